//! What every engine of the map promises: the trait `DistributedMap`, its cursors and its errors.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use common::api::write_entry;
use common::bounds::Bounds;
use common::entry::{Entry, Outcome};
use common::health::Check;
use uuid::Uuid;

/// How far ahead of the map's clock a new entry's time may lie: room for the clocks of facades on
/// other machines.
pub const MAX_AHEAD: Duration = Duration::from_secs(2);

/// How far apart the clocks may be that check the settle window: those of the servers of a shard, and
/// one clock before and after it was corrected. With clocks further apart, an entry that was said never
/// to be stored could be stored by the next primary.
pub const MAX_SKEW: Duration = Duration::from_secs(1);

/// A map of immutable entries that several logging instances share.
///
/// Entries are ordered by UUID, the same on every instance and engine.
#[async_trait]
pub trait DistributedMap: fmt::Debug + Send + Sync {
    /// The id that was made together with the map, the same on every instance; `None` while it is
    /// not known.
    fn id(&self) -> Option<Uuid>;

    /// Puts a batch and tells for each entry, in the order given, what became of it.
    ///
    /// - *Durability*: `Stored` and `Duplicate` are told only once the entry is committed as
    ///   durably as the engine promises (LMDB: fsynced; Redis: on the primary and on
    ///   `Options::backups` replicas); every read that begins afterwards, on any instance, sees it.
    /// - *Duplicates*: the same UUID with the same message is one entry, also within one batch.
    /// - *Conflicts*: the same UUID with another message changes nothing.
    /// - *Settle window*: a UUID that is not in the map is added only if its time is at most
    ///   `settle` behind and [`MAX_AHEAD`] ahead of the map's clock, looked at where the entry is
    ///   written. Otherwise it is `Stale`: not in the map. It never will be when its time is more than
    ///   `settle` and [`MAX_SKEW`] behind; until then a server whose clock is behind may still add it.
    ///   (A commit becomes visible as long after that look as the disk needs for it.)
    /// - *Failure*: `Refused` means certainly not executed; `Unknown` that it may or may not be
    ///   stored. Entries of one batch may fare differently: they are in different partitions.
    ///
    /// Answers within the engine's store timeout.
    async fn put(&self, entries: Arc<[Entry]>) -> Vec<Outcome>;

    /// The message under `uuid`, or `None` if there is none. Answers within the store timeout.
    async fn get(&self, uuid: Uuid) -> Result<Option<String>, MapError>;

    /// Begins to read the entries within `bounds`, in their order. Nothing is asked of the map before
    /// the first piece is.
    fn read(&self, bounds: Bounds) -> Box<dyn Cursor>;

    /// The greatest UUID in the map, or `None` when it is empty. Answers within the store timeout.
    async fn last(&self) -> Result<Option<Uuid>, MapError>;

    /// How the map fares. Takes as long as a put.
    async fn health(&self) -> Health;
}

/// How a map fares, for people and for load balancers.
#[derive(Debug)]
pub struct Health {
    /// Why this instance can serve nobody now, in words; `None` when it is ready.
    pub not_ready: Option<String>,
    /// What an engine can say of its parts. One that is not `ok` makes a map that is ready a
    /// degraded one; a warning is `ok`.
    pub checks: Vec<Check>,
}

/// A read under way. It holds no transaction and no lock of the map while nobody asks it.
#[async_trait]
pub trait Cursor: fmt::Debug + Send {
    /// The entries that come next; none when the read is at its end.
    ///
    /// - *Complete*: an entry that was stored before the cursor began to read is in a piece. A part
    ///   of the map that cannot be read is an error, never a shorter piece.
    /// - *Bounded*: besides the piece a cursor keeps at most [`READ_AHEAD`] times `limit.bytes`, or
    ///   half a mebibyte if that is more.
    /// - *In time*: within the store timeout.
    ///
    /// After an error the read is over; go on with a new cursor, behind the last entry.
    async fn next(&mut self, limit: PieceLimit) -> Result<Piece, MapError>;
}

/// What a cursor may have read and not yet given, in bytes, as a multiple of a piece.
pub const READ_AHEAD: usize = 4;

/// How much one piece may hold.
#[derive(Clone, Copy, Debug)]
pub struct PieceLimit {
    /// At most this many entries.
    pub entries: u64,
    /// At most about this many bytes of lines, but always one entry.
    pub bytes: usize,
}

/// Entries in the order that was asked for, as lines: see [`write_entry`].
#[derive(Debug, Default)]
pub struct Piece {
    /// The lines.
    pub lines: Vec<u8>,
    /// How many they are.
    pub count: u64,
    /// The last one's UUID.
    pub last: Option<Uuid>,
}

impl Piece {
    /// Whether a message of so many bytes still goes in. One always does.
    pub(super) fn has_room(&self, limit: PieceLimit, bytes: usize) -> bool {
        self.count == 0 || (self.count < limit.entries && self.lines.len() + bytes <= limit.bytes)
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
    /// It cannot be read now; it may be later, or by another instance.
    #[error("{0}")]
    Unavailable(String),
    /// An entry is not what was put: LMDB's does not match its checksum, Redis's is not UTF-8.
    #[error("entry {0} is damaged: it is not what was put there")]
    Damaged(Uuid),
}

/// What every engine needs to know.
#[derive(Clone, Debug)]
pub struct Options {
    /// How long a put may take, all in all.
    pub store_timeout: Duration,
    /// How far behind the map's clock a new entry's time may lie.
    pub settle: Duration,
    /// Replicas that must hold an entry before it is acknowledged. By default none for LMDB and
    /// one Redis server, one for a Redis Cluster.
    pub backups: Option<u16>,
    /// Whether a map is made where there is none yet.
    pub create: bool,
}
