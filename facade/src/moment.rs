//! Parses the points in time of the bounds `since` and `until` of a read.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use common::entry::first_uuid;
use serde::Deserialize;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use uuid::Uuid;

#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(try_from = "String")]
pub(crate) enum Moment {
    At(SystemTime),
    /// This long before the read.
    Ago(Duration),
}

impl TryFrom<String> for Moment {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        if let Some(ago) = duration(&text) {
            return Ok(Self::Ago(ago));
        }
        // A `+` that was not percent-encoded arrives as a space.
        let at = OffsetDateTime::parse(&text.replace(' ', "+"), &Rfc3339);
        at.map(|at| Self::At(at.into())).map_err(
            |_| "write an RFC 3339 time such as 2026-11-24T20:00:00Z, or how long ago, such as 10m",
        )
    }
}

/// Longer ones are not taken for a duration: humantime panics when their sum is just too large.
const MAX_DURATION_LENGTH: usize = 64;
const MAX_DIGITS: usize = 10;

fn duration(text: &str) -> Option<Duration> {
    let mut numbers = text.split(|character: char| !character.is_ascii_digit());
    if text.len() > MAX_DURATION_LENGTH || numbers.any(|number| number.len() > MAX_DIGITS) {
        return None;
    }
    humantime::parse_duration(text).ok()
}

impl Moment {
    /// The lowest UUID of this moment, for a read that begins `now`: only earlier entries have
    /// lower UUIDs. The time of a UUID is in whole milliseconds, so it is rounded up.
    pub(crate) fn first_uuid(self, now: SystemTime) -> Uuid {
        let time = match self {
            Self::At(time) => time,
            Self::Ago(ago) => now.checked_sub(ago).unwrap_or(UNIX_EPOCH),
        };
        let since_epoch = time.duration_since(UNIX_EPOCH).unwrap_or_default();
        first_uuid(since_epoch.as_nanos().div_ceil(1_000_000) as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn millis(text: &str) -> Option<u128> {
        let now = UNIX_EPOCH + Duration::from_secs(1_000_000);
        let moment = Moment::try_from(text.to_owned()).ok()?;
        let uuid = moment.first_uuid(now).as_u128();
        assert_eq!(uuid << 48, 0, "{text}");
        Some(uuid >> 80)
    }

    #[test]
    fn moments_are_times_or_durations_back_from_now() {
        for (text, expected) in [
            ("1970-01-01T00:00:01Z", 1_000),
            ("1970-01-01t00:00:01.5z", 1_500),
            ("1970-01-01T02:00:01+02:00", 1_000),
            ("1970-01-01T02:00:01 02:00", 1_000),
            ("1970-01-01T00:00:00.0010001Z", 2),
            ("9999-12-31T23:59:59Z", 253_402_300_799_000),
            ("1969-12-31T23:59:59Z", 0),
            ("10m", 999_400_000),
            ("1h 30s", 996_370_000),
            ("0s", 1_000_000_000),
            ("100years", 0),
            ("9999999999y", 0),
        ] {
            assert_eq!(millis(text), Some(expected), "{text}");
        }
        for text in [
            "",
            "10",
            "-10m",
            "yesterday",
            "2026-11-24",
            "1970-01-01T00:00:01",
            "18446744073709551615s 1000ms",
            "584542046090y 7month 15day 17h 31m 44s 1000ms",
        ] {
            assert_eq!(millis(text), None, "{text}");
        }
    }
}
