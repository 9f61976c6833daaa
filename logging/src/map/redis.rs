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
use std::time::{Duration, SystemTime};

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
use super::rules::settled_before;

/// A map whose entries are on Redis servers.
#[derive(Debug)]
pub(super) struct RedisMap {
    cluster: Arc<Cluster>,
    budget: WriteBudget,
    store_timeout: Duration,
    settle: Duration,
}

impl RedisMap {
    /// Starts discovery; until it has found the servers, every operation fails.
    pub(super) fn open(config: RedisConfig, options: Options) -> Self {
        Self {
            store_timeout: options.store_timeout,
            settle: options.settle,
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
        let partitions = entries.iter().map(|entry| partition::of(entry.uuid));
        let (groups, unowned) = topology.group(partitions);
        let mut outcomes = vec![Outcome::unknown("redis returned no outcome"); entries.len()];
        if !unowned.is_empty() {
            self.cluster.start_discovery();
        }
        for index in unowned {
            outcomes[index] = Outcome::partition_down(self.cluster.unowned_reason());
        }
        let puts = groups.into_iter().map(async |(shard, indices)| {
            let batch = indices.iter().map(|index| entries[*index].clone());
            let put = shard.writer.put(&self.budget, batch.collect()).await;
            let put = put.unwrap_or_else(|outcome| vec![outcome; indices.len()]);
            indices.into_iter().zip(put)
        });
        for (index, outcome) in join_all(puts).await.into_iter().flatten() {
            outcomes[index] = outcome;
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

    async fn settled(&self) -> Result<SystemTime, MapError> {
        // A script's entries are visible at once, so the clocks alone decide.
        let clock = in_time(self.store_timeout, query::slowest_clock(&self.cluster)).await?;
        Ok(settled_before(clock, self.settle))
    }

    async fn health(&self) -> Health {
        let topology = self.cluster.topology();
        let writers = topology.shards.iter().map(|shard| &shard.writer);
        // Each writer keeps its result as its closed reason.
        join_all(writers.map(|writer| writer.put(&self.budget, Arc::new([])))).await;
        self.cluster.health()
    }

    async fn stats(&self) -> MapStats {
        stats::stats(&self.cluster).await
    }

    fn measure(&self) {
        self.budget.measure();
        self.cluster.measure();
    }
}
