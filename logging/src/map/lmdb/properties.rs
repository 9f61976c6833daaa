//! Records of the map that are no entries. Their keys are shorter than a UUID and sort before all of them.

use std::ops::Bound;
use std::str::FromStr;

use heed::{AnyTls, RoTxn, RwTxn};

use super::store::Entries;
use crate::map::contract::MapError;

/// The map's id, see [`crate::map::rules::parse_id`].
pub(super) const ID: &[u8] = &[0; 1];

/// The settle window, in milliseconds.
pub(super) const SETTLE: &[u8] = &[0; 2];

/// Below this time, in milliseconds since the Unix epoch, no entry is new any more.
pub(super) const FLOOR: &[u8] = &[0; 5];

/// See [`super::clock::BootClock`].
pub(super) const CLOCK: &[u8] = &[0; 6];

/// The least key of an entry.
const FIRST_UUID: &[u8] = &[0; 16];

pub(super) fn read<T: FromStr>(
    entries: Entries,
    txn: &RoTxn<'_, AnyTls>,
    key: &[u8],
) -> Result<Option<T>, MapError> {
    let Some(value) = entries.get(txn, key)? else {
        return Ok(None);
    };
    let parsed = str::from_utf8(value)
        .ok()
        .and_then(|text| text.parse().ok());
    let parsed = parsed.ok_or_else(|| {
        let value = String::from_utf8_lossy(value);
        MapError::Unavailable(format!(
            "the map's folder has {value:?} as property {}",
            key.len()
        ))
    });
    parsed.map(Some)
}

pub(super) fn write(
    entries: Entries,
    txn: &mut RwTxn<'_>,
    key: &[u8],
    value: &impl ToString,
) -> heed::Result<()> {
    entries.put(txn, key, value.to_string().as_bytes())
}

/// The number of properties.
pub(super) fn count(entries: Entries, txn: &RoTxn<'_, AnyTls>) -> Result<u64, MapError> {
    let range: (Bound<&[u8]>, Bound<&[u8]>) = (Bound::Unbounded, Bound::Excluded(FIRST_UUID));
    Ok(entries.range(txn, &range)?.count() as u64)
}
