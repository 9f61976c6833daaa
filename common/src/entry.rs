//! The entry of the log, and what becomes of one that is to be put into the map.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// One message of the log under its identifier. Entries never change once they are stored.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// A version 7 UUID: its first 48 bits are the entry's time in milliseconds.
    pub uuid: Uuid,
    /// The message, exactly as it was posted.
    pub msg: String,
}

/// What became of one entry that was to be put into the map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It is in the map now, durably.
    Stored,
    /// It was in the map already, with the same message.
    Duplicate,
    /// The map holds another message under this UUID; nothing was changed.
    Conflict,
    /// It is not in the map and never will be: its UUID's time is in the past of the settle window.
    Stale,
    /// It is not in the map, and its UUID's time has just left the settle window. A server whose clock
    /// is behind this one's may still add it, so nothing is final.
    Leaving,
    /// It is not in the map now, and its UUID's time is in the future: it may be added later.
    Early,
    /// It was certainly not executed; the same or another instance may be asked again.
    Refused {
        /// Why, for the caller.
        detail: String,
    },
    /// It was certainly not executed because no primary takes its partition: another UUID may be in
    /// a partition that has one. It says nothing about the load on this instance.
    PartitionDown {
        /// Why, for the caller.
        detail: String,
    },
    /// It may or may not be in the map; asking again with the same UUID is safe.
    Unknown {
        /// Why, for the caller.
        detail: String,
    },
}

impl Outcome {
    /// A [`Outcome::Refused`] for this reason.
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

    /// A [`Outcome::Unknown`] for this reason.
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

/// Reads a UUID that is to become an entry's.
///
/// Bounds of a read may be any UUID; an entry's must be version 7, because its time decides
/// whether the entry may still be added.
///
/// # Errors
/// A sentence for the caller when the text is not a UUID, or one of another version.
pub fn parse_entry_uuid(text: &str) -> Result<Uuid, String> {
    let uuid = Uuid::try_parse(text).map_err(|error| format!("this is not a UUID: {error}"))?;
    require_entry_uuid(uuid)
}

/// Checks that a UUID may become an entry's: see [`parse_entry_uuid`].
///
/// # Errors
/// A sentence for the caller when it is not version 7.
pub fn require_entry_uuid(uuid: Uuid) -> Result<Uuid, String> {
    let is_rfc_variant = uuid.get_variant() == uuid::Variant::RFC4122;
    if uuid.get_version_num() != 7 || !is_rfc_variant {
        return Err(format!(
            "{uuid} is not a version 7 UUID, whose first 48 bits are the time"
        ));
    }
    Ok(uuid)
}
