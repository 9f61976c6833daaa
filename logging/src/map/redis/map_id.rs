//! The id of a map on Redis: a key in the slot of partition 0 with the version of the layout,
//! created once with the map. Each partition has a mark with the id at both ends.
//!
//! Discovery reads the id in every round, so an instance notices that its servers hold another map:
//! they were emptied, or other servers have their addresses. A partition without its marks was lost
//! and is not read as an empty one.

use std::sync::Arc;

use futures_util::future::try_join_all;
use redis::{Pipeline, RedisError, Value};
use uuid::Uuid;

use super::cluster::Shard;
use super::connection::{self, ServerConnection};
use super::partition::{self, LAYOUT, Member, entries_key, fence_key};
use super::timeouts::wait_timeout;
use crate::map::rules::parse_id;

/// The partition in whose slot the id is.
pub(super) const PARTITION: u16 = 0;

fn key() -> String {
    format!("id:{{{PARTITION}}}")
}

/// Adds the command that reads the id; only the primary that owns the partition answers it.
pub(super) fn question(commands: &mut Pipeline) {
    commands.cmd("GET").arg(key());
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
    pub(super) async fn run(&self) -> Result<Uuid, String> {
        let id = self.claim().await?;
        let marked = self.shards.iter().map(async |shard| {
            let partitions = shard.writer.partitions();
            self.require_new(&shard.connection, &partitions, id).await?;
            let mut commands = redis::pipe();
            for partition in &partitions {
                let [first, last] = partition::marks(id);
                let add = commands.cmd("ZADD").arg(entries_key(*partition));
                add.arg(0).arg(first).arg(0).arg(last);
            }
            self.send(&shard.connection, commands, partitions[0]).await
        });
        try_join_all(marked).await?;
        let mut commands = redis::pipe();
        commands.cmd("SET").arg(key()).arg(format!("{LAYOUT} {id}"));
        self.send(self.owner, commands, PARTITION).await?;
        Ok(id)
    }

    /// The id that the map will have: ours, or the one that another instance chose first.
    async fn claim(&self) -> Result<Uuid, String> {
        let mut commands = redis::pipe();
        let new = format!("making {LAYOUT} {}", Uuid::now_v7());
        commands.cmd("SET").arg(key()).arg(new).arg("NX");
        question(&mut commands);
        let replies = self.send(self.owner, commands, PARTITION).await?;
        match parse(&replies[1])? {
            MapId::Making(id) | MapId::Made(id) => Ok(id),
            MapId::Missing => Err("the map's id was deleted while it was created".to_owned()),
        }
    }

    /// Fails when a partition has entries, or marks of another map: the id was lost.
    async fn require_new(
        &self,
        primary: &ServerConnection,
        partitions: &[u16],
        id: Uuid,
    ) -> Result<(), String> {
        let mut commands = redis::pipe();
        for partition in partitions {
            let first = commands.cmd("ZRANGEBYLEX").arg(entries_key(*partition));
            first.arg("-").arg("+").arg("LIMIT").arg(0).arg(1);
        }
        let replies = self.send(primary, commands, partitions[0]).await?;
        for (partition, reply) in partitions.iter().zip(replies) {
            let Value::Array(mut found) = reply else {
                return Err(partition::unexpected_reply(&[reply]).to_string());
            };
            let Some(first) = found.pop() else {
                continue;
            };
            let first = Member::read(first).map_err(|error| error.to_string())?;
            if !matches!(first, Member::Mark(map) if map == id.as_bytes()) {
                return Err(format!(
                    "the map's id (key {}) is missing but partition {partition} has entries: \
                     restore the map from a copy",
                    key()
                ));
            }
        }
        Ok(())
    }

    /// Sends commands and waits until the backups have what they wrote. `WAIT` counts only writes
    /// of its own connection, so the partition's fence is always written.
    async fn send(
        &self,
        primary: &ServerConnection,
        mut commands: Pipeline,
        partition: u16,
    ) -> Result<Vec<Value>, String> {
        let wait_millis = wait_timeout(primary.timeout).as_millis() as u64;
        commands.cmd("INCR").arg(fence_key(partition));
        commands
            .cmd("WAIT")
            .arg(self.backups)
            .arg(wait_millis.max(1));
        // A separate connection, as `WAIT` blocks all commands after it.
        let sent = async { connection::send(&mut primary.connect().await?, &commands).await };
        let mut replies = sent.await.map_err(|error: RedisError| error.to_string())?;
        for reply in &replies {
            if let Value::ServerError(error) = reply {
                return Err(format!("the map cannot be created: {error}"));
            }
        }
        match replies.pop() {
            Some(Value::Int(replicas)) if replicas >= i64::from(self.backups) => Ok(replies),
            Some(Value::Int(replicas)) => Err(format!(
                "{replicas} of {} backups have the map's id",
                self.backups
            )),
            _ => Err(partition::unexpected_reply(&replies).to_string()),
        }
    }
}
