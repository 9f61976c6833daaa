//! Rules that the engines share: the settle window and the map's id.

use std::time::{Duration, SystemTime};

use common::entry::{self, Outcome};
use uuid::Uuid;

use super::contract::{MAX_AHEAD, MAX_SKEW};

/// Parses a stored map id, `LAYOUT ID`, where the layout is the version of the storage format.
///
/// # Errors
/// When the layout is not `layout`, with what to do then, or the id is not a UUID.
pub(super) fn parse_id(text: &str, layout: u32) -> Result<Uuid, String> {
    let (found, id) = text.split_once(' ').unwrap_or(("0", text));
    if found != layout.to_string() {
        return Err(format!(
            "holds a map with another layout ({found:?}; this version reads and writes {layout}): \
             export it with the version that wrote it (`logging export`) and import it into an \
             empty map"
        ));
    }
    id.parse()
        .map_err(|_| format!("has {text:?} where the map's id should be"))
}

/// The time before which no entry can be new any more at `now`, by the map's clock.
pub(super) fn settled_before(now: SystemTime, settle: Duration) -> SystemTime {
    let settled = now.checked_sub(settle + MAX_SKEW);
    settled.unwrap_or(SystemTime::UNIX_EPOCH)
}

/// The outcome when the time in `uuid` forbids a new entry at `now`, by the map's clock.
pub(super) fn staleness(uuid: Uuid, now: SystemTime, settle: Duration) -> Option<Outcome> {
    let time = SystemTime::UNIX_EPOCH + Duration::from_millis(entry::unix_millis(uuid));
    if time > now + MAX_AHEAD {
        return Some(Outcome::Early);
    }
    if now > time + settle + MAX_SKEW {
        return Some(Outcome::Stale);
    }
    (now > time + settle).then_some(Outcome::Leaving)
}
