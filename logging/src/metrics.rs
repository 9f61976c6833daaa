//! `GET /metrics`: what an instance measures besides requests. What only a scrape needs is read then;
//! the rest is counted where it happens.

use ::metrics::{
    Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram,
};
use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::Response;
use common::metrics;

use crate::state::App;

/// Entries in a batch from a facade.
pub(crate) const PUT_ENTRIES: &str = "logging_put_entries";
/// From the arrival of a batch to its outcomes.
pub(crate) const PUT_DURATION: &str = "logging_put_duration_seconds";
/// Entries in a group commit.
pub(crate) const COMMIT_ENTRIES: &str = "logging_commit_entries";
/// A group commit, the wait for the write lock included.
pub(crate) const COMMIT_DURATION: &str = "logging_commit_duration_seconds";
/// Whether a Redis server answers, by its address and role.
pub(crate) const SERVER_UP: &str = "logging_map_server_up";
/// Whether a Redis primary takes entries, by its address.
pub(crate) const PRIMARY_OPEN: &str = "logging_map_primary_open";
/// What waits for the map's writers.
pub(crate) const FREE_QUEUE: &str = "logging_free_queue_bytes";

const ENTRIES: &str = "logging_entries_total";
const IN_FLIGHT: &str = "logging_puts_in_flight";
const FREE_PERMITS: &str = "logging_free_permits";
const FREE_MEMORY: &str = "logging_free_memory_bytes";

/// Gives each metric its unit and a sentence.
pub(crate) fn describe() {
    let none = Unit::Count;
    describe_histogram!(PUT_ENTRIES, none, "Entries in a batch from a facade.");
    describe_histogram!(
        PUT_DURATION,
        Unit::Seconds,
        "Time of putting a batch: waiting for the group before, and its own commit."
    );
    describe_histogram!(COMMIT_ENTRIES, none, "Entries in a group commit.");
    describe_histogram!(COMMIT_DURATION, Unit::Seconds, "Time of a group commit.");
    describe_gauge!(SERVER_UP, none, "1 while a Redis server answers, or 0.");
    describe_gauge!(
        PRIMARY_OPEN,
        none,
        "1 while a Redis primary takes entries, or 0."
    );
    describe_gauge!(
        FREE_QUEUE,
        Unit::Bytes,
        "What is left of the memory for batches in the map."
    );
    describe_counter!(
        ENTRIES,
        none,
        "Entries received for putting, by their outcome."
    );
    describe_gauge!(IN_FLIGHT, none, "Batches that are being put.");
    describe_gauge!(
        FREE_PERMITS,
        none,
        "Further requests of a kind that would be served now."
    );
    describe_gauge!(
        FREE_MEMORY,
        Unit::Bytes,
        "What is left of the memory for bodies."
    );
    for name in [PUT_ENTRIES, PUT_DURATION, COMMIT_ENTRIES, COMMIT_DURATION] {
        let _ = histogram!(name);
    }
}

pub(crate) async fn show(State(app): State<App>, headers: HeaderMap) -> Response {
    app.map.measure();
    let (outcomes, in_flight) = app.counters.puts();
    for (outcome, count) in [
        ("stored", outcomes.stored),
        ("duplicate", outcomes.duplicate),
        ("conflict", outcomes.conflict),
        ("stale", outcomes.stale),
        ("refused", outcomes.refused),
        ("unknown", outcomes.unknown),
    ] {
        counter!(ENTRIES, "outcome" => outcome).absolute(count);
    }
    gauge!(IN_FLIGHT).set(in_flight as f64);
    for (kind, permits) in [("read", &app.reads), ("statistics", &app.statistics)] {
        gauge!(FREE_PERMITS, "kind" => kind).set(permits.available_permits() as f64);
    }
    gauge!(FREE_MEMORY).set(app.posts.available_permits() as f64);
    metrics::show(&headers)
}
