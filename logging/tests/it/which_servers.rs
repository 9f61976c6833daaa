//! Redis servers that could lose entries, are not a map, or hold another map: each is warned about or refused
//! with the reason.

use std::time::SystemTime;

use common::bounds::{Bounds, Order};
use common::entry::{Entry, Outcome};
use logging::map::Health;
use testing::redis_servers::{RedisCluster, RedisServer};
use uuid::Uuid;

use crate::map::read;
use crate::redis::{
    SETTLE, entries, entry_at, is_partition_down, is_whole, open_at, put, wait_for,
    wait_until_missing, wait_until_ready,
};

#[tokio::test]
async fn server_with_more_replicas_than_backups_is_warned_about() {
    let folder = tempfile::tempdir().unwrap();
    let server = RedisServer::single(&folder.path().join("primary"));
    let map = open_at(&format!("redis://{}", server.address()), None);
    wait_until_ready(&map).await;
    let port = server.port.to_string();
    let follow = ["--cluster-enabled", "no", "--replicaof", "127.0.0.1", &port];
    let _replica = RedisServer::start(&folder.path().join("replica"), &follow);
    let is_warned = |health: &Health| {
        let mut checks = health.checks.iter();
        checks.any(|check| check.ok && check.detail.starts_with("warning: has 1 replicas"))
    };
    wait_for(&map, is_warned).await;
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

/// Two instances agree on the map's id, which either of them generates. Emptied servers are no new map to
/// them, but to an instance that has never known an id; then they serve neither.
#[tokio::test]
async fn emptied_servers_are_another_map_to_new_instances_only() {
    let folder = tempfile::tempdir().unwrap();
    let server = RedisServer::single(folder.path());
    let location = format!("redis://{}", server.address());
    let maps = [open_at(&location, None), open_at(&location, None)];
    for map in &maps {
        wait_until_ready(map).await;
    }
    let id = maps[0].id();
    assert!(id.is_some());
    assert_eq!(maps[1].id(), id);
    let stored = entries(10);
    assert_eq!(put(&maps[0], &stored).await, vec![Outcome::Stored; 10]);
    let _: () = server.ask(&["FLUSHALL"]);
    for map in &maps {
        wait_for(map, has_lost_its_id).await;
        assert_eq!(map.id(), id);
        assert!(map.get(stored[0].uuid).await.is_err());
        assert!(map.last().await.is_err());
        assert!(read(&**map, Bounds::default()).await.is_err());
        assert!(put(map, &stored).await.iter().all(is_partition_down));
    }
    assert!(server.ask::<Vec<String>>(&["KEYS", "[ei]*"]).is_empty());

    let new = open_at(&location, None);
    wait_until_ready(&new).await;
    assert!(new.id() != id && new.id().is_some());
    for map in &maps {
        wait_until_missing(map, "hold map").await;
        assert_eq!(map.id(), id);
        assert!(map.get(stored[0].uuid).await.is_err());
        assert!(put(map, &stored).await.iter().all(is_partition_down));
    }
    assert_eq!(new.get(stored[0].uuid).await.unwrap(), None);
}

fn has_lost_its_id(health: &Health) -> bool {
    let mut checks = health.checks.iter();
    checks.any(|check| {
        !check.ok
            && check
                .detail
                .contains("the map's id (key id:{0}) is missing")
    })
}

/// Issue 29, 2: the shard with the map's id was emptied, and an instance made a new map there.
#[tokio::test]
async fn shard_that_was_emptied_is_not_a_new_map() {
    require_no_new_map(|cluster| {
        let _: () = cluster.nodes[2].ask(&["FLUSHALL"]);
    })
    .await;
}

/// The same when both members of the shard come back without their files.
#[tokio::test]
async fn shard_that_lost_its_files_is_not_a_new_map() {
    require_no_new_map(|cluster| {
        for node in [2, 5] {
            cluster.nodes[node].lose_data();
        }
        for node in [2, 5] {
            cluster.nodes[node].restart();
        }
        cluster.wait_until_whole();
    })
    .await;
}

/// `lose` empties the shard of node 2, which has the map's id.
async fn require_no_new_map(lose: impl FnOnce(&mut RedisCluster)) {
    let mut cluster = RedisCluster::start();
    let map = open_at(&cluster.url(), None);
    wait_until_ready(&map).await;
    let id = map.id();
    let stored = entries(1000);
    assert_eq!(put(&map, &stored).await, vec![Outcome::Stored; 1000]);
    lose(&mut cluster);
    let owns = |node: usize, entry: &Entry| {
        let partition = crc32fast::hash(entry.uuid.as_bytes()) % 271;
        let slot: u16 = cluster.nodes[0].ask(&["CLUSTER", "KEYSLOT", &format!("{{{partition}}}")]);
        slot / 5461 == u16::try_from(node).unwrap()
    };
    let emptied = &cluster.nodes[2];
    let health = wait_for(&map, has_lost_its_id).await;
    let reason = health.not_ready.expect("no read is whole");
    assert!(
        reason.contains("the map's id (key id:{0}) is missing"),
        "{reason}"
    );
    let fresh = open_at(&cluster.url(), None);
    wait_until_missing(&fresh, "the map's id (key id:{0}) is missing but partition").await;
    for map in [&map, &fresh] {
        assert!(read(&**map, Bounds::default()).await.is_err());
        assert!(map.last().await.is_err());
    }
    assert_eq!((map.id(), fresh.id()), (id, None));
    for entry in &stored {
        let found = map.get(entry.uuid).await;
        if owns(2, entry) {
            assert!(found.is_err(), "{found:?}");
        } else {
            assert_eq!(found.unwrap().as_ref(), Some(&entry.msg));
        }
    }
    let new = entries(1000);
    for (entry, outcome) in new.iter().zip(put(&map, &new).await) {
        if owns(2, entry) {
            assert!(is_partition_down(&outcome), "{outcome:?}");
        } else {
            assert_eq!(outcome, Outcome::Stored);
        }
    }
    let stats = map.stats().await;
    let counted = stats
        .members
        .iter()
        .find(|row| row.member == emptied.address());
    assert_eq!(counted.and_then(|row| row.entries), None);
    assert!(
        stats
            .problem
            .is_some_and(|problem| problem.contains("id:{0}"))
    );
    assert!(emptied.ask::<Vec<String>>(&["KEYS", "[ei]*"]).is_empty());
}

/// A partition with the marks and entries of another map is an error to each kind of read, also to one that
/// ends before its last mark.
#[tokio::test]
async fn partition_of_another_map_is_neither_read_nor_written() {
    let folder = tempfile::tempdir().unwrap();
    let server = RedisServer::single(folder.path());
    let map = open_at(&format!("redis://{}", server.address()), None);
    wait_until_ready(&map).await;
    let in_partition = |entry: &Entry| crc32fast::hash(entry.uuid.as_bytes()) % 271 == 7;
    let stored: Vec<Entry> = entries(5000).into_iter().filter(in_partition).collect();
    let outcomes = put(&map, &stored).await;
    assert!(outcomes.iter().all(|outcome| *outcome == Outcome::Stored));
    let last = stored.last().expect("some entries are in the partition");
    let read_all = async || {
        let bounds = [Order::Asc, Order::Desc].map(|order| Bounds {
            after: Some(stored[0].uuid),
            before: Some(last.uuid),
            order,
        });
        [
            read(&*map, bounds[0]).await.err(),
            read(&*map, bounds[1]).await.err(),
            map.get(stored[0].uuid).await.err(),
            map.last().await.err(),
        ]
    };
    assert!(read_all().await.iter().all(Option::is_none));
    let other = Uuid::now_v7();
    let client = redis::Client::open(format!("redis://{}", server.address())).unwrap();
    let mut connection = client.get_connection().unwrap();
    let mut marks = redis::cmd("ZADD");
    marks.arg("entries:{7}");
    for end in [Uuid::nil(), Uuid::max()] {
        let id = map.id().expect("it is ready");
        let remove = [*end.as_bytes(), *id.as_bytes()].concat();
        let mut command = redis::cmd("ZREM");
        let removed: i64 = command
            .arg("entries:{7}")
            .arg(remove)
            .query(&mut connection)
            .unwrap();
        assert_eq!(removed, 1);
        marks
            .arg(0)
            .arg([*end.as_bytes(), *other.as_bytes()].concat());
    }
    let _: i64 = marks.query(&mut connection).unwrap();
    // Neither is a new entry stored there, nor a repeat, nor is one called never stored.
    let mut put_there: Vec<Entry> = entries(5000).into_iter().filter(in_partition).collect();
    put_there.push(stored[0].clone());
    let old = (0..5000).map(|_| entry_at(SystemTime::now() - 10 * SETTLE));
    put_there.extend(old.filter(in_partition));
    let outcomes = put(&map, &put_there).await;
    assert!(outcomes.iter().all(is_partition_down), "{outcomes:?}");
    let [ascending, descending, get, last] = read_all().await;
    for error in [ascending, descending, get, last] {
        let error = error.expect("no entry of another map is read").to_string();
        assert!(error.contains("another map"), "{error}");
    }
    let stats = map.stats().await;
    assert_eq!(stats.members[0].entries, None);
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
        if is_lost(entry) {
            assert!(is_partition_down(&outcome));
        } else {
            assert_eq!(outcome, Outcome::Stored);
        }
    }
    let in_lost = stored.iter().find(|entry| is_lost(entry)).unwrap();
    assert!(map.get(in_lost.uuid).await.is_err());

    let _: i64 = server.ask(&["DEL", "id:{0}"]);
    let late = open_at(&location, None);
    let is_lost_map = |health: &Health| {
        let missing = health.not_ready.as_deref().unwrap_or_default();
        missing.contains("the map's id (key id:{0}) is missing but partition 0 is not empty")
    };
    wait_for(&late, is_lost_map).await;
}
