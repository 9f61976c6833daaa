//! The folder on disk: opens and reopens the LMDB environment, reads from it, and encodes entries.

use std::fs::{self, DirBuilder, File};
use std::io::{self, Read, Seek, Write};
use std::ops::Bound;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, bail};
use common::api::{MemberStats, Role};
use common::bounds::{Bounds, Order};
use common::clock::{MapClock, since_boot};
use common::entry::{Entry, time_of};
use heed::byteorder::BigEndian;
use heed::types::{Bytes, U128};
use heed::{AnyTls, Database, Env, EnvOpenOptions, MdbError, RoTxn, RwTxn, WithoutTls};
use parking_lot::RwLock;
use uuid::Uuid;

use super::clock::BootClock;
use super::files::{self, Files};
use super::properties;
use super::readers::{MAX_READERS, Readers};
use crate::map::contract::{MapError, Piece, PieceLimit};
use crate::map::rules::parse_id;

/// Address space reserved for the memory map, in bytes; a map that reaches it refuses entries.
const MAP_SIZE: usize = 1 << 40;

/// How long a reopen waits for reads to end.
const MAX_CLOSING: Duration = Duration::from_secs(5);

/// With less space than this, in bytes, the disk counts as full: the size of one group commit.
const MIN_SPACE: u64 = 4 * 1024 * 1024;

/// The version of the storage format.
pub(super) const LAYOUT: u32 = 1;

const CHECKSUM_BYTES: usize = 4;

pub(super) const DISK_FULL: &str = "the disk that holds the map is full";

pub(super) type Entries = Database<Bytes, Bytes>;

/// The key of an entry.
type UuidKey = U128<BigEndian>;

/// The folder, and the environment while it is open.
#[derive(Debug)]
pub(super) struct Store {
    pub(super) folder: PathBuf,
    /// `None` only during a reopen after a fatal error, or until one succeeds.
    opened: RwLock<Option<Opened>>,
    /// Set once the id is in the map and in the folder's file `id`.
    pub(super) id: OnceLock<Uuid>,
    /// The map's settle window, in milliseconds; set with the first commit.
    pub(super) settle: OnceLock<u64>,
    /// The map's clock as of the last commit that this process has seen.
    pub(super) clock: MapClock,
    /// The map's last transaction when this process opened the folder, if no other had it open.
    pub(super) last_alone: Option<u64>,
    pub(super) readers: Readers,
    /// Entries read by this process.
    gets: AtomicU64,
    pub(super) files: Files,
}

/// An open environment and its one database.
#[derive(Clone, Debug)]
pub(super) struct Opened {
    pub(super) env: Env<WithoutTls>,
    pub(super) entries: Entries,
}

impl Store {
    pub(super) fn open(folder: &Path, create: bool) -> anyhow::Result<Self> {
        Self::open_files(folder, create).map_err(|error| match files::foreign_owner(folder) {
            Some(owner) if is_denied(&error) => error.context(owner),
            _ => error,
        })
    }

    fn open_files(folder: &Path, create: bool) -> anyhow::Result<Self> {
        let expected = files::expected_id(folder, create)?;
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(folder)
            .with_context(|| format!("cannot create the map's folder {}", folder.display()))?;
        let (namespace, last_alone) = claim_namespace(folder)?;
        let files = Files::open(folder, namespace)?;
        let opened = Opened::open(folder, &files, expected)?;
        if opened.id()?.is_none() {
            tracing::warn!(
                folder = %files::absolute(folder).display(),
                "making a new, empty map, as the folder has had none: right at the first start; \
                 otherwise the folder is the wrong one, or was emptied"
            );
        }
        let store = Self {
            folder: folder.to_owned(),
            id: expected.map(OnceLock::from).unwrap_or_default(),
            settle: OnceLock::new(),
            clock: MapClock::default(),
            last_alone,
            opened: RwLock::new(Some(opened)),
            readers: Readers::default(),
            gets: AtomicU64::new(0),
            files,
        };
        store.read_clock()?;
        Ok(store)
    }

    pub(super) fn opened(&self) -> Result<Opened, MapError> {
        let opened = self.opened.read();
        opened.clone().ok_or_else(|| {
            MapError::Unavailable("the map is being opened again after an I/O error".to_owned())
        })
    }

