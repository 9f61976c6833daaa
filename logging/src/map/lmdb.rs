//! The embedded engine: one LMDB folder shared by the logging processes of one machine.
//!
//! The key is the UUID, so the B-tree has the order of the log. One thread writes, see `writer`;
//! reads run on the blocking pool, each piece in one transaction, so no slow client holds one.
//!
//! Machines or PID namespaces cannot share a folder, because LMDB's locks use process ids.

mod clock;
mod files;
mod properties;
mod readers;
mod store;
mod writer;

use std::path::Path;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use common::api::{MapStats, MemberStats, Role};
use common::bounds::Bounds;
use common::entry::{Entry, Outcome, millis_at, time_of};
use common::health::Health;
use tokio::time::timeout;
use uuid::Uuid;

use self::store::{DISK_FULL, LAYOUT, Store};
use self::writer::Writer;
use super::contract::{
    Access, Clocks, Cursor, DistributedMap, MapError, Options, Piece, PieceLimit, STATS_TIMEOUT,
    failed_checks,
};
use super::queue::{Job, Work, WriteBudget};
use super::rules::{clock_problem, settle_problem, settled_at};

/// An LMDB environment with its writer thread.
#[derive(Debug)]
pub(super) struct LmdbMap {
    store: Arc<Store>,
    jobs: mpsc::Sender<Job>,
    budget: WriteBudget,
    store_timeout: Duration,
    settle: Option<Duration>,
}

impl LmdbMap {
    pub(super) fn open(folder: &Path, options: Options) -> anyhow::Result<Self> {
        let is_created = options.access != Access::Read;
        let store = Arc::new(Store::open(folder, is_created)?);
        let (jobs, queued_jobs) = mpsc::channel();
        let writer = Writer {
            store: store.clone(),
            jobs: queued_jobs,
            settle: options.settle,
            access: options.access,
            failure: None,
        };
        let (begun, has_begun) = mpsc::channel();
        thread::Builder::new()
            .name("lmdb-writer".to_owned())
            .spawn(move || writer.run(begun))?;
        // Until then the map's clock may be unknown. A paused process may hold the write lock.
        let _ = has_begun.recv_timeout(options.store_timeout);
        Ok(Self {
            store,
            jobs,
            budget: WriteBudget::default(),
            store_timeout: options.store_timeout,
            settle: options.settle,
        })
    }

    /// Has a batch written; an error is the outcome of all entries.
    async fn submit(&self, work: Work) -> Result<Vec<Outcome>, Outcome> {
        let (job, reply) = self.budget.admit(work)?;
        if self.jobs.send(job).is_err() {
            return Err(Outcome::refused("the map's writer has stopped"));
        }
        reply.outcomes(self.store_timeout).await
    }

    /// What an operator should know of the map's clock, settle window and disk.
    fn problems(&self) -> Vec<String> {
        let clocks = self.clocks();
        let clock =
            clocks.and_then(|Clocks { map, machine }| clock_problem("this machine", machine, map));
        let settle = self.settle_window();
        let settle = settle.and_then(|settle| settle_problem(self.settle, settle));
        let disk = self.store.is_disk_full().then(|| DISK_FULL.to_owned());
        clock.into_iter().chain(settle).chain(disk).collect()
    }
}

/// Runs a read in a transaction of its own, within a timeout.
async fn read_within<T: Send + 'static>(
    limit: Duration,
    store: &Arc<Store>,
    read: impl FnOnce(&Store) -> Result<T, MapError> + Send + 'static,
) -> Result<T, MapError> {
    let store = store.clone();
    let reading = tokio::task::spawn_blocking(move || read(&store));
    match timeout(limit, reading).await {
        Ok(Ok(result)) => result,
        Ok(Err(error)) => Err(MapError::Unavailable(format!(
            "reading the map failed: {error}"
        ))),
        Err(_) => Err(MapError::Unavailable(
            "the map's disk did not return the entries within the store timeout".to_owned(),
        )),
    }
}

