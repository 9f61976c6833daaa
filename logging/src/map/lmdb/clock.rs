//! The map's clock on LMDB: the time since the machine's boot plus an offset that is kept in the map, so all
//! processes have the same clock, and a step of the machine's time does not change it. Commits move it
//! slowly to the machine's time.

use std::fmt;
use std::str::FromStr;
use std::sync::LazyLock;
use std::time::{Duration, SystemTime};

use common::clock::{since_boot, slew};
use common::entry::millis_at;
use heed::{AnyTls, RoTxn};

use super::properties;
use super::store::{Entries, boot_id};
use crate::map::contract::MapError;
use crate::map::rules::millis;

/// A smaller difference to the machine's time, in milliseconds, is left alone.
const MIN_DIFFERENCE: u64 = 100;

/// The clock as a record of the map: `BOOT OFFSET MOVED`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct BootClock {
    /// The id of the boot since which time is counted.
    boot: String,
    /// The clock at the boot, in milliseconds since the Unix epoch.
    offset: u64,
    /// When the offset was last moved, in milliseconds since the boot.
    moved: u64,
}

/// The clocks of the machine.
#[derive(Clone, Debug)]
pub(super) struct Machine {
    boot: String,
    since_boot: u64,
    time: u64,
}

impl Machine {
    pub(super) fn now() -> Self {
        static BOOT: LazyLock<String> = LazyLock::new(boot_id);
        Self {
            boot: BOOT.clone(),
            since_boot: millis(since_boot()),
            time: millis_at(SystemTime::now()),
        }
    }
}

impl BootClock {
    pub(super) fn read(
        entries: Entries,
        txn: &RoTxn<'_, AnyTls>,
    ) -> Result<Option<Self>, MapError> {
        properties::read(entries, txn, properties::CLOCK)
    }

    pub(super) fn is_of_this_boot(&self) -> bool {
        self.boot == Machine::now().boot
    }

    /// In milliseconds since the Unix epoch.
    pub(super) fn now(&self, since_boot: Duration) -> u64 {
        self.offset + millis(since_boot)
    }

    /// A clock that begins where no process ran: at the machine's time, but not before `least`.
    pub(super) fn begin(machine: Machine, least: u64) -> Self {
        Self {
            offset: machine.time.max(least).saturating_sub(machine.since_boot),
            moved: machine.since_boot,
            boot: machine.boot,
        }
    }

    /// The clock in the map, moved towards the machine's time by at most [`slew`], and to `least` if it is
    /// behind; begun anew after a boot.
    pub(super) fn moved(mut self, machine: Machine, least: u64) -> Self {
        if self.boot != machine.boot {
            return Self::begin(machine, least);
        }
        let aim = machine.time.saturating_sub(machine.since_boot);
        let elapsed = machine.since_boot.saturating_sub(self.moved);
        let most = millis(slew(Duration::from_millis(elapsed)));
        if aim.abs_diff(self.offset) >= MIN_DIFFERENCE && most > 0 {
            self.offset = aim.clamp(self.offset.saturating_sub(most), self.offset + most);
            self.moved = machine.since_boot;
        }
        self.offset = self.offset.max(least.saturating_sub(machine.since_boot));
        self
    }
}

impl fmt::Display for BootClock {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            boot,
            offset,
            moved,
        } = self;
        write!(formatter, "{boot} {offset} {moved}")
    }
}

impl FromStr for BootClock {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let words: Vec<&str> = text.split(' ').collect();
        let [boot, offset, moved] = words[..] else {
            return Err(());
        };
        Ok(Self {
            boot: boot.to_owned(),
            offset: offset.parse().map_err(drop)?,
            moved: moved.parse().map_err(drop)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1000;
    const RIGHT: u64 = 1_795_000_000_000;

    /// A machine so many seconds after its boot, whose time is this many seconds off.
    fn machine(boot: &str, seconds: u64, off: i64) -> Machine {
        Machine {
            boot: boot.to_owned(),
            since_boot: seconds * SECOND,
            time: (RIGHT + seconds * SECOND).saturating_add_signed(off * SECOND as i64),
        }
    }

    fn ahead(clock: &BootClock, seconds: u64) -> i64 {
        let now = clock.now(Duration::from_secs(seconds));
        now as i64 - (RIGHT + seconds * SECOND) as i64
    }

    #[test]
    fn step_is_followed_slowly_and_taken_back_slowly() {
        let mut clock = BootClock::begin(machine("a", 100, 0), 0);
        for seconds in 101..=105 {
            clock = clock.moved(machine("a", seconds, 60), 0);
        }
        assert_eq!(ahead(&clock, 105), 500);
        for seconds in 106..=110 {
            clock = clock.moved(machine("a", seconds, 0), 0);
        }
        assert_eq!(ahead(&clock, 110), 0);
    }

    #[test]
    fn step_after_a_long_pause_is_not_followed_at_once() {
        let clock = BootClock::begin(machine("a", 100, 0), 0);
        let moved = clock.moved(machine("a", 100_000, 3600), 0);
        assert_eq!(ahead(&moved, 100_000), 1000);
    }

    #[test]
    fn boot_begins_at_the_machines_time_but_not_before_what_was_told() {
        let clock = BootClock::begin(machine("a", 100, 60), 0);
        assert_eq!(ahead(&clock, 100), 60_000);
        let right = clock.clone().moved(machine("b", 5, 0), 0);
        assert_eq!(ahead(&right, 5), 0);
        let told = RIGHT + 30 * SECOND;
        let slow = clock.moved(machine("b", 5, -3600), told);
        assert_eq!(slow.now(Duration::from_secs(5)), told);
    }

    #[test]
    fn clock_is_never_behind_what_was_told() {
        let clock = BootClock::begin(machine("a", 100, 0), 0);
        let told = RIGHT + 200 * SECOND;
        let moved = clock.moved(machine("a", 101, 0), told);
        assert_eq!(moved.now(Duration::from_secs(101)), told);
    }

    #[test]
    fn record_is_read_as_it_was_written() {
        let clock = BootClock::begin(machine("0b007000-0000", 100, 7), 0);
        assert_eq!(clock.to_string().parse(), Ok(clock));
        for text in ["", "a", "a 1", "a 1 x", "a 1 2 3"] {
            assert_eq!(text.parse::<BootClock>(), Err(()), "{text}");
        }
    }
}
