//! The facade: the only public service. It gives each message a UUID, stores it through a random
//! logging instance, and answers a GET with all entries and the messages service's reply.
//!
//! A facade stores nothing itself: any number of facades may run in parallel. The page of [`common`] explains
//! the workspace.
//!
//! # Where to start
//!
//! [`mod@router`] has all routes, [`state`] what the handlers share, [`mod@error`] the status of each error.
//!
//! A POST passes through these modules:
//!
//! 1. [`post`], or [`upload`] for many messages, reads the body; [`message`] parses it.
//! 2. [`delivery`] gives the message a UUID of [`identifiers`] and tries it until it is stored; [`judge`] decides
//!    after each try.
//! 3. [`pool`] chooses an instance among those whose [`health`] is good.
//! 4. [`batcher`] queues the message for the instance, [`client`] sends the batch, [`upstream`] has the errors.
//!
//! A GET passes through these:
//!
//! 1. [`get`] parses the bounds, with [`moment`] for times, and chooses a [`mod@format`].
//! 2. [`read`] streams from one instance after the other; [`entry_stream`] checks each line.
//!
//! [`discovery`] finds the instances, [`names`] names them, [`served_map`] decides which map is served.
//! [`collection`] looks at all services once a second; [`stats`] and [`console`], the page, show that. [`common::door`] decides which requests reach them.

#![allow(
    rustdoc::private_intra_doc_links,
    reason = "the crate's page leads through all modules; documentation of private items has the links"
)]

mod backoff;
pub mod batcher;
pub mod client;
mod collection;
mod config;
mod console;
mod counters;
pub mod delivery;
mod discovery;
mod docs;
pub mod entry_stream;
mod error;
mod follow;
pub mod format;
#[cfg(test)]
mod fuzz;
mod get;
pub mod health;
pub mod identifiers;
mod judge;
pub mod message;
mod metrics;
mod moment;
pub mod names;
mod openapi;
pub mod pool;
mod post;
mod read;
mod router;
mod search;
pub mod served_map;
mod state;
mod stats;
mod upload;
pub mod upstream;
mod window;

pub use config::Config;
pub use router::{router, routes};
pub use state::App;
