//! `GET /metrics`: what the facade measures besides requests. What only a scrape needs is read then;
//! the rest is counted where it happens.

use ::metrics::{Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge};
use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::Response;
use common::metrics;

use crate::judge::Trouble;
use crate::state::App;

/// Entries in a batch, by instance.
pub(crate) const BATCH_ENTRIES: &str = "facade_batch_entries";
/// From sending a batch to its answer or failure, by instance.
pub(crate) const BATCH_DURATION: &str = "facade_batch_duration_seconds";
/// Further tries of messages, by the reason: a [`Trouble`], or [`HEDGE`].
pub(crate) const REPEATS: &str = "facade_repeats_total";
/// The reason of a second try beside a slow first one.
pub(crate) const HEDGE: &str = "hedge";
/// How often an instance went down.
pub(crate) const INSTANCE_FAILURES: &str = "facade_instance_failures_total";
/// GETs that went on in the middle on another instance.
pub(crate) const READS_RESUMED: &str = "facade_reads_resumed_total";
/// GETs whose body was aborted.
pub(crate) const READS_ABORTED: &str = "facade_reads_aborted_total";

const INSTANCE_UP: &str = "facade_instance_up";
const QUEUE: &str = "facade_queue_bytes";
const FREE_PERMITS: &str = "facade_free_permits";
const FREE_MEMORY: &str = "facade_free_memory_bytes";
const POSTED: &str = "facade_posted_bytes_total";
const READ: &str = "facade_read_bytes_total";

/// Gives each metric its unit and a sentence, and the counters that alerts look at a first value.
pub(crate) fn describe() {
    let none = Unit::Count;
    describe_histogram!(BATCH_ENTRIES, none, "Entries in a batch to an instance.");
    describe_histogram!(
        BATCH_DURATION,
        Unit::Seconds,
        "Time from sending a batch to an instance to its answer or failure."
    );
    describe_counter!(
        REPEATS,
        none,
        "Further tries of messages, by the reason; hedge is a second one beside a slow first."
    );
    describe_counter!(INSTANCE_FAILURES, none, "How often an instance went down.");
    describe_counter!(READS_RESUMED, none, "GETs continued on another instance.");
    describe_counter!(READS_ABORTED, none, "GETs that no instance could continue.");
    describe_gauge!(
        INSTANCE_UP,
        none,
        "1 while an instance gets messages, or 0."
    );
    describe_gauge!(QUEUE, Unit::Bytes, "Entries that wait for a batch.");
    describe_gauge!(
        FREE_PERMITS,
        none,
        "Further requests of a kind that would be served now."
    );
    describe_gauge!(
        FREE_MEMORY,
        Unit::Bytes,
        "What is left of the memory for single messages."
    );
    describe_counter!(
        POSTED,
        Unit::Bytes,
        "Bytes of the messages that were stored."
    );
    describe_counter!(READ, Unit::Bytes, "Bytes of GETs of the log.");
    for name in [READS_RESUMED, READS_ABORTED] {
        counter!(name).increment(0);
    }
    for reason in Trouble::ALL.map(Trouble::word).into_iter().chain([HEDGE]) {
        counter!(REPEATS, "reason" => reason).increment(0);
    }
}

pub(crate) async fn show(State(app): State<App>, headers: HeaderMap) -> Response {
    for instance in app.pool.instances() {
        let is_up = if instance.health.is_up() { 1.0 } else { 0.0 };
        let name = &instance.name;
        gauge!(INSTANCE_UP, "upstream" => name.clone()).set(is_up);
        gauge!(QUEUE, "upstream" => name.clone()).set(instance.batcher.queued_bytes() as f64);
        counter!(INSTANCE_FAILURES, "upstream" => name.clone()).increment(0);
    }
    for (kind, permits) in [
        ("read", &app.reads),
        ("upload", &app.uploads),
        ("statistics", &app.statistics),
    ] {
        gauge!(FREE_PERMITS, "kind" => kind).set(permits.available_permits() as f64);
    }
    for (method, budget) in [("POST", &app.posts), ("GET", &app.lookups)] {
        gauge!(FREE_MEMORY, "method" => method).set(budget.available_permits() as f64);
    }
    counter!(POSTED).absolute(app.counters.posted_bytes());
    counter!(READ).absolute(app.counters.read_bytes());
    metrics::show(&headers)
}
