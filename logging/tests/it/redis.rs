//! The failures of a map on Redis: servers that are away or paused, logins, TLS, replicas that come and go,
//! failovers, wrong clocks.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use common::bounds::Bounds;
use common::entry::{Entry, Outcome};
use logging::map::{Access, DistributedMap, Health, MapError, Options, open};
use reqwest::Client;
use testing::process::{LOOK_AGAIN, PATIENCE, Process, free_address};
use testing::redis_servers::{RedisCluster, RedisServer};
use testing::requirements::valkey_server;
use uuid::{NoContext, Timestamp, Uuid};

use crate::map::read;
use crate::processes::{LOGGING, put_one};

pub(crate) const SETTLE: Duration = Duration::from_secs(60);

pub(crate) fn open_at(location: &str, backups: Option<u16>) -> Arc<dyn DistributedMap> {
    let options = Options {
        store_timeout: Duration::from_millis(800),
        settle: Some(SETTLE),
        backups,
        access: Access::Serve,
    };
    open(&location.parse().unwrap(), options).unwrap()
}

pub(crate) fn entries(count: usize) -> Vec<Entry> {
    let entry = |n| Entry {
        uuid: Uuid::now_v7(),
        msg: format!("message {n}"),
    };
    (0..count).map(entry).collect()
}

pub(crate) fn entry_at(time: SystemTime) -> Entry {
    let since_epoch = time.duration_since(SystemTime::UNIX_EPOCH).unwrap();
    let timestamp =
        Timestamp::from_unix(NoContext, since_epoch.as_secs(), since_epoch.subsec_nanos());
    Entry {
        uuid: Uuid::new_v7(timestamp),
        msg: "of another time".to_owned(),
    }
}

pub(crate) async fn put(map: &Arc<dyn DistributedMap>, entries: &[Entry]) -> Vec<Outcome> {
    map.put(entries.into()).await
}

pub(crate) fn is_partition_down(outcome: &Outcome) -> bool {
    matches!(outcome, Outcome::PartitionDown { .. })
}

