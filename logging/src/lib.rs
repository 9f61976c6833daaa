//! A logging instance: an HTTP service that stores entries in the shared distributed map.
//!
//! It keeps no entries, knows no other instance, and logs one line for each acknowledged entry. The page of
//! [`common`] explains the workspace.
//!
//! # Where to start
//!
//! [`mod@router`] has all routes, [`state`] what the handlers share, [`mod@error`] the status of each error.
//!
//! 1. [`put`] decodes a batch and answers with an outcome for each entry; [`get`] streams entries, or answers one.
//! 2. [`map`] opens an engine; [`map::DistributedMap`] is the contract between the handlers and the engines.
//! 3. In it, `queue` passes batches to the writers of an engine, `lmdb` and `redis` are the engines, and
//!    `rules` has the settle window.
//!
//! [`transfer`] is `export`, `check` and `import`; [`readiness`] and [`stats`] report.

#![allow(
    rustdoc::private_intra_doc_links,
    reason = "the crate's page leads through all modules; documentation of private items has the links"
)]

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
