//! The facade: the only public door. It gives each message a UUID, hands it to a random logging
//! instance, and merges what they hold with the messages service's reply.
//!
//! It keeps nothing: any number of facades may stand side by side.

mod backoff;
pub mod batcher;
pub mod client;
mod config;
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
mod moment;
pub mod pool;
mod post;
mod read;
mod readiness;
mod router;
pub mod served_map;
mod state;
mod upload;
pub mod upstream;

pub use config::Config;
pub use router::router;
pub use state::App;
