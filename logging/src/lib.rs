//! A logging instance: a client of the shared distributed map with an HTTP door for the facade.
//!
//! It keeps no entries of its own and knows no other instance; what it stored is in its log, one
//! line an entry.

mod config;
mod error;
mod get;
pub mod map;
mod put;
mod readiness;
mod router;
mod state;
pub mod transfer;

pub use config::{Config, Task};
pub use router::router;
pub use state::App;
