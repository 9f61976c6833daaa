//! What an instance knows of the map on its servers: the id, the settle window and the clock.
//!
//! The clock begins at the median of the primaries' clocks, continues by the time since this machine's
//! boot, and follows the median slowly, so no step of one clock moves it. It is never behind what was told as
//! settled: each reply of a primary has the floors of the partitions that were used.

use std::sync::{OnceLock, Weak};
use std::time::{Duration, SystemTime};

use common::clock::MapClock;
use common::entry::time_of;
use futures_util::future::join_all;
use parking_lot::Mutex;
use redis::{Value, from_redis_value};
use tokio::time::sleep;
use uuid::Uuid;

use super::cluster::{Cluster, Shard};
use super::config::Address;
use super::partition::floor_key;
use crate::map::contract::Clocks;
use crate::map::rules::{clock_at, clock_problem};

/// The interval between two readings of the primaries' clocks, and until the first one succeeds.
const READ_INTERVAL: Duration = Duration::from_secs(1);
const FIRST_INTERVAL: Duration = Duration::from_millis(100);

#[derive(Debug, Default)]
pub(super) struct KnownMap {
    map: OnceLock<Properties>,
    clock: MapClock,
    /// The clocks of the primaries at the last reading.
    clocks: Mutex<PrimaryClocks>,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Properties {
    pub(super) id: Uuid,
    /// The settle window, in milliseconds.
    pub(super) settle: u64,
}

/// Each with its server.
#[derive(Debug, Default)]
struct PrimaryClocks {
    /// Their median.
    median: MapClock,
    problems: Vec<String>,
}

impl KnownMap {
    /// What the servers have of the map, and the map's clock now; `None` until both are known.
    pub(super) fn get(&self) -> Option<(Properties, SystemTime)> {
        Some((*self.map.get()?, self.clock.now()?))
    }

    pub(super) fn set(&self, properties: Properties) {
        self.map.get_or_init(|| properties);
    }

    pub(super) fn id(&self) -> Option<Uuid> {
        Some(self.map.get()?.id)
    }

    pub(super) fn settle(&self) -> Option<u64> {
        Some(self.map.get()?.settle)
    }

    pub(super) fn clocks(&self) -> Option<Clocks> {
        let clocks = self.clocks.lock();
        Some(Clocks {
            map: self.clock.now()?,
            machine: clocks.median.now()?,
        })
    }

    /// The primaries whose clocks differ from the map's.
    pub(super) fn problems(&self) -> Vec<String> {
        let clocks = self.clocks.lock();
        clocks.problems.clone()
    }

    /// Moves the clock ahead to what it had shown when this floor was told.
    pub(super) fn note_floor(&self, floor: u64) {
        if let Some(settle) = self.settle().filter(|_| floor > 0) {
            self.clock.advance_to(time_of(clock_at(floor, settle)));
        }
    }

    /// Follows the clocks of the primaries that answered, which must be more than half of `primaries`.
    fn follow(&self, mut answered: Vec<(Address, SystemTime)>, primaries: usize) {
        if 2 * answered.len() <= primaries {
            return;
        }
        answered.sort_by_key(|(_, time)| *time);
        // Of two in the middle the earlier: a clock that is behind is moved ahead by the first floor.
        let (_, median) = answered[(answered.len() - 1) / 2];
        self.clock.follow(median);
        let map = self.clock.now().unwrap_or(median);
        let problems = answered
            .iter()
            .filter_map(|(address, time)| clock_problem(&format!("redis {address}"), *time, map));
        let mut clocks = self.clocks.lock();
        clocks.median.set(median);
        clocks.problems = problems.collect();
    }
}

/// Reads the primaries' clocks until the cluster is dropped.
pub(super) async fn keep_clock(cluster: Weak<Cluster>) {
    while let Some(cluster) = cluster.upgrade() {
        read_clocks(&cluster).await;
        let is_known = cluster.known.get().is_some();
        drop(cluster);
        sleep(if is_known {
            READ_INTERVAL
        } else {
            FIRST_INTERVAL
        })
        .await;
    }
}

async fn read_clocks(cluster: &Cluster) {
    if cluster.known.settle().is_none() {
        return;
    }
    let topology = cluster.topology();
    let asked = topology.shards.iter().map(async |shard| ask(shard).await);
    let answers = join_all(asked).await.into_iter().flatten();
    let mut clocks = Vec::new();
    for (address, time, floor) in answers {
        cluster.known.note_floor(floor);
        clocks.push((address, time));
    }
    cluster.known.follow(clocks, topology.shards.len());
}

/// A primary's clock, and the floor of one of its partitions.
async fn ask(shard: &Shard) -> Option<(Address, SystemTime, u64)> {
    let partition = *shard.writer.partitions().first()?;
    let mut commands = redis::pipe();
    commands.cmd("TIME").cmd("GET").arg(floor_key(partition));
    let replies = shard.connection.ask(&commands).await.ok()?;
    let [time, floor] = <[Value; 2]>::try_from(replies).ok()?;
    let (seconds, micros) = from_redis_value::<(u64, u64)>(time).ok()?;
    let floor = from_redis_value::<Option<u64>>(floor).ok()?;
    let millis = seconds * 1000 + micros / 1000;
    Some((
        shard.connection.address.clone(),
        time_of(millis),
        floor.unwrap_or(0),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known(settle: u64) -> KnownMap {
        let known = KnownMap::default();
        let id = Uuid::nil();
        known.set(Properties { id, settle });
        known
    }

    fn clocks(seconds: &[u64]) -> Vec<(Address, SystemTime)> {
        let address = |port| Address {
            host: "127.0.0.1".to_owned(),
            port,
        };
        let ports = 7001..;
        let clocks = seconds.iter().zip(ports);
        clocks
            .map(|(seconds, port)| (address(port), time_of(seconds * 1000)))
            .collect()
    }

    fn shown(known: &KnownMap) -> Option<u64> {
        let (_, now) = known.get()?;
        Some(
            now.duration_since(SystemTime::UNIX_EPOCH)
                .expect("after it")
                .as_secs(),
        )
    }

    #[test]
    fn clock_begins_at_the_median_of_most_primaries() {
        for (answered, primaries, expected) in [
            (&[1000, 1001, 1061][..], 3, Some(1001)),
            (&[940, 1000, 1001], 3, Some(1000)),
            (&[1000, 1060], 3, Some(1000)),
            (&[1000], 3, None),
            (&[], 0, None),
            (&[1060], 1, Some(1060)),
        ] {
            let known = known(10_000);
            known.follow(clocks(answered), primaries);
            assert_eq!(shown(&known), expected, "{answered:?} of {primaries}");
        }
    }

    #[test]
    fn stepped_primary_is_named_and_not_followed() {
        let known = known(10_000);
        known.follow(clocks(&[1000, 1000, 1000]), 3);
        assert_eq!(known.problems(), Vec::<String>::new());
        known.follow(clocks(&[1000, 1060, 1000]), 3);
        assert_eq!(shown(&known), Some(1000));
        let problems = known.problems();
        assert!(
            problems.len() == 1 && problems[0].contains("127.0.0.1:7002 is "),
            "{problems:?}"
        );
    }

    #[test]
    fn clock_is_never_behind_what_was_told_as_settled() {
        let known = known(10_000);
        known.note_floor(1_049_000);
        known.follow(clocks(&[1000]), 1);
        assert_eq!(shown(&known), Some(1060));
    }
}
