//! The facade: the only public service. It gives each message a UUID, stores it through a random
//! logging instance, and answers a GET with all entries and the messages service's reply.
//!
//! A facade stores nothing itself: any number of facades may run in parallel.

mod backoff;
pub mod batcher;
pub mod client;
mod config;
mod counters;
pub mod delivery;
mod discovery;
pub mod entry_stream;
mod error;
pub mod format;
mod get;
pub mod health;
pub mod identifiers;
mod judge;
pub mod message;
mod metrics;
mod moment;
pub mod pool;
mod post;
mod read;
mod readiness;
mod router;
pub mod served_map;
mod state;
mod stats;
mod upload;
pub mod upstream;

pub use config::Config;
pub use router::router;
pub use state::App;
