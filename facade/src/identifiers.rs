//! Generates the UUIDs of messages without a key: version 7 (RFC 9562, section 5.7), strictly
//! increasing within the process.
//!
//! When the clock is set back by less than two seconds, UUIDs continue from their last time, which
//! the map still accepts. After a larger step they continue from the corrected time, because the
//! map refuses times in the future: order is kept on each side of the step, not across it.

use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use rand::RngExt;
use uuid::Uuid;

/// UUIDs ignore a smaller clock step back: the map accepts times up to two seconds in the future.
const SMALL_STEP: Duration = Duration::from_secs(2);

/// The tail is the bits of a UUID below its time, without version and variant.
const TAIL_BITS: u32 = 74;

/// The bits of a tail behind the variant (RFC 9562, figure 11: `rand_b`).
const VARIANT_AT: u32 = 62;

/// The lowest bits of a tail count the large steps, so UUIDs of one millisecond before and after a
/// step differ. The count wraps after 256 steps.
const EPOCH_BITS: u32 = 8;

/// Each tail exceeds the previous one by a random number of up to this many bits.
const STRIDE_BITS: u32 = 32;

type Clock = dyn Fn() -> SystemTime + Send + Sync;

/// Generates the UUIDs of one process.
pub struct Identifiers {
    clock: Box<Clock>,
    last: Mutex<Last>,
}

/// The last UUID that was generated.
#[derive(Debug, Default)]
struct Last {
    millis: u64,
    tail: u128,
    /// The number of large steps so far.
    epoch: u8,
    step: Option<ClockStep>,
}

/// A large step back of the clock: UUIDs from before it are in the future.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClockStep {
    pub back: Duration,
    /// The latest time of a UUID from before the step, in milliseconds since the Unix epoch.
    greatest_millis: u64,
}

impl fmt::Display for ClockStep {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            formatter,
            "this facade's clock was set back by {} s: until it has caught up, new messages sort \
             before messages stored before the step",
            self.back.as_secs_f64()
        )
    }
}

impl fmt::Debug for Identifiers {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let last = &*self.last();
        formatter.debug_tuple("Identifiers").field(last).finish()
    }
}

impl Identifiers {
    pub fn new(clock: impl Fn() -> SystemTime + Send + Sync + 'static) -> Self {
        Self {
            clock: Box::new(clock),
            last: Mutex::default(),
        }
    }

    /// A UUID greater than the previous one, unless the clock was set back by 2 s or more.
    pub fn next(&self) -> Uuid {
        let mut last = self.last();
        let now = self.millis();
        if now > last.millis {
            last.restart_at(now);
        } else if Duration::from_millis(last.millis - now) < SMALL_STEP {
            last.advance();
        } else {
            last.step_back_to(now);
        }
        last.uuid()
    }

    /// The last large step, while UUIDs from before it are in the future.
    pub fn clock_step(&self) -> Option<ClockStep> {
        let now = self.millis();
        self.last().step.filter(|step| step.greatest_millis >= now)
    }

    fn millis(&self) -> u64 {
        let since_epoch = (self.clock)().duration_since(SystemTime::UNIX_EPOCH);
        since_epoch.map_or(0, |time| time.as_millis() as u64)
    }

    fn last(&self) -> MutexGuard<'_, Last> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Last {
    /// Starts a millisecond with a random tail in the lower half, which leaves space to count up.
    fn restart_at(&mut self, millis: u64) {
        let random = rand::rng().random::<u128>() >> (u128::BITS - TAIL_BITS + 1);
        self.millis = millis;
        self.set_tail(random);
    }

    /// Takes a greater tail, or the next millisecond when the tails of this one are used up.
    fn advance(&mut self) {
        let stride = 1 + (rand::rng().random::<u128>() >> (u128::BITS - STRIDE_BITS));
        let greater = self.tail + (stride << EPOCH_BITS);
        match greater >> TAIL_BITS {
            0 => self.set_tail(greater),
            _ => self.restart_at(self.millis + 1),
        }
    }

