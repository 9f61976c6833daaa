//! Real Redis servers on free ports of the loopback interface: single servers, and a cluster of three
//! primaries with a replica each, all with the shipped profile. They end with the test.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use redis::{Value, from_redis_value};
use tempfile::TempDir;

use crate::process::{LOOK_AGAIN, free_address};

/// Timeout for servers to form a cluster or to change their state.
const PATIENCE: Duration = Duration::from_secs(60);

/// The shipped profile.
const PROFILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../scripts/redis.conf");

/// Starts a server, the program `SERVER` if that is set, and kills it at the end of standard input, which
/// comes also when the test is killed.
const SUPERVISOR: &str =
    "${SERVER:-redis-server} \"$@\" & echo $!; read -r _; kill -KILL $!; { wait $!; } 2>/dev/null";

/// A running Redis server.
#[derive(Debug)]
pub struct RedisServer {
    supervisor: Child,
    pid: String,
    pub port: u16,
    /// The port of the cluster bus.
    bus_port: u16,
    folder: PathBuf,
    flags: Vec<String>,
    environment: Vec<(String, String)>,
}

impl RedisServer {
    /// Starts a server with its files in `folder`; `flags` override the profile.
    pub fn start(folder: &Path, flags: &[&str]) -> Self {
        Self::start_with(folder, flags, &[])
    }

    /// The same with environment variables.
    pub fn start_with(folder: &Path, flags: &[&str], environment: &[(String, String)]) -> Self {
        let (port, bus_port) = (free_address().port(), free_address().port());
        let ports = [
            "--port",
            &port.to_string(),
            "--cluster-port",
            &bus_port.to_string(),
        ]
        .map(str::to_owned);
        let flags = flags.iter().map(|flag| (*flag).to_owned());
        let flags: Vec<String> = ports.into_iter().chain(flags).collect();
        std::fs::create_dir_all(folder).unwrap();
        let environment = environment.to_vec();
        let (supervisor, pid) = supervise(folder, &flags, &environment);
        let server = Self {
            supervisor,
            pid,
            port,
            bus_port,
            folder: folder.to_owned(),
            flags,
            environment,
        };
        server.wait_until("it answers", |server| server.try_ask(&["PING"]).is_ok());
        server
    }

    /// A single server, without cluster and replicas.
    pub fn single(folder: &Path) -> Self {
        Self::single_of("redis-server", folder)
    }

    /// The same of another program, for example [`crate::requirements::valkey_server`].
    pub fn single_of(program: &str, folder: &Path) -> Self {
        let alone = ["--cluster-enabled", "no", "--min-replicas-to-write", "0"];
        Self::start_with(folder, &alone, &[("SERVER".to_owned(), program.to_owned())])
    }

    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    pub fn try_ask(&self, command: &[&str]) -> redis::RedisResult<Value> {
        let client = redis::Client::open(format!("redis://{}", self.address()))?;
        let mut connection = client.get_connection_with_timeout(Duration::from_secs(1))?;
        connection.set_read_timeout(Some(Duration::from_secs(5)))?;
        let (name, arguments) = command.split_first().unwrap();
        redis::cmd(name).arg(arguments).query(&mut connection)
    }

    /// The answer to a command that must succeed.
    #[track_caller]
    pub fn ask<T: redis::FromRedisValue>(&self, command: &[&str]) -> T {
        from_redis_value(self.try_ask(command).unwrap()).unwrap()
    }

    /// A field of `INFO`.
    pub fn info(&self, field: &str) -> Option<String> {
        self.field_of(&["INFO"], field)
    }

    #[track_caller]
    fn ask_role(&self) -> String {
        self.info("role").expect("the server answers")
    }

    /// A field of `CLUSTER INFO`.
    pub fn cluster_info(&self, field: &str) -> Option<String> {
        self.field_of(&["CLUSTER", "INFO"], field)
    }

    fn field_of(&self, command: &[&str], field: &str) -> Option<String> {
        let info: String = from_redis_value(self.try_ask(command).ok()?).ok()?;
        let mut fields = info.lines().filter_map(|line| line.split_once(':'));
        let found = fields.find(|(name, _)| *name == field);
        found.map(|(_, value)| value.to_owned())
    }

    #[track_caller]
    pub fn wait_until(&self, what: &str, is_so: impl Fn(&Self) -> bool) {
        let begin = Instant::now();
        while !is_so(self) {
            assert!(
                begin.elapsed() < PATIENCE,
                "{}: not true within {PATIENCE:?}: {what}",
                self.address()
            );
            std::thread::sleep(LOOK_AGAIN);
        }
    }

