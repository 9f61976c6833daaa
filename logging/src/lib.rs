//! A logging instance: an HTTP service that stores entries in the shared distributed map.
//!
//! It keeps no entries, knows no other instance, and logs one line for each acknowledged entry.

mod config;
mod counters;
mod error;
mod get;
pub mod map;
mod metrics;
mod put;
mod readiness;
mod router;
mod state;
mod stats;
pub mod transfer;

pub use config::{Config, Task};
pub use router::router;
pub use state::App;
