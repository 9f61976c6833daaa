//! Servers that are killed while their append-only files are not complete: after a full copy, a server
//! holds what it has in memory only until it has written a new file. Each test runs on Redis 7.0, and on
//! Valkey, which has `WAITAOF`.

use std::path::Path;
use std::sync::Arc;

use common::bounds::Bounds;
use common::entry::{Entry, Outcome};
use logging::map::DistributedMap;
use testing::process::LOOK_AGAIN;
use testing::redis_servers::RedisServer;
use testing::requirements::valkey_server;

use crate::map::read;
use crate::redis::{
    entries, is_whole, open_at, put, wait_for, wait_until_missing, wait_until_ready,
};

/// Two servers, the second of which has a full copy of the first in memory, but not yet in its file.
struct Copied {
    primary: RedisServer,
    replica: RedisServer,
    /// The map at the primary, with one backup.
    map: Arc<dyn DistributedMap>,
    /// What was stored before the copy.
    stored: Vec<Entry>,
}

impl Copied {
    async fn start(program: &str, folder: &Path) -> Self {
        let primary = RedisServer::single_of(program, &folder.join("primary"));
        let replica = RedisServer::single_of(program, &folder.join("replica"));
        follow(&replica, &primary);
        let map = open_at(&at(&primary), Some(1));
        wait_until_ready(&map).await;
        let stored = entries(100);
        assert_eq!(put(&map, &stored).await, vec![Outcome::Stored; 100]);
        copy_slowly(&replica, &primary);
        Self {
            primary,
            replica,
            map,
            stored,
        }
    }
}

fn follow(replica: &RedisServer, primary: &RedisServer) {
    let port = primary.port.to_string();
    let _: () = replica.ask(&["REPLICAOF", "127.0.0.1", &port]);
}

/// Gives the replica a full copy, and returns while the copy is in its memory only.
fn copy_slowly(replica: &RedisServer, primary: &RedisServer) {
    // A file that Valkey 9 receives for a copy becomes the beginning of its append-only file at once.
    let _: () = replica.ask(&["CONFIG", "SET", "repl-diskless-load", "swapdb"]);
    // It writes the file in seconds instead of milliseconds.
    let _: () = replica.ask(&["CONFIG", "SET", "rdb-key-save-delay", "20000"]);
    // The first of these changes the history that it has, so the second is a full copy.
    let _: () = replica.ask(&["REPLICAOF", "NO", "ONE"]);
    follow(replica, primary);
    replica.wait_until("it has a copy that is not on disk", |replica| {
        replica.info("master_link_status").as_deref() == Some("up") && is_file_written(replica)
    });
}

fn at(server: &RedisServer) -> String {
    format!("redis://{}", server.address())
}

fn is_file_written(server: &RedisServer) -> bool {
    server.info("aof_rewrite_in_progress").as_deref() == Some("1")
}

/// Puts entries one by one while the server writes its file, and returns the acknowledged ones.
async fn put_while_written(map: &Arc<dyn DistributedMap>, server: &RedisServer) -> Vec<Entry> {
    let mut acknowledged = Vec::new();
    for entry in entries(50) {
        let outcomes = put(map, std::slice::from_ref(&entry)).await;
        if outcomes == [Outcome::Stored] {
            acknowledged.push(entry);
        }
    }
    assert!(
        is_file_written(server),
        "the file was complete too early to prove anything"
    );
    acknowledged
}

/// Kills the server and starts it again: as a primary, with what is in its file.
async fn assert_kept(mut server: RedisServer, before: Vec<Entry>, later: Vec<Entry>) {
    server.kill();
    server.restart();
    let map = open_at(&at(&server), None);
    wait_until_ready(&map).await;
    let kept = read(&*map, Bounds::default()).await.unwrap();
    let acknowledged = before.len() + later.len();
    let all = before.iter().chain(&later);
    let lost = all.filter(|entry| !kept.contains(entry)).count();
    assert_eq!(lost, 0, "of {acknowledged} acknowledged entries");
}

fn programs() -> impl Iterator<Item = String> {
    [Some("redis-server".to_owned()), valkey_server()]
        .into_iter()
        .flatten()
}

/// `WAIT` counts a replica that has the entries in memory.
#[tokio::test]
async fn replica_counts_once_its_file_is_complete() {
    for program in programs() {
        let folder = tempfile::tempdir().unwrap();
        let copied = Copied::start(&program, folder.path()).await;
        let acknowledged = put_while_written(&copied.map, &copied.replica).await;
        assert_kept(copied.replica, copied.stored, acknowledged).await;
    }
}

/// The same replica takes part again, without a restart of the instance.
#[tokio::test]
async fn shard_takes_entries_again_when_the_file_is_complete() {
    for program in programs() {
        let folder = tempfile::tempdir().unwrap();
        let copied = Copied::start(&program, folder.path()).await;
        put_while_written(&copied.map, &copied.replica).await;
        wait_for(&copied.map, is_whole).await;
        let later = entries(10);
        assert_eq!(put(&copied.map, &later).await, vec![Outcome::Stored; 10]);
        assert_kept(copied.replica, copied.stored, later).await;
    }
}

