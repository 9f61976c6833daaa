//! Statistics: the response of an instance to `GET /stats`, for people and for the facade.

use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use crate::health::Health;

/// The statistics of one instance.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct InstanceStats {
    /// The time of the statistics (RFC 3339).
    pub at: String,
    /// The start of the process (RFC 3339), from which it counts.
    pub since: String,
    /// The version of the binary.
    pub version: String,
    /// Its own readiness.
    pub health: Health,
    /// The map as this instance sees it.
    pub map: MapStats,
    /// Entries received in batches.
    pub received: u64,
    /// Those of the last 10 s.
    pub received_lately: u64,
    /// Their outcomes.
    pub outcomes: OutcomeCounts,
    /// Batches in flight.
    pub in_flight: u64,
    /// The median time of a put in the last 5 minutes, in milliseconds; `None` without one.
    pub put_p50_ms: Option<f64>,
    /// The 99th percentile of that time, in milliseconds.
    pub put_p99_ms: Option<f64>,
}

/// The number of entries with each outcome, by its word on the wire.
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
    /// The version of the format in which entries are stored.
    pub layout: u32,
    /// One row for each member.
    pub members: Vec<MemberStats>,
    /// Why a partition has no primary; the rows are then not the whole map.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

/// A row for a member of the map: the LMDB folder, or a Redis server. The numbers of a member that does
/// not answer are `None`.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct MemberStats {
    /// The folder, or `HOST:PORT`.
    pub member: String,
    /// Its role in the map.
    pub role: Role,
    /// Whether it told its numbers within the timeout of the statistics.
    pub up: bool,
    /// Why not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
    /// Partitions that a primary or folder owns, or whose backups a replica holds.
    pub partitions: Option<u64>,
    /// Entries that it owns.
    pub entries: Option<u64>,
    /// Entries that this process looked up in, or read from, the partitions that the member owns. A
    /// limited read counts one more entry, which tells whether there are more.
    pub gets: Option<u64>,
    /// New entries put into it. Nothing is ever deleted, so this equals `entries`.
    pub puts: Option<u64>,
    /// The size of the owned entries, in bytes: pages of LMDB, the data set of Redis.
    pub entry_memory_bytes: Option<u64>,
    /// Entries that it holds as a replica.
    pub backups: Option<u64>,
    /// The size of the backups, in bytes.
    pub backup_memory_bytes: Option<u64>,
    /// The size of the whole member, in bytes: the file of LMDB, the memory of Redis.
    pub used_memory_bytes: Option<u64>,
    /// What it may take at most, in bytes, if Redis has a `maxmemory`.
    #[serde(default)]
    pub max_memory_bytes: Option<u64>,
}

/// The role of a member in the map.
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

/// A member that uses more than this share of the memory that it may use, in percent, is reported: soon it
/// refuses entries.
const NEARLY_FULL_PERCENT: u64 = 90;

/// The share of a member's memory in use, in percent, when that is worth a report.
pub fn nearly_full(used: u64, most: u64) -> Option<u64> {
    let percent = used.saturating_mul(100).checked_div(most)?;
    (percent >= NEARLY_FULL_PERCENT).then_some(percent)
}

impl MemberStats {
    /// The row of a member that does not tell its numbers.
    pub fn down(member: String, role: Role, problem: String) -> Self {
        Self {
            member,
            role,
            up: false,
            problem: Some(problem),
            partitions: None,
            entries: None,
            gets: None,
            puts: None,
            entry_memory_bytes: None,
            backups: None,
            backup_memory_bytes: None,
            used_memory_bytes: None,
            max_memory_bytes: None,
        }
    }
}

/// Formats a time for statistics: RFC 3339, UTC, with milliseconds.
pub fn timestamp(time: SystemTime) -> String {
    humantime::format_rfc3339_millis(time).to_string()
}
