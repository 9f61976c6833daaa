//! Tests of the logging service and its map.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

/// What every command line must do; the other services' tests use it too.
mod command_line;
/// The internal HTTP API, in-process.
mod http;
/// What every engine of the map promises, and the suite that holds it to that.
mod map;
/// Starting a service as a real process; facade's tests use it too.
mod process;
/// Real processes: kill -9, full and failing disks, the log.
mod processes;
