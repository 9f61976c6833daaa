//! How the map is laid out in Redis: 271 partitions (as many as Hazelcast's maps have), each one
//! sorted set that the cluster keeps in one slot. All scores are 0, so its members are in the order
//! of their bytes: the UUID's first, then the message's.

use common::entry::Entry;
use crc::{CRC_16_XMODEM, Crc};
use redis::Value;
use uuid::Uuid;

use crate::map::MapError;

/// How many partitions the map has. It can never be changed: it decides where entries are found.
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

/// The sorted set that holds a partition's entries. What stands in braces decides the slot.
pub(super) fn entries_key(partition: u16) -> String {
    format!("entries:{{{partition}}}")
}

/// The counter that every group commit changes, in the slot of this partition.
pub(super) fn fence_key(partition: u16) -> String {
    format!("fence:{{{partition}}}")
}

/// The cluster's slot of a partition.
/// Source: <https://redis.io/docs/latest/operate/oss_and_stack/reference/cluster-spec/>
pub(super) fn slot(partition: u16) -> u16 {
    const CRC16: Crc<u16> = Crc::<u16>::new(&CRC_16_XMODEM);
    CRC16.checksum(partition.to_string().as_bytes()) % SLOTS
}

/// An entry as a member of its partition's sorted set.
pub(super) fn member(entry: &Entry) -> Vec<u8> {
    let mut member = Vec::with_capacity(UUID_BYTES + entry.msg.len());
    member.extend_from_slice(entry.uuid.as_bytes());
    member.extend_from_slice(entry.msg.as_bytes());
    member
}

/// The entry that a member is.
pub(super) fn entry(member: Value) -> Result<Entry, MapError> {
    let Value::BulkString(mut bytes) = member else {
        return Err(strange(&[member]));
    };
    let Some(uuid) = bytes.first_chunk().copied().map(Uuid::from_bytes) else {
        return Err(strange(&[Value::BulkString(bytes)]));
    };
    bytes.drain(..UUID_BYTES);
    let msg = String::from_utf8(bytes).map_err(|_| MapError::Damaged(uuid))?;
    Ok(Entry { uuid, msg })
}

/// A reply that only a fault of ours or somebody else's data explains.
pub(super) fn strange(replies: &[Value]) -> MapError {
    let shown = shown(replies);
    MapError::Unavailable(format!("redis gave an unexpected reply: {shown}"))
}

/// What kinds of values replies are, without their contents: those are not for the log.
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
