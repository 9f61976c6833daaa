//! The layout of the map in Redis: 271 partitions (as many as a Hazelcast map has), each a sorted
//! set in one slot. All scores are 0, so members are in byte order: the UUID, then the message.
//!
//! A large message is a separate key in the same slot, and its member has its length instead.
//! Otherwise a read that merges all partitions would fetch many times what it returns.
//!
//! The first and last member of each set are marks with the map's id, created with the map. An
//! empty partition has both marks; a set without them was lost.

use common::entry::Entry;
use crc::{CRC_16_XMODEM, Crc};
use redis::{Cmd, Value};
use uuid::Uuid;

use crate::map::contract::MapError;

/// The number of partitions. It can never change, as it decides where entries are found.
pub(super) const PARTITIONS: u16 = 271;

/// Slots of a Redis Cluster.
const SLOTS: u16 = 16384;

pub(super) const UUID_BYTES: usize = 16;

/// The partition that an entry belongs to: the CRC-32 of its UUID, modulo [`PARTITIONS`].
pub(super) fn of(uuid: Uuid) -> u16 {
    let hash = crc32fast::hash(uuid.as_bytes());
    u16::try_from(hash % u32::from(PARTITIONS)).expect("a remainder below 271 fits")
}

pub(super) fn all() -> std::ops::Range<u16> {
    0..PARTITIONS
}

/// Messages up to this size, in bytes, are in their partition's sorted set, larger ones in separate
/// keys. A read keeps at least two members of each of 271 partitions, at most 271 KiB of messages.
pub(super) const INLINE_BYTES: usize = 512;

/// The byte after the UUID in the member of a large message. It does not occur in UTF-8.
const LARGE: u8 = 0xff;

/// Bytes of a line besides the message: see [`common::api::write_entry`].
pub(super) const LINE_BYTES: usize = 57;

/// Memory of a member besides its bytes, approximately.
const MEMBER_OVERHEAD: usize = 64;

/// Members of a partition that are no entries: its marks.
pub(super) const MARKS: u64 = 2;

/// The version of this layout, stored with the map's id; a map of another version is refused.
pub(super) const LAYOUT: u32 = 1;

/// The key of a partition's sorted set. The text in braces decides the slot.
pub(super) fn entries_key(partition: u16) -> String {
    format!("entries:{{{partition}}}")
}

/// The key of the counter that group commits change, in the slot of this partition.
pub(super) fn fence_key(partition: u16) -> String {
    format!("fence:{{{partition}}}")
}

/// The key of a partition's floor: the time, in milliseconds since the Unix epoch, below which nothing in it
/// is new any more.
pub(super) fn floor_key(partition: u16) -> String {
    format!("fence:{{{partition}}}:floor")
}

/// The slot of a partition. Source:
/// <https://redis.io/docs/latest/operate/oss_and_stack/reference/cluster-spec/>
pub(super) fn slot(partition: u16) -> u16 {
    const CRC16: Crc<u16> = Crc::<u16>::new(&CRC_16_XMODEM);
    CRC16.checksum(partition.to_string().as_bytes()) % SLOTS
}

/// The key of a large message.
pub(super) fn message_key(uuid: Uuid) -> String {
    format!("message:{{{}}}:{uuid}", of(uuid))
}

/// An entry as a member of its partition's sorted set, and whether its message is a key of its own.
pub(super) fn member(entry: &Entry) -> (Vec<u8>, bool) {
    let msg = entry.msg.as_bytes();
    let is_large = msg.len() > INLINE_BYTES;
    let mut member = Vec::with_capacity(UUID_BYTES + msg.len().min(INLINE_BYTES));
    member.extend_from_slice(entry.uuid.as_bytes());
    if is_large {
        let length = u32::try_from(msg.len()).expect("a message is smaller than a batch");
        member.push(LARGE);
        member.extend_from_slice(&length.to_be_bytes());
    } else {
        member.extend_from_slice(msg);
    }
    (member, is_large)
}