    fn step_back_to(&mut self, millis: u64) {
        let before = self.step.map_or(0, |step| step.greatest_millis);
        let step = ClockStep {
            back: Duration::from_millis(self.millis - millis),
            greatest_millis: self.millis.max(before),
        };
        tracing::warn!(back_s = step.back.as_secs_f64(), "{step}");
        self.step = Some(step);
        self.epoch = self.epoch.wrapping_add(1);
        self.restart_at(millis);
    }

    fn set_tail(&mut self, tail: u128) {
        self.tail = (tail >> EPOCH_BITS << EPOCH_BITS) | u128::from(self.epoch);
    }

    /// Twelve bits of the tail stand between version and variant, the rest behind the variant. The
    /// builder expects bytes with gaps for version and variant.
    fn uuid(&self) -> Uuid {
        let high = self.tail >> VARIANT_AT;
        let low = self.tail & ((1 << VARIANT_AT) - 1);
        let spaced = ((high << u64::BITS) | low).to_be_bytes();
        let tail = spaced.last_chunk().expect("ten of sixteen bytes");
        uuid::Builder::from_unix_timestamp_millis(self.millis, tail).into_uuid()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    use common::entry::{require_entry_uuid, unix_millis};

    use super::*;

    fn with_clock(millis: u64) -> (Identifiers, Arc<AtomicU64>) {
        let clock = Arc::new(AtomicU64::new(millis));
        let shown = clock.clone();
        let now = move || {
            let millis = Duration::from_millis(shown.load(Ordering::Relaxed));
            SystemTime::UNIX_EPOCH + millis
        };
        (Identifiers::new(now), clock)
    }

    #[test]
    fn uuids_of_one_millisecond_increase_and_bear_its_time() {
        let (identifiers, _) = with_clock(1_780_000_000_000);
        let uuids: Vec<Uuid> = (0..100_000).map(|_| identifiers.next()).collect();
        assert!(uuids.is_sorted_by(|left, right| left < right));
        for uuid in uuids {
            assert!(require_entry_uuid(uuid).is_ok(), "{uuid}");
            assert_eq!(unix_millis(uuid), 1_780_000_000_000);
        }
    }

    #[test]
    fn order_is_kept_over_small_steps_back() {
        let (identifiers, clock) = with_clock(10_000);
        let before = identifiers.next();
        clock.store(8_001, Ordering::Relaxed);
        let after = identifiers.next();
        assert!(after > before);
        assert_eq!(unix_millis(after), 10_000);
        assert_eq!(identifiers.clock_step(), None);
        clock.store(10_001, Ordering::Relaxed);
        assert!(identifiers.next() > after);
    }

    #[test]
    fn large_step_back_goes_on_from_the_corrected_time_and_is_told_while_it_shows() {
        let (identifiers, clock) = with_clock(70_000);
        identifiers.next();
        clock.store(10_000, Ordering::Relaxed);
        assert_eq!(unix_millis(identifiers.next()), 10_000);
        let step = identifiers.clock_step().expect("a step");
        assert_eq!(step.back, Duration::from_secs(60));
        clock.store(70_000, Ordering::Relaxed);
        assert!(identifiers.clock_step().is_some());
        clock.store(70_001, Ordering::Relaxed);
        assert_eq!(identifiers.clock_step(), None);
    }

    #[test]
    fn no_uuid_is_made_twice() {
        let (identifiers, clock) = with_clock(0);
        let mut seen = HashSet::new();
        for _ in 0..200 {
            for millis in [100_000, 50_000, 100_000, 97_000] {
                clock.store(millis, Ordering::Relaxed);
                for _ in 0..10 {
                    assert!(seen.insert(identifiers.next()));
                }
            }
        }
    }

    #[test]
    fn tails_of_two_epochs_differ_though_their_random_numbers_are_equal() {
        let mut first = Last::default();
        let mut second = Last {
            epoch: 1,
            ..Last::default()
        };
        first.set_tail(12_345 << EPOCH_BITS);
        second.set_tail(12_345 << EPOCH_BITS);
        assert_ne!(first.uuid(), second.uuid());
    }

    #[test]
    fn used_up_millisecond_is_followed_by_the_next() {
        let mut last = Last {
            millis: 7,
            tail: (1 << TAIL_BITS) - 1,
            ..Last::default()
        };
        let before = last.uuid();
        last.advance();
        assert_eq!(last.millis, 8);
        assert!(last.uuid() > before);
    }
}
