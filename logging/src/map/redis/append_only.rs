//! What counts as on disk. After a full copy, a Redis server holds its data in memory only until it has
//! written a new append-only file; killed before that, it comes back with the older file. `WAIT` counts
//! such a replica, and a promoted one acknowledges.
//!
//! `WAITAOF` (Redis 7.2, Valkey) proves more: the file itself. Where a server lacks it, an unchanged
//! [`Primacy`] does: every file was seen complete, and what follows goes to the file at once, also during
//! an ordinary rewrite.

use std::time::Duration;

use futures_util::future::join_all;
use redis::aio::MultiplexedConnection;
use redis::{Pipeline, Value};

use super::config::Address;
use super::connection::{self, ServerConnection};
use super::partition;
use super::replies::Node;

/// How a commit proves that its entries are on disk.
pub(super) enum Proof {
    WaitAof,
    /// All files were seen complete in this term of the primary.
    Unchanged(Primacy),
}

/// A term of a primary: the server was the primary, and no replica attached, while it is the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Primacy {
    /// Changes with each promotion and each start.
    replication_id: String,
    /// The full and partial copies that replicas were given.
    copies: u64,
}

impl Primacy {
    fn read(info: &str) -> Self {
        let copies = ["sync_full", "sync_partial_ok"].map(|name| field(info, name).parse::<u64>());
        Self {
            replication_id: field(info, "master_replid").to_owned(),
            copies: copies.into_iter().flatten().sum(),
        }
    }
}

impl Proof {
    /// Finds the proof that a primary can give, and requires that its file is complete. Without `WAITAOF`
    /// the files of all attached replicas must be, too, because `WAIT` counts any of them; `previous` is
    /// the term in which the primary's own file was complete before.
    ///
    /// # Errors
    /// Which server's file is not complete, and what to do.
    pub(super) async fn find(
        connection: &mut MultiplexedConnection,
        primary: &ServerConnection,
        backups: u16,
        previous: Option<&Primacy>,
    ) -> Result<Self, String> {
        let mut questions = redis::pipe();
        questions.cmd("WAITAOF").arg(0).arg(0).arg(1);
        ask_info(&mut questions);
        questions.cmd("CLUSTER").arg("NODES");
        let sent = connection::send(connection, &questions).await;
        let replies = sent.map_err(|error| primary.describe(&error))?;
        let [wait_aof, info, nodes] = &replies[..] else {
            return Err(partition::unexpected_reply(&replies).to_string());
        };
        let (info, nodes) = (text(info)?, text(nodes).unwrap_or_default());
        let address = &primary.address;
        // A replica has no append-only file while it gets a full copy.
        if field(&info, "role") != "master" {
            return Err(format!("redis {address} is no longer a primary"));
        }
        if let Some(fault) = file_fault(&info) {
            return Err(format!("redis {address} {fault}"));
        }
        // A server that lacks the command, and a user without the right to it.
        if !matches!(wait_aof, Value::ServerError(_)) {
            return Ok(Self::WaitAof);
        }
        let primacy = Primacy::read(&info);
        let was_complete =
            previous.is_some_and(|previous| previous.replication_id == primacy.replication_id);
        if !was_complete && is_rewritten(&info) {
            return Err(format!("redis {address} {REWRITTEN}"));
        }
        if backups > 0 {
            let attached = attached(&info);
            let nodes = Node::parse_all(&nodes, address, primary.config.is_tls);
            let replicas = replicas(&nodes).unwrap_or_else(|| attached.clone());
            let faults = replicas.iter().map(async |replica| {
                let replica = primary.sibling(replica.clone());
                let fault = replica_fault(&replica, &primacy.replication_id).await;
                fault
                    .err()
                    .map(|fault| format!("redis {} {fault}", replica.address))
            });
            let faults = join_all(faults).await;
            let complete = faults.iter().filter(|fault| fault.is_none()).count();
            if complete < attached.len() {
                let fault = faults.into_iter().flatten().next();
                return Err(fault.unwrap_or_else(|| {
                    format!("redis {address} has a replica that the cluster does not name yet")
                }));
            }
        }
        Ok(Self::Unchanged(primacy))
    }