    /// Waits for the file lock that each writing process takes before LMDB's own write lock.
    ///
    /// LMDB's lock is a robust mutex in shared memory, which can lose a wake-up: if a woken waiter
    /// is killed before it has the mutex, and the process that took it meanwhile is killed too, all
    /// other waiters hang. The kernel releases a file lock however its holder ends. Reads still
    /// take a robust mutex, for the microseconds in which they find a free slot.
    pub(super) fn lock_for_writing(&self) -> Result<Turn<'_>, MapError> {
        let turns = &self.files.turns;
        match turns.lock() {
            Ok(()) => Ok(Turn(turns)),
            Err(error) => Err(MapError::Unavailable(format!(
                "the map's write lock, the file turns, cannot be locked: {error}"
            ))),
        }
    }

    pub(super) fn id(&self) -> Option<Uuid> {
        self.id.get().copied()
    }

    /// Closes the environment once reads have ended, after at most [`MAX_CLOSING`], and opens it
    /// again. If that fails, the map cannot be read until the next batch or sweep retries.
    pub(super) fn reopen(&self) {
        if let Some(broken) = self.replace(None) {
            broken.env.prepare_for_closing().wait_timeout(MAX_CLOSING);
        }
        match self.open_same_map() {
            Ok(opened) => drop(self.replace(Some(opened))),
            Err(error) => tracing::error!(%error, "the map cannot be opened again: retrying"),
        }
    }

    /// Opens the environment again, unless the folder holds another map now.
    fn open_same_map(&self) -> anyhow::Result<Opened> {
        self.files.require_intact()?;
        let expected = files::expected_id(&self.folder, true)?;
        Opened::open(&self.folder, &self.files, self.id().or(expected))
    }

    fn replace(&self, opened: Option<Opened>) -> Option<Opened> {
        let mut current = self.opened.write();
        std::mem::replace(&mut *current, opened)
    }

    /// Asks the file system, as LMDB reports a short write on a full disk as an I/O error.
    pub(super) fn is_disk_full(&self) -> bool {
        rustix::fs::statvfs(&self.folder)
            .is_ok_and(|disk| disk.f_bavail * disk.f_frsize < MIN_SPACE)
    }

    /// Periodic work: reopens a closed environment, or clears and checks the readers.
    pub(super) fn sweep(&self) {
        let Ok(opened) = self.opened() else {
            return self.reopen();
        };
        if self.files.require_intact().is_err() {
            // LMDB would read a file that may be cut. Readiness and each batch report the reason.
            return;
        }
        opened.clear_stale_readers();
        self.readers.look(&self.files.lock);
        if let Err(error) = self.read_clock() {
            tracing::warn!(%error, "the map's clock cannot be read");
        }
    }

    /// Reads the map's clock, which another process may have moved.
    fn read_clock(&self) -> Result<(), MapError> {
        let clock = self.read(|opened, txn| BootClock::read(opened.entries, txn))?;
        if let Some(clock) = clock.filter(BootClock::is_of_this_boot) {
            self.clock.correct(time_of(clock.now(since_boot())));
        }
        Ok(())
    }

    /// Reads in a transaction. What it returns is of this map only if the files were the same ones,
    /// and whole, before and after.
    fn read<T>(
        &self,
        read: impl FnOnce(&Opened, &RoTxn<'_, WithoutTls>) -> Result<T, MapError>,
    ) -> Result<T, MapError> {
        let opened = self.opened()?;
        self.files.require_readable(self.id())?;
        let txn = opened.env.read_txn()?;
        if let Some(id) = self.id() {
            require_id(opened.entries, &txn, id)?;
        }
        let result = read(&opened, &txn);
        self.files.require_readable(self.id())?;
        result
    }

    pub(super) fn get(&self, uuid: Uuid) -> Result<Option<String>, MapError> {
        self.gets.fetch_add(1, Ordering::Relaxed);
        self.read(|opened, txn| {
            let value = opened.entries.get(txn, uuid.as_bytes())?;
            let msg = value.map(|value| decode(uuid, value)).transpose()?;
            Ok(msg.map(str::to_owned))
        })
    }

    /// See [`DistributedMap::part`](crate::map::DistributedMap::part).
    pub(super) fn part(&self, uuid: Uuid, from: usize, bytes: usize) -> Result<String, MapError> {
        self.read(|opened, txn| {
            let damaged = MapError::Damaged(uuid);
            let Some(value) = opened.entries.get(txn, uuid.as_bytes())? else {
                return Err(damaged);
            };
            // Once for all parts: the checksum is of the whole message.
            if from == 0 {
                decode(uuid, value)?;
            }
            let rest = value.get(CHECKSUM_BYTES + from..).unwrap_or_default();
            let part = &rest[..bytes.min(rest.len())];
            let part = match std::str::from_utf8(part) {
                Err(error) if error.error_len().is_none() => {
                    std::str::from_utf8(&part[..error.valid_up_to()])
                }
                checked => checked,
            };
            let part = part.ok().filter(|part| !part.is_empty());
            let part = part.ok_or(damaged)?;
            Ok(part.to_owned())
        })
    }

    /// The first entries within the bounds.
    pub(super) fn piece(&self, bounds: Bounds, limit: PieceLimit) -> Result<Piece, MapError> {
        if bounds.is_empty() {
            return Ok(Piece::default());
        }
        let excluded = |uuid: Uuid| Bound::Excluded(uuid.as_u128());
        let low = bounds.after.map_or(Bound::Included(0), excluded);
        let high = bounds.before.map_or(Bound::Unbounded, excluded);
        let range = (low, high);
        let piece = self.read(|opened, txn| {
            let entries = opened.entries.remap_key_type::<UuidKey>();
            match bounds.order {
                Order::Asc => fill_piece(entries.range(txn, &range)?, limit),
                Order::Desc => fill_piece(entries.rev_range(txn, &range)?, limit),
            }
        })?;
        self.gets.fetch_add(piece.count, Ordering::Relaxed);
        Ok(piece)
    }

    /// The row of the folder.
    pub(super) fn stats(&self) -> Result<MemberStats, MapError> {
        let (stat, properties) = self.read(|opened, txn| {
            let entries = opened.entries;
            Ok((entries.stat(txn)?, properties::count(entries, txn)?))
        })?;
        let records = stat.entries as u64;
        let count = records.saturating_sub(properties);
        let pages = stat.branch_pages + stat.leaf_pages + stat.overflow_pages;
        Ok(MemberStats {
            member: self.folder.display().to_string(),
            role: Role::Folder,
            up: true,
            problem: None,
            partitions: Some(1),
            entries: Some(count),
            gets: Some(self.gets.load(Ordering::Relaxed)),
            puts: Some(count),
            entry_memory_bytes: Some(pages as u64 * u64::from(stat.page_size)),
            backups: Some(0),
            backup_memory_bytes: Some(0),
            used_memory_bytes: self.files.used_bytes(),
            max_memory_bytes: None,
        })
    }

    pub(super) fn last(&self) -> Result<Option<Uuid>, MapError> {
        self.read(|opened, txn| {
            let entries = opened.entries.remap_key_type::<UuidKey>();
            let last = entries.rev_range(txn, &(0..))?.next().transpose()?;
            Ok(last.map(|(uuid, _)| Uuid::from_u128(uuid)))
        })
    }
}

