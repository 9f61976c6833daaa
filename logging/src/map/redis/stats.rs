//! The statistics of the members: each is asked how many entries it has and what they take.

use common::api::{MapStats, MemberStats, Role};
use futures_util::future::join_all;
use redis::{ErrorKind, RedisError, RedisResult, Value, from_redis_value};
use tokio::time::timeout;

use super::cluster::{Cluster, Topology};
use super::config::{Address, RedisConfig};
use super::connection;
use super::partition::{self, LAYOUT, MARKS, entries_key};
use super::replies::ServerInfo;
use crate::map::contract::STATS_TIMEOUT;

/// Asks all known members at once.
pub(super) async fn stats(config: &RedisConfig, cluster: &Cluster) -> MapStats {
    let state = cluster.state();
    let topology = &state.topology;
    let mut addresses: Vec<&Address> = topology.connections.keys().collect();
    addresses.sort();
    let is_cluster = state.infos.values().any(|info| info.is_cluster_enabled);
    let rows = addresses.iter().map(async |address| {
        let own = owned(topology, address);
        let primary = topology.primaries.get(address);
        let (role, partitions) = match primary.filter(|_| own.is_empty()) {
            Some(primary) => (Role::Replica, owned(topology, primary)),
            None => (Role::Primary, own),
        };
        let asked = ask(config, address, is_cluster, &partitions);
        let Ok(Ok(answer)) = timeout(STATS_TIMEOUT, asked).await else {
            return MemberStats::down(address.to_string(), role);
        };
        let is_primary = role == Role::Primary;
        let split = |number| match is_primary {
            true => (Some(number), Some(0)),
            false => (Some(0), Some(number)),
        };
        let (entries, backups) = split(answer.entries);
        let (entry_memory_bytes, backup_memory_bytes) = split(answer.info.dataset_memory);
        let gets = partitions.iter().map(|partition| cluster.gets(*partition));
        MemberStats {
            member: address.to_string(),
            role,
            up: true,
            partitions: Some(partitions.len() as u64),
            entries,
            gets: Some(if is_primary { gets.sum() } else { 0 }),
            puts: entries,
            entry_memory_bytes,
            backups,
            backup_memory_bytes,
            used_memory_bytes: Some(answer.info.used_memory),
        }
    });
    let members = join_all(rows).await;
    MapStats {
        engine: if is_cluster { "redis-cluster" } else { "redis" }.to_owned(),
        layout: LAYOUT,
        members,
        problem: (!state.topology.is_whole()).then(|| cluster.unowned_reason()),
    }
}

fn owned(topology: &Topology, primary: &Address) -> Vec<u16> {
    let is_owner = |shard: usize| topology.shards[shard].connection.address == *primary;
    let partitions = partition::all();
    partitions
        .filter(|partition| topology.owner(*partition).is_some_and(is_owner))
        .collect()
}

struct Answer {
    info: ServerInfo,
    entries: u64,
}

/// Asks one member, on a connection for this alone: `READONLY`, which lets a replica count, would let it
/// answer reads too.
async fn ask(
    config: &RedisConfig,
    address: &Address,
    is_cluster: bool,
    partitions: &[u16],
) -> RedisResult<Answer> {
    let mut connection = connection::connect(&config.client(address), STATS_TIMEOUT).await?;
    let mut commands = redis::pipe();
    if is_cluster {
        commands.cmd("READONLY").ignore();
    }
    commands.cmd("INFO");
    for partition in partitions {
        commands.cmd("ZCARD").arg(entries_key(*partition));
    }
    let mut replies = connection::send(&mut connection, &commands)
        .await?
        .into_iter();
    if is_cluster {
        replies.next();
    }
    let info: String = from_redis_value(replies.next().unwrap_or(Value::Nil))?;
    let mut entries = 0;
    for reply in replies {
        let members: u64 = from_redis_value(reply)?;
        let count = members.checked_sub(MARKS);
        entries += count.ok_or_else(|| {
            RedisError::from((ErrorKind::UnexpectedReturnType, "a partition is missing"))
        })?;
    }
    let info = ServerInfo::parse(&info);
    Ok(Answer { info, entries })
}