    /// The command whose reply is the proof. It follows `WAIT`: a replica that is asked before its fsync
    /// answers `WAITAOF` up to a second late.
    pub(super) fn question(&self, backups: u16, wait: Duration) -> Pipeline {
        let mut commands = redis::pipe();
        match self {
            Self::WaitAof => {
                let wait_aof = commands.cmd("WAITAOF").arg(1).arg(backups);
                wait_aof.arg(wait.as_millis().max(1) as u64);
            }
            Self::Unchanged(_) => ask_info(&mut commands),
        }
        commands
    }

    /// Checks the replies to [`Self::question`].
    ///
    /// # Errors
    /// Why it proves nothing, as the end of a sentence about the primary.
    pub(super) fn check(&self, replies: &[Value], backups: u16) -> Result<(), String> {
        let [reply] = replies else {
            return Err(partition::shown(replies));
        };
        match self {
            Self::WaitAof => {
                let [Value::Int(own), Value::Int(replicas)] =
                    reply.as_sequence().unwrap_or_default()
                else {
                    return Err(partition::shown(replies));
                };
                if *own < 1 {
                    return Err(REWRITTEN.to_owned());
                }
                if *replicas < i64::from(backups) {
                    return Err(format!(
                        "has the entries on the disks of {replicas} of {backups} backups: one without \
                         an append-only file, or that still writes a new one, does not count"
                    ));
                }
                Ok(())
            }
            Self::Unchanged(primacy) => {
                let info = text(reply)?;
                if let Some(fault) = file_fault(&info) {
                    return Err(fault.to_owned());
                }
                if Primacy::read(&info) != *primacy {
                    let detail = "changed its role or gave a replica a copy: the append-only files are \
                                  looked at again";
                    return Err(detail.to_owned());
                }
                Ok(())
            }
        }
    }
}

const REWRITTEN: &str = "writes a new append-only file, and would come back without entries until it is \
                         complete";

/// The sections with the fields that are read here. The server takes 4 µs for them.
fn ask_info(commands: &mut Pipeline) {
    let info = commands.cmd("INFO").arg("stats").arg("replication");
    info.arg("persistence");
}

fn text(reply: &Value) -> Result<String, String> {
    match reply {
        Value::BulkString(bytes) => Ok(String::from_utf8_lossy(bytes).into_owned()),
        other => Err(partition::shown(std::slice::from_ref(other))),
    }
}

fn field<'a>(info: &'a str, name: &str) -> &'a str {
    let mut lines = info.lines();
    let found = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    found.unwrap_or_default()
}

fn file_fault(info: &str) -> Option<&'static str> {
    if field(info, "aof_enabled") != "1" {
        return Some(
            "keeps no append-only file, so acknowledged entries could be lost: set appendonly yes and \
             appendfsync always",
        );
    }
    (field(info, "aof_last_write_status") != "ok").then_some("cannot write its append-only file")
}

/// Whether a rewrite is running or to come. It may be an ordinary one, which `INFO` does not tell.
fn is_rewritten(info: &str) -> bool {
    ["aof_rewrite_in_progress", "aof_rewrite_scheduled"]
        .iter()
        .any(|name| field(info, name) != "0")
}

/// The replicas that the primary sends its writes to. A copy for a backup (`redis-cli --rdb`) has no port;
/// `WAIT` does not count it.
fn attached(info: &str) -> Vec<Address> {
    let addresses = info.lines().filter_map(|line| {
        let (_, replica) = line.strip_prefix("slave")?.split_once(":ip=")?;
        let (host, rest) = replica.split_once(",port=")?;
        let port = rest.split(',').next()?.parse().ok()?;
        Some(Address {
            host: host.to_owned(),
            port,
        })
    });
    addresses.filter(|address| address.port != 0).collect()
}

/// The replicas of the member that returned these nodes; `None` from a server without a cluster.
fn replicas(nodes: &[Node]) -> Option<Vec<Address>> {
    let primary = nodes.iter().find(|node| node.is_myself)?;
    let replicas = nodes
        .iter()
        .filter(|node| node.primary_id.as_ref() == Some(&primary.id));
    Some(replicas.map(|node| node.address.clone()).collect())
}

