//! Redis servers that could lose entries, are not a map, or hold another map: each is warned about or refused
//! with the reason.

use common::bounds::{Bounds, Order};
use common::entry::{Entry, Outcome};
use logging::map::Health;
use testing::redis_servers::{RedisCluster, RedisServer};

use crate::map::read;
use crate::redis::{
    entries, is_partition_down, is_whole, open_at, put, wait_for, wait_until_missing,
    wait_until_ready,
};

#[tokio::test]
async fn server_that_may_lose_entries_is_warned_about() {
    let folder = tempfile::tempdir().unwrap();
    let flags = ["--cluster-enabled", "no", "--min-replicas-to-write", "0"];
    let no_file = [&flags[..], &["--appendonly", "no"]].concat();
    let server = RedisServer::start(&folder.path().join("primary"), &no_file);
    let map = open_at(&format!("redis://{}", server.address()), None);
    let health = wait_until_ready(&map).await;
    let warning = "warning: keeps no append-only file";
    let is_warned = |health: &Health, warning: &str| {
        let mut checks = health.checks.iter();
        checks.any(|check| check.ok && check.detail.starts_with(warning))
    };
    assert!(is_warned(&health, warning), "{health:?}");

    let port = server.port.to_string();
    let follow = [&flags[..], &["--replicaof", "127.0.0.1", &port]].concat();
    let _replica = RedisServer::start(&folder.path().join("replica"), &follow);
    wait_for(&map, |health| is_warned(health, "warning: has 1 replicas")).await;
}

/// A server with such a policy evicts acknowledged entries when its memory is full. The policy is detected at
/// the start and later, on any member. Policies that evict only keys with a time to live are accepted.
#[tokio::test]
async fn server_that_may_evict_entries_is_not_the_map() {
    let folder = tempfile::tempdir().unwrap();
    let server = RedisServer::single(folder.path());
    let used: u64 = server.info("used_memory").unwrap().parse().unwrap();
    let _: () = server.ask(&["CONFIG", "SET", "maxmemory", &(2 * used).to_string()]);
    let set_policy = |policy: &str| {
        let _: () = server.ask(&["CONFIG", "SET", "maxmemory-policy", policy]);
    };
    set_policy("allkeys-lru");
    let map = open_at(&format!("redis://{}", server.address()), None);
    wait_until_missing(&map, "set maxmemory-policy noeviction").await;
    assert!(put(&map, &entries(10)).await.iter().all(is_partition_down));
    assert!(read(&*map, Bounds::default()).await.is_err());

    set_policy("volatile-lru");
    wait_until_ready(&map).await;
    let stored = entries(10);
    assert_eq!(put(&map, &stored).await, vec![Outcome::Stored; 10]);
    set_policy("allkeys-random");
    wait_until_missing(&map, "set maxmemory-policy noeviction").await;
    assert!(put(&map, &entries(10)).await.iter().all(is_partition_down));
    set_policy("noeviction");
    wait_until_ready(&map).await;
    let read = read(&*map, Bounds::default()).await.unwrap();
    assert_eq!(read, stored);
}

/// A map of another layout version is neither read nor written.
#[tokio::test]
async fn map_of_another_layout_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let server = RedisServer::single(folder.path());
    let id = "2 01a203b3-3bb1-7319-90b9-a08e864b5eeb";
    let _: () = server.ask(&["SET", "id:{0}", id]);
    let map = open_at(&format!("redis://{}", server.address()), None);
    wait_until_missing(&map, "another layout (\"2\"").await;
    let outcomes = put(&map, &entries(10)).await;
    assert!(!outcomes.contains(&Outcome::Stored), "{outcomes:?}");
    assert!(read(&*map, Bounds::default()).await.is_err());
    assert_eq!(server.ask::<String>(&["GET", "id:{0}"]), id);
    assert!(server.ask::<Vec<String>>(&["KEYS", "entries:*"]).is_empty());
}