/// Waits until the map's health satisfies `is_wanted`, and returns it.
pub(crate) async fn wait_for(
    map: &Arc<dyn DistributedMap>,
    is_wanted: impl Fn(&Health) -> bool,
) -> Health {
    let looking = async {
        loop {
            let health = map.health().await;
            if is_wanted(&health) {
                return health;
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    };
    let found = tokio::time::timeout(Duration::from_secs(30), looking).await;
    match found {
        Ok(health) => health,
        Err(_) => panic!("it stays {:?}", map.health().await),
    }
}

pub(crate) async fn wait_until_ready(map: &Arc<dyn DistributedMap>) -> Health {
    wait_for(map, |health| health.not_ready.is_none()).await
}

pub(crate) async fn wait_until_missing(map: &Arc<dyn DistributedMap>, words: &str) {
    wait_for(map, |health| {
        health
            .not_ready
            .as_ref()
            .is_some_and(|missing| missing.contains(words))
    })
    .await;
}

/// All checks pass.
pub(crate) fn is_whole(health: &Health) -> bool {
    health.not_ready.is_none() && health.checks.iter().all(|check| check.ok)
}

#[tokio::test]
async fn map_may_be_opened_before_its_server_runs_and_survives_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let mut server = RedisServer::single(folder.path());
    server.kill();
    let map = open_at(&format!("redis://{}", server.address()), None);
    wait_until_missing(&map, "cannot be reached").await;
    let entries = entries(10);
    assert!(put(&map, &entries).await.iter().all(is_partition_down));
    let unreadable = read(&*map, Bounds::default()).await;
    assert!(matches!(unreadable, Err(MapError::Unavailable(_))));

    server.restart();
    wait_until_ready(&map).await;
    assert_eq!(put(&map, &entries[..5]).await, vec![Outcome::Stored; 5]);

    server.kill();
    for outcome in put(&map, &entries[5..]).await {
        let is_not_acknowledged =
            matches!(outcome, Outcome::Refused { .. } | Outcome::Unknown { .. });
        assert!(is_not_acknowledged, "{outcome:?}");
    }
    wait_for(&map, |health| health.not_ready.is_some()).await;
    server.restart();
    wait_for(&map, is_whole).await;
    let outcomes = put(&map, &entries).await;
    assert_eq!(outcomes[..5], vec![Outcome::Duplicate; 5]);
    assert_eq!(outcomes[5..], vec![Outcome::Stored; 5]);
    assert_eq!(read(&*map, Bounds::default()).await.unwrap(), entries);
}

/// A server that accepts connections and never answers is detected only by a timeout: entries in flight are
/// unknown, later ones are refused without asking it, and it is used again when it resumes.
#[tokio::test]
async fn paused_server_is_not_asked_until_it_resumes() {
    let folder = tempfile::tempdir().unwrap();
    let server = RedisServer::single(folder.path());
    let map = open_at(&format!("redis://{}", server.address()), None);
    wait_until_ready(&map).await;
    let entries = entries(3);
    server.signal("STOP");
    let outcomes = put(&map, &entries[..1]).await;
    assert!(
        matches!(outcomes[..], [Outcome::Unknown { .. }]),
        "{outcomes:?}"
    );
    let outcomes = put(&map, &entries[1..2]).await;
    assert!(outcomes.iter().all(is_partition_down), "{outcomes:?}");
    assert!(read(&*map, Bounds::default()).await.is_err());
    server.signal("CONT");
    wait_for(&map, is_whole).await;
    for outcome in put(&map, &entries).await {
        assert!(
            matches!(outcome, Outcome::Stored | Outcome::Duplicate),
            "{outcome:?}"
        );
    }
    let read = read(&*map, Bounds::default()).await.unwrap();
    assert_eq!(read, entries);
}

/// At the start, a shard without its backup makes an instance unready. Later it does not, because all
/// instances would become unready at once: only entries of its partitions are refused.
#[tokio::test]
async fn shard_without_its_backup_is_not_ready_at_first_and_degraded_later() {
    let mut cluster = RedisCluster::start();
    let url = cluster.url();
    cluster.nodes[3].kill();
    let map = open_at(&url, None);
    wait_until_missing(&map, "NOREPLICAS").await;
    cluster.nodes[3].restart();
    let health = wait_until_ready(&map).await;
    assert!(is_whole(&health), "{health:?}");

    let stored = entries(100);
    assert_eq!(put(&map, &stored).await, vec![Outcome::Stored; 100]);
    cluster.nodes[3].kill();
    let health = wait_for(&map, |health| !is_whole(health)).await;
    assert_eq!(health.not_ready, None);
    let failed: Vec<_> = health.checks.iter().filter(|check| !check.ok).collect();
    assert_eq!(failed.len(), 1);
    assert_eq!(
        failed[0].name,
        format!("primary {}", cluster.nodes[0].address())
    );
    let outcomes = put(&map, &entries(100)).await;
    let refused = outcomes
        .iter()
        .filter(|outcome| is_partition_down(outcome))
        .count();
    let accepted = outcomes
        .iter()
        .filter(|outcome| **outcome == Outcome::Stored)
        .count();
    assert!(refused > 0 && accepted > 0, "{outcomes:?}");
    assert_eq!(refused + accepted, 100, "{outcomes:?}");
    let read = read(&*map, Bounds::default()).await.unwrap();
    assert_eq!(read.len(), 100 + accepted);

    cluster.nodes[3].restart();
    wait_for(&map, is_whole).await;
    assert_eq!(put(&map, &entries(100)).await, vec![Outcome::Stored; 100]);
}

/// A primary that steps down answers `READONLY` and fails the `WAIT` behind it: the entries were not
/// executed, so none is unknown.
#[tokio::test(flavor = "multi_thread")]
async fn planned_failovers_leave_nothing_unknown() {
    let cluster = RedisCluster::start();
    let map = open_at(&cluster.url(), None);
    wait_until_ready(&map).await;
    let mut stored = Vec::new();
    let mut unknown = Vec::new();
    for (primary, replica) in [(0, 3), (1, 4), (2, 5)] {
        let _: () = cluster.nodes[replica].ask(&["CLUSTER", "FAILOVER"]);
        let is_primary =
            |node: usize| cluster.nodes[node].info("role").as_deref() == Some("master");
        loop {
            // The last round comes after the failover; the others before it or during it.
            let is_over = is_primary(replica) && !is_primary(primary);
            for batch in entries(200).chunks(20) {
                for (entry, outcome) in batch.iter().zip(put(&map, batch).await) {
                    match outcome {
                        Outcome::Stored => stored.push(entry.clone()),
                        Outcome::Unknown { detail } => unknown.push(detail),
                        outcome => assert!(is_partition_down(&outcome), "{outcome:?}"),
                    }
                }
            }
            if is_over {
                break;
            }
        }
        cluster.wait_until_whole();
        wait_for(&map, is_whole).await;
    }
    println!(
        "{} stored, {} unknown in three planned failovers",
        stored.len(),
        unknown.len()
    );
    assert!(unknown.is_empty(), "{unknown:?}");
    let read = read(&*map, Bounds::default()).await.unwrap();
    assert!(stored.iter().all(|entry| {
        read.binary_search_by_key(&entry.uuid, |read| read.uuid)
            .is_ok()
    }));
}

/// With `--backups 1` on one server with a replica, an entry is acknowledged when both have it.
#[tokio::test]
async fn backups_of_a_single_server_are_waited_for() {
    let folder = tempfile::tempdir().unwrap();
    let server = RedisServer::single(&folder.path().join("primary"));
    let map = open_at(&format!("redis://{}", server.address()), Some(1));
    wait_until_missing(&map, "0 of 1 backups").await;
    assert!(put(&map, &entries(1)).await.iter().all(is_partition_down));
    let port = server.port.to_string();
    let flags = ["--cluster-enabled", "no", "--replicaof", "127.0.0.1", &port];
    let replica = RedisServer::start(&folder.path().join("replica"), &flags);
    wait_until_ready(&map).await;
    assert_eq!(put(&map, &entries(10)).await, vec![Outcome::Stored; 10]);
    let keys: i64 = replica.ask(&["DBSIZE"]);
    assert!(keys > 1);
    // It stays connected, but receives no further entries.
    replica.signal("STOP");
    let outcomes = put(&map, &entries(1)).await;
    replica.signal("CONT");
    assert!(
        matches!(outcomes[..], [Outcome::Unknown { .. }]),
        "{outcomes:?}"
    );
}

/// A password that is changed on the server and in its file is used without a restart, while the old one fails.
#[tokio::test(flavor = "multi_thread")]
async fn password_follows_its_file() {
    let folder = tempfile::tempdir().unwrap();
    let server = RedisServer::single(folder.path());
    let set_password = |password: &str| {
        let new = format!(">{password}");
        let _: () = server.ask(&[
            "ACL",
            "SETUSER",
            "logging",
            "on",
            "resetpass",
            &new,
            "~*",
            "+@all",
        ]);
        // What is connected stays logged in.
        let _ = server.try_ask(&["CLIENT", "KILL", "USER", "logging"]);
    };
    let file = folder.path().join("password");
    std::fs::write(&file, "first\n").unwrap();
    set_password("first");
    let mut command = Command::new(LOGGING);
    let map = format!("redis://logging@{}", server.address());
    command
        .args(["--map", &map, "--map-password-file"])
        .arg(&file);
    let process = Process::start(command, free_address());
    process.wait_until_ready();
    set_password("second");
    let begin = Instant::now();
    while !process.readiness().contains("authentication failed") {
        assert!(begin.elapsed() < PATIENCE, "{}", process.readiness());
        tokio::time::sleep(LOOK_AGAIN).await;
    }
    std::fs::write(&file, "second\n").unwrap();
    process.wait_until_ready();
    let outcome = put_one(&Client::new(), &process.url(), &entries(1)[0]).await;
    assert_eq!(outcome, Outcome::Stored);
    assert!(!process.log().iter().any(|line| line.contains("second")));
}

/// The user of docs/redis.md has all the rights that are needed and no others, in both forms of its line; a
/// wrong password is reported as the reason.
#[tokio::test]
async fn user_with_a_password_needs_few_rights() {
    let rights = "on >secret/word ~entries:* ~message:* ~fence:* ~id:* +get +getrange +set +asking +eval +evalsha +zadd +zrange +zrevrange +zrangebylex +zrevrangebylex +zcard +readonly \
                  +incr +time +wait +info +ping +cluster|nodes";
    let with_waitaof = format!("{rights} +waitaof");
    let mut servers = vec![("redis-server".to_owned(), rights)];
    if let Some(valkey) = valkey_server() {
        servers.extend([(valkey.clone(), rights), (valkey, &with_waitaof)]);
    }
    for (program, rights) in servers {
        let folder = tempfile::tempdir().unwrap();
        let server = RedisServer::single_of(&program, folder.path());
        let mut command = vec!["ACL", "SETUSER", "logging"];
        command.extend(rights.split_whitespace());
        let _: () = server.ask(&command);
        let _: () = server.ask(&["ACL", "SETUSER", "default", "off"]);
        let address = server.address();
        let map = open_at(&format!("redis://logging:secret%2Fword@{address}"), None);
        wait_until_ready(&map).await;
        let entries = entries(10);
        assert_eq!(put(&map, &entries).await, vec![Outcome::Stored; 10]);
        assert_eq!(read(&*map, Bounds::default()).await.unwrap(), entries);
        assert_eq!(map.last().await.unwrap(), Some(entries[9].uuid));

        let map = open_at(&format!("redis://logging:wrong@{address}"), None);
        wait_until_missing(&map, "authentication failed").await;
    }
}

/// A right that is missing, or is taken away, is named, and the instance is not ready: all else seems well until
/// the first request that needs it.
#[tokio::test]
async fn right_that_is_missing_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let server = RedisServer::single(folder.path());
    let set = |rights: &[&str]| {
        let command = [&["ACL", "SETUSER", "logging"], rights].concat();
        let _: () = server.ask(&command);
    };
    set(&["on", ">secret", "~*", "+@all", "-zadd"]);
    let map = open_at(
        &format!("redis://logging:secret@{}", server.address()),
        None,
    );
    wait_until_missing(&map, "no right to +zadd:").await;
    set(&["+zadd"]);
    wait_until_ready(&map).await;
    for right in ["zadd", "zrangebylex", "getrange"] {
        set(&[&format!("-{right}")]);
        wait_until_missing(&map, &format!("+{right}")).await;
    }
    set(&["+@all"]);
    wait_until_ready(&map).await;
    assert_eq!(put(&map, &entries(1)).await, [Outcome::Stored]);
}

