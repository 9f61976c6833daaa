//! The folder on disk: opens and reopens the LMDB environment, reads from it, and encodes entries.

use std::fs::{self, DirBuilder, File, Permissions};
use std::io::{Read, Seek, Write};
use std::ops::Bound;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{OnceLock, PoisonError, RwLock};
use std::time::Duration;

use anyhow::{Context, bail};
use common::api::{MemberStats, Role};
use common::bounds::{Bounds, Order};
use common::entry::Entry;
use heed::byteorder::BigEndian;
use heed::types::{Bytes, U128};
use heed::{AnyTls, Database, Env, EnvOpenOptions, MdbError, RoTxn, RwTxn, WithoutTls};
use uuid::Uuid;

use super::readers::{MAX_READERS, Readers};
use crate::map::contract::{MapError, Piece, PieceLimit};
use crate::map::rules::parse_id;

/// Address space reserved for the memory map, in bytes; a map that reaches it refuses entries.
const MAP_SIZE: usize = 1 << 40;

/// How long a reopen waits for reads to end.
const MAX_CLOSING: Duration = Duration::from_secs(5);

/// With less space than this, in bytes, the disk counts as full: the size of one group commit.
const MIN_SPACE: u64 = 4 * 1024 * 1024;

const DATA_FILE: &str = "data.mdb";

/// The version of the storage format.
pub(super) const LAYOUT: u32 = 1;

/// Only the user of the instances may open the files: who can open the write lock can hold it. LMDB
/// gives its own files the same mode.
const FILE_MODE: u32 = 0o600;

const CHECKSUM_BYTES: usize = 4;

/// The key of the map's id, see [`parse_id`]. It sorts before every UUID.
const ID_KEY: &[u8] = &[0];

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
    /// Set once the id is found in the map or committed to it.
    pub(super) id: OnceLock<Uuid>,
    pub(super) readers: Readers,
    /// Entries read by this process.
    gets: AtomicU64,
    /// Locked by the process that writes: see [`Store::lock_for_writing`].
    turns: File,
    /// Locked while the map is open: see [`claim_namespace`].
    _namespace: File,
}

/// An open environment and its one database.
#[derive(Clone, Debug)]
pub(super) struct Opened {
    pub(super) env: Env<WithoutTls>,
    pub(super) entries: Entries,
}

impl Store {
    pub(super) fn open(folder: &Path, create: bool) -> anyhow::Result<Self> {
        if !create && !folder.join(DATA_FILE).exists() {
            bail!("there is no map in the folder {}", folder.display());
        }
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(folder)
            .with_context(|| format!("cannot create the map's folder {}", folder.display()))?;
        let namespace = claim_namespace(folder)?;
        let turns = lock_file(folder, "turns")?;
        let opened = Opened::open(folder).with_context(|| {
            format!(
                "cannot open the map in {}; it must be on a local disk and may be shared only by \
                 processes of one machine, not by several containers",
                folder.display()
            )
        })?;
        Ok(Self {
            folder: folder.to_owned(),
            id: opened.id()?.map(OnceLock::from).unwrap_or_default(),
            opened: RwLock::new(Some(opened)),
            readers: Readers::open(folder)?,
            gets: AtomicU64::new(0),
            turns,
            _namespace: namespace,
        })
    }

    pub(super) fn opened(&self) -> Result<Opened, MapError> {
        let opened = self.opened.read().unwrap_or_else(PoisonError::into_inner);
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
        match self.turns.lock() {
            Ok(()) => Ok(Turn(&self.turns)),
            Err(error) => Err(MapError::Unavailable(format!(
                "the map's write lock, the file turns, cannot be locked: {error}"
            ))),
        }
    }

    pub(super) fn id(&self) -> Option<Uuid> {
        self.id.get().copied()
    }

    /// Fails when the folder was deleted. Deleted files can still be written while they are open,
    /// but no instance that starts later would find the entries.
    pub(super) fn require_folder(&self) -> Result<(), MapError> {
        let file = rustix::fs::fstat(&self.turns);
        if file.is_ok_and(|file| file.st_nlink > 0) {
            return Ok(());
        }
        Err(MapError::Unavailable(format!(
            "the map's folder {} was deleted while this instance ran: no entries are stored; \
             restore the folder from a copy, then restart all logging instances on it",
            self.folder.display()
        )))
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
        self.require_folder()?;
        let opened = Opened::open(&self.folder)?;
        let found = opened.id()?;
        if self.id().is_some_and(|id| found != Some(id)) {
            bail!("the map in the folder is not the one that was opened first");
        }
        Ok(opened)
    }

    fn replace(&self, opened: Option<Opened>) -> Option<Opened> {
        let mut current = self.opened.write().unwrap_or_else(PoisonError::into_inner);
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
        opened.clear_stale_readers();
        self.readers.look();
    }