/// Continues each piece after the last UUID of the previous one.
#[derive(Debug)]
struct LmdbCursor {
    store: Arc<Store>,
    timeout: Duration,
    bounds: Bounds,
}

#[async_trait]
impl Cursor for LmdbCursor {
    async fn next(&mut self, limit: PieceLimit) -> Result<Piece, MapError> {
        let bounds = self.bounds;
        let read = move |store: &Store| store.piece(bounds, limit);
        let piece = read_within(self.timeout, &self.store, read).await?;
        if let Some(last) = piece.last {
            self.bounds = bounds.resumed_from(last);
        }
        Ok(piece)
    }
}

#[async_trait]
impl DistributedMap for LmdbMap {
    fn id(&self) -> Option<Uuid> {
        self.store.id()
    }

    async fn put(&self, entries: Arc<[Entry]>) -> Vec<Outcome> {
        let count = entries.len();
        if count == 0 {
            return Vec::new();
        }
        self.submit(Work::put(entries))
            .await
            .unwrap_or_else(|outcome| vec![outcome; count])
    }

    async fn get(&self, uuid: Uuid) -> Result<Option<String>, MapError> {
        let read = move |store: &Store| store.get(uuid);
        read_within(self.store_timeout, &self.store, read).await
    }

    async fn part(&self, uuid: Uuid, from: usize, bytes: usize) -> Result<String, MapError> {
        let read = move |store: &Store| store.part(uuid, from, bytes);
        read_within(self.store_timeout, &self.store, read).await
    }

    fn read(&self, bounds: Bounds) -> Box<dyn Cursor> {
        Box::new(LmdbCursor {
            store: self.store.clone(),
            timeout: self.store_timeout,
            bounds,
        })
    }

    async fn last(&self) -> Result<Option<Uuid>, MapError> {
        read_within(self.store_timeout, &self.store, Store::last).await
    }

    fn clocks(&self) -> Option<Clocks> {
        Some(Clocks {
            map: self.store.clock.now()?,
            machine: SystemTime::now(),
        })
    }

    fn settle_window(&self) -> Option<Duration> {
        self.store.settle.get().copied().map(Duration::from_millis)
    }

    async fn settle(&self, clock: SystemTime) -> Result<SystemTime, MapError> {
        let window = self.store.settle.get().ok_or_else(|| {
            MapError::Unavailable("the map's settle window was not read yet".to_owned())
        })?;
        let floor = settled_at(millis_at(clock), *window);
        // The write lock is held from the check of an entry's time until its commit, so what was
        // checked against an earlier floor is visible then.
        let settled = self.submit(Work::settle(floor, Vec::new())).await;
        settled.map_err(|outcome| MapError::Unavailable(format!("{outcome:?}")))?;
        Ok(time_of(floor))
    }

    async fn health(&self) -> Health {
        let not_ready = match self.last().await {
            Err(error) => Some(error.to_string()),
            Ok(_) => match self.submit(Work::default()).await {
                Ok(_) => None,
                Err(Outcome::Refused { detail, .. } | Outcome::Unknown { detail }) => Some(detail),
                Err(other) => Some(format!("{other:?}")),
            },
        };
        Health {
            not_ready,
            checks: {
                let mut checks = self.store.readers.checks();
                checks.extend(failed_checks(self.problems()));
                checks
            },
        }
    }

    async fn stats(&self) -> MapStats {
        let folder = read_within(STATS_TIMEOUT, &self.store, Store::stats).await;
        let member = self.store.folder.display().to_string();
        MapStats {
            engine: "lmdb".to_owned(),
            layout: LAYOUT,
            problem: None,
            members: vec![folder.unwrap_or_else(|error| {
                MemberStats::down(member, Role::Folder, error.to_string())
            })],
        }
    }

    fn measure(&self) {
        self.budget.measure();
    }
}
