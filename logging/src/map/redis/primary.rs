//! Writes to a primary on a separate connection, and maps its replies to outcomes. A commit is one
//! call of `put.lua` and a `WAIT` for the replicas. The script first increments a counter, the
//! fence, so that `WAIT` has a write to wait for even when no entry is new.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use common::entry::{Outcome, unix_millis};
use redis::aio::MultiplexedConnection;
use redis::{Pipeline, Script, ServerError, Value};
use tokio::sync::watch;

use super::connection::{self, ServerConnection};
use super::partition::{self, entries_key, fence_key, message_key};
use super::timeouts::wait_timeout;
use crate::map::contract::{MAX_AHEAD, MAX_SKEW};
use crate::map::queue::Job;

const PUT_SCRIPT: &str = include_str!("put.lua");

/// The name that a server gives the script.
static PUT_SCRIPT_HASH: LazyLock<String> =
    LazyLock::new(|| Script::new(PUT_SCRIPT).get_hash().to_owned());

/// The state that a writer shares with its handle.
#[derive(Debug)]
pub(super) struct Shared {
    /// Why the writer is closed, as it is until its first commit; `None` while it is open.
    pub(super) closed_reason: watch::Sender<Option<String>>,
    /// The primary's partitions; the fence is in the slot of one of them.
    pub(super) partitions: watch::Sender<Vec<u16>>,
    /// Advances to the next partition when the fence's partition has moved to another primary.
    pub(super) fence: AtomicUsize,
}

impl Shared {
    fn fence(&self) -> u16 {
        let partitions = self.partitions.borrow();
        let turn = self.fence.load(Ordering::Relaxed);
        partitions
            .get(turn % partitions.len().max(1))
            .copied()
            .unwrap_or(0)
    }
}

/// The primary that is written to.
pub(super) struct Primary {
    /// The connection for reads, which may notice first that the server is down.
    pub(super) connection: Arc<ServerConnection>,
    pub(super) settle: Duration,
    /// Replicas that must hold an entry before it is acknowledged.
    pub(super) backups: u16,
    pub(super) shared: Arc<Shared>,
}

impl Primary {
    /// Connects, and commits the fence to check the replicas.
    pub(super) async fn open(&self) -> Result<MultiplexedConnection, String> {
        let connected = self.connection.connect().await;
        let mut connection = connected.map_err(|error| self.connection.describe(&error))?;
        let committed = self.commit(&[], &mut connection).await;
        committed.map_err(|failure| failure.detail)?;
        Ok(connection)
    }

    /// Commits a group and returns the outcome of each entry once the replicas have the commit.
    /// Even `stale` waits for them, as a replaced primary does not know its successor's entries.
    pub(super) async fn commit(
        &self,
        group: &[Job],
        connection: &mut MultiplexedConnection,
    ) -> Result<Vec<Outcome>, Failure> {
        let address = &self.connection.address;
        let sent = connection::send(connection, &self.pipeline(group)).await;
        let replies = sent.map_err(|error| {
            Failure::maybe_executed(format!("redis {address} returned no reply: {error}"))
        })?;
        let entries = group.iter().map(|job| job.entries.len()).sum();
        self.outcomes(&replies, entries)
    }

    /// Maps the replies of a pipeline to the outcome of each entry.
    fn outcomes(&self, replies: &[Value], entries: usize) -> Result<Vec<Outcome>, Failure> {
        let address = &self.connection.address;
        // If the script was not executed, the reply of `WAIT` does not matter. On a primary that
        // steps down, `WAIT` fails too.
        if let [Value::ServerError(error), ..] = replies {
            return Err(self.refusal(error));
        }
        let backups = i64::from(self.backups);
        let (put, replicas) = match replies {
            [put] => (put, 0),
            [put, Value::Int(replicas)] => (put, *replicas),
            _ => return Err(self.unexpected_reply(replies)),
        };
        let Some([Value::BulkString(letters), Value::BulkString(failure)]) = put.as_sequence()
        else {
            return Err(self.unexpected_reply(replies));
        };
        if letters.len() != entries {
            return Err(self.unexpected_reply(replies));
        }
        if replicas < backups {
            return Err(Failure::maybe_executed(format!(
                "redis {address}: {replicas} of {backups} backups have the entries"
            )));
        }
        let failure = String::from_utf8_lossy(failure);
        let outcomes = letters.iter().map(|letter| match letter {
            b's' => Outcome::Stored,
            b'd' => Outcome::Duplicate,
            b'c' => Outcome::Conflict,
            b'o' => Outcome::Stale,
            b'l' => Outcome::Leaving,
            b'a' => Outcome::Early,
            b'e' => Outcome::partition_down(format!("redis {address}: {failure}")),
            _ => Outcome::unknown(format!("redis {address} returned an unexpected reply")),
        });
        Ok(outcomes.collect())
    }