fn is_denied(error: &anyhow::Error) -> bool {
    let cause = error.root_cause().downcast_ref::<io::Error>();
    cause.is_some_and(|cause| cause.kind() == io::ErrorKind::PermissionDenied)
}

/// The write lock of this process, released on drop.
pub(super) struct Turn<'store>(&'store File);

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.0.unlock() {
            tracing::error!(%error, "the map's write lock cannot be released: restart this instance");
        }
    }
}

fn fill_piece<'txn>(
    found: impl Iterator<Item = heed::Result<(u128, &'txn [u8])>>,
    limit: PieceLimit,
) -> Result<Piece, MapError> {
    let mut piece = Piece::default();
    for item in found {
        let (key, value) = item?;
        let uuid = Uuid::from_u128(key);
        let message = value.len().saturating_sub(CHECKSUM_BYTES);
        if message > limit.message {
            return Ok(match piece.count {
                0 if limit.entries > 0 => Piece::large(uuid, message),
                _ => piece,
            });
        }
        if !piece.fits(limit, value.len()) {
            break;
        }
        piece.push(uuid, decode(uuid, value)?);
    }
    Ok(piece)
}

impl Opened {
    /// Opens the environment, which must hold the map `expected`, if there is one.
    fn open(folder: &Path, files: &Files, expected: Option<Uuid>) -> anyhow::Result<Self> {
        if expected.is_some() {
            files.require_whole()?;
        }
        let opened = Self::open_any(folder).with_context(|| {
            format!(
                "cannot open the map in {}; it must be on a local disk and may be shared only by \
                 processes of one machine, not by several containers",
                folder.display()
            )
        })?;
        files.require_intact()?;
        let found = opened.id()?;
        if let Some(expected) = expected.filter(|expected| found != Some(*expected)) {
            let found = found.map_or("no map".to_owned(), |id| format!("the map {id}"));
            bail!(
                "the folder {} is of the map {expected}, but its data.mdb holds {found}: restore \
                 data.mdb from a copy of that map, or, to change to the one in data.mdb, delete the \
                 file id",
                folder.display()
            );
        }
        opened.clear_stale_readers();
        Ok(opened)
    }

