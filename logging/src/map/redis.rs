//! The engine for more than one machine: a Redis server, or a Redis Cluster whose primaries share
//! the partitions and whose replicas are the backups.
//!
//! `partition` is the layout in Redis; `discovery` finds out which primary owns each partition and
//! publishes it to `cluster`; `primary_writer` writes to a primary, `query` reads from partitions, and
//! `cursor` merges reads over all of them.
//!
//! An entry is acknowledged when its primary and `--backups` replicas have it. In a shard of just
//! so many members every one of them has every acknowledged entry, so whichever of them serves
//! reads, also one that was paused or cut off and does not know that it was replaced, gives them
//! all. That is why more replicas than backups are warned about.

mod cluster;
mod config;
mod connection;
mod cursor;
mod discovery;
mod map_id;
mod partition;
mod primary;
mod primary_writer;
mod query;
mod replies;
mod timeouts;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use common::bounds::Bounds;
use common::entry::{Entry, Outcome};
use futures_util::future::join_all;
use uuid::Uuid;

pub use self::config::RedisConfig;

use self::cluster::Cluster;
use self::cursor::RedisCursor;
use self::timeouts::in_time;
use super::contract::{Cursor, DistributedMap, Health, MapError, Options};
use super::queue::WriteBudget;

/// A map whose entries are on Redis servers.
#[derive(Debug)]
pub(super) struct RedisMap {
    cluster: Arc<Cluster>,
    budget: WriteBudget,
    store_timeout: Duration,
}

impl RedisMap {
    /// Begins to look for the servers; what needs them before they are found fails.
    pub(super) fn open(config: RedisConfig, options: Options) -> Self {
        Self {
            store_timeout: options.store_timeout,
            cluster: Arc::new(discovery::start(config, options)),
            budget: WriteBudget::default(),
        }
    }
}

#[async_trait]
impl DistributedMap for RedisMap {
    fn id(&self) -> Option<Uuid> {
        self.cluster.map_id()
    }

    async fn put(&self, entries: Arc<[Entry]>) -> Vec<Outcome> {
        let topology = self.cluster.topology();
        let mut places: Vec<Vec<usize>> = vec![Vec::new(); topology.shards.len()];
        let mut outcomes = vec![Outcome::unknown("no outcome was told"); entries.len()];
        for (place, entry) in entries.iter().enumerate() {
            match topology.owner(partition::of(entry.uuid)) {
                Some(shard) => places[shard].push(place),
                None => {
                    self.cluster.start_discovery();
                    outcomes[place] = Outcome::partition_down(self.cluster.unowned_reason());
                }
            }
        }
        let groups = topology.shards.iter().zip(&places);
        let groups = groups.filter(|(_, places)| !places.is_empty());
        let puts = groups.map(async |(shard, places)| {
            let batch = places.iter().map(|place| entries[*place].clone());
            (
                places,
                shard.writer.put(&self.budget, batch.collect()).await,
            )
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
        in_time(self.store_timeout, query::get(&self.cluster, uuid)).await
    }

    fn read(&self, bounds: Bounds) -> Box<dyn Cursor> {
        let cluster = self.cluster.clone();
        Box::new(RedisCursor::new(cluster, self.store_timeout, bounds))
    }

    async fn last(&self) -> Result<Option<Uuid>, MapError> {
        in_time(self.store_timeout, query::last(&self.cluster)).await
    }

    async fn health(&self) -> Health {
        let topology = self.cluster.topology();
        let writers = topology.shards.iter().map(|shard| &shard.writer);
        // A writer remembers what came of it.
        join_all(writers.map(|writer| writer.put(&self.budget, Arc::new([])))).await;
        self.cluster.health()
    }
}
