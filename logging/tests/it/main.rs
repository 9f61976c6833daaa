//! Tests of the logging service and its map.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

/// The folder of an LMDB map that several processes share.
mod folder;
/// The internal HTTP API, in-process.
mod http;
/// Processes that are killed under load.
mod kills;
/// What every engine of the map promises, and the suite that holds it to that.
mod map;
/// Real processes: full and failing disks, the log, the command line.
mod processes;
/// What only a map on Redis can do wrong: servers that are away, logins, replicas, moving slots.
mod redis;
/// Slots of a Redis Cluster that move while the map is used.
mod slots;
/// The tasks `export` and `import`.
mod transfer;
/// Which Redis servers are the map, and which could lose it.
mod which_servers;
