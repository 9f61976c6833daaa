//! The statistics of the members: each is asked how many entries it has and what they take.

use common::api::{MapStats, MemberStats, Role};
use futures_util::future::join_all;
use redis::{RedisResult, Value, from_redis_value};
use tokio::time::timeout;

use super::cluster::{Cluster, Topology};
use super::config::Address;
use super::connection::ServerConnection;
use super::partition::{LAYOUT, MARKS, Member, entries_key, first_member};
use super::replies::ServerInfo;
use crate::map::contract::STATS_TIMEOUT;

/// Asks all known members at once.
pub(super) async fn stats(cluster: &Cluster) -> MapStats {
    let state = cluster.state();
    let topology = &state.topology;
    let mut members: Vec<_> = topology.connections.values().collect();
    members.sort_by_key(|member| &member.address);
    let is_cluster = state.infos.values().any(|info| info.is_cluster_enabled);
    let rows = members.into_iter().map(async |member| {
        let address = &member.address;
        let own = owned(topology, address);
        let primary = topology.primaries.get(address);
        let (role, partitions) = match primary.filter(|_| own.is_empty()) {
            Some(primary) => (Role::Replica, owned(topology, primary)),
            None => (Role::Primary, own),
        };
        let asked = ask(cluster, member, is_cluster, &partitions);
        let answered = timeout(STATS_TIMEOUT, asked).await;
        let silent = || Err(format!("redis {address} does not answer"));
        let (info, entries) = match answered.unwrap_or_else(|_| silent()) {
            Ok(answer) => answer,
            Err(problem) => return MemberStats::down(address.to_string(), role, problem),
        };
        let is_primary = role == Role::Primary;
        let split = |number| {
            if is_primary {
                (Some(number), Some(0))
            } else {
                (Some(0), Some(number))
            }
        };
        let (entries, backups) = split(entries);
        let (entry_memory_bytes, backup_memory_bytes) = split(info.dataset_memory);
        let gets = partitions.iter().map(|partition| cluster.gets(*partition));
        MemberStats {
            member: address.to_string(),
            role,
            up: true,
            problem: None,
            partitions: Some(partitions.len() as u64),
            entries,
            gets: Some(if is_primary { gets.sum() } else { 0 }),
            puts: entries,
            entry_memory_bytes,
            backups,
            backup_memory_bytes,
            used_memory_bytes: Some(info.used_memory),
            max_memory_bytes: (info.max_memory > 0).then_some(info.max_memory),
        }
    });
    let members = join_all(rows).await;
    MapStats {
        engine: if is_cluster { "redis-cluster" } else { "redis" }.to_owned(),
        layout: LAYOUT,
        members,
        problem: if state.topology.is_whole() {
            state.map_id_error.clone()
        } else {
            Some(cluster.unowned_reason())
        },
    }
}

fn owned(topology: &Topology, primary: &Address) -> Vec<u16> {
    let mut shards = topology.shards.iter();
    let shard = shards.find(|shard| shard.connection.address == *primary);
    shard.map_or_else(Vec::new, |shard| shard.writer.partitions())
}

/// Asks one member for its `INFO` and its number of entries, on a connection for this alone:
/// `READONLY`, which lets a replica count, would let it answer reads too.
async fn ask(
    cluster: &Cluster,
    member: &ServerConnection,
    is_cluster: bool,
    partitions: &[u16],
) -> Result<(ServerInfo, u64), String> {
    let mut commands = redis::pipe();
    // A user may lack the right to `READONLY`; a primary needs none.
    commands.ignore_errors();
    if is_cluster {
        commands.cmd("READONLY").ignore();
    }
    commands.cmd("INFO");
    for partition in partitions {
        commands.add_command(first_member(*partition));
        commands.cmd("ZCARD").arg(entries_key(*partition));
    }
    let address = &member.address;
    let replies = member.ask_for_statistics(&commands).await;
    let replies = replies.map_err(|error| format!("redis {address} does not answer: {error}"))?;
    let read = || -> RedisResult<_> {
        let mut replies = replies.into_iter();
        let info: String = from_redis_value(replies.next().unwrap_or(Value::Nil))?;
        let (mut entries, mut missing) = (0, 0);
        while let (Some(first), Some(count)) = (replies.next(), replies.next()) {
            let first: Vec<Value> = from_redis_value(first)?;
            let is_marked = first.into_iter().next().is_some_and(|first| {
                let map = Member::read(first);
                matches!(map, Ok(Member::Mark(map)) if cluster.require_mark(&map).is_ok())
            });
            let members: u64 = from_redis_value(count)?;
            match members.checked_sub(MARKS).filter(|_| is_marked) {
                Some(count) => entries += count,
                None => missing += 1,
            }
        }
        Ok((ServerInfo::parse(&info), entries, missing))
    };
    match read().map_err(|error| format!("redis {address} gives no numbers: {error}"))? {
        (info, entries, 0) => Ok((info, entries)),
        (_, _, missing) => Err(format!(
            "redis {address} lacks {missing} of its {} partitions: if it is not a replica that copies them \
             now, restore the map from a copy",
            partitions.len()
        )),
    }
}
