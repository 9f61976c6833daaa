//! The reader table in LMDB's `lock.mdb`, to name a process that does not end its read: while it
//! holds an old transaction, LMDB reuses no page that was freed since, and `data.mdb` grows.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use std::time::{Duration, Instant};

use common::health::Check;
use parking_lot::Mutex;

/// Slots for read transactions of all processes on the folder; without a free one, a read fails.
pub(super) const MAX_READERS: u32 = 4096;

/// A read, which should take milliseconds, is reported when it is behind for longer than this.
const MAX_READ: Duration = Duration::from_secs(1);

/// The size of a record of the table, in bytes: a cache line.
pub(super) const RECORD: usize = 64;

/// The transaction id in the record of a reader that has no transaction.
const NO_TXN: u64 = u64::MAX;

/// The reads that were behind the last commit in the latest sweep.
#[derive(Debug, Default)]
pub(super) struct Readers {
    behind: Mutex<HashMap<Read, Seen>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Read {
    record: usize,
    pid: u32,
    txn: u64,
}

#[derive(Clone, Copy, Debug)]
struct Seen {
    since: Instant,
    /// Transactions committed since the one that is read.
    lag: u64,
    takes_too_long: bool,
}

impl Readers {
    /// Reads the table, LMDB's `lock.mdb`, and logs each read that takes too long once.
    pub(super) fn look(&self, lock: &File) {
        let found = match behind(lock) {
            Ok(found) => found,
            Err(error) => {
                return tracing::warn!(%error, "LMDB's reader table, lock.mdb, cannot be read");
            }
        };
        let now = Instant::now();
        let mut behind = self.behind.lock();
        let previous = std::mem::take(&mut *behind);
        for (read, lag) in found {
            let before = previous.get(&read);
            let since = before.map_or(now, |seen| seen.since);
            let takes_too_long = now - since >= MAX_READ;
            if takes_too_long && before.is_some_and(|seen| !seen.takes_too_long) {
                tracing::warn!(
                    pid = read.pid,
                    lag_transactions = lag,
                    "a process holds an old read transaction: data.mdb grows until the process \
                     continues or ends; send it CONT or KILL"
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
        let behind = self.behind.lock();
        let too_long = behind.iter().filter(|(_, seen)| seen.takes_too_long);
        too_long
            .map(|(read, seen)| Check {
                name: format!("reader {}", read.pid),
                ok: false,
                detail: format!(
                    "process {} has held a read transaction for {} s and is {} transactions behind: \
                     data.mdb grows until it continues or ends; send it CONT or KILL",
                    read.pid,
                    seen.since.elapsed().as_secs(),
                    seen.lag
                ),
            })
            .collect()
    }
}

/// The reads behind the last commit, each with its lag in transactions. Empty unless the file
/// has the layout of LMDB 0.9.
fn behind(lock: &File) -> io::Result<Vec<(Read, u64)>> {
    const MAGIC: u32 = 0xBEEF_C0DE;
    const LOCK_VERSION: u32 = 2;
    let mut table = vec![0; usize::try_from(lock.metadata()?.len()).unwrap_or(0)];
    lock.read_exact_at(&mut table, 0)?;
    // The records follow a header, whose length depends on the size of a mutex.
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