/// A replica that would evict entries once it is promoted.
#[tokio::test]
async fn member_that_may_evict_entries_makes_the_cluster_unready() {
    let cluster = RedisCluster::start();
    let map = open_at(&cluster.url(), None);
    wait_until_ready(&map).await;
    let replica = &cluster.nodes[4];
    let _: () = replica.ask(&["CONFIG", "SET", "maxmemory", "1gb"]);
    let _: () = replica.ask(&["CONFIG", "SET", "maxmemory-policy", "allkeys-lfu"]);
    wait_until_missing(&map, &replica.address()).await;
    let _: () = replica.ask(&["CONFIG", "SET", "maxmemory-policy", "noeviction"]);
    let health = wait_until_ready(&map).await;
    assert!(is_whole(&health), "{health:?}");
}

#[tokio::test]
async fn servers_without_a_cluster_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let start = |name: &str| RedisServer::single(&folder.path().join(name));
    let (first, second) = (start("1"), start("2"));
    let both = format!("redis://{},{}", first.address(), second.address());
    let map = open_at(&both, None);
    wait_until_missing(&map, "is not a member of a cluster; name one server").await;
    assert!(put(&map, &entries(1)).await.iter().all(is_partition_down));
}

/// Two instances agree on the map's id, which either of them generates; emptied servers are another map.
#[tokio::test]
async fn emptied_servers_are_another_map() {
    let folder = tempfile::tempdir().unwrap();
    let server = RedisServer::single(folder.path());
    let location = format!("redis://{}", server.address());
    let maps = [open_at(&location, None), open_at(&location, None)];
    for map in &maps {
        wait_until_ready(map).await;
    }
    let first = maps[0].id();
    assert!(first.is_some());
    assert_eq!(maps[1].id(), first);
    let _: () = server.ask(&["FLUSHALL"]);
    for map in &maps {
        wait_for(map, |_| map.id() != first).await;
        assert!(map.id().is_some());
    }
    assert_eq!(maps[0].id(), maps[1].id());
}

/// A replica of a single server can be read, but may lack entries of its primary.
#[tokio::test]
async fn replica_of_a_single_server_is_not_the_map() {
    let folder = tempfile::tempdir().unwrap();
    let primary = RedisServer::single(&folder.path().join("primary"));
    let (port, flags) = (
        primary.port.to_string(),
        ["--cluster-enabled", "no", "--replicaof"],
    );
    let flags = [&flags[..], &["127.0.0.1", &port]].concat();
    let replica = RedisServer::start(&folder.path().join("replica"), &flags);
    let map = open_at(&format!("redis://{}", replica.address()), None);
    wait_until_missing(&map, "is a replica; name its primary").await;
    assert!(read(&*map, Bounds::default()).await.is_err());
    assert!(map.last().await.is_err());
}

/// A partition that its primary has lost is not an empty one: reads and puts that need it fail. A map that
/// has lost its id is not a new one.
#[tokio::test]
async fn lost_partition_is_not_an_empty_one() {
    const LOST: u32 = 7;
    let folder = tempfile::tempdir().unwrap();
    let server = RedisServer::single(folder.path());
    let location = format!("redis://{}", server.address());
    let map = open_at(&location, None);
    wait_until_ready(&map).await;
    let stored = entries(2000);
    assert_eq!(put(&map, &stored).await, vec![Outcome::Stored; 2000]);
    let _: i64 = server.ask(&["DEL", &format!("entries:{{{LOST}}}")]);
    for order in [Order::Asc, Order::Desc] {
        let bounds = Bounds {
            order,
            ..Bounds::default()
        };
        let lost = read(&*map, bounds).await.unwrap_err().to_string();
        assert!(lost.contains("partition 7 is missing"), "{lost}");
    }
    let is_lost = |entry: &Entry| crc32fast::hash(entry.uuid.as_bytes()) % 271 == LOST;
    let new = entries(2000);
    let outcomes = put(&map, &new).await;
    for (entry, outcome) in new.iter().zip(outcomes) {
        match is_lost(entry) {
            true => assert!(is_partition_down(&outcome)),
            false => assert_eq!(outcome, Outcome::Stored),
        }
    }
    let in_lost = stored.iter().find(|entry| is_lost(entry)).unwrap();
    assert!(map.get(in_lost.uuid).await.is_err());

    let _: i64 = server.ask(&["DEL", "id:{0}"]);
    let late = open_at(&location, None);
    let is_lost_map = |health: &Health| {
        let missing = health.not_ready.as_deref().unwrap_or_default();
        missing.contains("the map's id (key id:{0}) is missing but partition 0 has entries")
    };
    wait_for(&late, is_lost_map).await;
}
