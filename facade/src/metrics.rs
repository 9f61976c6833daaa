//! `GET /metrics`: what the facade measures besides requests. What only a scrape needs is read then;
//! the rest is counted where it happens.

use std::sync::Arc;

use ::metrics::{Gauge, counter, gauge};
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::response::Response;
use common::metrics;

use crate::follow::Cut;
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
/// The route of an upload: its time is that of all its lines.
pub(crate) const UPLOAD: &str = "upload";
/// By the word of a [`Cut`].
pub(crate) const FOLLOWERS_CUT: &str = "facade_followers_cut_total";
const FOLLOWERS: &str = "facade_followers";
const INSTANCE_UP: &str = "facade_instance_up";
const INSTANCE_READY: &str = "facade_instance_ready";
const MAP_COMPLETE: &str = "facade_map_complete";
const MESSAGES_UP: &str = "facade_messages_up";
const PROBLEMS: &str = "facade_problems";
const QUEUE: &str = "facade_queue_bytes";
const FREE_PERMITS: &str = "facade_free_permits";
const FREE_MEMORY: &str = "facade_free_memory_bytes";
const POSTED: &str = "facade_posted_bytes_total";
const READ: &str = "facade_read_bytes_total";

/// The statuses that alerts compare.
const ALERTED: [StatusCode; 3] = [
    StatusCode::OK,
    StatusCode::INTERNAL_SERVER_ERROR,
    StatusCode::SERVICE_UNAVAILABLE,
];

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
        (FOLLOWERS, "GETs that follow the log now."),
        (FOLLOWERS_CUT, "Followers that were cut, by the reason."),
        (
            INSTANCE_UP,
            "1 while an instance gets messages and answers, or 0.",
        ),
        (
            INSTANCE_READY,
            "1 while an instance can read and store by its own checks, or 0.",
        ),
        (
            MAP_COMPLETE,
            "1 while every member and partition of the map is seen, or 0.",
        ),
        (MESSAGES_UP, "1 while the messages service answers, or 0."),
        (PROBLEMS, "The problems in /stats."),
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
    for reason in Cut::WORDS {
        counter!(FOLLOWERS_CUT, "reason" => reason).increment(0);
    }
    for (method, route) in [
        ("POST", "/"),
        ("POST", UPLOAD),
        ("GET", "/"),
        ("GET", "/{uuid}"),
    ] {
        metrics::expect_requests(method, route, &ALERTED);
    }
}

pub(crate) async fn show(State(app): State<Arc<App>>, headers: HeaderMap) -> Response {
    let collected = app.collected.get().await;
    let set = |gauge: Gauge, is_so: bool| gauge.set(f64::from(u8::from(is_so)));
    for row in &collected.instances {
        let name = || row.name.clone();
        set(gauge!(INSTANCE_UP, "upstream" => name()), row.up);
        set(gauge!(INSTANCE_READY, "upstream" => name()), row.ready);
    }
    let is_whole = collected.map.as_ref().is_some_and(|map| map.is_whole);
    set(gauge!(MAP_COMPLETE), is_whole);
    set(gauge!(MESSAGES_UP), collected.messages.up);
    gauge!(PROBLEMS).set(collected.problems.len() as f64);
    for instance in app.pool.instances() {
        let name = &instance.name;
        gauge!(QUEUE, "upstream" => name.clone()).set(instance.batcher.queued_bytes() as f64);
        counter!(INSTANCE_FAILURES, "upstream" => name.clone()).increment(0);
    }
    for (kind, free) in [("read", app.reads.free()), ("upload", app.uploads.free())] {
        gauge!(FREE_PERMITS, "kind" => kind).set(free as f64);
    }
    for (method, budget) in [("POST", &app.posts), ("GET", &app.lookups)] {
        gauge!(FREE_MEMORY, "method" => method).set(budget.free() as f64);
    }
    gauge!(FOLLOWERS).set(app.followers.count() as f64);
    counter!(POSTED).absolute(app.counters.posted_bytes());
    counter!(READ).absolute(app.counters.read_bytes());
    metrics::show(&headers)
}
