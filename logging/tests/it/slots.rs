//! Slots of a Redis Cluster that move from one member to another while the map is used.

use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use common::bounds::Bounds;
use common::entry::{Entry, Outcome};
use logging::map::{DistributedMap, Health, MapError};
use testing::process::{LOOK_AGAIN, Process, free_address};
use testing::redis_servers::RedisCluster;

use crate::map::read;
use crate::redis::{
    certify, entries, is_partition_down, is_whole, open_at, put, wait_for, wait_until_ready,
};

/// Slots with their partitions move to another primary while entries are put: every acknowledged entry is
/// kept, and all partitions accept entries again afterwards.
#[tokio::test(flavor = "multi_thread")]
async fn slots_may_move_while_entries_are_put() {
    let cluster = RedisCluster::start();
    let map = open_at(&cluster.url(), None);
    wait_until_ready(&map).await;
    let id = |node: usize| cluster.nodes[node].ask::<String>(&["CLUSTER", "MYID"]);
    let mut moving = Command::new("redis-cli")
        .args(["--cluster", "reshard", &cluster.nodes[0].address()])
        .args(["--cluster-from", &id(0), "--cluster-to", &id(1)])
        .args(["--cluster-slots", "2000", "--cluster-yes"])
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let mut stored = Vec::new();
    let mut refused = 0;
    let has_moved = loop {
        let batch = entries(100);
        for (entry, outcome) in batch.iter().zip(put(&map, &batch).await) {
            match outcome {
                Outcome::Stored => stored.push(entry.clone()),
                outcome if is_partition_down(&outcome) => refused += 1,
                other => panic!("{other:?}"),
            }
        }
        if let Some(status) = moving.try_wait().unwrap() {
            break status.success();
        }
    };
    assert!(has_moved);
    println!(
        "{} entries stored and {refused} refused while slots moved",
        stored.len()
    );
    // A refusal tells the instance the new primary of a partition.
    let last = entries(100);
    let putting = async {
        let mut left = last.clone();
        while !left.is_empty() {
            let outcomes = put(&map, &left).await;
            let mut outcomes = outcomes.iter();
            left.retain(|_| outcomes.next().is_some_and(is_partition_down));
        }
    };
    let put_again = tokio::time::timeout(Duration::from_secs(30), putting).await;
    put_again.expect("all partitions accept entries again");
    stored.extend(last);
    assert!(read_all(&map).await == stored);
}

