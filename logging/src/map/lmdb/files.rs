//! The files of the map's folder, which LMDB takes for granted: whether they are still the ones that
//! were opened, whether `data.mdb` is whole, and which map the folder has.
//!
//! LMDB writes to a deleted file without an error. It maps `data.mdb` into memory, so a read behind
//! the end of a file that was cut ends the process.

use std::fs::{self, File, Metadata, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{self, Path, PathBuf};

use anyhow::{Context, bail};
use common::entry::Entry;
use rustix::process::geteuid;
use uuid::Uuid;

use super::readers::{MAX_READERS, RECORD};
use crate::map::contract::MapError;

const DATA_FILE: &str = "data.mdb";

const LOCK_FILE: &str = "lock.mdb";

pub(super) const NAMESPACE_FILE: &str = "namespace";

const TURNS_FILE: &str = "turns";

/// What LMDB's table of readers takes in `lock.mdb`, in bytes.
const MIN_LOCK_BYTES: u64 = MAX_READERS as u64 * RECORD as u64;

/// Names the map from before the first acknowledgement on, so that a folder which lost `data.mdb` is
/// not taken for a new one.
const ID_FILE: &str = "id";

/// Only the user of the instances may open the files: who can open the write lock can hold it. LMDB
/// gives its own files the same mode.
const FILE_MODE: u32 = 0o600;

/// The hole behind the last page, in bytes: more than LMDB's list of free pages can grow by in a
/// commit. It takes no space on the disk.
const HOLE: u64 = 8 * 1024 * 1024;

/// The pages that a new entry can add besides those of its message: its leaf and a branch are copied,
/// and both are split.
const PAGES_PER_ENTRY: u64 = 5;

/// The files that must stay the same while the environment is open.
#[derive(Debug)]
pub(super) struct Files {
    folder: PathBuf,
    data: File,
    /// Stays open as long as the environment: LMDB's locks on the file are POSIX locks, which a
    /// process loses when it closes any descriptor of the file.
    pub(super) lock: File,
    /// Locked by the process that writes: see [`super::store::Store::lock_for_writing`].
    pub(super) turns: File,
    /// Locked while the map is open: see `claim_namespace` in [`super::store`].
    namespace: File,
}

/// What the two meta pages at the beginning of `data.mdb` say.
#[derive(Default)]
pub(super) struct Meta {
    page_bytes: u64,
    /// The end of the last page, in bytes.
    end: u64,
    /// The number of the last transaction.
    txn: u64,
}

impl Files {
    /// Opens the files before LMDB does, and creates missing ones: an empty one is new to LMDB.
    pub(super) fn open(folder: &Path, namespace: File) -> anyhow::Result<Self> {
        Ok(Self {
            folder: folder.to_owned(),
            data: open_file(folder, DATA_FILE)?,
            lock: open_file(folder, LOCK_FILE)?,
            turns: open_file(folder, TURNS_FILE)?,
            namespace,
        })
    }

    /// Fails when a file is not the one that was opened, or was cut or overwritten, for an open
    /// environment.
    ///
    /// Other processes do not see what is written to a file that was replaced. A writer that has
    /// another `lock.mdb` does not see the readers in this one, and reuses the pages that they read.
    pub(super) fn require_intact(&self) -> Result<(), MapError> {
        for (name, file, length) in [
            (DATA_FILE, &self.data, 0),
            (LOCK_FILE, &self.lock, MIN_LOCK_BYTES),
            (TURNS_FILE, &self.turns, 0),
            (NAMESPACE_FILE, &self.namespace, 0),
        ] {
            let found = fs::metadata(self.folder.join(name));
            let is_intact = |found: Metadata| {
                let opened = file.metadata()?;
                let is_same = (found.dev(), found.ino()) == (opened.dev(), opened.ino());
                Ok(is_same && found.len() >= length)
            };
            if !found.and_then(is_intact).unwrap_or(false) {
                return Err(MapError::Unavailable(format!(
                    "{name} in the map's folder {} was deleted, replaced or cut while this instance \
                     ran: no entries are stored; if data.mdb is missing, save it from the instances that \
                     still run, as docs/lmdb.md says, before you stop them; then restore it and start them",
                    self.folder.display()
                )));
            }
        }
        // LMDB writes a meta page before it tells the transaction's number in the lock file.
        let mut last_txn = [0; 8];
        let read = self.lock.read_exact_at(&mut last_txn, 8);
        read.map_err(|error| self.unavailable(format_args!("is without lock.mdb: {error}")))?;
        if self.require_whole()?.txn < u64::from_ne_bytes(last_txn) {
            return Err(self.unavailable("was overwritten with an older copy"));
        }
        Ok(())
    }

    /// Fails when `data.mdb` is shorter than the pages that it counts.
    pub(super) fn require_whole(&self) -> Result<Meta, MapError> {
        let read = Meta::read(&self.data).and_then(|meta| Ok((self.data.metadata()?.len(), meta)));
        match read {
            Ok((length, meta)) if length >= meta.end => Ok(meta),
            Ok((length, Meta { end, .. })) => {
                Err(self.unavailable(format_args!("is cut: it has {length} of {end} bytes")))
            }
            Err(error) => Err(self.unavailable(format_args!("is cut or cannot be read: {error}"))),
        }
    }

    /// Fails as [`Files::require_intact`], except when the folder was deleted, also if it has another map since: no
    /// process adds entries to the deleted files.
    pub(super) fn require_readable(&self, id: Option<Uuid>) -> Result<(), MapError> {
        self.require_intact().or_else(|error| {
            let is_deleted = self.data.metadata().is_ok_and(|data| data.nlink() == 0);
            if is_deleted && recorded_id(&self.folder).is_ok_and(|found| found != id) {
                Ok(())
            } else {
                Err(error)
            }
        })
    }

    /// Extends `data.mdb` by a hole for all pages that these entries can add. LMDB counts pages that
    /// it does not write, so without a hole a whole file can be shorter than its last page.
    ///
    /// The commit syncs the length before it counts the pages.
    pub(super) fn make_room<'a>(
        &self,
        entries: impl Iterator<Item = &'a Entry>,
    ) -> Result<(), MapError> {
        let grown = || {
            let meta = Meta::read(&self.data)?;
            let pages: u64 = entries
                .map(|entry| PAGES_PER_ENTRY + entry.msg.len() as u64 / meta.page_bytes)
                .sum();
            let needed = meta.end + pages * meta.page_bytes + HOLE;
            if self.data.metadata()?.len() < needed {
                self.data.set_len(needed + HOLE)
            } else {
                Ok(())
            }
        };
        grown().map_err(|error: io::Error| {
            MapError::Unavailable(format!("data.mdb cannot be extended: {error}"))
        })
    }

    /// The space that `data.mdb` takes on the disk, in bytes: a hole takes none.
    pub(super) fn used_bytes(&self) -> Option<u64> {
        self.data.metadata().ok().map(|data| data.blocks() * 512)
    }

    fn unavailable(&self, reason: impl std::fmt::Display) -> MapError {
        MapError::Unavailable(format!(
            "data.mdb in the map's folder {} {reason}: stop all logging instances on the folder and \
             restore it from a copy",
            self.folder.display()
        ))
    }

    /// Writes the map's id into the folder, under the write lock.
    pub(super) fn record_id(&self, id: Uuid) -> Result<(), MapError> {
        let new = self.folder.join("id.new");
        let recorded = || {
            let mut file = options().truncate(true).open(&new)?;
            file.write_all(id.to_string().as_bytes())?;
            file.sync_all()?;
            fs::rename(&new, self.folder.join(ID_FILE))?;
            File::open(&self.folder)?.sync_all()
        };
        recorded().map_err(|error: io::Error| {
            let folder = self.folder.display();
            MapError::Unavailable(format!(
                "the map's id cannot be written into the folder {folder}: {error}"
            ))
        })
    }
}

