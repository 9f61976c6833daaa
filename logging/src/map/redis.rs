//! The engine for more than one machine: a Redis server, or a Redis Cluster whose primaries share
//! the partitions and whose replicas are the backups.
//!
//! `partition` is the layout in Redis, `members` knows which primary has what and `discovery` finds it
//! out, `lane` writes to a primary, `query` asks partitions, `cursor` merges
//! reads over all of them.
//!
//! An entry is acknowledged when its primary and `--backups` replicas have it. In a shard of just
//! so many members every one of them has every acknowledged entry, so whichever of them serves
//! reads, also one that was paused or cut off and does not know that it was replaced, gives them
//! all. That is why more replicas than backups are warned about.

mod cursor;
mod discovery;
mod lane;
mod link;
mod map_id;
mod members;
mod nodes;
mod partition;
mod primary;
mod query;
mod servers;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use common::entry::{Entry, Outcome};
use common::read::Bounds;
use futures_util::future::join_all;
use tokio::time::timeout;
use uuid::Uuid;

pub use self::servers::Servers;

use self::cursor::RedisCursor;
use self::members::Members;
use super::job::Room;
use super::{Cursor, DistributedMap, Health, MapError, Options};

/// How long one call to a server may take: less than its caller waits, so that what waits behind one
/// that fails hears the reason, and not only that its time was up.
fn answer_timeout(options: &Options) -> Duration {
    options.store_timeout * 3 / 4
}

/// How long `WAIT` waits: shorter than the whole call may take, so that too few replicas come back as
/// a number.
fn wait_timeout(answer_timeout: Duration) -> Duration {
    answer_timeout * 2 / 3
}

/// A map whose entries are on Redis servers.
#[derive(Debug)]
pub(super) struct RedisMap {
    members: Arc<Members>,
    room: Room,
    store_timeout: Duration,
}

impl RedisMap {
    /// Begins to look for the servers; what needs them before they are found fails.
    pub(super) fn open(servers: Servers, options: Options) -> Self {
        Self {
            store_timeout: options.store_timeout,
            members: Members::discover(servers, options),
            room: Room::default(),
        }
    }
}

/// Reads must be answered as fast as puts: the facade gives up on an instance that hangs.
async fn in_time<T>(
    patience: Duration,
    read: impl Future<Output = Result<T, MapError>>,
) -> Result<T, MapError> {
    let result = timeout(patience, read).await;
    result.unwrap_or_else(|_| {
        let detail = "redis did not give the entries in time";
        Err(MapError::Unavailable(detail.to_owned()))
    })
}

#[async_trait]
impl DistributedMap for RedisMap {
    fn id(&self) -> Option<Uuid> {
        self.members.map_id()
    }

    async fn put(&self, entries: Arc<[Entry]>) -> Vec<Outcome> {
        let topology = self.members.topology();
        let mut places: Vec<Vec<usize>> = vec![Vec::new(); topology.shards.len()];
        let mut outcomes = vec![Outcome::unknown("no outcome was told"); entries.len()];
        for (place, entry) in entries.iter().enumerate() {
            match topology.owner(partition::of(entry.uuid)) {
                Some(shard) => places[shard].push(place),
                None => {
                    self.members.refresh_soon();
                    outcomes[place] = Outcome::partition_down(self.members.trouble());
                }
            }
        }
        let groups = topology.shards.iter().zip(&places);
        let groups = groups.filter(|(_, places)| !places.is_empty());
        let puts = groups.map(async |(shard, places)| {
            let batch = places.iter().map(|place| entries[*place].clone());
            (places, shard.lane.put(&self.room, batch.collect()).await)
        });
        for (places, put) in join_all(puts).await {
            match put {
                Ok(found) => {
                    for (place, outcome) in places.iter().zip(found) {
                        outcomes[*place] = outcome;
                    }
                }
                Err(outcome) => {
                    for place in places {
                        outcomes[*place] = outcome.clone();
                    }
                }
            }
        }
        outcomes
    }

    async fn get(&self, uuid: Uuid) -> Result<Option<String>, MapError> {
        in_time(self.store_timeout, query::get(&self.members, uuid)).await
    }

    fn read(&self, bounds: Bounds) -> Box<dyn Cursor> {
        let members = self.members.clone();
        Box::new(RedisCursor::new(members, self.store_timeout, bounds))
    }

    async fn last(&self) -> Result<Option<Uuid>, MapError> {
        in_time(self.store_timeout, query::last(&self.members)).await
    }

    async fn health(&self) -> Health {
        let topology = self.members.topology();
        let lanes = topology.shards.iter().map(|shard| &shard.lane);
        // A lane remembers what came of it.
        join_all(lanes.map(|lane| lane.put(&self.room, Arc::new([])))).await;
        self.members.health()
    }
}
