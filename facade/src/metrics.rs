//! `GET /metrics`: what the facade measures besides requests. What only a scrape needs is read then;
//! the rest is counted where it happens.

use std::sync::Arc;

use ::metrics::{counter, gauge};
use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::Response;
use common::metrics;

use crate::judge::Trouble;
use crate::state::App;

pub(crate) const BATCH_ENTRIES: &str = "facade_batch_entries";
pub(crate) const BATCH_DURATION: &str = "facade_batch_duration_seconds";
/// By the reason: a [`Trouble`], or [`HEDGE`].
pub(crate) const REPEATS: &str = "facade_repeats_total";
/// The reason of a second try beside a slow first one.
pub(crate) const HEDGE: &str = "hedge";
pub(crate) const INSTANCE_FAILURES: &str = "facade_instance_failures_total";
pub(crate) const READS_RESUMED: &str = "facade_reads_resumed_total";
pub(crate) const READS_ABORTED: &str = "facade_reads_aborted_total";
const INSTANCE_UP: &str = "facade_instance_up";
const QUEUE: &str = "facade_queue_bytes";
const FREE_PERMITS: &str = "facade_free_permits";
const FREE_MEMORY: &str = "facade_free_memory_bytes";
const POSTED: &str = "facade_posted_bytes_total";
const READ: &str = "facade_read_bytes_total";

/// Describes the metrics, and gives the counters that alerts look at a first value.
pub(crate) fn describe() {
    metrics::describe(&[
        (BATCH_ENTRIES, "Entries in a batch to an instance."),
        (
            BATCH_DURATION,
            "Time from sending a batch to an instance to its answer or failure.",
        ),
        (
            REPEATS,
            "Further tries of messages, by the reason; hedge is a second one beside a slow first.",
        ),
        (INSTANCE_FAILURES, "How often an instance went down."),
        (READS_RESUMED, "GETs continued on another instance."),
        (READS_ABORTED, "GETs that no instance could continue."),
        (INSTANCE_UP, "1 while an instance gets messages, or 0."),
        (QUEUE, "Entries that wait for a batch."),
        (
            FREE_PERMITS,
            "Further requests of a kind that would be served now.",
        ),
        (
            FREE_MEMORY,
            "What is left of the memory for single messages.",
        ),
        (POSTED, "Bytes of the messages that were stored."),
        (READ, "Bytes of GETs of the log."),
    ]);
    for name in [READS_RESUMED, READS_ABORTED] {
        counter!(name).increment(0);
    }
    for reason in Trouble::ALL.map(Trouble::word).into_iter().chain([HEDGE]) {
        counter!(REPEATS, "reason" => reason).increment(0);
    }
}

pub(crate) async fn show(State(app): State<Arc<App>>, headers: HeaderMap) -> Response {
    for instance in app.pool.instances() {
        let is_up = if instance.health.is_up() { 1.0 } else { 0.0 };
        let name = &instance.name;
        gauge!(INSTANCE_UP, "upstream" => name.clone()).set(is_up);
        gauge!(QUEUE, "upstream" => name.clone()).set(instance.batcher.queued_bytes() as f64);
        counter!(INSTANCE_FAILURES, "upstream" => name.clone()).increment(0);
    }
    for (kind, free) in [
        ("read", app.reads.free()),
        ("upload", app.uploads.free()),
        ("statistics", app.statistics.available_permits()),
    ] {
        gauge!(FREE_PERMITS, "kind" => kind).set(free as f64);
    }
    for (method, budget) in [("POST", &app.posts), ("GET", &app.lookups)] {
        gauge!(FREE_MEMORY, "method" => method).set(budget.free() as f64);
    }
    counter!(POSTED).absolute(app.counters.posted_bytes());
    counter!(READ).absolute(app.counters.read_bytes());
    metrics::show(&headers)
}
