//! The embedded engine: one LMDB folder shared by the logging processes of one machine.
//!
//! The key is the UUID, so the B-tree is in order already. One thread writes: it takes LMDB's
//! write lock, drains what has queued up meanwhile into one transaction, commits (LMDB fsyncs)
//! and answers everyone after that. Reads run on the blocking pool, a page per transaction, so no
//! transaction waits for a slow reader.
//!
//! It does not work across machines or PID namespaces, because LMDB's locks are by process id.

use std::fs::{self, File};
use std::io::{Read, Seek, Write};
use std::ops::Bound;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, PoisonError, RwLock};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, bail};
use async_trait::async_trait;
use common::entry::{Entry, Outcome};
use common::page::{self, Bounds};
use heed::types::Bytes;
use heed::{Database, Env, EnvOpenOptions, MdbError, RwTxn, WithoutTls};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use uuid::Uuid;

use super::{DistributedMap, MapError, Options, Page, PageLimit, staleness};

/// Address space reserved once for the memory map. It costs nothing until it is used; a map that
/// grows beyond it refuses entries.
const MAP_SIZE: usize = 1 << 40;

/// Slots for read transactions of all processes on the folder; when they are used up, reads fail.
const MAX_READERS: u32 = 4096;

/// Readers of killed processes keep pages from being reused until they are cleared this often.
const STALE_READER_SWEEP: Duration = Duration::from_secs(10);

/// How long reads may keep an environment open that must be opened again.
const MAX_CLOSING: Duration = Duration::from_secs(5);

/// Entries that may wait for the writer, in bytes; more are refused at once.
const MAX_QUEUED_BYTES: usize = 32 * 1024 * 1024;

/// A group commit takes no further batch beyond this, so that nobody waits for a giant one.
const MAX_GROUP_BYTES: usize = 4 * 1024 * 1024;

/// What an entry costs besides its message: key, checksum, B-tree and queue bookkeeping.
const ENTRY_OVERHEAD: usize = 64;

/// What a job costs besides its entries, so that many small ones are bounded too.
const JOB_OVERHEAD: usize = 512;

const CHECKSUM_BYTES: usize = 4;

const DISK_FULL: &str = "the disk that holds the map is full";

type Entries = Database<Bytes, Bytes>;

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

/// The thread that writes.
struct Writer {
    store: Arc<Store>,
    jobs: mpsc::Receiver<Job>,
    settle: Duration,
}