    pub(super) fn get(&self, uuid: Uuid) -> Result<Option<String>, MapError> {
        let Opened { env, entries } = self.opened()?;
        let txn = env.read_txn()?;
        let value = entries.get(&txn, uuid.as_bytes());
        self.gets.fetch_add(1, Ordering::Relaxed);
        let msg = value?.map(|value| decode(uuid, value)).transpose()?;
        Ok(msg.map(str::to_owned))
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
        let Opened { env, entries } = self.opened()?;
        let entries = entries.remap_key_type::<UuidKey>();
        let txn = env.read_txn()?;
        let piece = match bounds.order {
            Order::Asc => fill_piece(entries.range(&txn, &range)?, limit),
            Order::Desc => fill_piece(entries.rev_range(&txn, &range)?, limit),
        }?;
        self.gets.fetch_add(piece.count, Ordering::Relaxed);
        Ok(piece)
    }

    /// The row of the folder.
    pub(super) fn stats(&self) -> Result<MemberStats, MapError> {
        let Opened { env, entries } = self.opened()?;
        let txn = env.read_txn()?;
        let stat = entries.stat(&txn)?;
        let records = stat.entries as u64;
        // One record is the map's id.
        let count = records.saturating_sub(u64::from(read_id(entries, &txn)?.is_some()));
        let pages = stat.branch_pages + stat.leaf_pages + stat.overflow_pages;
        let file = fs::metadata(self.folder.join(DATA_FILE));
        Ok(MemberStats {
            member: self.folder.display().to_string(),
            role: Role::Folder,
            up: true,
            partitions: Some(1),
            entries: Some(count),
            gets: Some(self.gets.load(Ordering::Relaxed)),
            puts: Some(count),
            entry_memory_bytes: Some(pages as u64 * u64::from(stat.page_size)),
            backups: Some(0),
            backup_memory_bytes: Some(0),
            used_memory_bytes: file.ok().map(|file| file.len()),
            max_memory_bytes: None,
        })
    }

    pub(super) fn last(&self) -> Result<Option<Uuid>, MapError> {
        let Opened { env, entries } = self.opened()?;
        let txn = env.read_txn()?;
        let entries = entries.remap_key_type::<UuidKey>();
        let last = entries.rev_range(&txn, &(0..))?.next().transpose()?;
        Ok(last.map(|(uuid, _)| Uuid::from_u128(uuid)))
    }
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
        if !piece.fits(limit, value.len()) {
            break;
        }
        let uuid = Uuid::from_u128(key);
        piece.push(uuid, decode(uuid, value)?);
    }
    Ok(piece)
}

impl Opened {
    fn open(folder: &Path) -> heed::Result<Self> {
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
        let opened = Self { env, entries };
        opened.clear_stale_readers();
        Ok(opened)
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

fn read_id(entries: Entries, txn: &RoTxn<'_, AnyTls>) -> Result<Option<Uuid>, MapError> {
    let Some(id) = entries.get(txn, ID_KEY)? else {
        return Ok(None);
    };
    let id = parse_id(&String::from_utf8_lossy(id), LAYOUT);
    let described = |reason| MapError::Unavailable(format!("the map's folder {reason}"));
    id.map(Some).map_err(described)
}

/// Reads the map's id, or writes a new one in this transaction.
pub(super) fn find_or_make_id(entries: Entries, txn: &mut RwTxn<'_>) -> Result<Uuid, MapError> {
    if let Some(id) = read_id(entries, txn)? {
        return Ok(id);
    }
    let id = Uuid::now_v7();
    let text = format!("{LAYOUT} {id}");
    let put = entries.put(txn, ID_KEY, text.as_bytes());
    put?;
    Ok(id)
}

/// Requires that all processes on the folder are in one PID namespace, where LMDB's locks work.
///
/// The file `namespace` names the boot id and the PID namespace; the boot id stands for the
/// machine, as the initial namespace has the same number on every machine. Each process holds a
/// shared lock on the file; one that finds it unlocked is the only one and writes its own names.
fn claim_namespace(folder: &Path) -> anyhow::Result<File> {
    let mut file = lock_file(folder, "namespace")?;
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let namespace = fs::read_link("/proc/self/ns/pid").unwrap_or_default();
    let ours = format!("{} {}", boot.trim_end(), namespace.display());
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
            "the map's folder {} is in use by a logging process on another machine, or in another \
             container or PID namespace, where its locks do not work; give this one a folder of its \
             own, or share a map on Redis",
            folder.display()
        );
    }
    Ok(file)
}

/// Opens a file of the map's folder that is there to be locked.
fn lock_file(folder: &Path, name: &str) -> anyhow::Result<File> {
    let opened = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(FILE_MODE)
        .open(folder.join(name));
    let restricted = opened.and_then(|file| {
        // An earlier version left it open to everyone.
        file.set_permissions(Permissions::from_mode(FILE_MODE))?;
        Ok(file)
    });
    restricted.with_context(|| format!("cannot write to the map's folder {}", folder.display()))
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
