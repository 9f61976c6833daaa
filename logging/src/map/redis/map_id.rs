//! The id of a map on Redis: a key in the slot of partition 0, made once, when the map is new.
//!
//! Discovery reads it with each of its questions, so an instance notices when its servers hold
//! another map than before: the servers were emptied, or others are at their addresses.

use std::time::Duration;

use redis::{Client, Pipeline, Value};
use uuid::Uuid;

use super::link;
use super::partition::{self, fence_key};

/// The partition in whose slot the id is.
pub(super) const PARTITION: u16 = 0;

fn key() -> String {
    format!("id:{{{PARTITION}}}")
}

/// Asks for the id; only the partition's primary answers with it.
pub(super) fn question(commands: &mut Pipeline) {
    commands.cmd("GET").arg(key());
}

/// What the primary answered: the id, or that there is none yet.
///
/// # Errors
/// What it answered instead.
pub(super) fn parse(reply: &Value) -> Result<Option<Uuid>, String> {
    match reply {
        Value::Nil => Ok(None),
        Value::BulkString(text) => match Uuid::try_parse_ascii(text) {
            Ok(id) => Ok(Some(id)),
            Err(_) => Err(format!("the key {} is not a map's id", key())),
        },
        Value::ServerError(error) => Err(format!("refuses GET {}: {error}", key())),
        other => Err(partition::strange(std::slice::from_ref(other)).to_string()),
    }
}

/// Gives the map an id unless another instance does so first, and returns the one it has then: only
/// after `backups` replicas have it too, so that a failover cannot give the map another one.
///
/// # Errors
/// Why there is no id yet.
pub(super) async fn make(
    client: &Client,
    backups: u16,
    answer_timeout: Duration,
    wait_timeout: Duration,
) -> Result<Uuid, String> {
    let mut commands = redis::pipe();
    commands.cmd("SET").arg(key());
    commands.arg(Uuid::now_v7().to_string()).arg("NX");
    // `WAIT` counts the writes of its connection only, and the id may be another instance's.
    commands.cmd("INCR").arg(fence_key(PARTITION));
    question(&mut commands);
    let wait_millis = u64::try_from(wait_timeout.as_millis()).unwrap_or(u64::MAX);
    commands.cmd("WAIT").arg(backups).arg(wait_millis.max(1));
    // A connection of its own: `WAIT` holds up all that comes behind it.
    let mut connection = link::connect(client, answer_timeout)
        .await
        .map_err(|error| error.to_string())?;
    let sent = link::send(&mut connection, &commands).await;
    let replies = sent.map_err(|error| error.to_string())?;
    match &replies[..] {
        [Value::ServerError(error), ..] | [_, Value::ServerError(error), ..] => {
            Err(format!("refuses the map's id: {error}"))
        }
        [_, _, id, Value::Int(replicas)] if *replicas >= i64::from(backups) => {
            parse(id)?.ok_or_else(|| "the map's id vanished".to_owned())
        }
        [_, _, _, Value::Int(replicas)] => {
            Err(format!("{replicas} of {backups} backups have the map's id"))
        }
        _ => Err(partition::strange(&replies).to_string()),
    }
}
