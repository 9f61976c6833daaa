//! The wire between facade and logging: HTTP whose responses bear a mark. `put` has batches and their
//! results, `stream` the query and the lines of a read, `stats` the statistics.
//!
//! A logging instance answers 429 when it is overloaded, 503 when its map is unavailable, and 507 to a batch
//! while its standard output is stuck. With the mark, each proves that the request was not executed. Without the
//! mark no status proves it: the response may come from a proxy or from another server at the address.

mod put;
mod stats;
mod stream;

use std::fmt;
use std::str::FromStr;

use uuid::Uuid;

pub use put::{Batch, EncodedEntry, MAX_BATCH_BYTES, Posted, PutEntry, PutResult};
pub use stats::{
    InstanceStats, MapStats, MemberStats, OutcomeCounts, Role, nearly_full, timestamp,
};
pub use stream::{EntryLine, Poll, READ_END, READ_SETTLED, ReadQuery, StreamEnd, write_entry};

/// The header of every response of a logging instance. Its value is a [`Mark`].
pub const MARK: &str = "x-message-log";

/// The version of the wire. Raise it when one side would misread the other of the version before.
pub const WIRE_VERSION: u32 = 2;

/// Proves that a logging instance that speaks [`WIRE_VERSION`] wrote the response, and names the map
/// that it serves: `2 0193b3f2-…`, or `2 -` while the instance does not know the map's id yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark {
    /// The map's id, which was generated when the map was created.
    pub map: Option<Uuid>,
}

impl fmt::Display for Mark {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.map {
            Some(map) => write!(formatter, "{WIRE_VERSION} {map}"),
            None => write!(formatter, "{WIRE_VERSION} -"),
        }
    }
}

impl FromStr for Mark {
    type Err = String;

    /// # Errors
    /// When the text is not a mark of this version: the reason.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (version, map) = text
            .split_once(' ')
            .ok_or_else(|| format!("{text:?} is not a version and a map's id"))?;
        if version.parse() != Ok(WIRE_VERSION) {
            return Err(format!(
                "it speaks version {version} of the wire, this facade speaks {WIRE_VERSION}"
            ));
        }
        let map = match map {
            "-" => None,
            id => Some(
                id.parse()
                    .map_err(|_| format!("{id:?} is not a map's id"))?,
            ),
        };
        Ok(Self { map })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mark_is_read_as_it_was_written() {
        for map in [None, Some(Uuid::now_v7())] {
            assert_eq!(Mark { map }.to_string().parse(), Ok(Mark { map }));
        }
    }

    #[test]
    fn other_marks_are_refused_with_a_reason() {
        let version = "1 -".parse::<Mark>().expect_err("another version");
        assert!(version.contains("version 1"), "{version}");
        for text in ["", "2", "2 x", "- 2"] {
            assert!(text.parse::<Mark>().is_err(), "{text}");
        }
    }
}
