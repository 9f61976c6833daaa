//! The shared distributed map (uuid -> msg): where it lives, and which engine opens it.
//!
//! Entries are immutable and are never deleted and never expire, so every retry is safe.

mod contract;
mod lmdb;
mod queue;
mod redis;
mod rules;

use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;

use common::files::Followed;
pub use common::health::Health;

pub use self::contract::{
    Access, Clocks, Cursor, DistributedMap, MAX_AHEAD, MAX_SKEW, MapError, Options, Piece,
    PieceLimit, READ_AHEAD,
};
pub use self::redis::RedisConfig;

/// The engine and where its data is.
#[derive(Clone, Debug)]
pub enum Location {
    /// `lmdb:FOLDER`: one folder shared by the logging processes of one machine.
    Lmdb(PathBuf),
    /// `redis://…`: a Redis server, or members of a Redis Cluster.
    Redis(RedisConfig),
}

impl Location {
    /// The location with the password that was not given in its text; a changed one counts for new connections.
    ///
    /// # Errors
    /// When the two contradict each other, as a line for the operator.
    pub fn with_password(self, password: Option<Followed<String>>) -> Result<Self, String> {
        match self {
            Self::Redis(config) => config.with_password(password).map(Self::Redis),
            Self::Lmdb(_) if password.is_some() => {
                Err("an lmdb map has no password; leave --map-password-file out".to_owned())
            }
            Self::Lmdb(_) => Ok(self),
        }
    }
}

impl FromStr for Location {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.split_once(':') {
            Some(("lmdb", folder)) if folder.starts_with('~') => Err(
                "the shell expands ~ only at the beginning of a word: write lmdb:$HOME/FOLDER"
                    .to_owned(),
            ),
            Some(("lmdb", folder)) if !folder.is_empty() => Ok(Self::Lmdb(folder.into())),
            Some(("redis" | "rediss", _)) => Ok(Self::Redis(text.parse()?)),
            _ => {
                Err("write lmdb:FOLDER or redis://HOST:PORT, for example lmdb:data/map".to_owned())
            }
        }
    }
}

/// Opens the map at `location`, on Redis without waiting for a server. All that open one location share a map.
///
/// # Errors
/// Why the map cannot be opened, for the operator.
pub fn open(location: &Location, options: Options) -> anyhow::Result<Arc<dyn DistributedMap>> {
    match location {
        Location::Lmdb(folder) => Ok(Arc::new(lmdb::LmdbMap::open(folder, options)?)),
        Location::Redis(servers) => Ok(Arc::new(redis::RedisMap::open(servers.clone(), options))),
    }
}