/// The first and the last mark of a partition of this map.
pub(super) fn marks(map: Uuid) -> [Vec<u8>; 2] {
    [Uuid::nil(), Uuid::max()].map(|end| [*end.as_bytes(), *map.as_bytes()].concat())
}

/// The command that reads a partition's first member, which is its mark.
pub(super) fn first_member(partition: u16) -> Cmd {
    let mut command = redis::cmd("ZRANGE");
    command.arg(entries_key(partition)).arg(0).arg(0);
    command
}

/// A member of a partition's sorted set.
#[derive(Debug)]
pub(super) enum Member {
    /// An entry with its message.
    Small(Uuid, Vec<u8>),
    /// An entry whose message is a separate key, with the message's length in bytes.
    Large(Uuid, usize),
    /// A mark, with the map's id.
    Mark(Vec<u8>),
}

impl Member {
    pub(super) fn read(value: Value) -> Result<Self, MapError> {
        let Value::BulkString(mut bytes) = value else {
            return Err(unexpected_reply(&[value]));
        };
        let Some(uuid) = bytes.first_chunk().copied().map(Uuid::from_bytes) else {
            return Err(unexpected_reply(&[Value::BulkString(bytes)]));
        };
        bytes.drain(..UUID_BYTES);
        if uuid.is_nil() || uuid.is_max() {
            return Ok(Self::Mark(bytes));
        }
        match bytes[..] {
            [LARGE, a, b, c, d] => {
                let length = u32::from_be_bytes([a, b, c, d]) as usize;
                Ok(Self::Large(uuid, length))
            }
            _ => Ok(Self::Small(uuid, bytes)),
        }
    }

    pub(super) fn uuid(&self) -> Option<Uuid> {
        match self {
            Self::Small(uuid, _) | Self::Large(uuid, _) => Some(*uuid),
            Self::Mark(_) => None,
        }
    }

    pub(super) fn message_bytes(&self) -> usize {
        match self {
            Self::Small(_, message) => message.len(),
            Self::Large(_, length) => *length,
            Self::Mark(_) => 0,
        }
    }

    pub(super) fn memory_bytes(&self) -> usize {
        MEMBER_OVERHEAD
            + match self {
                Self::Small(_, bytes) | Self::Mark(bytes) => bytes.len(),
                Self::Large(..) => 0,
            }
    }
}

/// The error for a reply that only a bug or foreign data explains.
pub(super) fn unexpected_reply(replies: &[Value]) -> MapError {
    let shown = shown(replies);
    MapError::Unavailable(format!("redis returned an unexpected reply: {shown}"))
}

/// The kinds of the replies without their contents, which must not be logged.
pub(super) fn shown(replies: &[Value]) -> String {
    let kinds = replies.iter().map(|reply| match reply {
        Value::ServerError(error) => error.to_string(),
        Value::BulkString(bytes) => format!("{} bytes", bytes.len()),
        Value::Array(items) => format!("{} items", items.len()),
        Value::Int(number) => number.to_string(),
        _ => "another value".to_owned(),
    });
    kinds.collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Entries written by an earlier version must be found where it put them.
    #[test]
    fn place_of_an_entry_never_changes() {
        let uuid = Uuid::from_u128(0x01a203b3_3bb1_7319_90b9_a08e864b5eeb);
        assert_eq!(of(uuid), 182);
        assert_eq!(entries_key(182), "entries:{182}");
        assert_eq!(slot(182), 10424);
    }

    #[test]
    fn entries_spread_evenly() {
        let mut counts = [0; PARTITIONS as usize];
        for _ in 0..100 * PARTITIONS {
            counts[usize::from(of(Uuid::now_v7()))] += 1;
        }
        let expected = 100.0;
        let deviations = counts.map(|count: i32| (f64::from(count) - expected).powi(2) / expected);
        // 99.9 % quantile of chi-square with 270 degrees of freedom.
        assert!(deviations.iter().sum::<f64>() < 348.0);
    }
}
