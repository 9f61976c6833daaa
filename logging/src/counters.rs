//! What this process counts: entries it was given, what became of them, how long that took.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};

use std::time::{Duration, SystemTime};

use common::api::{InstanceStats, OutcomeCounts, timestamp};
use common::entry::Outcome;
use hdrhistogram::Histogram;
use metrics::histogram;
use parking_lot::Mutex;
use tokio::time::Instant;

use crate::metrics::{PUT_DURATION, PUT_ENTRIES};
use crate::readiness::Report;

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
    /// Entries received in the last 10 s.
    lately: Window<u64>,
    /// How long the batches of the last 5 minutes took, in microseconds.
    times: Window<Histogram<u64>>,
}

impl Default for Counters {
    fn default() -> Self {
        Self {
            since: Instant::now(),
            in_flight: AtomicU64::new(0),
            puts: Mutex::new(Puts {
                received: 0,
                outcomes: OutcomeCounts::default(),
                lately: Window::new(Duration::from_secs(10)),
                times: Window::new(Duration::from_secs(300)),
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
        let mut puts = self.puts.lock();
        puts.received += outcomes.len() as u64;
        *puts.lately.current(|| 0) += outcomes.len() as u64;
        let times = puts.times.current(no_times);
        times.saturating_record(took.as_micros() as u64);
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
        let puts = self.puts.lock();
        (puts.outcomes, self.in_flight.load(Ordering::Relaxed))
    }

    /// The counts, with the map's clock and the last check.
    pub(crate) fn stats(&self, clock: SystemTime, report: &Report) -> InstanceStats {
        let puts = self.puts.lock();
        let mut times = no_times();
        for slot in puts.times.recent() {
            times.add(slot).expect("they have one maximum");
        }
        let percentile = |quantile| {
            let micros = times.value_at_quantile(quantile);
            (!times.is_empty()).then_some(micros as f64 / 1000.0)
        };
        InstanceStats {
            at: timestamp(clock),
            since: timestamp(clock - self.since.elapsed()),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            health: report.health.clone(),
            map: report.map.clone(),
            received: puts.received,
            received_lately: puts.lately.recent().sum(),
            outcomes: puts.outcomes,
            in_flight: self.in_flight.load(Ordering::Relaxed),
            put_p50_ms: percentile(0.5),
            put_p99_ms: percentile(0.99),
        }
    }
}

fn no_times() -> Histogram<u64> {
    Histogram::new_with_max(LONGEST_PUT, 2).expect("two digits are allowed")
}

/// What was counted lately, in slots of a tenth of that time.
#[derive(Debug)]
struct Window<T> {
    slot: Duration,
    /// Each with its beginning.
    slots: VecDeque<(Instant, T)>,
}

const SLOTS: u32 = 10;

impl<T> Window<T> {
    fn new(span: Duration) -> Self {
        Self {
            slot: span / SLOTS,
            slots: VecDeque::new(),
        }
    }

    /// The slot of now; drops what is no longer recent.
    fn current(&mut self, empty: impl FnOnce() -> T) -> &mut T {
        let (now, slot) = (Instant::now(), self.slot);
        self.slots.retain(|(began, _)| now - *began < slot * SLOTS);
        let is_current = |(began, _): &(Instant, T)| now - *began < slot;
        if !self.slots.back().is_some_and(is_current) {
            self.slots.push_back((now, empty()));
        }
        let (_, current) = self.slots.back_mut().expect("there is one");
        current
    }

    fn recent(&self) -> impl Iterator<Item = &T> {
        let is_recent = |(began, _): &&(Instant, T)| began.elapsed() < self.slot * SLOTS;
        self.slots.iter().filter(is_recent).map(|(_, slot)| slot)
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
    use common::api::MapStats;
    use common::health::Health;

    use super::*;

    fn stats(counters: &Counters) -> InstanceStats {
        let report = Report {
            health: Health::default(),
            map: MapStats {
                engine: String::new(),
                layout: 1,
                members: Vec::new(),
                problem: None,
            },
        };
        counters.stats(SystemTime::now(), &report)
    }

    #[tokio::test(start_paused = true)]
    async fn percentiles_are_of_five_minutes_and_shares_of_ten_seconds() {
        let counters = Counters::default();
        assert_eq!(stats(&counters).put_p50_ms, None);
        let is_about = |told: Option<f64>, millis: f64| {
            told.is_some_and(|told| (told / millis - 1.0).abs() < 0.01)
        };
        for (millis, times) in [(5, 98), (800, 1), (100_000, 1)] {
            for _ in 0..times {
                counters.count_put(&[Outcome::Stored], Duration::from_millis(millis));
            }
        }
        let told = stats(&counters);
        assert_eq!((told.outcomes.stored, told.received_lately), (100, 100));
        assert!(is_about(told.put_p50_ms, 5.0), "{told:?}");
        assert!(is_about(told.put_p99_ms, 800.0), "{told:?}");

        tokio::time::advance(Duration::from_secs(200)).await;
        for _ in 0..300 {
            counters.count_put(&[Outcome::Stored], Duration::from_millis(20));
        }
        let told = stats(&counters);
        assert_eq!((told.received, told.received_lately), (400, 300));
        assert!(is_about(told.put_p50_ms, 20.0), "{told:?}");

        tokio::time::advance(Duration::from_secs(101)).await;
        let told = stats(&counters);
        assert_eq!((told.received, told.received_lately), (400, 0));
        assert!(is_about(told.put_p99_ms, 20.0), "{told:?}");

        tokio::time::advance(Duration::from_secs(200)).await;
        assert_eq!(stats(&counters).put_p99_ms, None);
    }
}
