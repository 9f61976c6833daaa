//! The id of a map on Redis: a key in the slot of partition 0 with the version of the layout,
//! created once with the map. Each partition has a mark with the id at both ends.
//!
//! Discovery reads the id in every round. An instance that knows an id keeps it: one that is missing or
//! another one means that its servers were emptied, or that other servers have their addresses. A partition
//! without its marks was lost and is not read as an empty one. So a map is created only where no partition
//! has anything, by an instance that has never known an id.

use std::sync::Arc;

use futures_util::future::try_join_all;
use redis::{Pipeline, RedisError, Value, from_redis_value};
use uuid::Uuid;

use super::cluster::Shard;
use super::connection::{self, ServerConnection};
use super::partition::{self, LAYOUT, MARKS, Member, entries_key, fence_key};
use super::timeouts::wait_timeout;
use crate::map::queue::{Work, WriteBudget};
use crate::map::rules::parse_id;

/// The partition in whose slot the id is.
pub(super) const PARTITION: u16 = 0;

fn key() -> String {
    format!("id:{{{PARTITION}}}")
}

fn settle_key() -> String {
    format!("{}:settle", key())
}

/// Adds the commands that read the id and the settle window; only the primary that owns the partition
/// answers them.
pub(super) fn question(commands: &mut Pipeline) {
    commands.cmd("GET").arg(key()).cmd("GET").arg(settle_key());
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum MapId {
    Missing,
    /// The map gets this id once all partitions have their marks.
    Making(Uuid),
    Made(Uuid),
}

/// Parses `LAYOUT ID` or `making LAYOUT ID`.
///
/// # Errors
/// When the reply is something else or the layout is not [`LAYOUT`].
pub(super) fn parse(reply: &Value) -> Result<MapId, String> {
    let text = match reply {
        Value::Nil => return Ok(MapId::Missing),
        Value::BulkString(text) => String::from_utf8_lossy(text),
        Value::ServerError(error) => return Err(format!("GET {} failed: {error}", key())),
        other => return Err(partition::unexpected_reply(std::slice::from_ref(other)).to_string()),
    };
    let made = text.strip_prefix("making ");
    let id = parse_id(made.unwrap_or(&text), LAYOUT)?;
    Ok(made.map_or(MapId::Made(id), |_| MapId::Making(id)))
}

/// Parses the settle window, in milliseconds. A map of before has none.
///
/// # Errors
/// When the reply is something else.
pub(super) fn parse_settle(reply: &Value) -> Result<Option<u64>, String> {
    if let Value::ServerError(error) = reply {
        return Err(format!("GET {} failed: {error}", settle_key()));
    }
    let settle = from_redis_value(reply.clone());
    settle.map_err(|error| format!("GET {} failed: {error}", settle_key()))
}

/// Stores the settle window, unless another instance has done so first, and returns the stored one.
///
/// # Errors
/// Why it is not stored.
pub(super) async fn store_settle(
    owner: &ServerConnection,
    backups: u16,
    settle: u64,
) -> Result<u64, String> {
    let mut commands = redis::pipe();
    commands.cmd("SET").arg(settle_key()).arg(settle).arg("NX");
    commands.cmd("GET").arg(settle_key());
    let replies = send(owner, commands, PARTITION, backups).await?;
    parse_settle(&replies[1])?.ok_or_else(|| "the map's settle window was deleted".to_owned())
}

pub(super) struct Making<'a> {
    /// All primaries, each of which must take entries.
    pub(super) shards: &'a [Arc<Shard>],
    /// The one that owns [`PARTITION`].
    pub(super) owner: &'a ServerConnection,
    pub(super) backups: u16,
}

