//! Writes to a primary on a separate connection, and maps its replies to outcomes. A commit is one
//! call of `put.lua`, a `WAIT` for the replicas, and the proof that what they have is on disk. The script
//! first increments a counter, the fence, so that `WAIT` has a write to wait for even when no entry is new.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock};

use std::time::Duration;

use common::entry::{Outcome, millis_at, unix_millis};
use futures_util::future::join;
use redis::aio::MultiplexedConnection;
use redis::{Pipeline, Script, ServerError, Value};
use tokio::sync::watch;

use super::append_only::{Primacy, Proof};
use super::connection::{self, ServerConnection};
use super::known_map::{KnownMap, Properties};
use super::partition::{self, entries_key, fence_key, message_key};
use super::timeouts::wait_timeout;
use crate::map::contract::{Access, MAX_AHEAD, MAX_SKEW};
use crate::map::queue::Job;
use crate::map::rules::millis;

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
    pub(super) known: Arc<KnownMap>,
    pub(super) access: Access,
    /// Replicas that must hold an entry before it is acknowledged.
    pub(super) backups: u16,
    pub(super) shared: Arc<Shared>,
    /// When its append-only file was seen complete.
    pub(super) seen: Option<Primacy>,
}

/// A connection for commits, and what proves that they are on disk.
pub(super) struct Session {
    connection: MultiplexedConnection,
    proof: Proof,
}

impl Primary {
    /// Connects, looks at the append-only files, and commits the fence to check the replicas.
    pub(super) async fn open(&mut self) -> Result<Session, String> {
        let server = &*self.connection;
        let connected = server.connect().await;
        let mut connection = connected.map_err(|error| server.describe(&error))?;
        let seen = self.seen.as_ref();
        let proof = Proof::find(&mut connection, server, self.backups, seen).await?;
        if let Proof::Unchanged(primacy) = &proof {
            self.seen = Some(primacy.clone());
        }
        let mut session = Session { connection, proof };
        let committed = self.commit(&[], &mut session).await;
        committed.map_err(|failure| failure.detail)?;
        Ok(session)
    }

    /// Commits a group and returns the outcome of each entry once the replicas have the commit.
    /// Even `stale` waits for them, as a replaced primary does not know its successor's entries.
    pub(super) async fn commit(
        &self,
        group: &[Job],
        session: &mut Session,
    ) -> Result<Vec<Outcome>, Failure> {
        let address = &self.connection.address;
        let Session { connection, proof } = session;
        let wait = match proof {
            // The two waits must end within the call.
            Proof::WaitAof => wait_timeout(self.connection.timeout) * 5 / 8,
            Proof::Unchanged(_) => wait_timeout(self.connection.timeout),
        };
        let (put, prove) = (
            self.pipeline(group, wait),
            proof.question(self.backups, wait),
        );
        // In this order, but apart: a primary that steps down closes the connection after the replies to the
        // first, which may say that nothing was executed.
        let (mut putting, mut proving) = (connection.clone(), connection.clone());
        let putting = connection::send(&mut putting, &put);
        let proving = connection::send(&mut proving, &prove);
        let (sent, proved) = join(putting, proving).await;
        let replies = sent.map_err(|error| {
            Failure::maybe_executed(format!("redis {address} returned no reply: {error}"))
        })?;
        let outcomes = group.iter().map(Job::outcomes).sum();
        let proved = match proved {
            Ok(replies) => proof.check(&replies, self.backups),
            Err(error) => Err(format!("returned no reply: {error}")),
        };
        self.outcomes(&replies, outcomes, proved)
    }

