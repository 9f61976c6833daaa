//! What at least two of the services need: the entry, the wire between facade and logging, problem+json
//! answers, configuration, serving, health checks and telemetry.
//!
//! Nothing that only one service uses lives here.

#![warn(missing_docs)]

pub mod api;
pub mod body;
pub mod bounds;
pub mod config;
pub mod entry;
pub mod escape;
pub mod health;
pub mod json;
pub mod metrics;
pub mod middleware;
pub mod problem;
pub mod serve;
pub mod telemetry;
pub mod traces;