/// A server forgets its scripts, as by an operator's command: nothing is stored by the group that meets it, and
/// the instance sends the script again by itself.
#[tokio::test]
async fn server_that_forgot_the_script_gets_it_again() {
    let folder = tempfile::tempdir().unwrap();
    let server = RedisServer::single(folder.path());
    let map = open_at(&format!("redis://{}", server.address()), None);
    wait_until_ready(&map).await;
    let first = entries(3);
    assert_eq!(put(&map, &first).await, vec![Outcome::Stored; 3]);
    let _: () = server.ask(&["SCRIPT", "FLUSH"]);
    for outcome in put(&map, &entries(2)).await {
        assert!(
            matches!(&outcome, Outcome::PartitionDown { detail } if detail.contains("NOSCRIPT")),
            "{outcome:?}"
        );
    }
    let opened_again = async {
        loop {
            let outcomes = put(&map, &first).await;
            if !outcomes.iter().all(is_partition_down) {
                return outcomes;
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    };
    let outcomes = tokio::time::timeout(PATIENCE, opened_again).await.unwrap();
    assert_eq!(outcomes, vec![Outcome::Duplicate; 3]);
    assert_eq!(put(&map, &entries(2)).await, vec![Outcome::Stored; 2]);
}

/// Makes a key and a certificate for these names.
pub(crate) fn certify(folder: &Path, names: &str) -> [String; 2] {
    let [key, certificate] = ["key", "certificate"].map(|name| {
        let path = folder.join(name);
        path.to_str().expect("the path is UTF-8").to_owned()
    });
    let made = Command::new("openssl")
        .args(["req", "-x509", "-newkey", "ec", "-nodes", "-days", "2"])
        .args(["-pkeyopt", "ec_paramgen_curve:prime256v1"])
        .args(["-subj", "/CN=test"])
        .args(["-addext", &format!("subjectAltName={names}")])
        .args(["-addext", "basicConstraints=critical,CA:FALSE"])
        .args(["-keyout", &key, "-out", &certificate])
        .output()
        .unwrap();
    assert!(
        made.status.success(),
        "{}",
        String::from_utf8_lossy(&made.stderr)
    );
    [key, certificate]
}

/// `rediss://` with a certificate that the test generates and adds to the trusted ones.
#[test]
fn servers_are_reached_by_tls() {
    let folder = tempfile::tempdir().unwrap();
    let [key, certificate] = certify(folder.path(), "IP:127.0.0.1");
    let tls_port = free_address().port();
    let _server = RedisServer::start(
        &folder.path().join("server"),
        &[
            "--cluster-enabled",
            "no",
            "--min-replicas-to-write",
            "0",
            "--tls-port",
            &tls_port.to_string(),
            "--tls-cert-file",
            &certificate,
            "--tls-key-file",
            &key,
            "--tls-auth-clients",
            "no",
        ],
    );
    let start = |trusted: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_logging"));
        command.args(["--map", &format!("rediss://127.0.0.1:{tls_port}")]);
        command.env("SSL_CERT_FILE", trusted);
        Process::start(command, free_address())
    };
    start(&certificate).wait_until_ready();
    let stranger = start("/etc/ssl/certs/ca-certificates.crt");
    stranger.wait_for_line(|line| line.contains("certificate"));
    assert!(stranger.readiness().starts_with("HTTP/1.1 503"));
}
