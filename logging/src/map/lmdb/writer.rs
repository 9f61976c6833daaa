//! The writer thread: it takes the write lock, writes all queued batches in one transaction,
//! commits (LMDB fsyncs), and then answers the callers.

use std::mem;
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use common::clock::since_boot;
use common::entry::{Entry, Outcome, time_of};
use heed::{Env, RwTxn, WithoutTls};
use uuid::Uuid;

use super::clock::{BootClock, Machine};
use super::files::absolute;
use super::properties::{self, FLOOR, SETTLE};
use super::store::{
    DISK_FULL, Entries, Opened, Store, decode, describe, encode, is_panic, make_id, read_id,
    require_id,
};
use crate::map::contract::{Access, DEFAULT_SETTLE, MapError};
use crate::map::queue::{Job, answer_group, claim_group, measure_commit};
use crate::map::rules::{SettleWindow, clock_at, log_opened, millis, settled_at};

/// The interval of sweeps. Readers keep LMDB from reusing pages; a sweep clears those of dead
/// processes and reports those that take too long.
const SWEEP: Duration = Duration::from_secs(2);

/// A group commit takes no further batch beyond this, in bytes, which bounds the time of a commit.
const MAX_GROUP_BYTES: usize = 4 * 1024 * 1024;

pub(super) struct Writer {
    pub(super) store: Arc<Store>,
    pub(super) jobs: mpsc::Receiver<Job>,
    pub(super) settle: Option<Duration>,
    pub(super) access: Access,
    /// Why the last write transaction failed, if it did.
    pub(super) failure: Option<Outcome>,
}

