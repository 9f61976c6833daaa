//! The entry of the log, and what the logging service says about each entry that it was asked to
//! put. These are the types of the internal API between facade and logging.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// The largest body that a logging instance accepts for one batch, in bytes.
///
/// The facade keeps its batches below it, and refuses a `--max-message` that could not fit.
pub const MAX_BATCH_BYTES: usize = 8 * 1024 * 1024;

/// How many bytes one byte of a message can become in JSON: a control character is `\u001b`.
pub const MAX_JSON_EXPANSION: usize = 6;

/// One message of the log under its identifier. Entries never change once they are stored.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// A version 7 UUID: its first 48 bits are the entry's time in milliseconds.
    pub uuid: Uuid,
    /// The message, exactly as it was posted.
    pub msg: String,
}

/// An entry on its way to a logging instance.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct PutEntry {
    /// The identifier under which the message is to be stored.
    pub uuid: Uuid,
    /// The message.
    pub msg: String,
    /// The `x-request-id` of the POST that brought it, for the logs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request_id: Option<String>,
}

/// The answer of a logging instance about one entry.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct PutResult {
    /// The identifier that was asked for.
    pub uuid: Uuid,
    /// What became of it.
    #[serde(flatten)]
    pub outcome: Outcome,
}

/// What became of one entry that was to be put into the map.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(tag = "outcome", rename_all = "lowercase")]
pub enum Outcome {
    /// It is in the map now, durably.
    Stored,
    /// It was in the map already, with the same message.
    Duplicate,
    /// The map holds another message under this UUID; nothing was changed.
    Conflict,
    /// It is not in the map, and its UUID's time lies outside the settle window.
    Stale {
        /// On which side of the window that time lies; without a word it is [`Staleness::Past`].
        #[serde(default, skip_serializing_if = "Staleness::is_past")]
        when: Staleness,
    },
    /// It was certainly not executed; the same or another instance may be asked again.
    Refused {
        /// Why, for the caller.
        detail: String,
        /// Whether only the entry's partition cannot take it now: another UUID may be in one that
        /// can, and no load is to be taken off this instance.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        is_partition_down: bool,
    },
    /// It may or may not be in the map; asking again with the same UUID is safe.
    Unknown {
        /// Why, for the caller.
        detail: String,
    },
}

/// Where the time of an entry lies that is not in the map and was not added.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Staleness {
    /// In the future: the entry may be added later.
    Ahead,
    /// Just outside the window. A server whose clock is behind this one's may still add the entry, so
    /// nothing is final.
    Leaving,
    /// In the past: the entry is not in the map and never will be.
    #[default]
    Past,
}

impl Staleness {
    fn is_past(&self) -> bool {
        *self == Self::Past
    }
}

impl Outcome {
    /// A [`Outcome::Refused`] for this reason.
    pub fn refused(detail: impl Into<String>) -> Self {
        Self::Refused {
            detail: detail.into(),
            is_partition_down: false,
        }
    }

    /// A [`Outcome::Refused`] because the entry's partition has nobody who could take it now.
    pub fn partition_down(detail: impl Into<String>) -> Self {
        Self::Refused {
            detail: detail.into(),
            is_partition_down: true,
        }
    }

    /// A [`Outcome::Unknown`] for this reason.
    pub fn unknown(detail: impl Into<String>) -> Self {
        Self::Unknown {
            detail: detail.into(),
        }
    }
}

/// Whether a character could change how a line looks or where it ends: control characters,
/// Unicode's line ends, and the marks that change the direction of text.
pub fn is_control(character: char) -> bool {
    character.is_control()
        || matches!(
            character,
            '\u{061c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}'
        )
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
/// A sentence for the caller when the text is no UUID or one of another version.
pub fn parse_entry_uuid(text: &str) -> Result<Uuid, String> {
    let uuid = Uuid::try_parse(text).map_err(|error| format!("this is no UUID: {error}"))?;
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
