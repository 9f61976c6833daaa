//! Tests of the whole system as its callers see it, through HTTP.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

/// Compares what the facade answers with its description.
mod description;
/// Continuous POSTs and GETs, and their record.
mod load;
/// The services as real processes.
mod processes;
/// Starts the services in-process, each on a free port.
mod system;

/// The memory of requests and responses, and uploads when the facade stops.
mod bounds;
/// Uploads of many messages.
mod bulk;
/// A facade with a wrong clock.
mod clock;
/// Redis servers that die, hang and return under load.
mod cluster;
/// The shipped containers.
mod compose;
/// Flags, environment variables, and the subcommand `healthcheck`.
mod configuration;
/// The console, in a real browser and without one.
mod console;
/// Who may come in: tokens, hosts, origins.
mod door;
/// The requirements of the exercise, on real processes.
mod exercise;
/// Instances that die, hang and return, as real processes.
mod failover;
/// Messages that are not stored at the first try.
mod fates;
/// GETs that follow the log.
mod follow;
/// A full disk, a full memory.
mod full;
/// GET: formats, bounds, single entries, services that are away.
mod get;
/// Clients that want to keep others out.
mod hostile;
/// Paths, methods, request ids, health.
mod http;
/// Keys that several callers use at the same time.
mod keys;
/// A million entries, slow readers, memory.
mod large;
/// Metrics, and the dashboard and alerts that use them.
mod metrics;
/// The description of the API and its page.
mod openapi;
/// Standard output that takes nothing.
mod output;
/// More messages than the instances can store.
mod overload;
/// POST of one message: every accepted shape, every refusal, keys.
mod post;
/// nginx in front of the facade.
mod proxy;
/// The scripts that a newcomer runs first.
mod scripts;
/// Searches of the log.
mod search;
/// Instances that answer wrongly, proxies, other servers, bursts behind a paused instance.
mod sick;
/// Promises 1 to 4 and 6 to 8 on a simulated network and clock, for many seeds.
mod simulated;
/// What is told of a system in which something is wrong.
mod state;
/// Statistics.
mod stats;
/// Traces of requests.
mod traces;
