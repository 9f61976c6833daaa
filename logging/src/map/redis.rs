//! The engine for several machines: a Redis server, or a Redis Cluster whose primaries own the
//! partitions and whose replicas are the backups.
//!
//! `partition` is the layout in Redis; `discovery` finds the primary that owns each partition and
//! publishes the topology to `cluster`; `primary_writer` writes to a primary; `query` reads from
//! partitions, and `cursor` merges reads over all of them.
//!
//! An entry is acknowledged when its primary and `--backups` replicas have it on disk, which `append_only`
//! proves. If a shard has no
//! more replicas than that, each member has every acknowledged entry, and a read is complete even
//! from a paused or disconnected primary that was replaced. More replicas cause a warning.

mod append_only;
mod cluster;
mod config;
mod connection;
mod cursor;
mod discovery;
mod known_map;
mod map_id;
mod members;
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
use common::entry::{Entry, Outcome, millis_at, time_of};
use common::health::Health;
use futures_util::future::join_all;
use uuid::Uuid;

pub use self::config::RedisConfig;

use self::cluster::Cluster;
use self::cursor::RedisCursor;
use self::timeouts::in_time;
use super::contract::{Clocks, Cursor, DistributedMap, MapError, Options, failed_checks};
use super::queue::{Work, WriteBudget};
use super::rules::{settle_problem, settled_at};

/// A map whose entries are on Redis servers.
#[derive(Debug)]
pub(super) struct RedisMap {
    cluster: Arc<Cluster>,
    budget: WriteBudget,
    store_timeout: Duration,
    settle: Option<Duration>,
}

impl RedisMap {
    /// Starts discovery; until it has found the servers, every operation fails.
    pub(super) fn open(config: RedisConfig, options: Options) -> Self {
        let (store_timeout, settle) = (options.store_timeout, options.settle);
        let cluster = Arc::new(discovery::start(config, options));
        tokio::spawn(known_map::keep_clock(Arc::downgrade(&cluster)));
        Self {
            cluster,
            budget: WriteBudget::default(),
            store_timeout,
            settle,
        }
    }

    /// What an operator should know of the primaries' clocks and the settle window.
    fn problems(&self) -> Vec<String> {
        let settle = self.settle_window();
        let settle = settle.and_then(|settle| settle_problem(self.settle, settle));
        let clocks = self.cluster.known.problems();
        clocks.into_iter().chain(settle).collect()
    }
}

#[async_trait]
impl DistributedMap for RedisMap {
    fn id(&self) -> Option<Uuid> {
        self.cluster.known.id()
    }

    async fn put(&self, entries: Arc<[Entry]>) -> Vec<Outcome> {
        if self.cluster.known.get().is_none() {
            let reason = self.cluster.health().not_ready;
            let reason = reason.unwrap_or_else(|| self.cluster.unowned_reason());
            return vec![Outcome::partition_down(reason); entries.len()];
        }
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
            let work = Work::put(batch.collect());
            let put = shard.writer.put(&self.budget, work).await;
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

    async fn part(&self, uuid: Uuid, from: usize, bytes: usize) -> Result<String, MapError> {
        let part = query::part(&self.cluster, uuid, from, bytes);
        in_time(self.store_timeout, part).await
    }

    fn read(&self, bounds: Bounds) -> Box<dyn Cursor> {
        let cluster = self.cluster.clone();
        Box::new(RedisCursor::new(cluster, self.store_timeout, bounds))
    }

    async fn last(&self) -> Result<Option<Uuid>, MapError> {
        in_time(self.store_timeout, query::last(&self.cluster)).await
    }

    fn clocks(&self) -> Option<Clocks> {
        self.cluster.known.clocks()
    }

    fn settle_window(&self) -> Option<Duration> {
        self.cluster.known.settle().map(Duration::from_millis)
    }

    async fn settle(&self, clock: SystemTime) -> Result<SystemTime, MapError> {
        let Some(settle) = self.cluster.known.settle() else {
            let detail = "the map's settle window was not read yet";
            return Err(MapError::Unavailable(detail.to_owned()));
        };
        let floor = settled_at(millis_at(clock), settle);
        let topology = self.cluster.topology();
        let (groups, unowned) = topology.group(partition::all());
        if topology.shards.is_empty() || !unowned.is_empty() {
            self.cluster.start_discovery();
            return Err(MapError::Unavailable(self.cluster.unowned_reason()));
        }
        // What was added before the floor of its partition was raised is visible then.
        let raised = groups.into_iter().map(async |(shard, partitions)| {
            let partitions = partitions.into_iter().map(|partition| partition as u16);
            let work = Work::settle(floor, partitions.collect());
            shard.writer.put(&self.budget, work).await
        });
        for raised in join_all(raised).await {
            let raised = raised.unwrap_or_else(|outcome| vec![outcome]);
            let refused = raised
                .into_iter()
                .find(|outcome| *outcome != Outcome::Stored);
            if let Some(outcome) = refused {
                return Err(MapError::Unavailable(format!("{outcome:?}")));
            }
        }
        Ok(time_of(floor))
    }

    async fn health(&self) -> Health {
        let topology = self.cluster.topology();
        let writers = topology.shards.iter().map(|shard| &shard.writer);
        // Each writer keeps its result as its closed reason.
        join_all(writers.map(|writer| writer.put(&self.budget, Work::default()))).await;
        let mut health = self.cluster.health();
        health.checks.extend(failed_checks(self.problems()));
        health
    }

    async fn stats(&self) -> MapStats {
        stats::stats(&self.cluster).await
    }

    fn measure(&self) {
        self.budget.measure();
        self.cluster.measure();
    }
}
