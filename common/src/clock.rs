//! The map's clock as one process knows it: told by others, and continued by a clock that no step of the
//! machine's time changes.
//!
//! The map's clock decides which new entries are accepted and what is settled, so it must not jump. A
//! process that hears a different time follows it slowly.

use std::fmt;

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use parking_lot::{Mutex, MutexGuard};
use rustix::time::{ClockId, clock_gettime};
use tokio::sync::Notify;

/// How far a correction moves the map's clock towards another time: a tenth of the time since the last
/// correction, and a second at most, as a step just before the correction must not be followed at once.
pub fn slew(since_last: Duration) -> Duration {
    const LONGEST: Duration = Duration::from_secs(10);
    since_last.min(LONGEST) / 10
}

/// The time since the machine's boot, suspension included.
pub fn since_boot() -> Duration {
    let time = clock_gettime(ClockId::Boottime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// A clock that has no time until it is told one.
pub struct MapClock {
    ticks: Box<dyn Fn() -> Duration + Send + Sync>,
    reading: Mutex<Option<Reading>>,
    told: Notify,
}

/// What the clock shows.
#[derive(Clone, Copy, Debug)]
struct Reading {
    ticks: Duration,
    /// The time at `ticks`, since the Unix epoch.
    time: Duration,
    /// The latest time that was shown, which a correction does not undo.
    latest: Duration,
}

impl Reading {
    /// The time to show, which is kept as the latest.
    fn show(&mut self, ticks: Duration) -> Duration {
        let time = self.time + ticks.saturating_sub(self.ticks);
        self.latest = self.latest.max(time);
        self.latest
    }
}

impl Default for MapClock {
    fn default() -> Self {
        Self::with_ticks(since_boot)
    }
}

impl MapClock {
    /// A clock that goes by `ticks`, a time since any moment.
    pub fn with_ticks(ticks: impl Fn() -> Duration + Send + Sync + 'static) -> Self {
        Self {
            ticks: Box::new(ticks),
            reading: Mutex::default(),
            told: Notify::new(),
        }
    }

    /// The time; `None` before the clock was told one. It never goes back, except by [`Self::set`].
    pub fn now(&self) -> Option<SystemTime> {
        let mut reading = self.reading();
        let reading = reading.as_mut()?;
        Some(UNIX_EPOCH + reading.show((self.ticks)()))
    }

    /// Waits until the clock was told a time.
    pub async fn told(&self) {
        loop {
            let told = self.told.notified();
            if self.reading().is_some() {
                return;
            }
            told.await;
        }
    }

    /// Moves towards `time`, by at most [`slew`]. The first time is taken as it is.
    pub fn follow(&self, time: SystemTime) {
        self.change(time, |reading, time, ticks| {
            let elapsed = ticks.saturating_sub(reading.ticks);
            let (now, most) = (reading.time + elapsed, slew(elapsed));
            Some(time.clamp(now.saturating_sub(most), now + most))
        });
    }

    /// Shows `time`, or what it shows if that is later.
    pub fn advance_to(&self, time: SystemTime) {
        self.change(time, |reading, time, ticks| {
            (reading.show(ticks) < time).then_some(time)
        });
    }

    /// Continues from `time`; if it has shown a later time, it shows that one until then.
    pub fn correct(&self, time: SystemTime) {
        self.change(time, |_, time, _| Some(time));
    }

    /// Shows `time` from now on, even if that is back.
    pub fn set(&self, time: SystemTime) {
        let time = time.duration_since(UNIX_EPOCH).unwrap_or_default();
        *self.reading() = Some(Reading {
            ticks: (self.ticks)(),
            time,
            latest: time,
        });
        self.told.notify_waiters();
    }

    /// Continues from the time that `choose` makes of the reading, `time` and the ticks, if any.
    fn change(
        &self,
        time: SystemTime,
        choose: impl FnOnce(&mut Reading, Duration, Duration) -> Option<Duration>,
    ) {
        let mut current = self.reading();
        let Some(reading) = current.as_mut() else {
            drop(current);
            return self.set(time);
        };
        let ticks = (self.ticks)();
        reading.show(ticks);
        let time = time.duration_since(UNIX_EPOCH).unwrap_or_default();
        if let Some(time) = choose(reading, time, ticks) {
            (reading.time, reading.ticks) = (time, ticks);
        }
    }

    fn reading(&self) -> MutexGuard<'_, Option<Reading>> {
        self.reading.lock()
    }
}

impl fmt::Debug for MapClock {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let reading = *self.reading();
        formatter.debug_tuple("MapClock").field(&reading).finish()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    fn seconds(seconds: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(seconds)
    }

    fn clock() -> (MapClock, impl Fn(u64)) {
        let ticks = Arc::new(AtomicU64::new(0));
        let passed = ticks.clone();
        let clock =
            MapClock::with_ticks(move || Duration::from_secs(ticks.load(Ordering::Relaxed)));
        (clock, move |time| {
            passed.fetch_add(time, Ordering::Relaxed);
        })
    }

    #[test]
    fn clock_continues_from_what_it_was_told_first() {
        let (clock, pass) = clock();
        assert_eq!(clock.now(), None);
        clock.follow(seconds(1000));
        pass(5);
        assert_eq!(clock.now(), Some(seconds(1005)));
    }

    #[test]
    fn step_is_followed_by_a_tenth_of_the_time_that_passes() {
        let (clock, pass) = clock();
        clock.follow(seconds(1000));
        for _ in 0..10 {
            pass(10);
            clock.follow(seconds(5000));
        }
        assert_eq!(clock.now(), Some(seconds(1110)));
        pass(3600);
        clock.follow(seconds(9000));
        assert_eq!(
            clock.now(),
            Some(seconds(4711)),
            "a second at most, however long the pause"
        );
    }

    #[test]
    fn clock_waits_for_an_earlier_time_and_does_not_go_back() {
        let (clock, pass) = clock();
        clock.follow(seconds(1000));
        pass(10);
        assert_eq!(clock.now(), Some(seconds(1010)));
        clock.follow(seconds(900));
        assert_eq!(clock.now(), Some(seconds(1010)));
        pass(1);
        assert_eq!(clock.now(), Some(seconds(1010)));
        pass(1);
        assert_eq!(clock.now(), Some(seconds(1011)));
    }

    #[test]
    fn clock_is_moved_ahead_and_never_back_by_what_was_told_as_settled() {
        let (clock, _) = clock();
        clock.advance_to(seconds(1000));
        clock.advance_to(seconds(900));
        assert_eq!(clock.now(), Some(seconds(1000)));
        clock.advance_to(seconds(1060));
        assert_eq!(clock.now(), Some(seconds(1060)));
    }
}
