//! Tests of the logging service and its map.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

/// Servers of the map that are killed before their append-only files are complete.
mod append_only;
/// An instance whose clock is not the map's.
mod clock;
/// Which requests an instance takes: tokens, hosts, origins, content types.
mod door;
/// The files of an LMDB map that are deleted, replaced or cut.
mod files;
/// The folder of an LMDB map that several processes share.
mod folder;
/// The internal HTTP API, in-process.
mod http;
/// Processes that are killed under load.
mod kills;
/// The contract of the map, as one suite for every engine.
mod map;
/// Addresses in `--map` that get other owners.
mod members;
/// Standard output that takes nothing.
mod output;
/// Real processes: full and failing disks, the log, the command line.
mod processes;
/// The failures of a map on Redis: servers that are away, logins, replicas, failovers.
mod redis;
/// Slots of a Redis Cluster that move while the map is used.
mod slots;
/// The subcommands `export` and `import`.
mod transfer;
/// Redis servers that are refused or warned about as the map.
mod which_servers;
