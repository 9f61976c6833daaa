//! A follower of server-sent events.

use axum::BoxError;
use axum::body::Body;
use bytes::Bytes;
use common::entry::Entry;
use futures_util::stream::BoxStream;
use futures_util::{StreamExt, TryStreamExt};
use memchr::memmem;
use reqwest::Client;
use testing::process::PATIENCE;
use tokio::time::timeout;
use uuid::Uuid;

use crate::system::System;

/// A follower of server-sent events, which checks the form of each.
pub(crate) struct Follower {
    body: BoxStream<'static, Result<Bytes, BoxError>>,
    read: Vec<u8>,
    /// The last id, as a browser remembers it.
    pub(crate) id: Option<Uuid>,
}

impl Follower {
    pub(crate) async fn start(http: &Client, url: &str, last_event_id: Option<Uuid>) -> Self {
        let mut request = http.get(url).header("accept", "text/event-stream");
        if let Some(id) = last_event_id {
            request = request.header("last-event-id", id.to_string());
        }
        let response = request.send().await.unwrap();
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        assert_eq!(response.headers()["cache-control"], "no-store");
        assert_eq!(response.headers()["x-accel-buffering"], "no");
        Self {
            body: response.bytes_stream().map_err(BoxError::from).boxed(),
            read: Vec::new(),
            id: last_event_id,
        }
    }

    /// The follower that reads this body, of an answer in the test's own process.
    pub(crate) fn reading(body: Body) -> Self {
        Self {
            body: body.into_data_stream().map_err(BoxError::from).boxed(),
            read: Vec::new(),
            id: None,
        }
    }

    pub(super) async fn of(system: &System, query: &str) -> Self {
        Self::start(&system.http, &format!("{}/{query}", system.url), None).await
    }

    /// Waits for the first position: what is stored from then on is new.
    pub(crate) async fn begin(&mut self) {
        while memmem::find(&self.read, b"\nid: ").is_none() {
            let piece = self.body.next().await.expect("the body goes on");
            self.read.extend_from_slice(&piece.unwrap());
        }
    }

    /// The next message; `None` at the end of the body, an error when it is cut.
    pub(crate) async fn try_next(&mut self) -> Result<Option<Entry>, BoxError> {
        let next = timeout(PATIENCE, self.read_next()).await;
        next.expect("a message comes, or the end")
    }

    async fn read_next(&mut self) -> Result<Option<Entry>, BoxError> {
        loop {
            if let Some(end) = memmem::find(&self.read, b"\n\n") {
                let rest = self.read.split_off(end + 2);
                let block = String::from_utf8(std::mem::replace(&mut self.read, rest)).unwrap();
                let lines: Vec<String> = block.lines().map(str::to_owned).collect();
                if let Some(entry) = self.take(&lines) {
                    return Ok(Some(entry));
                }
                continue;
            }
            match self.body.next().await {
                Some(piece) => self.read.extend_from_slice(&piece?),
                None => return Ok(None),
            }
        }
    }

    fn take(&mut self, lines: &[String]) -> Option<Entry> {
        let field = |line: &String, name: &str| {
            let value = line.strip_prefix(name)?.strip_prefix(": ")?;
            Some(value.to_owned())
        };
        if let Some(id) = lines.iter().find_map(|line| field(line, "id")) {
            let id = id.parse().unwrap();
            assert!(Some(id) >= self.id, "the position goes back");
            self.id = Some(id);
        }
        let data = lines.iter().find_map(|line| field(line, "data"))?;
        let event = lines.iter().find_map(|line| field(line, "event"));
        assert_eq!(event.as_deref(), Some("message"));
        Some(serde_json::from_str(&data).unwrap())
    }

    pub(crate) async fn next(&mut self) -> Entry {
        self.try_next().await.unwrap().expect("the body goes on")
    }

    pub(super) async fn messages(&mut self, count: usize) -> Vec<String> {
        let mut messages = Vec::new();
        while messages.len() < count {
            messages.push(self.next().await.msg);
        }
        messages
    }
}