    /// The port by which the other nodes of its cluster name this one.
    pub fn node_port(&self) -> String {
        let mut flags = self.flags.iter().skip_while(|flag| *flag != "--tls-port");
        flags.nth(1).cloned().unwrap_or(self.port.to_string())
    }

    pub fn node_id(&self) -> String {
        self.ask(&["CLUSTER", "MYID"])
    }

    /// Adds `node` to the cluster of this one.
    fn meet(&self, host: &str, node: &Self) {
        let (port, bus_port) = (node.node_port(), node.bus_port.to_string());
        let _: () = self.ask(&["CLUSTER", "MEET", host, &port, &bus_port]);
    }

    /// Adds this node, which is of no cluster, to that of `primary`, and waits until it has its data and all
    /// `members` know it.
    #[track_caller]
    pub fn join(&self, primary: &Self, members: &[&Self]) {
        primary.meet("127.0.0.1", self);
        let (own, id) = (self.node_id(), primary.node_id());
        self.wait_until("it knows its primary", |node| {
            node.try_ask(&["CLUSTER", "REPLICATE", &id]).is_ok()
        });
        for member in members {
            member.wait_until("it knows the new member as a replica", |member| {
                let nodes: String = member.ask(&["CLUSTER", "NODES"]);
                let mut lines = nodes.lines().filter(|line| line.starts_with(&own));
                lines.any(|line| line.contains(&format!("slave {id} ")))
            });
        }
        self.wait_until(
            "it has its primary's data, and a link to each member",
            |node| {
                // Nobody votes for a node whose request has no link, and `redis-cli` passes over members without one.
                let nodes: String = node.ask(&["CLUSTER", "NODES"]);
                let has_link = |member: &&Self| {
                    let id = member.node_id();
                    let mut lines = nodes.lines().filter(|line| line.starts_with(&id));
                    lines.any(|line| line.contains(" connected"))
                };
                node.info("master_link_status").as_deref() == Some("up")
                    && node.cluster_info("cluster_state").as_deref() == Some("ok")
                    && members.iter().all(has_link)
            },
        );
    }

    /// Removes this replica from its cluster as `redis-cli --cluster del-node` does.
    #[track_caller]
    pub fn leave(&self, member: &Self) {
        let id = self.node_id();
        // It would give a replica that still names this node to a server that may be no primary.
        member.wait_until("no replica follows the node that leaves", |member| {
            let nodes: String = member.ask(&["CLUSTER", "NODES"]);
            !nodes.contains(&format!("slave {id} "))
        });
        let command = ["--cluster", "del-node", &member.address(), &id];
        let left = Command::new("redis-cli").args(command).output().unwrap();
        assert!(left.status.success(), "{left:?}");
    }

    /// Ends the replication to `replica` and keeps it from being taken up again: the replica logs in as
    /// somebody whom this server does not know. All else between them goes on.
    pub fn cut_off(&self, replica: &Self) {
        replica.set_primary_login("nobody", "nothing");
        let _: i64 = self.ask(&["CLIENT", "KILL", "TYPE", "replica"]);
        self.wait_until("the replica is cut off", |primary| {
            primary.info("connected_slaves").as_deref() == Some("0")
        });
    }

    /// How this server logs in at its primary; empty as at first.
    pub fn set_primary_login(&self, user: &str, password: &str) {
        let _: () = self.ask(&["CONFIG", "SET", "masteruser", user]);
        let _: () = self.ask(&["CONFIG", "SET", "masterauth", password]);
    }

    /// Sends a signal by its name, for example `STOP`.
    pub fn signal(&self, name: &str) {
        let arguments = [format!("-{name}"), self.pid.clone()];
        let sent = Command::new("kill").args(arguments).status();
        assert!(sent.unwrap().success());
    }

    /// Kills the server with SIGKILL and waits for its end.
    pub fn kill(&mut self) {
        drop(self.supervisor.stdin.take());
        self.supervisor.wait().unwrap();
    }

    /// Kills the server and deletes its data; it keeps its place in the cluster.
    pub fn lose_data(&mut self) {
        self.kill();
        std::fs::remove_dir_all(self.folder.join("appendonlydir")).unwrap();
    }

    /// Kills the server and starts another one, with its files in `folder`, on the same ports.
    pub fn replace(&mut self, folder: &Path, flags: &[&str]) {
        self.kill();
        std::fs::create_dir_all(folder).unwrap();
        folder.clone_into(&mut self.folder);
        self.flags.truncate(4);
        self.flags
            .extend(flags.iter().map(|flag| (*flag).to_owned()));
        self.restart();
    }

    /// Starts the server again on its port and folder.
    pub fn restart(&mut self) {
        (self.supervisor, self.pid) = supervise(&self.folder, &self.flags, &self.environment);
        self.wait_until("it answers", |server| server.try_ask(&["PING"]).is_ok());
    }
}

