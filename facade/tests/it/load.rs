//! Continuous POSTs and GETs while something fails, and the assertions on their record.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use common::entry::Entry;
use reqwest::Client;
use serde_json::Value;
use testing::process::LOOK_AGAIN;
use tokio::task::JoinHandle;
use uuid::Uuid;

use crate::system::Merged;

const WRITERS: usize = 64;

/// Timeout for POSTs to be answered.
const PATIENCE: Duration = Duration::from_secs(60);

/// The record of the posters and the reader.
#[derive(Default)]
pub(crate) struct Record {
    pub(crate) acknowledged: BTreeMap<Uuid, String>,
    pub(crate) failed: Vec<Failed>,
    /// The longest time without an answered GET.
    pub(crate) silence: Duration,
    /// The number of answered GETs.
    pub(crate) reads: usize,
}

/// A POST that did not get a 200.
#[derive(Debug)]
pub(crate) struct Failed {
    msg: String,
    began: Instant,
    ended: Instant,
    /// The UUID that the message may be stored under.
    unknown: Option<Uuid>,
    detail: String,
}

/// Posters, each of which sends one message after the other, and a reader.
pub(crate) struct Load {
    answered: Arc<AtomicU64>,
    is_over: Arc<AtomicBool>,
    writers: Vec<JoinHandle<Record>>,
    reader: JoinHandle<Record>,
}

impl Load {
    /// Puts load on the facade at `url`.
    pub(crate) fn start(http: &Client, url: &str) -> Self {
        let answered = Arc::new(AtomicU64::new(0));
        let is_over = Arc::new(AtomicBool::new(false));
        let newest = Arc::new(std::sync::Mutex::new(Uuid::nil()));
        let posted = Arc::new(AtomicU64::new(0));
        let writers = (0..WRITERS).map(|_| {
            let (http, url) = (http.clone(), url.to_owned());
            let (answered, is_over) = (answered.clone(), is_over.clone());
            let (newest, posted) = (newest.clone(), posted.clone());
            tokio::spawn(async move {
                let mut record = Record::default();
                while !is_over.load(Ordering::Relaxed) {
                    let msg = format!("message {}", posted.fetch_add(1, Ordering::Relaxed));
                    if let Some(uuid) = post(&http, &url, msg, &mut record).await {
                        let mut newest = newest.lock().unwrap();
                        *newest = uuid.max(*newest);
                        answered.fetch_add(1, Ordering::Relaxed);
                    }
                }
                record
            })
        });
        let (http, url) = (http.clone(), url.to_owned());
        let over = is_over.clone();
        let newest = newest.clone();
        Self {
            writers: writers.collect(),
            answered,
            is_over,
            reader: tokio::spawn(async move {
                let mut record = Record::default();
                let mut answered = Instant::now();
                while !over.load(Ordering::Relaxed) {
                    let acknowledged = *newest.lock().unwrap();
                    if let Some(last) = read_last(&http, &url).await {
                        assert!(last >= acknowledged, "{acknowledged} is missing");
                        record.reads += 1;
                        record.silence = record.silence.max(answered.elapsed());
                        answered = Instant::now();
                    }
                }
                record
            }),
        }
    }

    /// Waits until `more` POSTs got a 200.
    pub(crate) async fn wait_for_more(&self, more: u64) {
        let target = self.answered.load(Ordering::Relaxed) + more;
        let waiting = async {
            while self.answered.load(Ordering::Relaxed) < target {
                assert!(!self.reader.is_finished(), "the reader has failed");
                tokio::time::sleep(LOOK_AGAIN).await;
            }
        };
        let waited = tokio::time::timeout(PATIENCE, waiting).await;
        waited.expect("POSTs are answered");
    }

    pub(crate) async fn finish(self) -> Record {
        self.is_over.store(true, Ordering::Relaxed);
        let mut record = self.reader.await.unwrap();
        assert!(record.reads > 0);
        for writer in self.writers {
            let written = writer.await.unwrap();
            record.acknowledged.extend(written.acknowledged);
            record.failed.extend(written.failed);
        }
        record
    }
}

pub(crate) async fn post(
    http: &Client,
    url: &str,
    msg: String,
    record: &mut Record,
) -> Option<Uuid> {
    let began = Instant::now();
    let response = http.post(url).body(msg.clone()).send().await.unwrap();
    let status = response.status();
    let answer: Value = response.json().await.unwrap();
    let uuid = answer["uuid"].as_str().map(|uuid| uuid.parse().unwrap());
    if status == 200 {
        record.acknowledged.insert(uuid.unwrap(), msg);
        return uuid;
    }
    record.failed.push(Failed {
        msg,
        began,
        ended: Instant::now(),
        unknown: uuid.filter(|_| answer["stored"] != "no"),
        detail: answer["detail"].to_string(),
    });
    None
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

impl Record {
    /// Asserts that no acknowledged message is lost or changed, that none occurs twice or out of order, and
    /// that every other stored message was posted and has the UUID that its poster was given.
    #[track_caller]
    pub(crate) fn assert_kept(&self, stored: &[Entry]) {
        assert!(stored.is_sorted_by(|left, right| left.uuid < right.uuid));
        let lost = self.lost(stored);
        assert!(lost.is_empty(), "{} lost: {:?}", lost.len(), lost[0]);
        let unknown = self.failed.iter();
        let unknown = unknown.filter_map(|failed| Some((failed.unknown?, failed.msg.as_str())));
        let unknown: BTreeMap<Uuid, &str> = unknown.collect();
        let mut messages = HashSet::new();
        for Entry { uuid, msg } in stored {
            let acknowledged = self.acknowledged.get(uuid).map(String::as_str);
            let posted = acknowledged.or_else(|| unknown.get(uuid).copied());
            assert_eq!(posted, Some(msg.as_str()), "{uuid} was never posted");
            assert!(messages.insert(msg), "{msg} occurs twice");
        }
    }

    pub(crate) fn lost(&self, stored: &[Entry]) -> Vec<Uuid> {
        let stored: BTreeMap<Uuid, &str> = stored
            .iter()
            .map(|entry| (entry.uuid, entry.msg.as_str()))
            .collect();
        let acknowledged = self.acknowledged.iter();
        let lost = acknowledged.filter(|(uuid, msg)| stored.get(*uuid) != Some(&msg.as_str()));
        lost.map(|(uuid, _)| *uuid).collect()
    }

    #[track_caller]
    pub(crate) fn assert_none_failed_between(&self, from: Instant, until: Instant) {
        let failed = self.failed.iter();
        let failed: Vec<_> = failed
            .filter(|failed| failed.began > from && failed.began < until)
            .collect();
        assert!(failed.is_empty(), "failed after the failover: {failed:?}");
    }

    /// The number of POSTs that failed, and the time of the last one after `fault`.
    pub(crate) fn failed_after(&self, fault: Instant, until: Instant) -> String {
        let failed = self.failed.iter();
        let failed: Vec<_> = failed
            .filter(|failed| failed.ended > fault && failed.began < until)
            .collect();
        match failed.iter().map(|failed| failed.began).max() {
            None => "no POST failed".to_owned(),
            Some(last) => format!(
                "{} POSTs failed, all begun within {:.1} s after it ({})",
                failed.len(),
                last.saturating_duration_since(fault).as_secs_f64(),
                failed[0].detail
            ),
        }
    }
}
