//! What this process counts: entries it was given, what became of them, how long that took.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use common::api::{InstanceStats, MapStats, OutcomeCounts, timestamp};
use common::entry::Outcome;
use hdrhistogram::Histogram;
use metrics::histogram;

use crate::metrics::{PUT_DURATION, PUT_ENTRIES};

/// A longer time counts as this one, in microseconds: a minute.
const LONGEST_PUT: u64 = 60_000_000;

/// Counts of this process.
#[derive(Debug)]
pub(crate) struct Counters {
    since: Instant,
    in_flight: AtomicU64,
    puts: Mutex<Puts>,
}

#[derive(Debug)]
struct Puts {
    received: u64,
    outcomes: OutcomeCounts,
    /// How long batches took, in microseconds.
    times: Histogram<u64>,
}

impl Default for Counters {
    fn default() -> Self {
        Self {
            since: Instant::now(),
            in_flight: AtomicU64::new(0),
            puts: Mutex::new(Puts {
                received: 0,
                outcomes: OutcomeCounts::default(),
                times: Histogram::new_with_max(LONGEST_PUT, 2).expect("two digits are allowed"),
            }),
        }
    }
}

impl Counters {
    /// Counts a batch as in flight until the guard is dropped.
    pub(crate) fn in_flight(&self) -> InFlight<'_> {
        self.in_flight.fetch_add(1, Ordering::Relaxed);
        InFlight(&self.in_flight)
    }

    /// Counts a batch that was put, with the outcome of each entry.
    pub(crate) fn count_put(&self, outcomes: &[Outcome], took: Duration) {
        if outcomes.is_empty() {
            return;
        }
        histogram!(PUT_ENTRIES).record(outcomes.len() as f64);
        histogram!(PUT_DURATION).record(took);
        let mut puts = self.puts.lock().unwrap_or_else(PoisonError::into_inner);
        puts.received += outcomes.len() as u64;
        puts.times.saturating_record(took.as_micros() as u64);
        for outcome in outcomes {
            let counts = &mut puts.outcomes;
            *match outcome {
                Outcome::Stored => &mut counts.stored,
                Outcome::Duplicate => &mut counts.duplicate,
                Outcome::Conflict => &mut counts.conflict,
                Outcome::Stale | Outcome::Leaving | Outcome::Early => &mut counts.stale,
                Outcome::Refused { .. } | Outcome::PartitionDown { .. } => &mut counts.refused,
                Outcome::Unknown { .. } => &mut counts.unknown,
            } += 1;
        }
    }

    /// What became of the entries received, and the batches in flight.
    pub(crate) fn puts(&self) -> (OutcomeCounts, u64) {
        let puts = self.puts.lock().unwrap_or_else(PoisonError::into_inner);
        (puts.outcomes, self.in_flight.load(Ordering::Relaxed))
    }

    /// The counts, with the map's clock and statistics.
    pub(crate) fn stats(&self, clock: SystemTime, map: MapStats) -> InstanceStats {
        let puts = self.puts.lock().unwrap_or_else(PoisonError::into_inner);
        let percentile = |quantile| {
            let micros = puts.times.value_at_quantile(quantile);
            (!puts.times.is_empty()).then_some(micros as f64 / 1000.0)
        };
        InstanceStats {
            at: timestamp(clock),
            since: timestamp(clock - self.since.elapsed()),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            map,
            received: puts.received,
            outcomes: puts.outcomes,
            in_flight: self.in_flight.load(Ordering::Relaxed),
            put_p50_ms: percentile(0.5),
            put_p99_ms: percentile(0.99),
        }
    }
}

/// A batch that is being put.
#[derive(Debug)]
pub(crate) struct InFlight<'a>(&'a AtomicU64);

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_of_puts_are_told_in_milliseconds() {
        let counters = Counters::default();
        let map = || MapStats {
            engine: String::new(),
            layout: 1,
            members: Vec::new(),
            problem: None,
            problems: Vec::new(),
        };
        let now = SystemTime::now();
        assert_eq!(counters.stats(now, map()).put_p50_ms, None);
        for (millis, times) in [(5, 98), (800, 1), (100_000, 1)] {
            for _ in 0..times {
                counters.count_put(&[Outcome::Stored], Duration::from_millis(millis));
            }
        }
        let stats = counters.stats(now, map());
        assert_eq!(stats.outcomes.stored, 100);
        let is_about = |told: Option<f64>, millis: f64| {
            told.is_some_and(|told| (told / millis - 1.0).abs() < 0.01)
        };
        assert!(is_about(stats.put_p50_ms, 5.0), "{stats:?}");
        assert!(is_about(stats.put_p99_ms, 800.0), "{stats:?}");
    }
}
