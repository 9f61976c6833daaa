//! The code that at least two of the services share, and the first page about the workspace.
//!
//! # The workspace
//!
//! Three services keep a log of messages. A request passes through their crates in this order:
//!
//! 1. [`facade`](../facade/index.html), the public service, gives each message a UUID, stores it through a
//!    random logging instance, and merges the log with the reply of the messages service.
//! 2. [`logging`](../logging/index.html), several instances, stores entries in the shared map: LMDB or Redis.
//! 3. [`messages`](../messages/index.html) is a stub with one reply.
//!
//! [`testing`](../testing/index.html) has the fixtures of their tests. ARCHITECTURE.md has the invariants, and
//! follows a POST, a GET and a failure; docs/glossary.md explains the words.
//!
//! # This crate
//!
//! - A service starts with [`config`], [`telemetry`] and [`serve`]; [`output`] prints its log.
//! - A request passes through [`middleware`] and the [`door`]; [`body`] reads it within a memory budget,
//!   of which [`permits`] gives each [`client`] a share, and [`pace`] is what a client must keep.
//! - [`files`] follows files that change, [`tls`] makes certificates of them.
//! - [`entry`] is what the services store, [`bounds`] a part of the log.
//! - [`api`] is the wire between facade and logging.
//! - A response is written by [`json`] or [`problem`]; [`escape`] makes text safe to print.
//! - [`health`] answers `/livez` and `/readyz`, from the [`latest`] check.
//!
//! Code that only one service uses does not belong here.

#![warn(missing_docs)]

pub mod api;
pub mod body;
pub mod bounds;
pub mod client;
pub mod clock;
pub mod config;
mod connection;
pub mod door;
pub mod entry;
pub mod escape;
pub mod files;
pub mod health;
pub mod json;
pub mod latest;
mod listener;
pub mod metrics;
pub mod middleware;
pub mod output;
pub mod pace;
pub mod permits;
pub mod problem;
pub mod serve;
mod socket;
pub mod telemetry;
pub mod tls;
pub mod traces;
