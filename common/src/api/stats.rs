//! Statistics: what an instance answers to `GET /stats`, for people and for the facade.

use std::time::SystemTime;

use serde::{Deserialize, Serialize};

/// The statistics of one instance.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct InstanceStats {
    /// When they were taken (RFC 3339).
    pub at: String,
    /// Since when the process counts (RFC 3339): its start.
    pub since: String,
    /// The version of the binary.
    pub version: String,
    /// The map as this instance sees it.
    pub map: MapStats,
    /// Entries received for putting.
    pub received: u64,
    /// What became of them.
    pub outcomes: OutcomeCounts,
    /// Batches that are being put.
    pub in_flight: u64,
    /// The median time of putting a batch, in milliseconds; `None` before the first one.
    pub put_p50_ms: Option<f64>,
    /// The 99th percentile of that time, in milliseconds.
    pub put_p99_ms: Option<f64>,
}

/// How many entries had each outcome, by its word on the wire.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
#[allow(missing_docs, reason = "the outcomes are explained at `Outcome`")]
pub struct OutcomeCounts {
    pub stored: u64,
    pub duplicate: u64,
    pub conflict: u64,
    pub stale: u64,
    pub refused: u64,
    pub unknown: u64,
}

/// The statistics of a map.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct MapStats {
    /// `lmdb`, `redis` or `redis-cluster`.
    pub engine: String,
    /// The version of how entries are stored.
    pub layout: u32,
    /// One row for each member.
    pub members: Vec<MemberStats>,
    /// Why a partition has no primary, if so: then the rows are not the whole map.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

/// A row for a member of the map: the LMDB folder, or a Redis server. A member that does not answer has
/// no numbers.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct MemberStats {
    /// The folder, or `HOST:PORT`.
    pub member: String,
    /// What it is in the map.
    pub role: Role,
    /// Whether it answered within the deadline of statistics.
    pub up: bool,
    /// Partitions that it owns, or of which a replica holds the backups.
    pub partitions: Option<u64>,
    /// Entries that it owns.
    pub entries: Option<u64>,
    /// Entries looked up in or read from the partitions that it owns, by this process since its start; the
    /// one that tells whether more follow a limited read counts too.
    pub gets: Option<u64>,
    /// New entries put into it. Nothing is ever deleted, so they are as many as it owns.
    pub puts: Option<u64>,
    /// What owned entries take, in bytes: pages of LMDB, the data set of Redis.
    pub entry_memory_bytes: Option<u64>,
    /// Entries that it holds as a replica.
    pub backups: Option<u64>,
    /// What they take, in bytes.
    pub backup_memory_bytes: Option<u64>,
    /// What the member takes in all, in bytes: the file of LMDB, the memory of Redis.
    pub used_memory_bytes: Option<u64>,
}

/// What a member is in the map.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// A Redis server that owns entries.
    Primary,
    /// A Redis server that holds backups.
    Replica,
    /// An LMDB folder.
    Folder,
}

impl MemberStats {
    /// The row of a member that does not answer.
    pub fn down(member: String, role: Role) -> Self {
        Self {
            member,
            role,
            up: false,
            partitions: None,
            entries: None,
            gets: None,
            puts: None,
            entry_memory_bytes: None,
            backups: None,
            backup_memory_bytes: None,
            used_memory_bytes: None,
        }
    }
}

/// A time as statistics write it: RFC 3339, UTC, with milliseconds.
pub fn timestamp(time: SystemTime) -> String {
    humantime::format_rfc3339_millis(time).to_string()
}
