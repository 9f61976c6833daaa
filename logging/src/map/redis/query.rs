//! Reads from partitions: one pipeline to each primary, whatever the number of partitions. While a
//! slot moves, commands follow the redirections of the servers.

use std::sync::Arc;

use common::bounds::Order;
use futures_util::future::try_join_all;
use redis::{Cmd, ServerError, Value};
use uuid::Uuid;

use super::cluster::{Cluster, Topology};
use super::config::Address;
use super::connection::ServerConnection;
use super::partition::{self, Member, entries_key, message_key, unexpected_reply};
use crate::map::contract::MapError;

/// A range of a partition's members to read, in one order.
pub(super) struct Part {
    pub(super) partition: u16,
    /// The [`rank`] of the first UUID in the range.
    pub(super) from: u128,
    /// At most this many members.
    pub(super) count: usize,
}

/// The position of a UUID in an order: the first one has the smallest rank.
pub(super) fn rank(order: Order, uuid: Uuid) -> u128 {
    match order {
        Order::Asc => uuid.as_u128(),
        Order::Desc => !uuid.as_u128(),
    }
}

/// The rank of the first UUID that an entry may have; rank 0 and the last one belong to the marks.
pub(super) const FIRST_RANK: u128 = 1;

/// Reads several ranges. Each has at least one member, as both ends of a partition are marks. Each
/// partition's first mark is read too, so that no other map's entries are taken for this one's.
pub(super) async fn read_parts(
    cluster: &Cluster,
    order: Order,
    parts: &[Part],
) -> Result<Vec<Vec<Member>>, MapError> {
    let partitions = parts.iter().flat_map(|part| [part.partition; 2]);
    let partitions: Vec<u16> = partitions.collect();
    let replies = ask(cluster, &partitions, |index| match index % 2 {
        0 => partition::first_member(partitions[index]),
        _ => range(order, &parts[index / 2]),
    });
    let mut replies = replies.await?.into_iter();
    let read = parts.iter().map(|part| {
        let (Some(Value::Array(first)), Some(Value::Array(found))) =
            (replies.next(), replies.next())
        else {
            return Err(unexpected_reply(&[]));
        };
        let first = first.into_iter().next().map(Member::read).transpose()?;
        let found: Result<Vec<Member>, MapError> = found.into_iter().map(Member::read).collect();
        let found = found?;
        match first {
            Some(Member::Mark(map)) if !found.is_empty() => {
                cluster.require_mark(&map)?;
                Ok(found)
            }
            _ => Err(MapError::Unavailable(format!(
                "partition {} is missing: it is moving, or its primary lost it; if this lasts, see \
                 docs/redis.md, What loses entries",
                part.partition
            ))),
        }
    });
    read.collect()
}

/// The command that reads one range.
fn range(order: Order, part: &Part) -> Cmd {
    let mut command = Cmd::new();
    let (name, from, end) = match order {
        Order::Asc => ("ZRANGEBYLEX", bound(b'[', part.from), "+"),
        // Members that begin with a UUID sort after the bare UUID.
        Order::Desc => (
            "ZREVRANGEBYLEX",
            bound(b'(', (!part.from).saturating_add(1)),
            "-",
        ),
    };
    command.arg(name).arg(entries_key(part.partition));
    command.arg(from).arg(end);
    command.arg("LIMIT").arg(0).arg(part.count);
    command
}

fn bound(kind: u8, uuid: u128) -> Vec<u8> {
    let mut bound = vec![kind];
    bound.extend_from_slice(&uuid.to_be_bytes());
    bound
}

/// Reads large messages, which have separate keys.
pub(super) async fn read_messages(
    cluster: &Cluster,
    uuids: &[Uuid],
) -> Result<Vec<Vec<u8>>, MapError> {
    let partitions: Vec<u16> = uuids.iter().map(|uuid| partition::of(*uuid)).collect();
    let replies = ask(cluster, &partitions, |index| {
        let mut command = redis::cmd("GET");
        command.arg(message_key(uuids[index]));
        command
    });
    let replies = replies.await?.into_iter().zip(uuids);
    let messages = replies.map(|(reply, uuid)| match reply {
        Value::BulkString(message) => Ok(message),
        Value::Nil => Err(missing(*uuid)),
        other => Err(unexpected_reply(&[other])),
    });
    messages.collect()
}

fn missing(uuid: Uuid) -> MapError {
    MapError::Unavailable(format!(
        "the message of entry {uuid} is missing: it is moving, or its primary lost it"
    ))
}

/// See [`DistributedMap::part`](crate::map::DistributedMap::part).
pub(super) async fn part(
    cluster: &Cluster,
    uuid: Uuid,
    from: usize,
    bytes: usize,
) -> Result<String, MapError> {
    let partition = [partition::of(uuid)];
    let replies = ask(cluster, &partition, |_| {
        let mut command = redis::cmd("GETRANGE");
        command
            .arg(message_key(uuid))
            .arg(from)
            .arg(from + bytes - 1);
        command
    });
    let mut part = match replies.await?.pop() {
        Some(Value::BulkString(part)) => part,
        other => return Err(unexpected_reply(&other.into_iter().collect::<Vec<_>>())),
    };
    if let Err(error) = std::str::from_utf8(&part)
        && error.error_len().is_none()
    {
        part.truncate(error.valid_up_to());
    }
    match String::from_utf8(part) {
        // A key that is not there is an empty text.
        Ok(part) if part.is_empty() => Err(missing(uuid)),
        Ok(part) => Ok(part),
        Err(_) => Err(MapError::Damaged(uuid)),
    }
}

