//! The engines of the map, each of which gives a test an empty map.

use std::any::Any;
use std::fmt;
use std::time::Duration;

use logging::map::DistributedMap;
use parking_lot::{Condvar, Mutex};

use crate::process::LOOK_AGAIN;
use crate::redis_servers::{RedisCluster, RedisServer};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    Lmdb,
    RedisServer,
    RedisCluster,
}

/// An empty map; dropping it removes the map.
pub struct EmptyMap {
    /// Its location, for `--map`.
    pub location: String,
    _keeper: Box<dyn Any + Send + Sync>,
}

impl fmt::Debug for EmptyMap {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.location)
    }
}

/// A cluster takes seconds to start, so all tests that do not kill its members use this one, in turn.
static SHARED: Mutex<Shared> = Mutex::new(Shared::NotStarted);
static RETURNED: Condvar = Condvar::new();

enum Shared {
    NotStarted,
    Free(RedisCluster),
    InUse,
}

/// The shared cluster while a test uses it.
struct Borrowed(Option<RedisCluster>);

impl Borrowed {
    fn wait_for() -> Self {
        let mut shared = SHARED.lock();
        let is_in_use = |shared: &mut Shared| matches!(shared, Shared::InUse);
        RETURNED.wait_while(&mut shared, is_in_use);
        let cluster = match std::mem::replace(&mut *shared, Shared::NotStarted) {
            Shared::Free(cluster) => cluster,
            Shared::NotStarted | Shared::InUse => RedisCluster::start(),
        };
        *shared = Shared::InUse;
        Self(Some(cluster))
    }
}

impl Drop for Borrowed {
    fn drop(&mut self) {
        let mut shared = SHARED.lock();
        *shared = self.0.take().map_or(Shared::NotStarted, Shared::Free);
        RETURNED.notify_one();
    }
}

impl Engine {
    pub fn empty_map(self) -> EmptyMap {
        let folder = tempfile::tempdir().unwrap();
        let (location, keeper): (String, Box<dyn Any + Send + Sync>) = match self {
            Self::Lmdb => {
                let location = format!("lmdb:{}", folder.path().join("map").display());
                (location, Box::new(folder))
            }
            Self::RedisServer => {
                let server = RedisServer::single(folder.path());
                let location = format!("redis://{}", server.address());
                (location, Box::new((server, folder)))
            }
            Self::RedisCluster => {
                let borrowed = Borrowed::wait_for();
                let cluster = borrowed.0.as_ref().expect("it is given back on drop only");
                cluster.flush();
                (cluster.url(), Box::new(borrowed))
            }
        };
        EmptyMap {
            location,
            _keeper: keeper,
        }
    }
}

/// Timeout for a map to become ready.
const PATIENCE: Duration = Duration::from_secs(30);

/// Waits until a map is ready.
pub async fn wait_until_ready(map: &dyn DistributedMap) {
    let looking = async {
        while map.health().await.not_ready.is_some() {
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    };
    if tokio::time::timeout(PATIENCE, looking).await.is_err() {
        panic!("the map does not become ready: {:?}", map.health().await);
    }
}
