//! The wire between facade and logging: HTTP whose responses bear a mark. `put` has batches and their
//! results, `stream` the query and the lines of a read, `stats` the statistics.
//!
//! A logging instance answers 429 when it is overloaded, 503 when its map is unavailable, and 507 to a batch
//! that it cannot take: its standard output is stuck, it does not know its map yet, or the facade's is another. With the mark, each proves that the request was not executed. Without the
//! mark no status proves it: the response may come from a proxy or from another server at the address.

mod put;
mod stats;
mod stream;

use std::fmt;
use std::ops::RangeInclusive;
use std::str::FromStr;
use std::time::SystemTime;

use uuid::Uuid;

use crate::entry::{millis_at, time_of};

pub use put::{Batch, EncodedEntry, MAX_BATCH_BYTES, Posted, PutEntry, PutResult};
pub use stats::{
    InstanceStats, MapStats, MemberStats, OutcomeCounts, Role, nearly_full, timestamp,
};
pub use stream::{
    EntryLine, LINE_BEGIN_BYTES, LINE_END, MAX_LINE, Poll, READ_END, READ_SETTLED, ReadQuery,
    StreamEnd, begin_line, parse_line_begin, whole_characters, write_entry, write_part,
};

/// The header of every response of a logging instance, and of every request of a facade to one. Its value
/// is a [`Mark`].
pub const MARK: &str = "x-message-log";

/// The versions of the wire that this build speaks. Raise the last one when one side would misread the
/// other, and keep the one before.
pub const WIRE_VERSIONS: RangeInclusive<u32> = 3..=3;

/// Proves that a facade or logging instance that speaks [`WIRE_VERSIONS`] wrote the message, and names its
/// map and the map's clock: `3-3 0193b3f2-… 1795846123456`. `-` stands for what it does not know, or does not
/// tell. Further words are those of a later version.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mark {
    /// The map's id, which was generated when the map was created.
    pub map: Option<Uuid>,
    /// The map's clock when the message was written, in whole milliseconds.
    pub clock: Option<SystemTime>,
}

impl fmt::Display for Mark {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (oldest, newest) = (WIRE_VERSIONS.start(), WIRE_VERSIONS.end());
        write!(formatter, "{oldest}-{newest}")?;
        match self.map {
            Some(map) => write!(formatter, " {map}")?,
            None => formatter.write_str(" -")?,
        }
        match self.clock {
            Some(clock) => write!(formatter, " {}", millis_at(clock)),
            None => formatter.write_str(" -"),
        }
    }
}

impl FromStr for Mark {
    type Err = String;

    /// # Errors
    /// When the text is not a mark, or has no version that this build speaks: the reason.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let invalid = || format!("{text:?} is not versions, a map's id and a time");
        let mut words = text.split(' ');
        let mut word = || words.next().ok_or_else(invalid);
        let (versions, map, clock) = (word()?, word()?, word()?);
        let (oldest, newest) = versions.split_once('-').ok_or_else(invalid)?;
        let oldest: u32 = oldest.parse().map_err(|_| invalid())?;
        let newest: u32 = newest.parse().map_err(|_| invalid())?;
        if newest < *WIRE_VERSIONS.start() || oldest > *WIRE_VERSIONS.end() {
            return Err(format!(
                "it speaks the versions {versions} of the wire, this process speaks {} to {}",
                WIRE_VERSIONS.start(),
                WIRE_VERSIONS.end()
            ));
        }
        let map = match map {
            "-" => None,
            id => Some(id.parse().map_err(|_| invalid())?),
        };
        let clock = match clock {
            "-" => None,
            millis => Some(time_of(millis.parse().map_err(|_| invalid())?)),
        };
        Ok(Self { map, clock })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mark_is_read_as_it_was_written() {
        for map in [None, Some(Uuid::now_v7())] {
            for clock in [None, Some(time_of(1_795_846_123_456))] {
                let mark = Mark { map, clock };
                assert_eq!(mark.to_string().parse(), Ok(mark));
            }
        }
    }

    /// A neighbouring version may speak this one too, and say more.
    #[test]
    fn mark_of_another_version_is_read_if_it_speaks_this_one() {
        for text in ["2-3 - -", "3-4 - - more"] {
            assert_eq!(text.parse(), Ok(Mark::default()), "{text}");
        }
        for text in ["1-2 - -", "4-5 - -"] {
            let reason = text.parse::<Mark>().expect_err("other versions");
            assert!(reason.contains("this process speaks 3 to 3"), "{reason}");
        }
    }

    #[test]
    fn other_texts_are_refused() {
        for text in [
            "", "3", "3 -", "3-3 -", "3-3 x -", "3-3 - x", "- - -", "3- - -",
        ] {
            assert!(text.parse::<Mark>().is_err(), "{text}");
        }
    }
}