fn supervise(folder: &Path, flags: &[String], environment: &[(String, String)]) -> (Child, String) {
    let mut supervisor = Command::new("sh")
        .args(["-c", SUPERVISOR, "sh", PROFILE, "--dir"])
        .arg(folder)
        .args(["--bind", "127.0.0.1", "--logfile", "redis.log"])
        .args(flags)
        .envs(environment.iter().cloned())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("there is a shell");
    let mut pid = String::new();
    let stdout = supervisor.stdout.take().expect("stdout is piped");
    BufReader::new(stdout).read_line(&mut pid).unwrap();
    (supervisor, pid.trim_end().to_owned())
}

impl Drop for RedisServer {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Three primaries with a replica each.
#[derive(Debug)]
pub struct RedisCluster {
    /// The three nodes that began as primaries, then their replicas in the same order.
    pub nodes: Vec<RedisServer>,
    _folder: TempDir,
}

impl RedisCluster {
    pub fn start() -> Self {
        Self::start_with("127.0.0.1", &[], |_| Vec::new())
    }

    /// The same with nodes that name each other by the IP address `host`; `flags` override the profile, and a
    /// `--tls-port` is added where they have certificates. Each node has its environment variables.
    pub fn start_with(
        host: &str,
        flags: &[&str],
        environment: impl Fn(usize) -> Vec<(String, String)>,
    ) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let start = |n: usize| {
            let tls_port = free_address().port().to_string();
            let tls: &[&str] = if flags.contains(&"--tls-cert-file") {
                &["--tls-port", &tls_port]
            } else {
                &[]
            };
            let folder = folder.path().join(n.to_string());
            RedisServer::start_with(&folder, &[flags, tls].concat(), &environment(n))
        };
        let nodes: Vec<RedisServer> = (0..6).map(start).collect();
        for (n, slots) in [("0", "5460"), ("5461", "10922"), ("10923", "16383")]
            .iter()
            .enumerate()
        {
            let epoch = (n + 1).to_string();
            let _: () = nodes[n].ask(&["CLUSTER", "SET-CONFIG-EPOCH", &epoch]);
            let _: () = nodes[n].ask(&["CLUSTER", "ADDSLOTSRANGE", slots.0, slots.1]);
        }
        for node in &nodes[1..] {
            nodes[0].meet(host, node);
        }
        for node in &nodes {
            node.wait_until("it knows the others", |node| {
                node.cluster_info("cluster_known_nodes") == Some("6".to_owned())
            });
        }
        for n in 0..3 {
            let primary: String = nodes[n].ask(&["CLUSTER", "MYID"]);
            let replica = &nodes[n + 3];
            replica.wait_until("it knows its primary", |replica| {
                let command = ["CLUSTER", "REPLICATE", &primary];
                replica.try_ask(&command).is_ok()
            });
        }
        let cluster = Self {
            nodes,
            _folder: folder,
        };
        cluster.wait_until_whole();
        cluster
    }

    /// Waits until every primary has its replica and accepts writes, and every node reports that the cluster
    /// serves. A primary counts its replicas once a second and refuses writes until then. The script here
    /// counts as a write, because it has no flags, but changes nothing.
    #[track_caller]
    pub fn wait_until_whole(&self) {
        for node in &self.nodes {
            node.wait_until("the cluster is whole", |node| {
                let is_linked = match node.info("role").as_deref() {
                    Some("master") => node.try_ask(&["EVAL", "#!lua\nreturn 1", "0"]).is_ok(),
                    _ => node.info("master_link_status").as_deref() == Some("up"),
                };
                is_linked && node.cluster_info("cluster_state").as_deref() == Some("ok")
            });
        }
    }

    /// The nodes that are primaries now.
    pub fn primaries(&self) -> Vec<&RedisServer> {
        let is_primary = |node: &&RedisServer| node.ask_role() == "master";
        self.nodes.iter().filter(is_primary).collect()
    }

    /// All nodes, for `--map`.
    pub fn url(&self) -> String {
        let addresses: Vec<String> = self.nodes.iter().map(RedisServer::address).collect();
        format!("redis://{}", addresses.join(","))
    }

    /// All nodes, for `--map` with TLS.
    pub fn tls_url(&self) -> String {
        let nodes = self.nodes.iter();
        let addresses: Vec<String> = nodes
            .map(|node| format!("localhost:{}", node.node_port()))
            .collect();
        format!("rediss://{}", addresses.join(","))
    }

    /// Empties the map.
    pub fn flush(&self) {
        for primary in self.primaries() {
            let _: () = primary.ask(&["FLUSHALL"]);
        }
    }
}
