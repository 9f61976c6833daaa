//! Rules that the engines share: the map's id, its settle window, its clock.

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

/// What a map accepts as new, in milliseconds since the Unix epoch.
#[derive(Clone, Copy, Debug)]
pub(super) struct SettleWindow {
    /// The map's clock.
    pub(super) now: u64,
    pub(super) settle: u64,
    /// What was told as settled: nothing is added below it, whatever the clock shows.
    pub(super) floor: u64,
}

impl SettleWindow {
    /// Takes entries of any age.
    pub(super) fn of_any_age(now: u64) -> Self {
        Self {
            now,
            settle: u64::MAX,
            floor: 0,
        }
    }

    /// The outcome when the time in `uuid` forbids a new entry.
    pub(super) fn refusal(&self, uuid: Uuid) -> Option<Outcome> {
        let time = entry::unix_millis(uuid);
        if time > self.now + millis(MAX_AHEAD) {
            Some(Outcome::Early)
        } else if time < self.floor.max(settled_at(self.now, self.settle)) {
            Some(Outcome::Stale)
        } else {
            (time.saturating_add(self.settle) < self.now).then_some(Outcome::Leaving)
        }
    }
}

/// The time before which history is settled when the map's clock shows `now`.
pub(super) fn settled_at(now: u64, settle: u64) -> u64 {
    now.saturating_sub(settle.saturating_add(millis(MAX_SKEW)))
}

/// The least that the map's clock has shown when `floor` was told as settled.
pub(super) fn clock_at(floor: u64, settle: u64) -> u64 {
    match floor {
        0 => 0,
        floor => floor
            .saturating_add(settle)
            .saturating_add(millis(MAX_SKEW)),
    }
}

pub(super) fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// What to tell of a clock that differs from the map's by more than [`MAX_SKEW`].
pub(super) fn clock_problem(whose: &str, clock: SystemTime, map: SystemTime) -> Option<String> {
    let (difference, direction) = match clock.duration_since(map) {
        Ok(ahead) => (ahead, "ahead of"),
        Err(error) => (error.duration(), "behind"),
    };
    (difference > MAX_SKEW).then(|| {
        format!(
            "the clock of {whose} is {} s {direction} the map's, which follows by a tenth of the \
             time that passes: synchronize the clock, and see `logging clock`",
            difference.as_secs()
        )
    })
}

/// Logs that this process has read which map is at `place`, and a `--settle` that does not count.
pub(super) fn log_opened(place: &str, map: Uuid, settle: u64, given: Option<Duration>) {
    let settle = Duration::from_millis(settle);
    tracing::info!(%map, at = place, settle = %humantime::format_duration(settle), "opened the map");
    if let Some(problem) = settle_problem(given, settle) {
        tracing::warn!("{problem}");
    }
}

/// What to tell when `--settle` was given and is not the map's.
pub(super) fn settle_problem(given: Option<Duration>, settle: Duration) -> Option<String> {
    let given = given.filter(|given| *given != settle)?;
    Some(format!(
        "the map's settle window is {}, and --settle {} is ignored: leave the flag out",
        humantime::format_duration(settle),
        humantime::format_duration(given)
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(time: u64, window: SettleWindow) -> Option<Outcome> {
        window.refusal(entry::first_uuid(time))
    }

    #[test]
    fn settle_window_is_exact_to_the_millisecond() {
        let window = SettleWindow {
            now: 100_000,
            settle: 10_000,
            floor: 0,
        };
        for (time, expected) in [
            (102_001, Some(Outcome::Early)),
            (102_000, None),
            (90_000, None),
            (89_999, Some(Outcome::Leaving)),
            (89_000, Some(Outcome::Leaving)),
            (88_999, Some(Outcome::Stale)),
        ] {
            assert_eq!(refusal(time, window), expected, "{time}");
        }
    }

    #[test]
    fn nothing_is_new_below_the_floor_whatever_the_clock_shows() {
        for now in [0, 50_000, 99_000] {
            let window = SettleWindow {
                now,
                settle: 10_000,
                floor: 95_000,
            };
            assert_eq!(
                refusal(94_999, window),
                match now {
                    99_000 => Some(Outcome::Stale),
                    _ => Some(Outcome::Early),
                }
            );
        }
        let window = SettleWindow {
            now: 99_000,
            settle: 10_000,
            floor: 95_000,
        };
        assert_eq!(refusal(95_000, window), None);
    }

    #[test]
    fn clock_is_at_least_where_the_floor_was_settled() {
        assert_eq!(clock_at(settled_at(100_000, 10_000), 10_000), 100_000);
        assert_eq!(clock_at(0, 10_000), 0);
    }

    #[test]
    fn import_takes_any_age_and_no_future() {
        let window = SettleWindow::of_any_age(100_000);
        assert_eq!(refusal(0, window), None);
        assert_eq!(refusal(102_001, window), Some(Outcome::Early));
    }
}