/// The folder's absolute path.
pub(super) fn absolute(folder: &Path) -> PathBuf {
    // Fails only for an empty path, or without a working directory.
    path::absolute(folder).unwrap_or_else(|_| folder.to_owned())
}

/// Says whose the map's files are, or its folder, or the one that it is to be in, if another user's.
pub(super) fn foreign_owner(folder: &Path) -> Option<String> {
    let folder = absolute(folder);
    let files = [ID_FILE, NAMESPACE_FILE, DATA_FILE, LOCK_FILE, TURNS_FILE];
    let files = files.map(|name| folder.join(name));
    let nearest = folder.ancestors().find(|ancestor| ancestor.exists());
    let user = geteuid().as_raw();
    files.iter().map(PathBuf::as_path).chain(nearest).find_map(|path| {
        let owner = fs::metadata(path).ok()?.uid();
        (owner != user).then(|| {
            format!(
                "{} belongs to user {owner}, and this process runs as user {user}: start it as that \
                 user, or choose another folder with --map",
                path.display()
            )
        })
    })
}

/// The number of the last transaction in the folder, 0 if there is none. For a process that has not
/// opened the folder yet.
pub(super) fn last_transaction(folder: &Path) -> u64 {
    let meta = File::open(folder.join(DATA_FILE)).and_then(|data| Meta::read(&data));
    meta.map_or(0, |meta| meta.txn)
}