impl Writer {
    fn run(self) {
        let mut swept = Instant::now();
        loop {
            match self.jobs.recv_timeout(STALE_READER_SWEEP) {
                Ok(first) => self.commit_group(first),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            if swept.elapsed() >= STALE_READER_SWEEP {
                self.store.sweep();
                swept = Instant::now();
            }
        }
    }

    /// Writes `first` and what else is queued in one transaction, then answers.
    fn commit_group(&self, first: Job) {
        let mut group = vec![first];
        match self.write_group(&mut group) {
            Ok(outcomes) => {
                for (job, outcomes) in group.into_iter().zip(outcomes) {
                    job.answer(Ok(outcomes));
                }
            }
            Err(failure) => {
                tracing::error!(outcome = ?failure.outcome, "a write transaction failed");
                for job in group {
                    job.answer(Err(failure.outcome.clone()));
                }
                if failure.needs_reopen {
                    self.store.reopen();
                }
            }
        }
    }

    fn write_group(&self, group: &mut Vec<Job>) -> Result<Vec<Vec<Outcome>>, Failure> {
        let Opened { env, entries } = self.store.opened().map_err(Failure::not_open)?;
        let mut txn = env.write_txn().map_err(Failure::before_commit)?;
        self.claim_queued(group);
        let mut written = self.write(entries, &mut txn, group)?;
        while self.has_gone_stale(&written) {
            txn.abort();
            txn = env.write_txn().map_err(Failure::before_commit)?;
            written = self.write(entries, &mut txn, group)?;
        }
        txn.commit()
            .map_err(|error| self.store.failed_commit(&env, &error))?;
        Ok(written.outcomes)
    }

    /// Claims jobs only now that the write lock is held: what waited for the lock could still be
    /// withdrawn by its caller, and jobs that came meanwhile join the group.
    fn claim_queued(&self, group: &mut Vec<Job>) {
        group.retain(|job| job.claim.take());
        let mut bytes: usize = group.iter().map(|job| job.bytes).sum();
        while bytes < MAX_GROUP_BYTES {
            let Ok(job) = self.jobs.try_recv() else {
                return;
            };
            if job.claim.take() {
                bytes += job.bytes;
                group.push(job);
            }
        }
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
        let mut written = Written::default();
        for job in group {
            let mut outcomes = Vec::with_capacity(job.entries.len());
            for entry in job.entries.iter() {
                let key = entry.uuid.as_bytes();
                let known = entries.get(txn, key).map_err(Failure::before_commit)?;
                let outcome = match known.map(|value| compare(entry, value)) {
                    Some(outcome) => outcome,
                    None => match staleness(entry.uuid, now, self.settle) {
                        Some(stale) => stale,
                        None => {
                            let value = encode(entry);
                            let put = entries.put(txn, key, &value);
                            put.map_err(Failure::before_commit)?;
                            let oldest = written.oldest_new.unwrap_or(entry.uuid);
                            written.oldest_new = Some(oldest.min(entry.uuid));
                            Outcome::Stored
                        }
                    },
                };
                outcomes.push(outcome);
            }
            written.outcomes.push(outcomes);
        }
        Ok(written)
    }
}

/// What a transaction would store once it is committed.
#[derive(Default)]
struct Written {
    /// For each job, the outcome of each entry.
    outcomes: Vec<Vec<Outcome>>,
    /// The oldest entry that is new. If a pause makes it leave the settle window before the
    /// commit, the transaction is written again, so that settled history does not change.
    oldest_new: Option<Uuid>,
}

/// Why a group was not committed, and what its callers are told.
struct Failure {
    outcome: Outcome,
    /// LMDB refuses all further work on an environment after a fatal error.
    needs_reopen: bool,
}

impl Failure {
    fn not_open(error: MapError) -> Self {
        Self {
            outcome: Outcome::refused(error.to_string()),
            needs_reopen: true,
        }
    }

    fn before_commit(error: heed::Error) -> Self {
        Self {
            outcome: Outcome::refused(describe(&error)),
            needs_reopen: is_panic(&error),
        }
    }
}

/// The folder, and the environment while it is open.
#[derive(Debug)]
struct Store {
    folder: PathBuf,
    /// `None` only while it is closed to be opened again after a fatal error.
    opened: RwLock<Option<Opened>>,
    /// Held as long as the map is open: see [`claim_namespace`].
    _namespace: File,
}

/// An open environment and its one database.
#[derive(Clone, Debug)]
struct Opened {
    env: Env<WithoutTls>,
    entries: Entries,
}

impl Store {
    fn open(folder: &Path) -> anyhow::Result<Self> {
        fs::create_dir_all(folder)
            .with_context(|| format!("cannot create the map's folder {}", folder.display()))?;
        let namespace = claim_namespace(folder)?;
        let opened = Opened::open(folder).with_context(|| {
            format!(
                "cannot open the map in {}; it must be on a local disk and may be shared only by \
                 processes of one machine, not by several containers",
                folder.display()
            )
        })?;
        Ok(Self {
            folder: folder.to_owned(),
            opened: RwLock::new(Some(opened)),
            _namespace: namespace,
        })
    }

    fn opened(&self) -> Result<Opened, MapError> {
        let opened = self.opened.read().unwrap_or_else(PoisonError::into_inner);
        opened.clone().ok_or_else(|| {
            MapError::Unavailable("the map is being opened again after an I/O error".to_owned())
        })
    }

    /// Closes the environment, once reads have ended, and opens it again. If that fails, the
    /// writer tries once more with the next batch or sweep; until then nothing can be read.
    fn reopen(&self) {
        if let Some(broken) = self.replace(None) {
            broken.env.prepare_for_closing().wait_timeout(MAX_CLOSING);
        }
        match Opened::open(&self.folder) {
            Ok(opened) => drop(self.replace(Some(opened))),
            Err(error) => tracing::error!(%error, "the map cannot be opened again"),
        }
    }