    /// Maps the replies of a pipeline to the outcome of each entry and floor.
    fn outcomes(
        &self,
        replies: &[Value],
        count: usize,
        proved: Result<(), String>,
    ) -> Result<Vec<Outcome>, Failure> {
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
        let Some(
            [
                Value::BulkString(letters),
                Value::BulkString(failure),
                Value::BulkString(floor),
            ],
        ) = put.as_sequence()
        else {
            return Err(self.unexpected_reply(replies));
        };
        if letters.len() != count {
            return Err(self.unexpected_reply(replies));
        }
        let floor = str::from_utf8(floor).ok();
        let floor = floor.and_then(|floor| floor.parse().ok());
        self.known.note_floor(floor.unwrap_or(0));
        if replicas < backups {
            return Err(Failure::maybe_executed(format!(
                "redis {address}: {replicas} of {backups} backups have the entries"
            )));
        }
        if let Err(reason) = proved {
            return Err(Failure::maybe_executed(format!("redis {address} {reason}")));
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
    fn pipeline(&self, group: &[Job], wait: Duration) -> Pipeline {
        let mut commands = redis::pipe();
        let put = match group {
            [] => commands.cmd("EVAL").arg(PUT_SCRIPT),
            _ => commands.cmd("EVALSHA").arg(&*PUT_SCRIPT_HASH),
        };
        let entries = || group.iter().flat_map(|job| job.work.entries.iter());
        let times = || entries().map(|entry| unix_millis(entry.uuid));
        put.arg(0).arg(fence_key(self.shared.fence()));
        match self.known.get() {
            Some((Properties { id, settle }, clock)) => {
                let [_, last_mark] = partition::marks(id);
                put.arg(last_mark).arg(millis_at(clock));
                match self.access {
                    Access::Import => put.arg(""),
                    Access::Serve | Access::Read => put.arg(settle),
                }
            }
            // Only the fence is committed before the map is known.
            None => put.arg("").arg(0).arg(0),
        };
        put.arg(millis(MAX_SKEW))
            .arg(millis(MAX_AHEAD))
            .arg(times().min().unwrap_or(0))
            .arg(times().max().unwrap_or(0));
        for job in group {
            for entry in job.work.entries.iter() {
                let (member, is_large) = partition::member(entry);
                put.arg(entries_key(partition::of(entry.uuid))).arg(member);
                if is_large {
                    put.arg(message_key(entry.uuid)).arg(entry.msg.as_str());
                }
            }
            for partition in &job.work.partitions {
                put.arg(entries_key(*partition)).arg("").arg(job.work.floor);
            }
        }
        if self.backups > 0 {
            commands
                .cmd("WAIT")
                .arg(self.backups)
                .arg(millis(wait).max(1));
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
        let config = "redis://127.0.0.1:7001".parse().expect("a location");
        let timeout = Duration::from_secs(1);
        Primary {
            connection: Arc::new(ServerConnection::new(
                address,
                config,
                timeout,
                Arc::default(),
            )),
            known: Arc::default(),
            access: Access::Serve,
            backups: 1,
            shared: Arc::new(Shared {
                closed_reason: watch::Sender::default(),
                partitions: watch::Sender::default(),
                fence: AtomicUsize::new(0),
            }),
            seen: None,
        }
    }

    /// The outcomes of one entry, which is on disk.
    fn outcomes(put: Value, wait: Value) -> Result<Vec<Outcome>, Failure> {
        primary().outcomes(&[put, wait], 1, Ok(()))
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
                let replies = [error(refusal), wait.clone()];
                let failure = primary().outcomes(&replies, 1, Err("broken pipe".to_owned()));
                let failure = failure.expect_err("nothing was executed");
                assert!(!failure.may_be_executed, "{refusal}, {wait:?}");
            }
        }
    }

    #[test]
    fn script_that_was_executed_is_unknown_when_wait_fails() {
        let texts = [&b"s"[..], b"", b"0"];
        let put = Value::Array(texts.map(|text| Value::BulkString(text.to_vec())).to_vec());
        for wait in [Value::Int(0), error("UNBLOCKED force unblock")] {
            let failure = outcomes(put.clone(), wait);
            assert!(failure.expect_err("no backup has it").may_be_executed);
        }
        let other = outcomes(error("ERR in the middle"), Value::Int(1));
        assert!(other.expect_err("it failed").may_be_executed);
        let replies = [put.clone(), Value::Int(1)];
        let not_on_disk = primary().outcomes(&replies, 1, Err("is not on disk".to_owned()));
        assert!(not_on_disk.is_err_and(|failure| failure.may_be_executed));
        let stored = outcomes(put, Value::Int(1));
        assert!(stored.is_ok_and(|outcomes| outcomes == [Outcome::Stored]));
    }
}