impl Making<'_> {
    /// Creates the map unless another instance does so first, and returns its id. Each step waits
    /// for the backups, so that a failover cannot undo it.
    ///
    /// # Errors
    /// Why the map has no id yet.
    pub(super) async fn run(&self, settle: u64) -> Result<Uuid, String> {
        let made = self.make(settle).await;
        let Err(reason) = made else {
            return made;
        };
        // Another instance may have made the map meanwhile, and stored entries.
        let mut commands = redis::pipe();
        question(&mut commands);
        let replies = send(self.owner, commands, PARTITION, self.backups).await?;
        match parse(&replies[0])? {
            MapId::Made(id) => Ok(id),
            MapId::Missing | MapId::Making(_) => Err(reason),
        }
    }

    async fn make(&self, settle: u64) -> Result<Uuid, String> {
        // What is left of a map that has lost its id gets neither another id nor other marks.
        self.require_new(None).await?;
        let id = self.claim().await?;
        self.require_new(Some(id)).await?;
        let marked = self.shards.iter().map(async |shard| {
            let partitions = shard.writer.partitions();
            let mut commands = redis::pipe();
            for partition in &partitions {
                let [first, last] = partition::marks(id);
                let add = commands.cmd("ZADD").arg(entries_key(*partition));
                add.arg(0).arg(first).arg(0).arg(last);
            }
            send(&shard.connection, commands, partitions[0], self.backups).await
        });
        try_join_all(marked).await?;
        self.require_on_disk().await?;
        store_settle(self.owner, self.backups, settle).await?;
        let mut commands = redis::pipe();
        commands.cmd("SET").arg(key()).arg(format!("{LAYOUT} {id}"));
        send(self.owner, commands, PARTITION, self.backups).await?;
        self.require_on_disk().await?;
        Ok(id)
    }

    /// Has all shards prove that what they were given is on disk.
    async fn require_on_disk(&self) -> Result<(), String> {
        let budget = WriteBudget::default();
        let proved = self.shards.iter().map(async |shard| {
            let proved = shard.writer.put(&budget, Work::default()).await;
            proved.map_err(|outcome| format!("the map cannot be created: {outcome:?}"))
        });
        try_join_all(proved).await.map(drop)
    }

    /// The id that the map will have: ours, or the one that another instance chose first.
    async fn claim(&self) -> Result<Uuid, String> {
        let mut commands = redis::pipe();
        let new = format!("making {LAYOUT} {}", Uuid::now_v7());
        commands.cmd("SET").arg(key()).arg(new).arg("NX");
        question(&mut commands);
        let replies = send(self.owner, commands, PARTITION, self.backups).await?;
        match parse(&replies[1])? {
            MapId::Making(id) | MapId::Made(id) => Ok(id),
            MapId::Missing => Err("the map's id was deleted while it was created".to_owned()),
        }
    }

    /// Fails when a partition has anything but marks, of this map if there is one: the map's id was lost.
    async fn require_new(&self, map: Option<Uuid>) -> Result<(), String> {
        let checked = self.shards.iter().map(async |shard| {
            let partitions = shard.writer.partitions();
            let mut commands = redis::pipe();
            for partition in &partitions {
                let first = commands.cmd("ZRANGE").arg(entries_key(*partition));
                first.arg(0).arg(MARKS);
            }
            let sent = send(&shard.connection, commands, partitions[0], self.backups);
            let replies = sent.await?;
            for (partition, reply) in partitions.iter().zip(replies) {
                let Value::Array(found) = reply else {
                    return Err(partition::unexpected_reply(&[reply]).to_string());
                };
                let is_mark = |member| {
                    let member = Member::read(member);
                    matches!(member, Ok(Member::Mark(id)) if map.is_none_or(|map| map.as_bytes() == &id[..]))
                };
                if !found.into_iter().all(is_mark) {
                    return Err(format!(
                        "the map's id (key {}) is missing but partition {partition} is not empty: \
                         restore the map from a copy",
                        key()
                    ));
                }
            }
            Ok(())
        });
        try_join_all(checked).await.map(|_| ())
    }
}

/// Sends commands and waits until the backups have what they wrote. `WAIT` counts only writes
/// of its own connection, so the partition's fence is always written.
async fn send(
    primary: &ServerConnection,
    mut commands: Pipeline,
    partition: u16,
    backups: u16,
) -> Result<Vec<Value>, String> {
    let wait_millis = wait_timeout(primary.timeout).as_millis() as u64;
    commands.cmd("INCR").arg(fence_key(partition));
    commands.cmd("WAIT").arg(backups).arg(wait_millis.max(1));
    // A separate connection, as `WAIT` blocks all commands after it.
    let sent = async { connection::send(&mut primary.connect().await?, &commands).await };
    let mut replies = sent.await.map_err(|error: RedisError| error.to_string())?;
    for reply in &replies {
        if let Value::ServerError(error) = reply {
            return Err(format!("the map cannot be created: {error}"));
        }
    }
    match replies.pop() {
        Some(Value::Int(replicas)) if replicas >= i64::from(backups) => Ok(replies),
        Some(Value::Int(replicas)) => {
            Err(format!("{replicas} of {backups} backups have the map's id"))
        }
        _ => Err(partition::unexpected_reply(&replies).to_string()),
    }
}