    fn open_any(folder: &Path) -> heed::Result<Self> {
        let mut options = EnvOpenOptions::new().read_txn_without_tls();
        options.map_size(MAP_SIZE).max_readers(MAX_READERS);
        #[expect(
            unsafe_code,
            reason = "a memory map is sound only while LMDB alone changes the file; the folder \
                      belongs to the logging processes, see claim_namespace"
        )]
        let env = unsafe { options.open(folder)? };
        // The unnamed database always exists: no write lock, which a paused process may hold.
        let txn = env.read_txn()?;
        let entries = env.open_database(&txn, None)?;
        let entries = entries.expect("LMDB makes the unnamed database with the file");
        drop(txn);
        Ok(Self { env, entries })
    }

    fn id(&self) -> Result<Option<Uuid>, MapError> {
        let txn = self.env.read_txn()?;
        read_id(self.entries, &txn)
    }

    fn clear_stale_readers(&self) {
        match self.env.clear_stale_readers() {
            Ok(0) => {}
            Ok(readers) => tracing::info!(readers, "cleared LMDB readers of dead processes"),
            Err(error) => tracing::warn!(%error, "readers of dead processes cannot be cleared"),
        }
    }
}

pub(super) fn read_id(entries: Entries, txn: &RoTxn<'_, AnyTls>) -> Result<Option<Uuid>, MapError> {
    let Some(id) = entries.get(txn, properties::ID)? else {
        return Ok(None);
    };
    let id = parse_id(&String::from_utf8_lossy(id), LAYOUT);
    let described = |reason| MapError::Unavailable(format!("the map's folder {reason}"));
    id.map(Some).map_err(described)
}

/// Fails when `data.mdb` holds another map than `id`: it can be overwritten while it is open.
pub(super) fn require_id(
    entries: Entries,
    txn: &RoTxn<'_, AnyTls>,
    id: Uuid,
) -> Result<(), MapError> {
    match read_id(entries, txn)? {
        Some(found) if found == id => Ok(()),
        _ => Err(MapError::Unavailable(format!(
            "data.mdb no longer holds the map {id}: stop all logging instances on the folder and \
             restore it from a copy"
        ))),
    }
}

/// Writes a new map's id.
pub(super) fn make_id(entries: Entries, txn: &mut RwTxn<'_>) -> heed::Result<Uuid> {
    let id = Uuid::now_v7();
    let text = format!("{LAYOUT} {id}");
    entries.put(txn, properties::ID, text.as_bytes())?;
    Ok(id)
}

/// Requires that all processes on the folder are in one PID namespace, where LMDB's locks work.
///
/// The file `namespace` names the boot id and the PID namespace; the boot id stands for the
/// machine, as the initial namespace has the same number on every machine. Each process holds a
/// shared lock on the file; one that finds it unlocked is the only one and writes its own names.
///
/// Returns the locked file and, if this process was the only one, the map's last transaction.
fn claim_namespace(folder: &Path) -> anyhow::Result<(File, Option<u64>)> {
    let mut file = files::open_file(folder, files::NAMESPACE_FILE)?;
    let namespace = fs::read_link("/proc/self/ns/pid").unwrap_or_default();
    let ours = format!("{} {}", boot_id(), namespace.display());
    let mut last_alone = None;
    if file.try_lock().is_ok() {
        file.set_len(0)?;
        file.write_all(ours.as_bytes())?;
        last_alone = Some(files::last_transaction(folder));
    }
    file.lock_shared()?;
    let mut theirs = String::new();
    file.rewind()?;
    file.read_to_string(&mut theirs)?;
    if ours != theirs {
        bail!(
            "the map's folder {} is in use by a logging process on another machine, or in another \
             container or PID namespace, where its locks do not work; give this one a folder of its \
             own, or share a map on Redis",
            folder.display()
        );
    }
    Ok((file, last_alone))
}

/// The id of the machine's boot.
pub(super) fn boot_id() -> String {
    let id = fs::read_to_string("/proc/sys/kernel/random/boot_id");
    id.unwrap_or_default().trim_end().to_owned()
}

/// A stored value: the CRC-32 of key and message, big-endian, then the message.
pub(super) fn encode(entry: &Entry) -> Vec<u8> {
    let mut value = Vec::with_capacity(CHECKSUM_BYTES + entry.msg.len());
    value.extend_from_slice(&checksum(entry.uuid, entry.msg.as_bytes()).to_be_bytes());
    value.extend_from_slice(entry.msg.as_bytes());
    value
}

pub(super) fn decode(uuid: Uuid, value: &[u8]) -> Result<&str, MapError> {
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

impl From<heed::Error> for MapError {
    fn from(error: heed::Error) -> Self {
        Self::Unavailable(describe(&error))
    }
}

pub(super) fn is_panic(error: &heed::Error) -> bool {
    matches!(error, heed::Error::Mdb(MdbError::Panic))
}

pub(super) fn describe(error: &heed::Error) -> String {
    match error {
        heed::Error::Io(error) if error.kind() == std::io::ErrorKind::StorageFull => {
            DISK_FULL.to_owned()
        }
        heed::Error::Mdb(MdbError::MapFull) => "the map has reached its maximum size".to_owned(),
        heed::Error::Mdb(MdbError::ReadersFull) => "the map has no free LMDB reader".to_owned(),
        other => format!("the map's storage failed: {other}"),
    }
}
