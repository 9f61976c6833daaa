//! The contract of the map's engines: the trait `DistributedMap`, its cursors, errors and options.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use common::api::{MapStats, write_entry};
use common::bounds::Bounds;
use common::entry::{Entry, Outcome};
use common::health::{Check, Health};
use uuid::Uuid;

/// How far ahead of the map's clock a new entry's time may be.
pub const MAX_AHEAD: Duration = Duration::from_secs(2);

/// The time between leaving the settle window and being settled, and the difference between a clock and
/// the map's that is tolerated without a word.
pub const MAX_SKEW: Duration = Duration::from_secs(1);

/// How long a member of the map may take for its statistics.
pub(super) const STATS_TIMEOUT: Duration = Duration::from_millis(400);

/// A map of immutable entries that several logging instances share.
///
/// Entries are ordered by UUID, the same on every instance and engine.
#[async_trait]
pub trait DistributedMap: fmt::Debug + Send + Sync {
    /// The id that the map got when it was created; `None` until this instance has read it.
    fn id(&self) -> Option<Uuid>;

    /// Puts a batch and returns the outcome of each entry, in the order given.
    ///
    /// - *Durability*: `Stored` and `Duplicate` are returned only once the entry is committed
    ///   (LMDB: fsynced; Redis: on the primary and on `Options::backups` replicas). Every later
    ///   read, on any instance, sees it.
    /// - *Duplicates*: a UUID put twice with one message is one entry, also within one batch.
    /// - *Conflicts*: a UUID that is put with another message changes nothing.
    /// - *Settle window*: a new UUID is added only if its time is at most the map's settle window
    ///   behind and [`MAX_AHEAD`] ahead of the map's clock, and not below what [`Self::settle`] has
    ///   told; all are read where the entry is written. Otherwise it is not in the map: `Early` if it
    ///   is ahead; `Leaving` if it is up to [`MAX_SKEW`] too old, which is not final; `Stale` beyond
    ///   that, which is stored like an entry and is final. [`Access::Import`] has no settle window.
    /// - *Failure*: `Refused` is certainly not executed; `Unknown` may or may not be stored.
    ///   Outcomes within a batch may differ, as the entries are in different partitions.
    ///
    /// Returns within the store timeout.
    async fn put(&self, entries: Arc<[Entry]>) -> Vec<Outcome>;

    /// The message under `uuid`, or `None` if there is none. Returns within the store timeout.
    async fn get(&self, uuid: Uuid) -> Result<Option<String>, MapError>;

    /// Whole characters, at least one, of the message under `uuid`: from the byte `from` on, at most about
    /// `bytes` bytes. Only for an entry that a cursor returned as [`Piece::large`]. Returns within the store
    /// timeout.
    async fn part(&self, uuid: Uuid, from: usize, bytes: usize) -> Result<String, MapError>;

    /// A cursor over the entries within `bounds`. It reads nothing before its first `next`.
    fn read(&self, bounds: Bounds) -> Box<dyn Cursor>;

    /// The greatest UUID in the map, or `None` when it is empty. Returns within the store timeout.
    async fn last(&self) -> Result<Option<Uuid>, MapError>;

    /// The map's clock and the machine's; `None` until this instance knows them.
    fn clocks(&self) -> Option<Clocks>;

    /// How old the time in a new entry's UUID may be: a property of the map, `None` until it is known.
    fn settle_window(&self) -> Option<Duration>;

    /// Settles history up to the settle window and [`MAX_SKEW`] before `clock`, and returns that time:
    /// a read that begins after this has returned sees all entries whose UUID's time is earlier, and
    /// none will be added, whatever clocks do. It is stored where entries are checked, as durably as
    /// an entry. A map's clock that is behind `clock` is moved ahead to it. Takes as long as a put.
    async fn settle(&self, clock: SystemTime) -> Result<SystemTime, MapError>;

    /// Checks the map and its parts. Takes as long as a put.
    async fn health(&self) -> Health;

    /// The members of the map and what each holds. Answers within half a second; a member that does
    /// not is a row that says so.
    async fn stats(&self) -> MapStats;

    /// Sets the gauges of the map's metrics, without asking anybody.
    fn measure(&self);
}

