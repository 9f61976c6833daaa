//! The id of a map on Redis: a key in the slot of partition 0, made once, when the map is new, with the
//! version of the layout. At both ends of each partition is a mark with the id.
//!
//! Discovery reads it with each of its questions, so an instance notices when its servers hold
//! another map than before: the servers were emptied, or others are at their addresses. A partition
//! whose mark is gone was lost, and is not taken for an empty one.

use std::time::Duration;

use futures_util::future::try_join_all;
use redis::{Client, Pipeline, Value};
use uuid::Uuid;

use super::connection;
use super::partition::{self, LAYOUT, Member, entries_key, fence_key};
use crate::map::rules::parse_id;

/// The partition in whose slot the id is.
pub(super) const PARTITION: u16 = 0;

fn key() -> String {
    format!("id:{{{PARTITION}}}")
}

/// Asks for the id; only the partition's primary answers with it.
pub(super) fn question(commands: &mut Pipeline) {
    commands.cmd("GET").arg(key());
}

/// What the key says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum MapId {
    /// There is none yet.
    Missing,
    /// The map will have this id once all partitions have their marks.
    Making(Uuid),
    Made(Uuid),
}

/// Reads `LAYOUT ID`, or `making LAYOUT ID`.
///
/// # Errors
/// What the primary answered instead, or that the layout is another one.
pub(super) fn parse(reply: &Value) -> Result<MapId, String> {
    let text = match reply {
        Value::Nil => return Ok(MapId::Missing),
        Value::BulkString(text) => String::from_utf8_lossy(text),
        Value::ServerError(error) => return Err(format!("refuses GET {}: {error}", key())),
        other => return Err(partition::unexpected_reply(std::slice::from_ref(other)).to_string()),
    };
    let made = text.strip_prefix("making ");
    let id = parse_id(made.unwrap_or(&text), LAYOUT)?;
    Ok(made.map_or(MapId::Made(id), |_| MapId::Making(id)))
}

/// How a map is made.
pub(super) struct Making<'a> {
    /// The primaries and their partitions; the first one has the id's.
    pub(super) primaries: Vec<(&'a Client, Vec<u16>)>,
    pub(super) backups: u16,
    pub(super) answer_timeout: Duration,
    pub(super) wait_timeout: Duration,
}

impl Making<'_> {
    /// Gives the map an id unless another instance does so first, and returns the one it has then. Each
    /// step is told done only after the backups have it, so that a failover cannot undo it.
    ///
    /// # Errors
    /// Why there is no id yet.
    pub(super) async fn run(&self) -> Result<Uuid, String> {
        let (owner, _) = &self.primaries[0];
        let id = self.claim(owner).await?;
        let marked = self.primaries.iter().map(async |(client, partitions)| {
            self.require_new(client, partitions, id).await?;
            let mut commands = redis::pipe();
            for partition in partitions {
                let [first, last] = partition::marks(id);
                let add = commands.cmd("ZADD").arg(entries_key(*partition));
                add.arg(0).arg(first).arg(0).arg(last);
            }
            self.send(client, commands, partitions[0]).await
        });
        try_join_all(marked).await?;
        let mut commands = redis::pipe();
        commands.cmd("SET").arg(key()).arg(format!("{LAYOUT} {id}"));
        self.send(owner, commands, PARTITION).await?;
        Ok(id)
    }

    /// The id that the map is to have.
    async fn claim(&self, owner: &Client) -> Result<Uuid, String> {
        let mut commands = redis::pipe();
        let new = format!("making {LAYOUT} {}", Uuid::now_v7());
        commands.cmd("SET").arg(key()).arg(new).arg("NX");
        question(&mut commands);
        let replies = self.send(owner, commands, PARTITION).await?;
        match parse(&replies[1])? {
            MapId::Making(id) | MapId::Made(id) => Ok(id),
            MapId::Missing => Err("the map's id vanished".to_owned()),
        }
    }

    /// Fails when a partition has entries, or marks of another map: then the id was lost.
    async fn require_new(
        &self,
        client: &Client,
        partitions: &[u16],
        id: Uuid,
    ) -> Result<(), String> {
        let mut commands = redis::pipe();
        for partition in partitions {
            let first = commands.cmd("ZRANGEBYLEX").arg(entries_key(*partition));
            first.arg("-").arg("+").arg("LIMIT").arg(0).arg(1);
        }
        let replies = self.send(client, commands, partitions[0]).await?;
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
                    "the map's id is not there and partition {partition} has entries: its key {} was \
                     lost; restore the map from a copy",
                    key()
                ));
            }
        }
        Ok(())
    }

    /// Sends commands and waits until the backups have what they wrote; the fence of a partition
    /// gives `WAIT` something to wait for, as it counts only the writes of its connection.
    async fn send(
        &self,
        client: &Client,
        mut commands: Pipeline,
        partition: u16,
    ) -> Result<Vec<Value>, String> {
        let wait_millis = u64::try_from(self.wait_timeout.as_millis()).unwrap_or(u64::MAX);
        commands.cmd("INCR").arg(fence_key(partition));
        commands
            .cmd("WAIT")
            .arg(self.backups)
            .arg(wait_millis.max(1));
        // A connection of its own: `WAIT` holds up all that comes behind it.
        let connected = connection::connect(client, self.answer_timeout).await;
        let mut connection = connected.map_err(|error| error.to_string())?;
        let sent = connection::send(&mut connection, &commands).await;
        let mut replies = sent.map_err(|error| error.to_string())?;
        for reply in &replies {
            if let Value::ServerError(error) = reply {
                return Err(format!("refuses to make the map: {error}"));
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
