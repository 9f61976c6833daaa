//! The entry of the log, its UUID, and the outcome of putting it into the map.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// A message of the log and its UUID. A stored entry never changes.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// A version 7 UUID: its first 48 bits are the entry's time in milliseconds.
    pub uuid: Uuid,
    /// The message, exactly as it was posted.
    pub msg: String,
}

/// The outcome of putting one entry into the map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The entry is now in the map, durably.
    Stored,
    /// The map already held the entry, with the same message.
    Duplicate,
    /// The map holds another message under this UUID; nothing was changed.
    Conflict,
    /// The entry is not in the map and never will be: its UUID's time is older than the settle window.
    Stale,
    /// The entry is not in the map, and its UUID's time has just left the settle window. This is not
    /// final: a member of the map whose clock is behind may still add it.
    Leaving,
    /// The entry is not in the map, and its UUID's time is in the future: it may be added later.
    Early,
    /// The put was certainly not executed: retry on this or another instance.
    Refused {
        /// The reason, for the caller.
        detail: String,
    },
    /// The put was certainly not executed, because its partition has no primary. Another UUID may be in a
    /// partition that has one. This outcome says nothing about the load on the instance.
    PartitionDown {
        /// The reason, for the caller.
        detail: String,
    },
    /// The entry may or may not be in the map: a retry with the same UUID is safe.
    Unknown {
        /// The reason, for the caller.
        detail: String,
    },
}

impl Outcome {
    /// Whether the time of the UUID forbids a new entry.
    pub fn is_about_time(&self) -> bool {
        matches!(self, Self::Stale | Self::Leaving | Self::Early)
    }

    /// An [`Outcome::Refused`] for this reason.
    pub fn refused(detail: impl Into<String>) -> Self {
        Self::Refused {
            detail: detail.into(),
        }
    }

    /// A [`Outcome::PartitionDown`] for this reason.
    pub fn partition_down(detail: impl Into<String>) -> Self {
        Self::PartitionDown {
            detail: detail.into(),
        }
    }

    /// An [`Outcome::Unknown`] for this reason.
    pub fn unknown(detail: impl Into<String>) -> Self {
        Self::Unknown {
            detail: detail.into(),
        }
    }
}

/// The time of a version 7 UUID, in milliseconds since the Unix epoch (RFC 9562, section 5.7).
pub fn unix_millis(uuid: Uuid) -> u64 {
    (uuid.as_u128() >> 80) as u64
}

/// The lowest UUID of a time in milliseconds since the Unix epoch. No entry has it, as it has no version: the
/// entries of earlier times are below it, all others above.
pub fn first_uuid(unix_millis: u64) -> Uuid {
    Uuid::from_u128(u128::from(unix_millis) << 80)
}

/// The lowest UUID of a time: see [`first_uuid`].
pub fn first_uuid_at(time: SystemTime) -> Uuid {
    first_uuid(millis_at(time))
}

/// A time as milliseconds since the Unix epoch.
pub fn millis_at(time: SystemTime) -> u64 {
    let since_epoch = time.duration_since(UNIX_EPOCH);
    since_epoch.unwrap_or_default().as_millis() as u64
}

/// The time so many milliseconds after the Unix epoch.
pub fn time_of(millis: u64) -> SystemTime {
    UNIX_EPOCH + Duration::from_millis(millis)
}

/// Parses the UUID of a new entry.
///
/// It must be version 7, because its time decides whether the entry may be added. Bounds of a read may
/// be any UUID.
///
/// # Errors
/// A sentence for the caller, when the text is not a UUID or is one of another version.
pub fn parse_entry_uuid(text: &str) -> Result<Uuid, String> {
    let uuid = Uuid::try_parse(text).map_err(|error| format!("this is not a UUID: {error}"))?;
    require_entry_uuid(uuid)
}

/// Checks the version of a new entry's UUID: see [`parse_entry_uuid`].
///
/// # Errors
/// A sentence for the caller, when it is not version 7.
pub fn require_entry_uuid(uuid: Uuid) -> Result<Uuid, String> {
    let is_rfc_variant = uuid.get_variant() == uuid::Variant::RFC4122;
    if uuid.get_version_num() != 7 || !is_rfc_variant {
        return Err(format!(
            "{uuid} is not a version 7 UUID, whose first 48 bits are the time"
        ));
    }
    Ok(uuid)
}
