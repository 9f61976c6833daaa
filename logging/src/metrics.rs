//! `GET /metrics`: what an instance measures besides requests. What only a scrape needs is read then;
//! the rest is counted where it happens.

use std::sync::Arc;

use ::metrics::{counter, gauge, histogram};
use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::Response;
use common::api::Role;
use common::metrics;

use crate::state::App;

pub(crate) const PUT_ENTRIES: &str = "logging_put_entries";
pub(crate) const PUT_DURATION: &str = "logging_put_duration_seconds";
pub(crate) const COMMIT_ENTRIES: &str = "logging_commit_entries";
pub(crate) const COMMIT_DURATION: &str = "logging_commit_duration_seconds";
/// By its address and role.
pub(crate) const SERVER_UP: &str = "logging_map_server_up";
/// By its address.
pub(crate) const PRIMARY_OPEN: &str = "logging_map_primary_open";
/// By its address.
pub(crate) const SERVER_MEMORY: &str = "logging_map_server_memory_bytes";
pub(crate) const SERVER_MAX_MEMORY: &str = "logging_map_server_max_memory_bytes";
/// By the member that owns them.
const MAP_ENTRIES: &str = "logging_map_entries";
const MAP_ENTRY_BYTES: &str = "logging_map_entry_bytes";
pub(crate) const FREE_QUEUE: &str = "logging_free_queue_bytes";
const ENTRIES: &str = "logging_entries_total";
const IN_FLIGHT: &str = "logging_puts_in_flight";
const FREE_PERMITS: &str = "logging_free_permits";
const READY: &str = "logging_ready";
const FREE_MEMORY: &str = "logging_free_memory_bytes";

/// Describes the metrics, and has the histograms shown before their first value.
pub(crate) fn describe() {
    metrics::describe(&[
        (PUT_ENTRIES, "Entries in a batch from a facade."),
        (
            PUT_DURATION,
            "Time of putting a batch: waiting for the group before, and its own commit.",
        ),
        (COMMIT_ENTRIES, "Entries in a group commit."),
        (
            COMMIT_DURATION,
            "Time of a group commit, the wait for the write lock included.",
        ),
        (SERVER_UP, "1 while a Redis server answers, or 0."),
        (PRIMARY_OPEN, "1 while a Redis primary takes entries, or 0."),
        (MAP_ENTRIES, "Entries that a member of the map owns."),
        (
            MAP_ENTRY_BYTES,
            "What the entries that a member of the map owns take there.",
        ),
        (SERVER_MEMORY, "The memory that a Redis server uses."),
        (
            SERVER_MAX_MEMORY,
            "The maxmemory of a Redis server; 0 is no limit.",
        ),
        (
            FREE_QUEUE,
            "What is left of the memory for batches in the map.",
        ),
        (ENTRIES, "Entries received for putting, by their outcome."),
        (IN_FLIGHT, "Batches that are being put."),
        (
            FREE_PERMITS,
            "Further requests of a kind that would be served now.",
        ),
        (FREE_MEMORY, "What is left of the memory for bodies."),
        (READY, "1 while the instance can read and store, or 0."),
    ]);
    for name in [PUT_ENTRIES, PUT_DURATION, COMMIT_ENTRIES, COMMIT_DURATION] {
        let _ = histogram!(name);
    }
}

pub(crate) async fn show(State(app): State<Arc<App>>, headers: HeaderMap) -> Response {
    app.map.measure();
    let report = app.report.get().await;
    for member in &report.map.members {
        let numbers = [
            (MAP_ENTRIES, member.entries),
            (MAP_ENTRY_BYTES, member.entry_memory_bytes),
        ];
        for (name, number) in numbers {
            if let Some(number) = number.filter(|_| member.role != Role::Replica) {
                gauge!(name, "member" => member.member.clone()).set(number as f64);
            }
        }
    }
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
    gauge!(FREE_PERMITS, "kind" => "read").set(app.reads.free() as f64);
    let is_ready = report.health.not_ready.is_none();
    gauge!(READY).set(f64::from(u8::from(is_ready)));
    gauge!(FREE_MEMORY).set(app.posts.free() as f64);
    metrics::show(&headers)
}