/// Problems of the map as checks of its health: they make it degraded.
pub(super) fn failed_checks(problems: Vec<String>) -> impl Iterator<Item = Check> {
    problems.into_iter().map(|detail| Check {
        name: "map".to_owned(),
        ok: false,
        detail,
    })
}

/// A read in progress. Between calls of `next` it holds no transaction and no lock.
#[async_trait]
pub trait Cursor: fmt::Debug + Send {
    /// The next entries; none at the end.
    ///
    /// - *Complete*: every entry that was stored before the cursor began to read is returned. A
    ///   part of the map that cannot be read is an error, never a shorter piece.
    /// - *Bounded*: besides the piece, a cursor keeps at most [`READ_AHEAD`] times `limit.bytes`,
    ///   or 512 KiB if that is more.
    /// - *In time*: returns within the store timeout.
    ///
    /// After an error the cursor is unusable; continue with a new one after the last entry.
    async fn next(&mut self, limit: PieceLimit) -> Result<Piece, MapError>;
}

/// How many pieces' worth of bytes a cursor may have read and not yet returned.
pub const READ_AHEAD: usize = 4;

/// The size of a piece.
#[derive(Clone, Copy, Debug)]
pub struct PieceLimit {
    pub entries: u64,
    /// Bytes of lines, approximately; a single entry may exceed them.
    pub bytes: usize,
    /// The longest message that is part of the lines, in bytes: see [`Piece::large`].
    pub message: usize,
}

/// Consecutive entries as lines: see [`write_entry`].
#[derive(Debug, Default)]
pub struct Piece {
    pub lines: Vec<u8>,
    /// The number of entries.
    pub count: u64,
    /// The UUID of the last entry.
    pub last: Option<Uuid>,
    /// The length in bytes of a message that is longer than [`PieceLimit::message`]. Its entry is the only one
    /// of the piece, which has no lines: the message is read with [`DistributedMap::part`].
    pub large: Option<usize>,
}

impl Piece {
    /// Whether a message of `bytes` bytes still fits. The first one may have any size.
    pub(super) fn fits(&self, limit: PieceLimit, bytes: usize) -> bool {
        self.count < limit.entries && (self.count == 0 || self.lines.len() + bytes <= limit.bytes)
    }

    /// A piece of one entry with a large message.
    pub(super) fn large(uuid: Uuid, bytes: usize) -> Self {
        Self {
            count: 1,
            last: Some(uuid),
            large: Some(bytes),
            ..Self::default()
        }
    }

    pub(super) fn push(&mut self, uuid: Uuid, msg: &str) {
        write_entry(&mut self.lines, uuid, msg);
        self.count += 1;
        self.last = Some(uuid);
    }
}

/// Why the map could not be read.
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    /// The map cannot be read now: retry later or on another instance.
    #[error("{0}")]
    Unavailable(String),
    /// In LMDB the entry does not match its checksum, or in Redis it is not UTF-8.
    #[error("entry {0} is damaged: restore the map from a copy")]
    Damaged(Uuid),
}

/// The map's clock, and the clock that it follows.
#[derive(Clone, Copy, Debug)]
pub struct Clocks {
    /// Decides about new entries and settled history.
    pub map: SystemTime,
    /// LMDB: this machine's. Redis: the median of the primaries'.
    pub machine: SystemTime,
}

/// What a process opens a map for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// To serve it. If there is none, it is created.
    Serve,
    /// To put entries of any age. If there is none, it is created.
    Import,
    /// To read it. There must be one.
    Read,
}

/// The settle window of a map that is created without `--settle`.
pub(super) const DEFAULT_SETTLE: Duration = Duration::from_secs(10);

/// The options of every engine.
#[derive(Clone, Debug)]
pub struct Options {
    /// How long a put or a read of a piece may take.
    pub store_timeout: Duration,
    /// The settle window, if one was given. A map that has one already keeps it.
    pub settle: Option<Duration>,
    /// Replicas that must hold an entry before it is acknowledged. Default: 1 for a Redis Cluster,
    /// otherwise 0.
    pub backups: Option<u16>,
    /// What the map is opened for.
    pub access: Access,
}
