//! Writers that put load on a system, and the record of what was acknowledged.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use common::entry::Entry;
use tokio::task::JoinHandle;
use uuid::Uuid;

use crate::process::LOOK_AGAIN;

/// How long a test waits for entries to be acknowledged.
const PATIENCE: Duration = Duration::from_secs(60);

/// Writers, each one write after the other, until they are finished.
#[derive(Debug)]
pub struct Load {
    acknowledged: Arc<AtomicU64>,
    is_over: Arc<AtomicBool>,
    writers: Vec<JoinHandle<Record>>,
}

impl Load {
    /// `write` gets another number each time.
    pub fn start<W>(writers: usize, write: impl Fn(u64) -> W + Clone + Send + 'static) -> Self
    where
        W: Future<Output = Record> + Send,
    {
        let acknowledged = Arc::new(AtomicU64::new(0));
        let is_over = Arc::new(AtomicBool::new(false));
        let begun = Arc::new(AtomicU64::new(0));
        let writers = (0..writers).map(|_| {
            let (write, begun) = (write.clone(), begun.clone());
            let (acknowledged, is_over) = (acknowledged.clone(), is_over.clone());
            tokio::spawn(async move {
                let mut record = Record::default();
                while !is_over.load(Ordering::Relaxed) {
                    let written = write(begun.fetch_add(1, Ordering::Relaxed)).await;
                    acknowledged.fetch_add(written.acknowledged.len() as u64, Ordering::Relaxed);
                    record.extend(written);
                }
                record
            })
        });
        Self {
            writers: writers.collect(),
            acknowledged,
            is_over,
        }
    }

    /// How many entries are acknowledged; panics when a writer did.
    pub fn acknowledged(&self) -> u64 {
        let mut writers = self.writers.iter();
        assert!(!writers.any(JoinHandle::is_finished), "a writer has failed");
        self.acknowledged.load(Ordering::Relaxed)
    }

    /// Waits until so many more entries are acknowledged.
    pub async fn wait_for_more(&self, more: u64) {
        let target = self.acknowledged() + more;
        let waiting = async {
            while self.acknowledged() < target {
                tokio::time::sleep(LOOK_AGAIN).await;
            }
        };
        let waited = tokio::time::timeout(PATIENCE, waiting).await;
        waited.expect("entries are acknowledged");
    }

    pub async fn finish(self) -> Record {
        self.is_over.store(true, Ordering::Relaxed);
        let mut record = Record::default();
        for writer in self.writers {
            record.extend(writer.await.unwrap());
        }
        record
    }
}

/// What writers were told of their entries.
#[derive(Debug, Default)]
pub struct Record {
    pub acknowledged: BTreeMap<Uuid, String>,
    pub failed: Vec<Failed>,
}

/// A write that was not acknowledged.
#[derive(Debug)]
pub struct Failed {
    pub msg: String,
    pub began: Instant,
    pub ended: Instant,
    /// The UUID under which it may be stored.
    pub unknown: Option<Uuid>,
    pub detail: String,
}

impl Record {
    pub fn extend(&mut self, more: Self) {
        self.acknowledged.extend(more.acknowledged);
        self.failed.extend(more.failed);
    }

    /// Nothing acknowledged is lost or changed; nothing is there twice, out of order, or that nobody
    /// wrote: what was not acknowledged is there under the UUID that its writer was told, if at all.
    #[track_caller]
    pub fn assert_kept(&self, stored: &[Entry]) {
        assert!(stored.is_sorted_by(|left, right| left.uuid < right.uuid));
        let lost = self.lost(stored);
        assert!(lost.is_empty(), "{} lost: {:?}", lost.len(), lost[0]);
        let unknown = self.failed.iter();
        let unknown = unknown.filter_map(|failed| Some((failed.unknown?, failed.msg.as_str())));
        let unknown: BTreeMap<Uuid, &str> = unknown.collect();
        let mut messages = HashSet::new();
        for Entry { uuid, msg } in stored {
            let acknowledged = self.acknowledged.get(uuid).map(String::as_str);
            let written = acknowledged.or_else(|| unknown.get(uuid).copied());
            assert_eq!(written, Some(msg.as_str()), "{uuid} is a phantom");
            assert!(messages.insert(msg), "{msg} is there twice");
        }
    }

    pub fn lost(&self, stored: &[Entry]) -> Vec<Uuid> {
        let stored: BTreeMap<Uuid, &str> = stored
            .iter()
            .map(|entry| (entry.uuid, entry.msg.as_str()))
            .collect();
        let acknowledged = self.acknowledged.iter();
        let lost = acknowledged.filter(|(uuid, msg)| stored.get(*uuid) != Some(&msg.as_str()));
        lost.map(|(uuid, _)| *uuid).collect()
    }

    #[track_caller]
    pub fn assert_none_failed_between(&self, from: Instant, until: Instant) {
        let failed = self.failed.iter();
        let failed: Vec<_> = failed
            .filter(|failed| failed.began > from && failed.began < until)
            .collect();
        assert!(failed.is_empty(), "failed after the failover: {failed:?}");
    }

    /// How many writes failed, the last one of them how long after `fault`.
    pub fn failed_after(&self, fault: Instant, until: Instant) -> String {
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
