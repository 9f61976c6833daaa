//! Tests of the whole system as its callers see it, through HTTP.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

/// Posters and a reader who record what they saw.
mod load;
/// The services as real processes.
mod processes;
/// Starts the services in-process, each on a free port.
mod system;

/// What requests and answers may keep in memory, and uploads when the process stops.
mod bounds;
/// Uploads of many messages.
mod bulk;
/// A clock that is wrong.
mod clock;
/// Redis servers that die, hang and return while the system is used.
mod cluster;
/// The shipped containers.
mod compose;
/// Flags, variables, and the task `healthcheck`.
mod configuration;
/// What the exercise asks for, on real processes.
mod exercise;
/// Instances that die, hang and return, as real processes.
mod failover;
/// What becomes of messages that are not stored at the first try.
mod fates;
/// GET: formats, bounds, single entries, what happens when something is away.
mod get;
/// Paths, methods, request ids, health.
mod http;
/// A million entries, slow readers, memory.
mod large;
/// Metrics, and the dashboard and alerts that use them.
mod metrics;
/// More messages than the instances can store.
mod overload;
/// POST of one message: every accepted shape, every refusal, keys.
mod post;
/// The scripts that a newcomer runs first.
mod scripts;
/// Instances that are sick but answer, proxies, strangers, bursts behind a paused one.
mod sick;
/// Promises 1 to 4 and 6 to 8 on a simulated network and clock, for many seeds.
mod simulated;
/// Statistics.
mod stats;
/// Traces of requests.
mod traces;