/// All entries, as soon as they can be read; a refused read starts discovery too.
async fn read_all(map: &Arc<dyn DistributedMap>) -> Vec<Entry> {
    let reading = async {
        loop {
            if let Ok(read) = read(&**map, Bounds::default()).await {
                return read;
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    };
    let read = tokio::time::timeout(Duration::from_secs(30), reading).await;
    read.expect("the map can be read again")
}

/// A slot that moves from node 0 to node 1, with its keys.
struct OpenSlot {
    slot: String,
    ids: [String; 2],
    keys: Vec<String>,
}

impl OpenSlot {
    /// Opens the slot that holds the partition of `key` at both ends.
    fn open(cluster: &RedisCluster, key: &str) -> Self {
        let slot: u16 = cluster.nodes[0].ask(&["CLUSTER", "KEYSLOT", key]);
        let slot = slot.to_string();
        let ids = [0, 1].map(|node| cluster.nodes[node].ask::<String>(&["CLUSTER", "MYID"]));
        let keys = cluster.nodes[0].ask(&["CLUSTER", "GETKEYSINSLOT", &slot, "100"]);
        let _: () = cluster.nodes[1].ask(&["CLUSTER", "SETSLOT", &slot, "IMPORTING", &ids[0]]);
        let _: () = cluster.nodes[0].ask(&["CLUSTER", "SETSLOT", &slot, "MIGRATING", &ids[1]]);
        Self { slot, ids, keys }
    }

    fn move_keys(&self, cluster: &RedisCluster) {
        let port = cluster.nodes[1].node_port();
        for key in &self.keys {
            let migrate = ["MIGRATE", "127.0.0.1", &port, key, "0", "5000"];
            let _: () = cluster.nodes[0].ask(&migrate);
        }
    }

    fn close(&self, cluster: &RedisCluster) {
        for node in [1, 0] {
            let command = ["CLUSTER", "SETSLOT", &self.slot, "NODE", &self.ids[1]];
            let _: () = cluster.nodes[node].ask(&command);
        }
    }
}

/// The key of a partition of the first primary that has one of the entries; others have only marks.
fn key_with_entries(cluster: &RedisCluster, stored: &[Entry]) -> String {
    let keys: Vec<String> = cluster.nodes[0].ask(&["KEYS", "entries:*"]);
    let mut found = stored.iter().map(|entry| {
        let partition = crc32fast::hash(entry.uuid.as_bytes()) % 271;
        format!("entries:{{{partition}}}")
    });
    found
        .find(|key| keys.contains(key))
        .expect("the primary has entries")
}

/// The move of a slot was interrupted: its partition is read where its entries are, refuses entries, and is
/// reported.
#[tokio::test]
async fn interrupted_move_is_reported_and_its_partition_is_read() {
    let cluster = RedisCluster::start();
    let map = open_at(&cluster.url(), None);
    wait_until_ready(&map).await;
    let stored = entries(1000);
    assert_eq!(put(&map, &stored).await, vec![Outcome::Stored; 1000]);
    let whole = async || read(&*map, Bounds::default()).await;
    let key = key_with_entries(&cluster, &stored);
    let open = OpenSlot::open(&cluster, &key);
    assert_eq!(whole().await.unwrap(), stored);
    open.move_keys(&cluster);
    assert_eq!(whole().await.unwrap(), stored);
    let partition: u32 = key["entries:{".len()..key.len() - 1].parse().unwrap();
    let is_moved = |entry: &&Entry| crc32fast::hash(entry.uuid.as_bytes()) % 271 == partition;
    let moved = stored.iter().find(is_moved).unwrap();
    assert_eq!(
        map.get(moved.uuid).await.unwrap().as_ref(),
        Some(&moved.msg)
    );
    assert_eq!(map.last().await.unwrap(), Some(stored[999].uuid));

    let name = format!("slot {}", open.slot);
    let is_named = |health: &Health| {
        let mut checks = health.checks.iter();
        checks.any(|check| !check.ok && check.name == name && check.detail.contains("is moving"))
    };
    let health = wait_for(&map, is_named).await;
    assert_eq!(health.not_ready, None);
    let more = entries(1000);
    let outcomes = put(&map, &more).await;
    for (entry, outcome) in more.iter().zip(&outcomes) {
        match outcome {
            Outcome::Stored => assert!(!is_moved(&entry)),
            outcome => assert!(
                is_moved(&entry) && is_partition_down(outcome),
                "{outcome:?}"
            ),
        }
    }
    open.close(&cluster);
    let health = wait_for(&map, is_whole).await;
    assert!(!is_named(&health), "{health:?}");
    let again = async {
        while !put(&map, &more)
            .await
            .iter()
            .all(|outcome| matches!(outcome, Outcome::Stored | Outcome::Duplicate))
        {}
    };
    let put_again = tokio::time::timeout(Duration::from_secs(30), again).await;
    put_again.expect("the partition accepts entries again");
    let all = whole().await.unwrap();
    assert_eq!(all, [stored, more].concat());
}

/// The other names of members in redirections: each is followed while the move of a slot is interrupted.
#[tokio::test]
async fn redirection_is_followed_by_any_name_of_its_target() {
    let endpoint = "--cluster-preferred-endpoint-type";
    let announced = [
        "--cluster-announce-hostname",
        "localhost",
        endpoint,
        "hostname",
    ];
    for (host, flags) in [
        ("127.0.0.1", &announced[..]),
        ("127.0.0.1", &[endpoint, "hostname"]),
        ("127.0.0.1", &[endpoint, "unknown-endpoint"]),
        ("::1", &["--bind", "127.0.0.1", "::1"]),
    ] {
        let cluster = RedisCluster::start_with(host, flags, |_| Vec::new());
        let map = open_at(&cluster.url(), None);
        wait_until_ready(&map).await;
        let stored = entries(1000);
        assert_eq!(put(&map, &stored).await, vec![Outcome::Stored; 1000]);
        let open = OpenSlot::open(&cluster, &key_with_entries(&cluster, &stored));
        open.move_keys(&cluster);
        let read = read(&*map, Bounds::default()).await;
        assert_eq!(read.unwrap(), stored, "{host} {flags:?}");
    }
}

/// The same with TLS: members are reached by their names, and redirections name IP addresses, or no host.
#[tokio::test]
async fn redirection_is_followed_by_any_name_of_its_target_with_tls() {
    let folder = tempfile::tempdir().unwrap();
    let [key, certificate] = certify(folder.path(), "DNS:localhost,IP:127.0.0.1");
    for endpoint in ["ip", "unknown-endpoint"] {
        let cluster = RedisCluster::start_with(
            "127.0.0.1",
            &[
                "--tls-cert-file",
                &certificate,
                "--tls-key-file",
                &key,
                "--tls-ca-cert-file",
                &certificate,
                "--tls-auth-clients",
                "no",
                "--tls-cluster",
                "yes",
                "--tls-replication",
                "yes",
                "--cluster-announce-hostname",
                "localhost",
                "--cluster-preferred-endpoint-type",
                endpoint,
            ],
            |_| Vec::new(),
        );
        let mut command = Command::new(env!("CARGO_BIN_EXE_logging"));
        command.args(["--map", &cluster.tls_url()]);
        command.env("SSL_CERT_FILE", &certificate);
        let instance = Process::start(command, free_address());
        instance.wait_until_ready();
        let map = open_at(&cluster.url(), None);
        wait_until_ready(&map).await;
        let stored = entries(1000);
        assert_eq!(put(&map, &stored).await, vec![Outcome::Stored; 1000]);
        let open = OpenSlot::open(&cluster, &key_with_entries(&cluster, &stored));
        open.move_keys(&cluster);
        let read = instance.ask("/");
        let missing = stored
            .iter()
            .find(|entry| !read.contains(&entry.uuid.to_string()));
        assert_eq!(
            missing,
            None,
            "{endpoint}: {}",
            &read[read.len().min(500)..]
        );
    }
}

/// The primary that a slot leaves is replaced during the move: its successor does not know that the entries
/// of the partition are elsewhere, and would return none. The read must fail rather than be shorter.
#[tokio::test]
async fn slot_whose_move_one_end_forgot_is_an_error_not_a_shorter_read() {
    let cluster = RedisCluster::start();
    let map = open_at(&cluster.url(), None);
    wait_until_ready(&map).await;
    let stored = entries(1000);
    assert_eq!(put(&map, &stored).await, vec![Outcome::Stored; 1000]);
    let open = OpenSlot::open(&cluster, &key_with_entries(&cluster, &stored));
    open.move_keys(&cluster);
    let name = format!("slot {}", open.slot);
    let is_named = |health: &Health, words: &str| {
        let mut checks = health.checks.iter();
        checks.any(|check| check.name == name && check.detail.contains(words))
    };
    wait_for(&map, |health| is_named(health, "is moving")).await;
    let _: () = cluster.nodes[3].ask(&["CLUSTER", "FAILOVER", "TAKEOVER"]);
    wait_for(&map, |health| is_named(health, "does not report the move")).await;
    match read(&*map, Bounds::default()).await {
        Ok(read) => assert_eq!(read, stored),
        Err(error) => assert!(matches!(error, MapError::Unavailable(_)), "{error}"),
    }
    // The test finishes the move: all keys are at node 1.
    for node in [1, 3] {
        let command = ["CLUSTER", "SETSLOT", &open.slot, "NODE", &open.ids[1]];
        let _: () = cluster.nodes[node].ask(&command);
    }
    wait_for(&map, is_whole).await;
    assert_eq!(read_all(&map).await, stored);
}

/// The tool that moves the slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mover {
    /// `redis-cli --cluster reshard`.
    RedisCli,
    /// `scripts/move-slots.sh`.
    Script,
}

impl Mover {
    /// A command that moves slots from node 0 to node 1.
    fn command(self, cluster: &RedisCluster, slots: &str) -> Command {
        let [from, to] = [0, 1].map(|node| cluster.nodes[node].address());
        match self {
            Self::RedisCli => {
                let id = |node: usize| cluster.nodes[node].ask::<String>(&["CLUSTER", "MYID"]);
                let mut command = Command::new("redis-cli");
                command.args(["--cluster", "reshard", &from, "--cluster-yes"]);
                command.args(["--cluster-from", &id(0), "--cluster-to", &id(1)]);
                command.args(["--cluster-slots", slots]);
                command
            }
            Self::Script => {
                let mut command = Command::new(MOVE_SLOTS);
                command.args([&from, &to, slots]);
                command
            }
        }
    }
}

const MOVE_SLOTS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../scripts/move-slots.sh");

/// The target of a move dies before its replica has the slots. The script loses nothing. The control run with
/// redis-cli must lose a partition; otherwise the test proves nothing. A lost partition is an error, not an
/// empty partition.
#[tokio::test(flavor = "multi_thread")]
async fn slots_moved_by_the_script_survive_the_end_of_their_target() {
    for mover in [Mover::RedisCli, Mover::Script] {
        let mut cluster = RedisCluster::start();
        let map = open_at(&cluster.url(), None);
        wait_until_ready(&map).await;
        let stored = entries(5500);
        for batch in stored.chunks(500) {
            assert_eq!(put(&map, batch).await, vec![Outcome::Stored; 500]);
        }
        // From here on the target's replica gets nothing, and only `WAIT` would detect it.
        let [target, replica] = [1, 4].map(|node| &cluster.nodes[node]);
        let _: () = target.ask(&["CONFIG", "SET", "min-replicas-to-write", "0"]);
        target.cut_off(replica);
        let moved = mover.command(&cluster, "500").output().unwrap();
        cluster.nodes[1].kill();
        if mover == Mover::RedisCli {
            assert!(moved.status.success(), "{moved:?}");
            cluster.nodes[4].wait_until("it takes over", |replica| {
                replica.info("role").as_deref() == Some("master")
            });
            let reading = async {
                loop {
                    match read(&*map, Bounds::default()).await {
                        Ok(read) => panic!(
                            "{} entries are read as if they were all entries",
                            read.len()
                        ),
                        Err(lost) if lost.to_string().contains("is missing") => return,
                        Err(_) => tokio::time::sleep(LOOK_AGAIN).await,
                    }
                }
            };
            let told = tokio::time::timeout(Duration::from_secs(30), reading).await;
            told.expect("a lost partition is reported");
            continue;
        }
        assert!(!moved.status.success(), "{moved:?}");
        let said = String::from_utf8_lossy(&moved.stderr);
        assert!(said.contains("not all 1 replicas"), "{said}");
        cluster.nodes[2].wait_until("the target counts as down", |other| {
            other.cluster_info("cluster_state").is_some()
                && other.cluster_info("cluster_slots_fail") != Some("0".to_owned())
        });
        cluster.nodes[4].set_primary_login("", "");
        cluster.nodes[1].restart();
        cluster.wait_until_whole();
        assert_eq!(cluster.nodes[4].info("role").as_deref(), Some("slave"));
        let finished = mover.command(&cluster, "100").output().unwrap();
        assert!(finished.status.success(), "{finished:?}");
        wait_for(&map, is_whole).await;
        let left = read_all(&map).await;
        println!("move-slots.sh: 5500 acknowledged, {} left", left.len());
        assert!(left == stored);
        for node in &cluster.nodes {
            let setting: Vec<String> = node.ask(&["CONFIG", "GET", "cluster-replica-no-failover"]);
            assert_eq!(setting[1], "no");
        }
    }
}

/// What the target's replica holds in memory only is not moved yet: killed then, it comes back without.
#[tokio::test(flavor = "multi_thread")]
async fn script_waits_until_moved_entries_are_in_the_files_of_the_target() {
    // A server writes a new file in seconds instead of milliseconds.
    let slow = ["--rdb-key-save-delay", "20000"];
    let mut cluster = RedisCluster::start_with("127.0.0.1", &slow, |_| Vec::new());
    let map = open_at(&cluster.url(), None);
    wait_until_ready(&map).await;
    let stored = entries(1000);
    assert_eq!(put(&map, &stored).await, vec![Outcome::Stored; 1000]);
    let key = key_with_entries(&cluster, &stored);
    OpenSlot::open(&cluster, &key);
    cluster.nodes[4].kill();
    cluster.nodes[4].restart();
    cluster.nodes[4].wait_until("it has a copy that is not on disk", |replica| {
        replica.info("master_link_status").as_deref() == Some("up")
            && replica.info("aof_rewrite_in_progress").as_deref() == Some("1")
    });
    let moved = Mover::Script.command(&cluster, "0").output().unwrap();
    assert!(moved.status.success(), "{moved:?}");
    for node in [1, 4] {
        cluster.nodes[node].kill();
    }
    cluster.nodes[4].restart();
    cluster.nodes[4].wait_until("it has loaded its file", |replica| {
        replica.info("loading").as_deref() == Some("0")
    });
    let kept: Vec<String> = cluster.nodes[4].ask(&["KEYS", &key]);
    assert_eq!(kept, [key]);
}