/// The id of the map that the folder must have, or `None` when it has had none. To be read before
/// `data.mdb` is, as another process may be making the map.
///
/// # Errors
/// When there is no map and none is to be made, for the operator.
pub(super) fn expected_id(folder: &Path, create: bool) -> anyhow::Result<Option<Uuid>> {
    let expected = recorded_id(folder).with_context(|| folder.display().to_string())?;
    let has_data = fs::metadata(folder.join(DATA_FILE)).is_ok_and(|data| data.len() > 0);
    match expected {
        Some(id) if !has_data => bail!(
            "the folder {} has lost its map {id}: data.mdb is missing or empty; restore it from a \
             copy, or, to give the map up, delete all files in the folder",
            folder.display()
        ),
        None if !has_data && !create => {
            bail!("there is no map in the folder {}", folder.display())
        }
        expected => Ok(expected),
    }
}

/// The id of the map that the folder has had, or `None` when it has had none.
fn recorded_id(folder: &Path) -> anyhow::Result<Option<Uuid>> {
    match fs::read_to_string(folder.join(ID_FILE)) {
        Ok(text) => Ok(Some(text.parse().context("the file id has no UUID")?)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).context("the file id cannot be read"),
    }
}

impl Meta {
    /// Reads both meta pages, which commits write in turn, as LMDB 0.9 lays them out.
    fn read(data: &File) -> io::Result<Self> {
        const MAGIC: u32 = 0xBEEF_C0DE;
        let number = |head: &[u8], at: usize| {
            u32::from_ne_bytes(*head[at..].first_chunk().expect("4 bytes"))
        };
        let long = |head: &[u8], at: usize| {
            u64::from_ne_bytes(*head[at..].first_chunk().expect("8 bytes"))
        };
        let mut meta = Self::default();
        for _ in 0..2 {
            let mut head = [0; 152];
            data.read_exact_at(&mut head, meta.page_bytes)?;
            if number(&head, 16) != MAGIC {
                return Err(io::Error::other("it has no meta page of LMDB"));
            }
            meta.page_bytes = number(&head, 40).into();
            let end = long(&head, 136).saturating_add(1);
            meta.end = meta.end.max(end.saturating_mul(meta.page_bytes));
            meta.txn = meta.txn.max(long(&head, 144));
        }
        Ok(meta)
    }
}

fn options() -> OpenOptions {
    let mut options = File::options();
    options
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(FILE_MODE);
    options
}

/// Opens a file of the map's folder.
pub(super) fn open_file(folder: &Path, name: &str) -> anyhow::Result<File> {
    let opened = options().open(folder.join(name));
    let restricted = opened.and_then(|file| {
        // An earlier version left it open to everyone.
        file.set_permissions(Permissions::from_mode(FILE_MODE))?;
        Ok(file)
    });
    restricted.with_context(|| format!("cannot write to the map's folder {}", folder.display()))
}