/// Requires that a replica follows the primary with this replication id and has a complete file.
async fn replica_fault(replica: &ServerConnection, replication_id: &str) -> Result<(), String> {
    let mut questions = redis::pipe();
    ask_info(&mut questions);
    let asked = async { connection::send(&mut replica.connect().await?, &questions).await };
    let replies = asked
        .await
        .map_err(|error| format!("cannot be reached: {error}"))?;
    let [info] = &replies[..] else {
        return Err(partition::shown(&replies));
    };
    replica_info_fault(&text(info)?, replication_id)
}

fn replica_info_fault(info: &str, replication_id: &str) -> Result<(), String> {
    if field(info, "master_link_status") != "up" || field(info, "master_replid") != replication_id {
        return Err("does not follow its primary yet".to_owned());
    }
    if let Some(fault) = file_fault(info) {
        return Err(fault.to_owned());
    }
    if is_rewritten(info) {
        Err(REWRITTEN.to_owned())
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PRIMARY: &str = "aof_enabled:1\r\naof_rewrite_in_progress:0\r\naof_rewrite_scheduled:0\r\n\
         aof_last_write_status:ok\r\nsync_full:1\r\nsync_partial_ok:2\r\nsync_partial_err:7\r\n\
         role:master\r\nconnected_slaves:2\r\nslave0:ip=::1,port=7004,state=online,offset=9,lag=0\r\n\
         slave1:ip=10.0.0.9,port=0,state=send_bulk,offset=0,lag=0\r\nmaster_replid:abc\r\n\
         master_replid2:000\r\n";
    const REPLICA: &str = "aof_enabled:1\r\naof_rewrite_in_progress:0\r\naof_rewrite_scheduled:0\r\n\
         aof_last_write_status:ok\r\nrole:slave\r\nmaster_link_status:up\r\nmaster_replid:abc\r\n";

    fn reply(info: &str) -> Value {
        Value::BulkString(info.as_bytes().to_vec())
    }

    #[test]
    fn replica_counts_once_its_file_is_complete() {
        assert_eq!(replica_info_fault(REPLICA, "abc"), Ok(()));
        for (is, was) in [
            ("aof_enabled:0", "aof_enabled:1"),
            ("aof_rewrite_in_progress:1", "aof_rewrite_in_progress:0"),
            ("aof_rewrite_scheduled:1", "aof_rewrite_scheduled:0"),
            ("aof_last_write_status:err", "aof_last_write_status:ok"),
            ("master_link_status:down", "master_link_status:up"),
            ("master_replid:other", "master_replid:abc"),
        ] {
            let info = REPLICA.replace(was, is);
            assert!(replica_info_fault(&info, "abc").is_err(), "{is}");
        }
        assert!(replica_info_fault("", "").is_err());
    }

    #[test]
    fn primary_that_changed_proves_nothing_and_an_ordinary_rewrite_is_no_change() {
        let proof = Proof::Unchanged(Primacy::read(PRIMARY));
        let rewritten = PRIMARY.replace("in_progress:0", "in_progress:1");
        for unchanged in [PRIMARY, &rewritten] {
            assert_eq!(proof.check(&[reply(unchanged)], 1), Ok(()));
        }
        for (is, was) in [
            ("sync_full:2", "sync_full:1"),
            ("sync_partial_ok:3", "sync_partial_ok:2"),
            ("master_replid:new", "master_replid:abc"),
            ("aof_enabled:0", "aof_enabled:1"),
            ("aof_last_write_status:err", "aof_last_write_status:ok"),
        ] {
            let info = PRIMARY.replace(was, is);
            assert!(proof.check(&[reply(&info)], 1).is_err(), "{is}");
        }
        assert!(proof.check(&[Value::Nil], 0).is_err());
    }

    #[test]
    fn wait_aof_must_name_the_primary_and_its_backups() {
        let check = |own, replicas, backups| {
            let reply = Value::Array(vec![Value::Int(own), Value::Int(replicas)]);
            Proof::WaitAof.check(&[reply], backups).is_ok()
        };
        assert!(check(1, 1, 1) && check(1, 0, 0));
        assert!(!check(0, 1, 1) && !check(1, 0, 1) && !check(1, 1, 2) && !check(0, 0, 0));
        assert!(Proof::WaitAof.check(&[Value::Nil], 0).is_err());
    }

    #[test]
    fn attached_replicas_have_a_port() {
        let found: Vec<String> = attached(PRIMARY).iter().map(Address::to_string).collect();
        assert_eq!(found, ["[::1]:7004"]);
    }
}
