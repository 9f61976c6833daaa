//! What this facade counts.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

use std::time::{Instant, SystemTime};

use axum::http::{Method, StatusCode};
use common::api::timestamp;
use parking_lot::Mutex;
use serde::Serialize;

/// Counts since the start of the process.
#[derive(Debug)]
pub(crate) struct Counters {
    since: Instant,
    posts: AtomicU64,
    gets: AtomicU64,
    posted_bytes: AtomicU64,
    read_bytes: AtomicU64,
    errors: Mutex<BTreeMap<u16, u64>>,
}

/// The row of this facade.
#[derive(Serialize)]
pub(crate) struct FacadeStats {
    since: String,
    version: &'static str,
    /// POSTs to `/`, uploads among them.
    posts: u64,
    /// GETs of the log and of single messages.
    gets: u64,
    /// Of the messages that were stored.
    posted_bytes: u64,
    /// Of the bodies of GETs of the log.
    read_bytes: u64,
    /// GETs that follow the log now.
    followers: usize,
    /// Answers by status, of those that are errors.
    errors: BTreeMap<u16, u64>,
}

impl Default for Counters {
    fn default() -> Self {
        Self {
            since: Instant::now(),
            posts: AtomicU64::new(0),
            gets: AtomicU64::new(0),
            posted_bytes: AtomicU64::new(0),
            read_bytes: AtomicU64::new(0),
            errors: Mutex::default(),
        }
    }
}

impl Counters {
    /// Counts a request for messages.
    pub(crate) fn count_request(&self, method: &Method) {
        match *method {
            Method::POST => self.posts.fetch_add(1, Ordering::Relaxed),
            Method::GET => self.gets.fetch_add(1, Ordering::Relaxed),
            _ => 0,
        };
    }

    /// Counts a message that was stored, by its length.
    pub(crate) fn count_posted(&self, msg: usize) {
        self.posted_bytes.fetch_add(msg as u64, Ordering::Relaxed);
    }

    /// Counts a piece of the body of a GET of the log, by its length.
    pub(crate) fn count_read(&self, piece: usize) {
        self.read_bytes.fetch_add(piece as u64, Ordering::Relaxed);
    }

    pub(crate) fn posted_bytes(&self) -> u64 {
        self.posted_bytes.load(Ordering::Relaxed)
    }

    pub(crate) fn read_bytes(&self) -> u64 {
        self.read_bytes.load(Ordering::Relaxed)
    }

    /// Counts an answer if it is an error.
    pub(crate) fn count_answer(&self, status: StatusCode) {
        if status.is_client_error() || status.is_server_error() {
            let mut errors = self.errors.lock();
            *errors.entry(status.as_u16()).or_default() += 1;
        }
    }

    pub(crate) fn stats(&self, now: SystemTime, followers: usize) -> FacadeStats {
        let errors = self.errors.lock();
        FacadeStats {
            since: timestamp(now - self.since.elapsed()),
            version: env!("CARGO_PKG_VERSION"),
            posts: self.posts.load(Ordering::Relaxed),
            gets: self.gets.load(Ordering::Relaxed),
            posted_bytes: self.posted_bytes(),
            read_bytes: self.read_bytes(),
            followers,
            errors: errors.clone(),
        }
    }
}
