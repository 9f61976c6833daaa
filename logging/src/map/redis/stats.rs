//! The statistics of the members: each is asked how many entries it has and what they take.

use std::time::Duration;

use common::api::{MapStats, MemberStats, Role};
use futures_util::future::join_all;
use redis::{ErrorKind, RedisError, RedisResult, Value, from_redis_value};
use tokio::time::timeout;

use super::cluster::{Cluster, ClusterState};
use super::config::{Address, RedisConfig};
use super::connection;
use super::partition::{self, LAYOUT, MARKS, entries_key};
use super::replies::ServerInfo;

/// How long a member may take; then its row says that it is down.
const MEMBER_TIMEOUT: Duration = Duration::from_millis(400);

/// Asks all known members at once.
pub(super) async fn stats(config: &RedisConfig, cluster: &Cluster) -> MapStats {
    let state = cluster.state();
    let rows = state.infos.iter().map(async |(address, info)| {
        let (role, partitions) = match &info.primary_id {
            Some(primary) => (Role::Replica, owned(&state, |owner| owner.id == *primary)),
            None => (Role::Primary, owned(&state, |owner| owner.id == info.id)),
        };
        let is_cluster = info.is_cluster_enabled;
        let asked = ask(config, address, is_cluster, &partitions);
        let Ok(Ok(answer)) = timeout(MEMBER_TIMEOUT, asked).await else {
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
    let is_cluster = state.infos.values().any(|info| info.is_cluster_enabled);
    let members = join_all(rows).await;
    MapStats {
        engine: if is_cluster { "redis-cluster" } else { "redis" }.to_owned(),
        layout: LAYOUT,
        members,
        problem: (!state.topology.is_whole()).then(|| cluster.unowned_reason()),
    }
}

/// The partitions of the primary that is meant.
fn owned(state: &ClusterState, is_meant: impl Fn(&ServerInfo) -> bool) -> Vec<u16> {
    let owner = |partition| {
        let shard = &state.topology.shards[state.topology.owner(partition)?];
        state.infos.get(&shard.connection.address)
    };
    let partitions = partition::all();
    partitions
        .filter(|partition| owner(*partition).is_some_and(&is_meant))
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
    let mut connection = connection::connect(&config.client(address), MEMBER_TIMEOUT).await?;
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