/// A replica is promoted before its file is complete; an instance that finds it so, and one that is opened
/// then, acknowledge nothing.
#[tokio::test]
async fn promoted_primary_acknowledges_once_its_file_is_complete() {
    for program in programs() {
        let folder = tempfile::tempdir().unwrap();
        let Copied {
            mut primary,
            replica,
            stored,
            ..
        } = Copied::start(&program, folder.path()).await;
        primary.kill();
        let _: () = replica.ask(&["REPLICAOF", "NO", "ONE"]);
        let map = open_at(&at(&replica), None);
        wait_for(&map, |health| {
            let missing = health.not_ready.as_ref();
            missing.is_none_or(|missing| missing.contains("writes a new append-only file"))
        })
        .await;
        let acknowledged = put_while_written(&map, &replica).await;
        assert_kept(replica, stored, acknowledged).await;
    }
}

/// An ordinary rewrite is no reason to refuse: the entries meanwhile go to the file that follows the new one.
#[tokio::test]
async fn ordinary_rewrite_refuses_nothing_and_loses_nothing() {
    for program in programs() {
        let folder = tempfile::tempdir().unwrap();
        let server = RedisServer::single_of(&program, folder.path());
        let map = open_at(&at(&server), None);
        wait_until_ready(&map).await;
        let _: () = server.ask(&["CONFIG", "SET", "rdb-key-save-delay", "20000"]);
        let _: String = server.ask(&["BGREWRITEAOF"]);
        server.wait_until("it rewrites its file", is_file_written);
        let acknowledged = put_while_written(&map, &server).await;
        assert_eq!(acknowledged.len(), 50);
        // The writer is opened again during the rewrite.
        let _: () = server.ask(&["SCRIPT", "FLUSH"]);
        put(&map, &entries(1)).await;
        let later = entries(1);
        while put(&map, &later).await != [Outcome::Stored] {
            tokio::time::sleep(LOOK_AGAIN).await;
        }
        assert!(
            is_file_written(&server),
            "the rewrite was over too early to prove anything"
        );
        assert_kept(server, acknowledged, later).await;
    }
}

/// A map is made once its marks are on disk: without them, what is stored in it later could not be read.
#[tokio::test(flavor = "multi_thread")]
async fn map_is_made_once_its_marks_are_on_disk() {
    for program in programs() {
        let folder = tempfile::tempdir().unwrap();
        let primary = RedisServer::single_of(&program, &folder.path().join("primary"));
        let mut replica = RedisServer::single_of(&program, &folder.path().join("replica"));
        // Something else keeps the map from being made until the replica has a new copy.
        let _: i64 = primary.ask(&["ZADD", "entries:{7}", "0", "something else than an entry"]);
        for key in 0..200 {
            let _: () = primary.ask(&["SET", &format!("other:{key}"), ""]);
        }
        follow(&replica, &primary);
        replica.wait_until("its file is complete", |replica| {
            replica.info("master_link_status").as_deref() == Some("up") && !is_file_written(replica)
        });
        let map = open_at(&at(&primary), Some(1));
        wait_until_missing(&map, "partition 7 is not empty").await;
        copy_slowly(&replica, &primary);
        let _: i64 = primary.ask(&["DEL", "entries:{7}"]);
        let id = || primary.ask::<Option<String>>(&["GET", "id:{0}"]);
        primary.wait_until("the map is made", |_| {
            id().is_some_and(|id| id.starts_with("1 "))
        });
        assert!(!is_file_written(&replica));
        replica.kill();
        replica.restart();
        let copy = open_at(&at(&replica), None);
        wait_until_ready(&copy).await;
        assert_eq!(read(&*copy, Bounds::default()).await.unwrap(), []);
    }
}

/// Neither a primary nor a replica may lack the file.
#[tokio::test]
async fn server_without_append_only_file_takes_no_entries() {
    for program in programs() {
        let folder = tempfile::tempdir().unwrap();
        let server = RedisServer::single_of(&program, folder.path());
        let set_file = |value| {
            let _: () = server.ask(&["CONFIG", "SET", "appendonly", value]);
        };
        set_file("no");
        let map = open_at(&at(&server), None);
        let line = format!(
            "redis {} keeps no append-only file, so acknowledged entries could be lost: set appendonly yes",
            server.address()
        );
        wait_until_missing(&map, &line).await;
        assert!(!put(&map, &entries(10)).await.contains(&Outcome::Stored));
        set_file("yes");
        wait_until_ready(&map).await;
        let stored = entries(10);
        assert_eq!(put(&map, &stored).await, vec![Outcome::Stored; 10]);
        set_file("no");
        assert!(!put(&map, &entries(10)).await.contains(&Outcome::Stored));
    }
}
