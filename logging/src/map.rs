//! The shared distributed map (uuid -> msg): where it lives, and which engine opens it.
//!
//! The data is a grow-only set of immutable entries: nothing is deleted, changed or expired. That
//! is what makes every repeat safe.

mod contract;
mod lmdb;
mod queue;
mod redis;
mod rules;

use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;

pub use self::contract::{
    Cursor, DistributedMap, Health, MAX_AHEAD, MAX_SKEW, MapError, Options, Piece, PieceLimit,
    READ_AHEAD,
};
pub use self::redis::RedisConfig;

/// Where the map lives: which engine, and what that engine needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Location {
    /// `lmdb:FOLDER`: one folder shared by the logging processes of one machine.
    Lmdb(PathBuf),
    /// `redis://…`: a Redis server, or members of a Redis Cluster.
    Redis(RedisConfig),
}

impl FromStr for Location {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.split_once(':') {
            Some(("lmdb", folder)) if !folder.is_empty() => Ok(Self::Lmdb(folder.into())),
            Some(("redis" | "rediss", _)) => Ok(Self::Redis(text.parse()?)),
            _ => {
                Err("write lmdb:FOLDER or redis://HOST:PORT, for example lmdb:data/map".to_owned())
            }
        }
    }
}

/// Opens the map at `location`. A Redis map is opened without waiting for its servers.
///
/// # Errors
/// When it cannot be opened, in words for the person who started the service.
pub fn open(location: &Location, options: Options) -> anyhow::Result<Arc<dyn DistributedMap>> {
    match location {
        Location::Lmdb(folder) => Ok(Arc::new(lmdb::LmdbMap::open(folder, options)?)),
        Location::Redis(servers) => Ok(Arc::new(redis::RedisMap::open(servers.clone(), options))),
    }
}