pub(super) async fn get(cluster: &Cluster, uuid: Uuid) -> Result<Option<String>, MapError> {
    let part = Part {
        partition: partition::of(uuid),
        from: rank(Order::Asc, uuid),
        count: 1,
    };
    cluster.count_get(part.partition);
    let mut found = read_parts(cluster, Order::Asc, &[part]).await?.remove(0);
    let message = match found.pop() {
        Some(Member::Small(found, message)) if found == uuid => message,
        Some(Member::Large(found, _)) if found == uuid => {
            read_messages(cluster, &[uuid]).await?.remove(0)
        }
        _ => return Ok(None),
    };
    let message = String::from_utf8(message).map_err(|_| MapError::Damaged(uuid))?;
    Ok(Some(message))
}

/// The greatest UUID in the map.
pub(super) async fn last(cluster: &Cluster) -> Result<Option<Uuid>, MapError> {
    let parts = partition::all().map(|partition| Part {
        partition,
        from: FIRST_RANK,
        count: 1,
    });
    let parts: Vec<Part> = parts.collect();
    let found = read_parts(cluster, Order::Desc, &parts).await?;
    let entries = found.into_iter().flatten();
    Ok(entries.filter_map(|member| member.uuid()).max())
}

/// Sends each partition's command to its primary; the replies have the order of `partitions`.
async fn ask(
    cluster: &Cluster,
    partitions: &[u16],
    command: impl Fn(usize) -> Cmd + Sync,
) -> Result<Vec<Value>, MapError> {
    let topology = cluster.topology();
    let (groups, unowned) = topology.group(partitions.iter().copied());
    if !unowned.is_empty() {
        cluster.start_discovery();
        return Err(MapError::Unavailable(cluster.unowned_reason()));
    }
    let asked = groups.into_iter().map(async |(shard, indices)| {
        let mut commands = redis::pipe();
        for index in &indices {
            commands.add_command(command(*index));
        }
        let connection = &shard.connection;
        let replies = connection.ask(&commands).await;
        let replies = replies.map_err(MapError::Unavailable)?;
        if replies.len() != indices.len() {
            return Err(unexpected_reply(&replies));
        }
        let mut found = Vec::with_capacity(replies.len());
        for (index, reply) in indices.into_iter().zip(replies) {
            let reply = match reply {
                Value::ServerError(error) => {
                    cluster.start_discovery();
                    follow(&topology, connection, &error, command(index)).await?
                }
                reply => reply,
            };
            found.push((index, reply));
        }
        Ok(found)
    });
    let found = try_join_all(asked).await?;
    let mut replies: Vec<(usize, Value)> = found.into_iter().flatten().collect();
    replies.sort_unstable_by_key(|(index, _)| *index);
    Ok(replies.into_iter().map(|(_, reply)| reply).collect())
}

/// Sends a command to the server that a `MOVED` or `ASK` error names.
/// Source: <https://redis.io/docs/latest/operate/oss_and_stack/reference/cluster-spec/#redirection-and-resharding>
async fn follow(
    topology: &Topology,
    connection: &ServerConnection,
    error: &ServerError,
    command: Cmd,
) -> Result<Value, MapError> {
    let target = match error.code() {
        "MOVED" | "ASK" => redirection(topology, &connection.address, error),
        _ => None,
    };
    let target = target.ok_or_else(|| refused(connection, error))?;
    let mut commands = redis::pipe();
    commands.cmd("ASKING").add_command(command);
    let replies = target.ask(&commands).await.map_err(MapError::Unavailable)?;
    match <[Value; 2]>::try_from(replies) {
        Ok([_, Value::ServerError(error)]) => Err(refused(target, &error)),
        Ok([_, reply]) => Ok(reply),
        Err(replies) => Err(unexpected_reply(&replies)),
    }
}

/// Finds the member in the error's `SLOT HOST:PORT`; without a host, it is that of the member asked.
fn redirection<'a>(
    topology: &'a Topology,
    asked: &Address,
    error: &ServerError,
) -> Option<&'a Arc<ServerConnection>> {
    let (_, target) = error.details()?.split_once(' ')?;
    let target = Address::of_member(target)?;
    let hosts = if target.host.is_empty() {
        topology.hosts(asked)
    } else {
        vec![target.host.as_str()]
    };
    let mut members = hosts.into_iter().filter_map(|host| {
        let spelling = Address::new(host, target.port);
        topology.connections.get(topology.spellings.get(&spelling)?)
    });
    members.next()
}

fn refused(connection: &ServerConnection, error: &ServerError) -> MapError {
    let address = &connection.address;
    MapError::Unavailable(format!("redis {address} refuses: {error}"))
}
