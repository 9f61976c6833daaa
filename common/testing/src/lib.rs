//! What the tests of several crates share.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

/// What every command line must do.
pub mod command_line;
/// An empty map of each engine.
pub mod engine;
/// Starts a service as a real process.
pub mod process;
/// Starts real Redis servers and clusters.
pub mod redis_servers;
/// What not every machine gives.
pub mod requirements;