impl Writer {
    /// Drops `begun` after the first commit, which writes the id of a new map and begins its clock.
    pub(super) fn run(mut self, begun: mpsc::Sender<()>) {
        self.commit(Vec::new());
        drop(begun);
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

    fn commit(&mut self, mut group: Vec<Job>) {
        let began = Instant::now();
        let written = self.write_group(&mut group);
        measure_commit(&group, began);
        match written {
            Ok(outcomes) => {
                self.failure = None;
                answer_group(group, Ok(outcomes));
            }
            Err(Failure {
                outcome,
                needs_reopen,
            }) => {
                // Checks come each second: they repeat no line.
                if group.iter().any(|job| !job.work.entries.is_empty())
                    || self.failure.as_ref() != Some(&outcome)
                {
                    tracing::error!(?outcome, "a write transaction failed");
                }
                self.failure = Some(outcome.clone());
                answer_group(group, Err(outcome));
                if needs_reopen {
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
        let files = &self.store.files;
        files.require_intact()?;
        let mut txn = env.write_txn()?;
        // Under the write lock: until then callers could time out as `refused`, and jobs that
        // arrived meanwhile join the group.
        *group = claim_group(mem::take(group), self.jobs.try_iter(), MAX_GROUP_BYTES);
        files.make_room(group.iter().flat_map(|job| job.work.entries.iter()))?;
        let is_check = group.iter().all(|job| job.work.entries.is_empty());
        if is_check && self.failure.is_some() && self.store.is_disk_full() {
            return Err(MapError::Unavailable(DISK_FULL.to_owned()).into());
        }
        let mut written = self.write(entries, &mut txn, group)?;
        while written.has_gone_stale() {
            txn.abort();
            txn = env.write_txn()?;
            written = self.write(entries, &mut txn, group)?;
        }
        txn.commit()
            .map_err(|error| Failure::at_commit(&self.store, &env, &error))?;
        files.require_intact().map_err(Failure::after_commit)?;
        let now = time_of(written.clock_now());
        match self.store.settle.set(written.settle) {
            // Where no process ran, the clock may have begun earlier than it was.
            Ok(()) => {
                self.store.clock.set(now);
                let place = format!("lmdb:{}", absolute(&self.store.folder).display());
                log_opened(&place, written.id, written.settle, self.settle);
            }
            Err(_) => self.store.clock.correct(now),
        }
        if self.store.id().is_none() {
            let recorded = files.record_id(written.id);
            recorded.map_err(Failure::after_commit)?;
            self.store.id.get_or_init(|| written.id);
        }
        Ok(written.outcomes)
    }

    fn write(
        &self,
        entries: Entries,
        txn: &mut RwTxn<'_>,
        group: &[Job],
    ) -> Result<Written, Failure> {
        let (id, settle) = match self.store.id() {
            Some(id) => {
                require_id(entries, txn, id)?;
                (id, self.settle(entries, txn)?)
            }
            None => self.find_or_make_map(entries, txn)?,
        };
        let stored_floor = properties::read(entries, txn, FLOOR)?.unwrap_or(0);
        let floors = group.iter().map(|job| job.work.floor);
        let floor = floors.fold(stored_floor, u64::max);
        let clock = self.move_clock(entries, txn, clock_at(floor, settle))?;
        let now = clock.now(since_boot());
        let window = match self.access {
            Access::Serve | Access::Read => SettleWindow { now, settle, floor },
            Access::Import => SettleWindow::of_any_age(now),
        };
        let mut written = Written {
            id,
            settle,
            clock,
            window,
            floor,
            outcomes: Vec::new(),
            oldest_new: None,
        };
        for entry in group.iter().flat_map(|job| job.work.entries.iter()) {
            let key = entry.uuid.as_bytes();
            let not_new = match window.refusal(entry.uuid) {
                None => {
                    let value = encode(entry);
                    let found = entries.get_or_put(txn, key, &value)?;
                    found.map(|value| compare(entry, value))
                }
                Some(refusal) => {
                    let found = entries.get(txn, key)?;
                    Some(found.map_or(refusal, |value| compare(entry, value)))
                }
            };
            if not_new == Some(Outcome::Stale) {
                written.floor = written.floor.max(settled_at(now, settle));
            }
            written.outcomes.push(not_new.unwrap_or_else(|| {
                let oldest = written.oldest_new.unwrap_or(entry.uuid);
                written.oldest_new = Some(oldest.min(entry.uuid));
                Outcome::Stored
            }));
        }
        if written.floor > stored_floor {
            properties::write(entries, txn, FLOOR, &written.floor)?;
        }
        Ok(written)
    }

    /// The map's settle window, in milliseconds. A map of before has none until it is served.
    fn settle(&self, entries: Entries, txn: &mut RwTxn<'_>) -> Result<u64, Failure> {
        if let Some(settle) = self.store.settle.get() {
            return Ok(*settle);
        }
        if let Some(settle) = properties::read(entries, txn, SETTLE)? {
            return Ok(settle);
        }
        let settle = millis(self.settle.unwrap_or(DEFAULT_SETTLE));
        if self.access == Access::Serve {
            properties::write(entries, txn, SETTLE, &settle)?;
        }
        Ok(settle)
    }

    /// The map's id and settle window. If there is no map, it is made with this process's.
    fn find_or_make_map(
        &self,
        entries: Entries,
        txn: &mut RwTxn<'_>,
    ) -> Result<(Uuid, u64), Failure> {
        if let Some(id) = read_id(entries, txn)? {
            return Ok((id, self.settle(entries, txn)?));
        }
        let settle = millis(self.settle.unwrap_or(DEFAULT_SETTLE));
        properties::write(entries, txn, SETTLE, &settle)?;
        Ok((make_id(entries, txn)?, settle))
    }

    /// Moves the map's clock, and begins it where no process ran: this one was alone, and none has
    /// committed since.
    fn move_clock(
        &self,
        entries: Entries,
        txn: &mut RwTxn<'_>,
        least: u64,
    ) -> Result<BootClock, Failure> {
        let machine = Machine::now();
        let stored = BootClock::read(entries, txn)?;
        let begins = self.store.last_alone == Some(txn.id() as u64 - 1);
        let clock = match stored.clone().filter(|_| !begins) {
            Some(clock) => clock.moved(machine, least),
            None => BootClock::begin(machine, least),
        };
        // A check without anything to write costs no commit. After a failure it tries one.
        if stored.as_ref() != Some(&clock) || self.failure.is_some() {
            properties::write(entries, txn, properties::CLOCK, &clock)?;
        }
        Ok(clock)
    }
}

/// The content of a transaction that is not committed yet.
struct Written {
    /// The map's id.
    id: Uuid,
    settle: u64,
    clock: BootClock,
    window: SettleWindow,
    floor: u64,
    /// The outcome of each entry.
    outcomes: Vec<Outcome>,
    /// The oldest new entry. If it leaves the settle window before the commit, the transaction is
    /// written again, so that settled history does not change.
    oldest_new: Option<Uuid>,
}

impl Written {
    fn clock_now(&self) -> u64 {
        self.clock.now(since_boot())
    }

    fn has_gone_stale(&self) -> bool {
        let now = self.clock_now();
        let window = SettleWindow { now, ..self.window };
        let oldest = self.oldest_new;
        oldest.is_some_and(|uuid| window.refusal(uuid).is_some())
    }
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
    /// The entries are committed, but later instances may not find them.
    fn after_commit(error: MapError) -> Self {
        Self {
            outcome: Outcome::unknown(error.to_string()),
            needs_reopen: false,
        }
    }

    /// LMDB writes its meta page last. If that write fails, the environment is unusable and the
    /// outcome unknown; if an earlier step fails, nothing was committed.
    fn at_commit(store: &Store, env: &Env<WithoutTls>, error: &heed::Error) -> Self {
        let is_unusable = env.write_txn().is_err_and(|error| is_panic(&error));
        let detail = if store.is_disk_full() {
            DISK_FULL.to_owned()
        } else {
            describe(error)
        };
        Self {
            outcome: if is_unusable {
                Outcome::unknown(detail)
            } else {
                Outcome::refused(detail)
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
