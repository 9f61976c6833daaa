//! The writer thread: it takes the write lock, writes all queued batches in one transaction,
//! commits (LMDB fsyncs), and then answers the callers.

use std::mem;
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant, SystemTime};

use common::entry::{Entry, Outcome};
use heed::{Env, RwTxn, WithoutTls};
use uuid::Uuid;

use super::store::{
    DISK_FULL, Entries, Opened, Store, decode, describe, encode, find_or_make_id, is_panic,
};
use crate::map::contract::MapError;
use crate::map::queue::{Job, answer_group, claim_group, measure_commit};
use crate::map::rules::staleness;

/// The interval of sweeps. Readers keep LMDB from reusing pages; a sweep clears those of dead
/// processes and reports those that take too long.
const SWEEP: Duration = Duration::from_secs(2);

/// A group commit takes no further batch beyond this, in bytes, which bounds the time of a commit.
const MAX_GROUP_BYTES: usize = 4 * 1024 * 1024;

pub(super) struct Writer {
    pub(super) store: Arc<Store>,
    pub(super) jobs: mpsc::Receiver<Job>,
    pub(super) settle: Duration,
}

impl Writer {
    pub(super) fn run(self) {
        // Writes the id of a new map.
        self.commit(Vec::new());
        let mut swept = Instant::now();
        loop {
            match self.jobs.recv_timeout(SWEEP) {
                Ok(first) => self.commit(vec![first]),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            if swept.elapsed() >= SWEEP {
                self.store.sweep();
                swept = Instant::now();
            }
        }
    }

    fn commit(&self, mut group: Vec<Job>) {
        let began = Instant::now();
        let written = self.write_group(&mut group);
        measure_commit(&group, began);
        match written {
            Ok(outcomes) => answer_group(group, Ok(outcomes)),
            Err(failure) => {
                tracing::error!(outcome = ?failure.outcome, "a write transaction failed");
                answer_group(group, Err(failure.outcome));
                if failure.needs_reopen {
                    self.store.reopen();
                }
            }
        }
    }

    fn write_group(&self, group: &mut Vec<Job>) -> Result<Vec<Outcome>, Failure> {
        let opened = self.store.opened();
        let Opened { env, entries } = opened.map_err(|error| Failure {
            needs_reopen: true,
            ..Failure::from(error)
        })?;
        let _turn = self.store.lock_for_writing()?;
        self.store.require_folder()?;
        let mut txn = env.write_txn()?;
        // Under the write lock: until then callers could time out as `refused`, and jobs that
        // arrived meanwhile join the group.
        *group = claim_group(mem::take(group), self.jobs.try_iter(), MAX_GROUP_BYTES);
        let mut written = self.write(entries, &mut txn, group)?;
        while self.has_gone_stale(&written) {
            txn.abort();
            txn = env.write_txn()?;
            written = self.write(entries, &mut txn, group)?;
        }
        txn.commit()
            .map_err(|error| Failure::at_commit(&self.store, &env, &error))?;
        self.store.id.get_or_init(|| written.id);
        Ok(written.outcomes)
    }

    fn has_gone_stale(&self, written: &Written) -> bool {
        let now = SystemTime::now();
        let oldest = written.oldest_new;
        oldest.is_some_and(|uuid| staleness(uuid, now, self.settle).is_some())
    }

    fn write(
        &self,
        entries: Entries,
        txn: &mut RwTxn<'_>,
        group: &[Job],
    ) -> Result<Written, Failure> {
        let now = SystemTime::now();
        let mut written = Written {
            id: match self.store.id() {
                Some(id) => id,
                None => find_or_make_id(entries, txn)?,
            },
            outcomes: Vec::new(),
            oldest_new: None,
        };
        for entry in group.iter().flat_map(|job| job.entries.iter()) {
            let key = entry.uuid.as_bytes();
            let not_new = match staleness(entry.uuid, now, self.settle) {
                None => {
                    let value = encode(entry);
                    let found = entries.get_or_put(txn, key, &value)?;
                    found.map(|value| compare(entry, value))
                }
                Some(stale) => {
                    let found = entries.get(txn, key)?;
                    Some(found.map_or(stale, |value| compare(entry, value)))
                }
            };
            written.outcomes.push(not_new.unwrap_or_else(|| {
                let oldest = written.oldest_new.unwrap_or(entry.uuid);
                written.oldest_new = Some(oldest.min(entry.uuid));
                Outcome::Stored
            }));
        }
        Ok(written)
    }
}

/// The content of a transaction that is not committed yet.
struct Written {
    /// The map's id.
    id: Uuid,
    /// The outcome of each entry.
    outcomes: Vec<Outcome>,
    /// The oldest new entry. If it leaves the settle window before the commit, the transaction is
    /// written again, so that settled history does not change.
    oldest_new: Option<Uuid>,
}

/// A failed commit: the outcome of all its entries.
struct Failure {
    outcome: Outcome,
    /// LMDB refuses all further work on an environment after a fatal error.
    needs_reopen: bool,
}

/// The transaction cannot begin.
impl From<MapError> for Failure {
    fn from(error: MapError) -> Self {
        Self {
            outcome: Outcome::refused(error.to_string()),
            needs_reopen: false,
        }
    }
}

/// LMDB fails before the commit.
impl From<heed::Error> for Failure {
    fn from(error: heed::Error) -> Self {
        Self {
            outcome: Outcome::refused(describe(&error)),
            needs_reopen: is_panic(&error),
        }
    }
}

impl Failure {
    /// LMDB writes its meta page last. If that write fails, the environment is unusable and the
    /// outcome unknown; if an earlier step fails, nothing was committed.
    fn at_commit(store: &Store, env: &Env<WithoutTls>, error: &heed::Error) -> Self {
        let is_unusable = env.write_txn().is_err_and(|error| is_panic(&error));
        let detail = match store.is_disk_full() {
            true => DISK_FULL.to_owned(),
            false => describe(error),
        };
        Self {
            outcome: match is_unusable {
                true => Outcome::unknown(detail),
                false => Outcome::refused(detail),
            },
            needs_reopen: is_unusable,
        }
    }
}

fn compare(entry: &Entry, value: &[u8]) -> Outcome {
    match decode(entry.uuid, value) {
        Ok(msg) if msg == entry.msg => Outcome::Duplicate,
        Ok(_) => Outcome::Conflict,
        Err(error) => Outcome::unknown(error.to_string()),
    }
}