    /// The script, then `WAIT`. Opening the primary, without a group, sends the script's text, which the
    /// server keeps; if it forgets it, the next group is refused and the primary is opened again. The keys
    /// are passed as arguments, because `KEYS` of one call must all be in one slot; a key that this primary
    /// does not own fails inside the script.
    fn pipeline(&self, group: &[Job]) -> Pipeline {
        let millis = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let mut commands = redis::pipe();
        let put = match group {
            [] => commands.cmd("EVAL").arg(PUT_SCRIPT),
            _ => commands.cmd("EVALSHA").arg(&*PUT_SCRIPT_HASH),
        };
        let entries = || group.iter().flat_map(|job| job.entries.iter());
        let times = || entries().map(|entry| unix_millis(entry.uuid));
        put.arg(0)
            .arg(millis(self.settle))
            .arg(millis(self.settle + MAX_SKEW))
            .arg(millis(MAX_AHEAD))
            .arg(times().min().unwrap_or(0))
            .arg(times().max().unwrap_or(0))
            .arg(fence_key(self.shared.fence()));
        for entry in entries() {
            let (member, is_large) = partition::member(entry);
            put.arg(entries_key(partition::of(entry.uuid))).arg(member);
            if is_large {
                put.arg(message_key(entry.uuid)).arg(entry.msg.as_str());
            }
        }
        if self.backups > 0 {
            commands
                .cmd("WAIT")
                .arg(self.backups)
                .arg(millis(wait_timeout(self.connection.timeout)).max(1));
        }
        commands
    }

    /// The failure of the whole script. Errors with other codes than these may be partly executed.
    fn refusal(&self, error: &ServerError) -> Failure {
        const BEFORE_EXECUTION: &[&str] = &[
            "BUSY",
            "CLUSTERDOWN",
            "LOADING",
            "MASTERDOWN",
            "MISCONF",
            "NOAUTH",
            "NOFENCE",
            "NOPERM",
            "NOREPLICAS",
            "NOSCRIPT",
            "OOM",
            "READONLY",
        ];
        let code = error.code();
        let details = error.details().unwrap_or_default();
        if code == "NOFENCE" {
            self.shared.fence.fetch_add(1, Ordering::Relaxed);
        }
        let address = &self.connection.address;
        Failure {
            detail: match code {
                "OOM" => format!(
                    "redis {address} refuses: its memory is full; messages can be read, and to store \
                     more, raise its maxmemory or add members"
                ),
                _ => format!("redis {address} refuses: {code} {details}"),
            },
            may_be_executed: !BEFORE_EXECUTION.contains(&code),
        }
    }

    fn unexpected_reply(&self, replies: &[Value]) -> Failure {
        let shown = partition::shown(replies);
        let detail = format!(
            "redis {} returned an unexpected reply: {shown}",
            self.connection.address
        );
        Failure::maybe_executed(detail)
    }
}

/// Why a group was not committed.
pub(super) struct Failure {
    pub(super) detail: String,
    may_be_executed: bool,
}

impl Failure {
    fn maybe_executed(detail: String) -> Self {
        Self {
            detail,
            may_be_executed: true,
        }
    }

    /// The outcome of each entry of the group.
    pub(super) fn outcome(&self) -> Outcome {
        if self.may_be_executed {
            Outcome::unknown(&self.detail)
        } else {
            Outcome::partition_down(&self.detail)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn primary() -> Primary {
        let address = super::super::config::Address {
            host: "127.0.0.1".to_owned(),
            port: 7001,
        };
        let client = redis::Client::open("redis://127.0.0.1:7001").expect("this is an address");
        let timeout = Duration::from_secs(1);
        Primary {
            connection: Arc::new(ServerConnection::new(
                address,
                client,
                timeout,
                Arc::default(),
            )),
            settle: timeout,
            backups: 1,
            shared: Arc::new(Shared {
                closed_reason: watch::Sender::default(),
                partitions: watch::Sender::default(),
                fence: AtomicUsize::new(0),
            }),
        }
    }

    fn error(text: &str) -> Value {
        redis::parse_redis_value(format!("-{text}\r\n").as_bytes()).expect("this is an error reply")
    }

    /// Whatever `WAIT` replies.
    #[test]
    fn script_that_was_not_executed_is_a_certain_refusal() {
        let waits = [
            Value::Int(0),
            Value::Int(1),
            error("UNBLOCKED force unblock from blocking operation"),
            error("ERR WAIT cannot be used with replica instances."),
            error("LOADING Redis is loading the dataset in memory"),
        ];
        for refusal in [
            "BUSY Redis is busy running a script.",
            "CLUSTERDOWN The cluster is down",
            "LOADING Redis is loading the dataset in memory",
            "MASTERDOWN Link with MASTER is down",
            "MISCONF Errors writing to the AOF file",
            "NOFENCE ERR the slot is elsewhere",
            "NOREPLICAS Not enough good replicas to write.",
            "NOSCRIPT No matching script. Please use EVAL.",
            "OOM command not allowed when used memory > 'maxmemory'.",
            "READONLY You can't write against a read only replica.",
        ] {
            for wait in &waits {
                let failure = primary().outcomes(&[error(refusal), wait.clone()], 1);
                let failure = failure.expect_err("nothing was executed");
                assert!(!failure.may_be_executed, "{refusal}, {wait:?}");
            }
        }
    }

    #[test]
    fn script_that_was_executed_is_unknown_when_wait_fails() {
        let put = Value::Array(vec![
            Value::BulkString(b"s".to_vec()),
            Value::BulkString(Vec::new()),
        ]);
        for wait in [Value::Int(0), error("UNBLOCKED force unblock")] {
            let failure = primary().outcomes(&[put.clone(), wait], 1);
            assert!(failure.expect_err("no backup has it").may_be_executed);
        }
        let other = primary().outcomes(&[error("ERR in the middle"), Value::Int(1)], 1);
        assert!(other.expect_err("it failed").may_be_executed);
        let stored = primary().outcomes(&[put, Value::Int(1)], 1);
        assert!(stored.is_ok_and(|outcomes| outcomes == [Outcome::Stored]));
    }
}
