//! The embedded engine: one LMDB folder shared by the logging processes of one machine.
//!
//! The key is the UUID, so the B-tree is in order already. One thread writes, see `writer`; reads
//! run on the blocking pool, a page per transaction, so no transaction waits for a slow reader.
//!
//! It does not work across machines or PID namespaces, because LMDB's locks are by process id.

mod store;
mod writer;

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use async_trait::async_trait;
use common::entry::{Entry, Outcome};
use common::page::Bounds;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use uuid::Uuid;

use self::store::{ENTRY_OVERHEAD, Store};
use self::writer::Writer;
use super::{DistributedMap, MapError, Options, Page, PageLimit};

/// Entries that may wait for the writer, in bytes; more are refused at once.
const MAX_QUEUED_BYTES: usize = 32 * 1024 * 1024;

/// What a job costs besides its entries, so that many small ones are bounded too.
const JOB_OVERHEAD: usize = 512;

/// An LMDB environment with its writer thread.
#[derive(Debug)]
pub(super) struct LmdbMap {
    store: Arc<Store>,
    jobs: mpsc::Sender<Job>,
    queue: Arc<Semaphore>,
    store_timeout: Duration,
}

impl LmdbMap {
    pub(super) fn open(folder: &Path, options: Options) -> anyhow::Result<Self> {
        let store = Arc::new(Store::open(folder)?);
        let (jobs, queued_jobs) = mpsc::channel();
        let writer = Writer {
            store: store.clone(),
            jobs: queued_jobs,
            settle: options.settle,
        };
        thread::Builder::new()
            .name("lmdb-writer".to_owned())
            .spawn(move || writer.run())?;
        Ok(Self {
            store,
            jobs,
            queue: Arc::new(Semaphore::new(MAX_QUEUED_BYTES)),
            store_timeout: options.store_timeout,
        })
    }

    /// Has the writer write a batch; an error is the outcome of all its entries. An empty batch
    /// tells whether the writer gets LMDB's lock.
    async fn submit(&self, entries: Arc<[Entry]>) -> Result<Vec<Outcome>, Outcome> {
        let bytes = queued_bytes(&entries);
        let permits = u32::try_from(bytes).unwrap_or(u32::MAX);
        let permit = self.queue.clone().try_acquire_many_owned(permits);
        let permit = permit.map_err(|_| Outcome::refused("the write queue is full"))?;
        let (reply, outcomes) = oneshot::channel();
        let claim = Claim::default();
        let job = Job {
            entries,
            bytes,
            claim: claim.clone(),
            reply,
            _permit: permit,
        };
        if self.jobs.send(job).is_err() {
            return Err(Outcome::refused("the map's writer has stopped"));
        }
        match tokio::time::timeout(self.store_timeout, outcomes).await {
            Ok(Ok(outcomes)) => outcomes,
            Ok(Err(_)) => Err(Outcome::unknown("the map's writer stopped meanwhile")),
            Err(_) if claim.take() => Err(Outcome::refused(
                "the map's write lock was not free in time",
            )),
            Err(_) => Err(Outcome::unknown("the commit was not finished in time")),
        }
    }

    async fn read<T: Send + 'static>(
        &self,
        read: impl FnOnce(&Store) -> Result<T, MapError> + Send + 'static,
    ) -> Result<T, MapError> {
        let store = self.store.clone();
        tokio::task::spawn_blocking(move || read(&store))
            .await
            .map_err(|error| MapError::Unavailable(format!("reading the map failed: {error}")))?
    }
}

#[async_trait]
impl DistributedMap for LmdbMap {
    async fn put(&self, entries: Arc<[Entry]>) -> Vec<Outcome> {
        let count = entries.len();
        if count == 0 {
            return Vec::new();
        }
        self.submit(entries)
            .await
            .unwrap_or_else(|outcome| vec![outcome; count])
    }

    async fn get(&self, uuid: Uuid) -> Result<Option<String>, MapError> {
        self.read(move |store| store.get(uuid)).await
    }

    async fn page(&self, bounds: Bounds, limit: PageLimit) -> Result<Page, MapError> {
        self.read(move |store| store.page(bounds, limit)).await
    }

    async fn last(&self) -> Result<Option<Uuid>, MapError> {
        self.read(Store::last).await
    }

    async fn ready(&self) -> Result<(), MapError> {
        self.read(Store::last).await?;
        match self.submit(Arc::new([])).await {
            Ok(_) => Ok(()),
            Err(outcome) => Err(MapError::Unavailable(match outcome {
                Outcome::Refused { detail } | Outcome::Unknown { detail } => detail,
                other => format!("{other:?}"),
            })),
        }
    }
}

/// A batch on its way to the writer.
#[derive(Debug)]
struct Job {
    entries: Arc<[Entry]>,
    bytes: usize,
    claim: Claim,
    reply: oneshot::Sender<Result<Vec<Outcome>, Outcome>>,
    _permit: OwnedSemaphorePermit,
}

impl Job {
    /// Whoever waited may have given up: then its claim decided what it was told.
    fn answer(self, outcomes: Result<Vec<Outcome>, Outcome>) {
        let _ = self.reply.send(outcomes);
    }
}

/// Decides between the writer, who takes a job into a transaction, and the caller, whose time is
/// up: only the first one gets it. So a batch whose caller was told `refused` is never written.
#[derive(Clone, Debug, Default)]
struct Claim(Arc<AtomicBool>);

impl Claim {
    fn take(&self) -> bool {
        !self.0.swap(true, Ordering::AcqRel)
    }
}

fn queued_bytes(entries: &[Entry]) -> usize {
    let bytes = entries.iter().map(|entry| entry.msg.len() + ENTRY_OVERHEAD);
    JOB_OVERHEAD + bytes.sum::<usize>()
}