    fn replace(&self, opened: Option<Opened>) -> Option<Opened> {
        let mut current = self.opened.write().unwrap_or_else(PoisonError::into_inner);
        std::mem::replace(&mut *current, opened)
    }

    /// LMDB writes its meta page last. If that write failed, nobody can tell whether it reached
    /// the disk, and the environment is unusable; if something failed before it, the transaction
    /// certainly did not happen.
    fn failed_commit(&self, env: &Env<WithoutTls>, error: &heed::Error) -> Failure {
        let is_unusable = env.write_txn().is_err_and(|error| is_panic(&error));
        let detail = if self.is_disk_full() {
            DISK_FULL.to_owned()
        } else {
            describe(error)
        };
        Failure {
            outcome: if is_unusable {
                Outcome::unknown(detail)
            } else {
                Outcome::refused(detail)
            },
            needs_reopen: is_unusable,
        }
    }

    /// LMDB calls the short write on a full disk an I/O error, so the disk itself is asked.
    fn is_disk_full(&self) -> bool {
        rustix::fs::statvfs(&self.folder)
            .is_ok_and(|disk| disk.f_bavail * disk.f_frsize < MAX_GROUP_BYTES as u64)
    }

    /// What is to be done now and then, even when nobody writes.
    fn sweep(&self) {
        let Ok(opened) = self.opened() else {
            return self.reopen();
        };
        match opened.env.clear_stale_readers() {
            Ok(0) => {}
            Ok(readers) => tracing::info!(readers, "cleared readers of processes that died"),
            Err(error) => tracing::warn!(%error, "stale readers cannot be cleared"),
        }
    }

    fn get(&self, uuid: Uuid) -> Result<Option<String>, MapError> {
        let Opened { env, entries } = self.opened()?;
        let txn = env.read_txn().map_err(unavailable)?;
        let value = entries.get(&txn, uuid.as_bytes());
        match value.map_err(unavailable)? {
            Some(value) => Ok(Some(decode(uuid, value)?.to_owned())),
            None => Ok(None),
        }
    }

    fn page(&self, bounds: Bounds, limit: PageLimit) -> Result<Page, MapError> {
        if let (Some(after), Some(before)) = (bounds.after, bounds.before)
            && after >= before
        {
            return Ok(Page::default());
        }
        let range = (exclusive(&bounds.after), exclusive(&bounds.before));
        let Opened { env, entries } = self.opened()?;
        let txn = env.read_txn().map_err(unavailable)?;
        match bounds.order {
            page::Order::Asc => {
                let found = entries.range(&txn, &range).map_err(unavailable)?;
                collect_page(found, limit)
            }
            page::Order::Desc => {
                let found = entries.rev_range(&txn, &range).map_err(unavailable)?;
                collect_page(found, limit)
            }
        }
    }

    fn last(&self) -> Result<Option<Uuid>, MapError> {
        let Opened { env, entries } = self.opened()?;
        let txn = env.read_txn().map_err(unavailable)?;
        match entries.last(&txn).map_err(unavailable)? {
            Some((key, _)) => Ok(Some(key_uuid(key)?)),
            None => Ok(None),
        }
    }
}

fn exclusive(bound: &Option<Uuid>) -> Bound<&[u8]> {
    match bound {
        Some(uuid) => Bound::Excluded(uuid.as_bytes()),
        None => Bound::Unbounded,
    }
}

fn collect_page<'txn>(
    found: impl Iterator<Item = heed::Result<(&'txn [u8], &'txn [u8])>>,
    limit: PageLimit,
) -> Result<Page, MapError> {
    let mut page = Page::default();
    let mut bytes = 0;
    for item in found {
        let (key, value) = item.map_err(unavailable)?;
        bytes += value.len() + ENTRY_OVERHEAD;
        let is_full = page.entries.len() as u64 >= limit.entries;
        if is_full || (bytes > limit.bytes && !page.entries.is_empty()) {
            page.more = true;
            break;
        }
        let uuid = key_uuid(key)?;
        let msg = decode(uuid, value)?.to_owned();
        page.entries.push(Entry { uuid, msg });
    }
    Ok(page)
}

