//! Generates the UUIDs of messages without a key: version 7 (RFC 9562, section 5.7), with the map's clock,
//! strictly increasing within the process.
//!
//! An instance may tell that a UUID is in the future, if the map's clock was begun anew. Then UUIDs continue
//! from the corrected time, because the map refuses them otherwise.

use std::time::{Duration, SystemTime};

use common::entry::millis_at;
use parking_lot::Mutex;
use rand::RngExt;
use uuid::Uuid;

/// UUIDs ignore a smaller step back of the clock: the map accepts times up to two seconds in the future.
const SMALL_STEP: Duration = Duration::from_secs(2);

/// The tail is the bits of a UUID below its time, without version and variant.
const TAIL_BITS: u32 = 74;

/// The bits of a tail behind the variant (RFC 9562, figure 11: `rand_b`).
const VARIANT_AT: u32 = 62;

/// Each tail exceeds the previous one by a random number of up to this many bits.
const STRIDE_BITS: u32 = 40;

/// Generates the UUIDs of one process.
#[derive(Debug, Default)]
pub struct Identifiers {
    last: Mutex<Last>,
}

/// The last UUID that was generated.
#[derive(Debug, Default)]
struct Last {
    millis: u64,
    tail: u128,
}

impl Identifiers {
    /// A UUID of the time `now`, greater than the previous one unless that is 2 s or more ahead.
    pub fn next(&self, now: SystemTime) -> Uuid {
        let now = millis_at(now);
        let mut last = self.last.lock();
        let ahead = Duration::from_millis(last.millis.saturating_sub(now));
        if now > last.millis || ahead >= SMALL_STEP {
            last.restart_at(now);
        } else {
            last.advance();
        }
        last.uuid()
    }
}

impl Last {
    /// Starts a millisecond with a random tail in the lower half, which leaves space to count up.
    fn restart_at(&mut self, millis: u64) {
        self.millis = millis;
        self.tail = rand::rng().random::<u128>() >> (u128::BITS - TAIL_BITS + 1);
    }

    /// Takes a greater tail, or the next millisecond when the tails of this one are used up.
    fn advance(&mut self) {
        let stride = 1 + (rand::rng().random::<u128>() >> (u128::BITS - STRIDE_BITS));
        let greater = self.tail + stride;
        match greater >> TAIL_BITS {
            0 => self.tail = greater,
            _ => self.restart_at(self.millis + 1),
        }
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

    use common::entry::{require_entry_uuid, time_of, unix_millis};

    use super::*;

    #[test]
    fn uuids_of_one_millisecond_increase_and_bear_its_time() {
        let identifiers = Identifiers::default();
        let now = time_of(1_780_000_000_000);
        let uuids: Vec<Uuid> = (0..100_000).map(|_| identifiers.next(now)).collect();
        assert!(uuids.is_sorted_by(|left, right| left < right));
        for uuid in uuids {
            assert!(require_entry_uuid(uuid).is_ok(), "{uuid}");
            assert_eq!(unix_millis(uuid), 1_780_000_000_000);
        }
    }

    #[test]
    fn order_is_kept_over_small_steps_back() {
        let identifiers = Identifiers::default();
        let before = identifiers.next(time_of(10_000));
        let after = identifiers.next(time_of(8_001));
        assert!(after > before);
        assert_eq!(unix_millis(after), 10_000);
        assert!(identifiers.next(time_of(10_001)) > after);
    }

    #[test]
    fn large_step_back_goes_on_from_the_corrected_time() {
        let identifiers = Identifiers::default();
        identifiers.next(time_of(70_000));
        assert_eq!(unix_millis(identifiers.next(time_of(10_000))), 10_000);
    }

    #[test]
    fn no_uuid_is_made_twice() {
        let identifiers = Identifiers::default();
        let mut seen = HashSet::new();
        for _ in 0..200 {
            for millis in [100_000, 50_000, 100_000, 97_000] {
                for _ in 0..10 {
                    assert!(seen.insert(identifiers.next(time_of(millis))));
                }
            }
        }
    }

    #[test]
    fn used_up_millisecond_is_followed_by_the_next() {
        let mut last = Last {
            millis: 7,
            tail: (1 << TAIL_BITS) - 1,
        };
        let before = last.uuid();
        last.advance();
        assert_eq!(last.millis, 8);
        assert!(last.uuid() > before);
    }
}
