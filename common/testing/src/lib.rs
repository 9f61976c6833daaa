//! The fixtures that the tests of several crates share: maps, processes, Redis servers.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

/// Assertions on the command line of a service.
pub mod command_line;
/// An empty map of each engine.
pub mod engine;
/// Wall clocks that a test steps.
pub mod fake_clock;
/// Input for parsers that nobody would send on purpose.
pub mod fuzz;
/// Writers that go on while something fails, and what must hold of their entries afterwards.
pub mod load;
/// Starts a service as a real process.
pub mod process;
/// Starts real Redis servers and clusters.
pub mod redis_servers;
/// Requirements that not every machine meets.
pub mod requirements;
