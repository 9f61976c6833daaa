//! What at least two of the services need: the entry and its encodings, reads, problem+json
//! answers, configuration, serving, health checks and telemetry.
//!
//! Nothing that only one service uses lives here.

#![warn(missing_docs)]

pub mod api;
pub mod body;
pub mod config;
pub mod entry;
pub mod healthcheck;
pub mod json;
pub mod problem;
pub mod read;
pub mod server;
pub mod telemetry;