impl Opened {
    fn open(folder: &Path) -> heed::Result<Self> {
        let mut options = EnvOpenOptions::new().read_txn_without_tls();
        options.map_size(MAP_SIZE).max_readers(MAX_READERS);
        #[expect(
            unsafe_code,
            reason = "a memory map is sound only while nobody but LMDB changes the file; the \
                      folder belongs to the logging processes, see claim_namespace"
        )]
        let env = unsafe { options.open(folder)? };
        // The unnamed database is always there, so no write lock is needed, which a paused process
        // might hold.
        let txn = env.read_txn()?;
        let entries = env.open_database(&txn, None)?;
        let entries = entries.expect("LMDB makes the unnamed database with the file");
        drop(txn);
        env.clear_stale_readers()?;
        Ok(Self { env, entries })
    }
}

/// Makes sure that all processes on the folder are in one PID namespace, where LMDB's locks work.
///
/// The file `namespace` names it. Whoever finds the file unlocked is alone and writes its own;
/// everybody holds a shared lock, which ends with the process.
fn claim_namespace(folder: &Path) -> anyhow::Result<File> {
    let path = folder.join("namespace");
    let mut file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path)
        .with_context(|| format!("cannot write to the map's folder {}", folder.display()))?;
    let ours = fs::read_link("/proc/self/ns/pid")
        .map(|link| link.to_string_lossy().into_owned())
        .unwrap_or_default();
    if file.try_lock().is_ok() {
        file.set_len(0)?;
        file.write_all(ours.as_bytes())?;
    }
    file.lock_shared()?;
    let mut theirs = String::new();
    file.rewind()?;
    file.read_to_string(&mut theirs)?;
    if ours != theirs {
        bail!(
            "the map's folder {} is in use by a logging process in another container or PID \
             namespace, where its locks do not work; give this one a folder of its own",
            folder.display()
        );
    }
    Ok(file)
}

/// A stored value: the CRC-32 of key and message, big-endian, then the message.
fn encode(entry: &Entry) -> Vec<u8> {
    let mut value = Vec::with_capacity(CHECKSUM_BYTES + entry.msg.len());
    value.extend_from_slice(&checksum(entry.uuid, entry.msg.as_bytes()).to_be_bytes());
    value.extend_from_slice(entry.msg.as_bytes());
    value
}

fn decode(uuid: Uuid, value: &[u8]) -> Result<&str, MapError> {
    let damaged = || MapError::Damaged(uuid);
    let (stored, msg) = value
        .split_first_chunk::<CHECKSUM_BYTES>()
        .ok_or_else(damaged)?;
    if u32::from_be_bytes(*stored) != checksum(uuid, msg) {
        return Err(damaged());
    }
    std::str::from_utf8(msg).map_err(|_| damaged())
}

fn checksum(uuid: Uuid, msg: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(uuid.as_bytes());
    hasher.update(msg);
    hasher.finalize()
}

fn compare(entry: &Entry, value: &[u8]) -> Outcome {
    match decode(entry.uuid, value) {
        Ok(msg) if msg == entry.msg => Outcome::Duplicate,
        Ok(_) => Outcome::Conflict,
        Err(error) => Outcome::unknown(error.to_string()),
    }
}

fn key_uuid(key: &[u8]) -> Result<Uuid, MapError> {
    Uuid::from_slice(key).map_err(|_| {
        MapError::Unavailable("the map's folder holds keys of another kind".to_owned())
    })
}

fn queued_bytes(entries: &[Entry]) -> usize {
    let bytes = entries.iter().map(|entry| entry.msg.len() + ENTRY_OVERHEAD);
    JOB_OVERHEAD + bytes.sum::<usize>()
}

fn unavailable(error: heed::Error) -> MapError {
    MapError::Unavailable(describe(&error))
}

fn is_panic(error: &heed::Error) -> bool {
    matches!(error, heed::Error::Mdb(MdbError::Panic))
}

fn describe(error: &heed::Error) -> String {
    match error {
        heed::Error::Io(error) if error.kind() == std::io::ErrorKind::StorageFull => {
            DISK_FULL.to_owned()
        }
        heed::Error::Mdb(MdbError::MapFull) => "the map has reached its largest size".to_owned(),
        heed::Error::Mdb(MdbError::ReadersFull) => "too many reads at once".to_owned(),
        other => format!("the map's storage failed: {other}"),
    }
}
