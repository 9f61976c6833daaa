//! The table of readers in LMDB's `lock.mdb`, to name a process that does not end its read: while it
//! holds an old transaction, LMDB reuses no page that was freed since, and `data.mdb` grows.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use common::health::Check;

/// Slots for read transactions of all processes on the folder; when they are used up, reads fail.
pub(super) const MAX_READERS: u32 = 4096;

/// A read of a piece takes milliseconds. One that holds its transaction for longer than this, while
/// others write, is reported.
const MAX_READ: Duration = Duration::from_secs(1);

/// A record of the table, in bytes: a cache line.
const RECORD: usize = 64;

/// What stands in the place of a transaction while a record's reader has none.
const NO_TXN: u64 = u64::MAX;

/// The table, and the reads that were behind when it was looked at last.
#[derive(Debug)]
pub(super) struct Readers {
    /// Must stay open as long as the environment: LMDB's own locks on the file are POSIX locks, and a
    /// process loses those when it closes any descriptor of the file.
    file: File,
    behind: Mutex<HashMap<Read, Seen>>,
}

/// A read that has not ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Read {
    record: usize,
    pid: u32,
    txn: u64,
}

#[derive(Clone, Copy, Debug)]
struct Seen {
    since: Instant,
    /// Transactions that were committed after the one that is read.
    lag: u64,
    takes_too_long: bool,
}

impl Readers {
    pub(super) fn open(folder: &Path) -> io::Result<Self> {
        Ok(Self {
            file: File::open(folder.join("lock.mdb"))?,
            behind: Mutex::default(),
        })
    }

    /// Looks at the table. Logs a read once, when it has taken too long.
    pub(super) fn look(&self) {
        let found = match self.behind() {
            Ok(found) => found,
            Err(error) => return tracing::warn!(%error, "the table of readers cannot be read"),
        };
        let now = Instant::now();
        let mut behind = self.behind.lock().unwrap_or_else(PoisonError::into_inner);
        let known = std::mem::take(&mut *behind);
        for (read, lag) in found {
            let before = known.get(&read);
            let since = before.map_or(now, |seen| seen.since);
            let takes_too_long = now - since >= MAX_READ;
            if takes_too_long && before.is_some_and(|seen| !seen.takes_too_long) {
                tracing::warn!(
                    pid = read.pid,
                    lag_transactions = lag,
                    "a process holds an old read transaction: data.mdb grows until it goes on or \
                     ends; send it CONT or KILL"
                );
            }
            let seen = Seen {
                since,
                lag,
                takes_too_long,
            };
            behind.insert(read, seen);
        }
    }

    /// The reads that take too long, for `/readyz?verbose`.
    pub(super) fn checks(&self) -> Vec<Check> {
        let behind = self.behind.lock().unwrap_or_else(PoisonError::into_inner);
        let too_long = behind.iter().filter(|(_, seen)| seen.takes_too_long);
        too_long
            .map(|(read, seen)| Check {
                name: format!("reader {}", read.pid),
                ok: false,
                detail: format!(
                    "process {} has held a read transaction for {} s and is {} transactions behind: \
                     data.mdb grows until it goes on or ends; send it CONT or KILL",
                    read.pid,
                    seen.since.elapsed().as_secs(),
                    seen.lag
                ),
            })
            .collect()
    }

    /// The reads of transactions that others have been committed after, and how many. Empty when the
    /// file is of another layout than that of LMDB 0.9.
    fn behind(&self) -> io::Result<Vec<(Read, u64)>> {
        const MAGIC: u32 = 0xBEEF_C0DE;
        const LOCK_VERSION: u32 = 2;
        let mut table = vec![0; usize::try_from(self.file.metadata()?.len()).unwrap_or(0)];
        self.file.read_exact_at(&mut table, 0)?;
        // Before the records comes a header, whose length depends on the size of a mutex.
        let records = MAX_READERS as usize * RECORD;
        let Some(header) = table.len().checked_sub(records).filter(|len| *len >= 24) else {
            return Ok(Vec::new());
        };
        let number = |at: usize| u32::from_le_bytes(*table[at..].first_chunk().expect("4 bytes"));
        let long = |at: usize| u64::from_le_bytes(*table[at..].first_chunk().expect("8 bytes"));
        if number(0) != MAGIC || number(4) & 0xFFF != LOCK_VERSION {
            return Ok(Vec::new());
        }
        let last = long(8);
        let used = (number(16) as usize).min(MAX_READERS as usize);
        let reads = (0..used).filter_map(|record| {
            let at = header + record * RECORD;
            let (txn, pid) = (long(at), number(at + 8));
            let lag = last.checked_sub(txn).filter(|lag| *lag > 0)?;
            (pid != 0 && txn != NO_TXN).then_some((Read { record, pid, txn }, lag))
        });
        Ok(reads.collect())
    }
}
