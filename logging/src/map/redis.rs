//! The engine for several machines: a Redis server, or a Redis Cluster whose primaries own the
//! partitions and whose replicas are the backups.
//!
//! `partition` is the layout in Redis; `discovery` finds the primary that owns each partition and
//! publishes the topology to `cluster`; `primary_writer` writes to a primary; `query` reads from
//! partitions, and `cursor` merges reads over all of them.
//!
//! An entry is acknowledged when its primary and `--backups` replicas have it. If a shard has no
//! more replicas than that, each member has every acknowledged entry, and a read is complete even
//! from a paused or disconnected primary that was replaced. More replicas cause a warning.

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
mod stats;
mod timeouts;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use common::api::MapStats;
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
    config: RedisConfig,
    cluster: Arc<Cluster>,
    budget: WriteBudget,
    store_timeout: Duration,
}

impl RedisMap {
    /// Starts discovery; until it has found the servers, every operation fails.
    pub(super) fn open(config: RedisConfig, options: Options) -> Self {
        Self {
            store_timeout: options.store_timeout,
            cluster: Arc::new(discovery::start(config.clone(), options)),
            config,
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
        let mut indices: Vec<Vec<usize>> = vec![Vec::new(); topology.shards.len()];
        let mut outcomes = vec![Outcome::unknown("redis returned no outcome"); entries.len()];
        for (index, entry) in entries.iter().enumerate() {
            match topology.owner(partition::of(entry.uuid)) {
                Some(shard) => indices[shard].push(index),
                None => {
                    self.cluster.start_discovery();
                    outcomes[index] = Outcome::partition_down(self.cluster.unowned_reason());
                }
            }
        }
        let groups = topology.shards.iter().zip(&indices);
        let groups = groups.filter(|(_, indices)| !indices.is_empty());
        let puts = groups.map(async |(shard, indices)| {
            let batch = indices.iter().map(|index| entries[*index].clone());
            (
                indices,
                shard.writer.put(&self.budget, batch.collect()).await,
            )
        });
        for (indices, put) in join_all(puts).await {
            match put {
                Ok(found) => {
                    for (index, outcome) in indices.iter().zip(found) {
                        outcomes[*index] = outcome;
                    }
                }
                Err(outcome) => {
                    for index in indices {
                        outcomes[*index] = outcome.clone();
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
        // Each writer keeps its result as its closed reason.
        join_all(writers.map(|writer| writer.put(&self.budget, Arc::new([])))).await;
        self.cluster.health()
    }

    async fn stats(&self) -> MapStats {
        stats::stats(&self.config, &self.cluster).await
    }

    fn measure(&self) {
        self.budget.measure();
        self.cluster.measure();
    }
}
