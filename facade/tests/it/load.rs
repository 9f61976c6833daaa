//! Continuous POSTs and GETs while something fails, and the assertions on their record.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use reqwest::{Client, RequestBuilder};
use serde_json::Value;
use testing::load::{Failed, Record};
use tokio::task::JoinHandle;
use uuid::Uuid;

use crate::processes::Processes;
use crate::system::Merged;

const WRITERS: usize = 64;

/// What a reader saw.
#[derive(Default)]
pub(crate) struct Reads {
    pub(crate) count: usize,
    /// The longest time in which no GET was answered.
    pub(crate) silence: Duration,
}

/// Posters and a reader, until they are finished.
pub(crate) struct Load {
    posts: testing::load::Load,
    is_over: Arc<AtomicBool>,
    reader: JoinHandle<Reads>,
}

impl Load {
    /// Puts load on the facade at `url`.
    pub(crate) fn start(http: &Client, url: &str) -> Self {
        let newest = Arc::new(Mutex::new(Uuid::nil()));
        let is_over = Arc::new(AtomicBool::new(false));
        let reader = {
            let (http, url) = (http.clone(), url.to_owned());
            let (newest, is_over) = (newest.clone(), is_over.clone());
            async move {
                let mut reads = Reads::default();
                let mut answered = Instant::now();
                while !is_over.load(Ordering::Relaxed) {
                    let acknowledged = *newest.lock().unwrap();
                    if let Some(last) = read_last(&http, &url).await {
                        assert!(last >= acknowledged, "{acknowledged} is missing");
                        reads.count += 1;
                        reads.silence = reads.silence.max(answered.elapsed());
                        answered = Instant::now();
                    }
                }
                reads
            }
        };
        let (http, url) = (http.clone(), url.to_owned());
        let posts = testing::load::Load::start(WRITERS, move |number| {
            let (http, url, newest) = (http.clone(), url.clone(), newest.clone());
            async move {
                let record = post(&http, &url, format!("message {number}")).await;
                if let Some((uuid, _)) = record.acknowledged.last_key_value() {
                    let mut newest = newest.lock().unwrap();
                    *newest = newest.max(*uuid);
                }
                record
            }
        });
        Self {
            posts,
            is_over,
            reader: tokio::spawn(reader),
        }
    }

    /// Waits until `more` POSTs got a 200.
    pub(crate) async fn wait_for_more(&self, more: u64) {
        self.posts.wait_for_more(more).await;
        assert!(!self.reader.is_finished(), "the reader has failed");
    }

    pub(crate) async fn finish(self) -> (Record, Reads) {
        self.is_over.store(true, Ordering::Relaxed);
        let reads = self.reader.await.unwrap();
        assert!(reads.count > 0);
        (self.posts.finish().await, reads)
    }
}

/// A caller that posts one message after the other, each under a key of its own.
pub(crate) fn keyed_posts(system: &Processes) -> testing::load::Load {
    let (http, url) = (system.http.clone(), system.facade.url());
    testing::load::Load::start(1, move |number| {
        let key = Uuid::now_v7().to_string();
        let request = http.post(&url).header("idempotency-key", key);
        send(request, format!("message with a key {number}"))
    })
}

pub(crate) async fn post(http: &Client, url: &str, msg: String) -> Record {
    send(http.post(url), msg).await
}

/// Posts a message that no other request posts.
async fn send(request: RequestBuilder, msg: String) -> Record {
    let began = Instant::now();
    let response = request.body(msg.clone()).send().await.unwrap();
    let status = response.status();
    let answer: Value = response.json().await.unwrap();
    let uuid = answer["uuid"].as_str().map(|uuid| uuid.parse().unwrap());
    let mut record = Record::default();
    if status == 200 {
        assert_eq!(answer["msg"], msg);
        assert_eq!(answer["duplicate"], Value::Null);
        record.acknowledged.insert(uuid.unwrap(), msg);
    } else {
        record.failed.push(Failed {
            msg,
            began,
            ended: Instant::now(),
            unknown: uuid.filter(|_| answer["stored"] != "no"),
            detail: answer["detail"].to_string(),
        });
    }
    record
}

/// The newest entry; `None` when the map cannot be read.
async fn read_last(http: &Client, url: &str) -> Option<Uuid> {
    let response = http.get(format!("{url}/?order=desc&limit=1")).send().await;
    let response = response.unwrap();
    if response.status() == 503 {
        return None;
    }
    assert_eq!(response.status(), 200);
    let merged: Merged = response.json().await.unwrap();
    let last = merged.logging_service.first();
    Some(last.map_or(Uuid::nil(), |entry| entry.uuid))
}
