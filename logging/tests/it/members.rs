//! Addresses in `--map` that get other owners: an instance stays with the cluster of its map while it runs,
//! and is not ready when it starts with two.

use std::sync::Arc;

use common::bounds::Bounds;
use common::entry::Outcome;
use logging::map::{DistributedMap, Health};
use testing::redis_servers::{RedisCluster, RedisServer};

use crate::map::read;
use crate::redis::{
    entries, is_partition_down, is_whole, open_at, put, wait_for, wait_until_missing,
    wait_until_ready,
};

const SINGLE: [&str; 4] = ["--cluster-enabled", "no", "--min-replicas-to-write", "0"];

/// Two clusters, and a server that is a member of the first. The epochs of the second are greater.
struct Clusters {
    first: RedisCluster,
    second: RedisCluster,
    extra: RedisServer,
    folder: tempfile::TempDir,
}

impl Clusters {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let clusters = Self {
            first: RedisCluster::start(),
            second: RedisCluster::start(),
            extra: RedisServer::start(&folder.path().join("extra"), &[]),
            folder,
        };
        for primary in &clusters.second.nodes[..3] {
            let _: String = primary.ask(&["CLUSTER", "BUMPEPOCH"]);
        }
        let members: Vec<&RedisServer> = clusters.first.nodes.iter().collect();
        clusters.extra.join(&clusters.first.nodes[0], &members);
        clusters
    }

    /// `--map` with all members of the first cluster.
    fn url(&self) -> String {
        format!("{},{}", self.first.url(), self.extra.address())
    }

    fn join_second(&self) {
        let members: Vec<&RedisServer> = self.second.nodes.iter().collect();
        self.extra.join(&self.second.nodes[0], &members);
    }

    /// Makes the server the primary of its shard.
    fn promote_extra(&self) {
        let _: () = self.extra.ask(&["CLUSTER", "FAILOVER"]);
        self.extra.wait_until("it is the primary", |extra| {
            extra.info("role").as_deref() == Some("master")
        });
    }

    /// An instance that runs stays with its map and names the server that has left; one that starts is not
    /// ready until its `--map` is corrected. The second cluster gets nothing.
    async fn require_stays(
        &self,
        map: &Arc<dyn DistributedMap>,
        mut stored: Vec<common::entry::Entry>,
    ) {
        let id = map.id();
        let name = format!("server {}", self.extra.address());
        let is_named = |health: &Health| {
            let mut checks = health.checks.iter();
            checks.any(|check| check.name == name && !check.ok && check.detail.contains("--map"))
        };
        let is_right = |health: &Health| {
            let mut checks = health.checks.iter();
            let primaries = checks
                .clone()
                .filter(|check| check.name.starts_with("primary "));
            primaries.count() == 3
                && is_named(health)
                && checks.all(|check| check.ok || check.name == name)
        };
        let health = wait_for(map, is_right).await;
        assert_eq!(health.not_ready, None);
        let more = entries(500);
        assert_eq!(put(map, &more).await, vec![Outcome::Stored; 500]);
        stored.extend(more);
        assert_eq!(read(&**map, Bounds::default()).await.unwrap(), stored);
        assert_eq!(map.id(), id);

        let restarted = open_at(&self.url(), None);
        wait_until_missing(&restarted, "members of different redis clusters").await;
        wait_until_missing(&restarted, &self.extra.address()).await;
        wait_until_missing(&restarted, &self.first.nodes[0].address()).await;
        assert!(
            put(&restarted, &entries(10))
                .await
                .iter()
                .all(is_partition_down)
        );
        assert!(read(&*restarted, Bounds::default()).await.is_err());
        assert_eq!(restarted.id(), None);
        let corrected = open_at(&self.first.url(), None);
        let health = wait_until_ready(&corrected).await;
        assert!(is_whole(&health), "{health:?}");
        assert_eq!(corrected.id(), id);
        assert_eq!(read(&*corrected, Bounds::default()).await.unwrap(), stored);
        for primary in &self.second.nodes[..3] {
            assert!(primary.ask::<Vec<String>>(&["KEYS", "*"]).is_empty());
        }
    }
}

/// Issue 29, 1: the instances followed the replica to the other cluster, whose epochs are greater.
#[tokio::test]
async fn replica_that_joins_another_cluster_takes_no_instance_there() {
    let clusters = Clusters::start();
    let map = open_at(&clusters.url(), None);
    wait_until_ready(&map).await;
    let stored = entries(500);
    assert_eq!(put(&map, &stored).await, vec![Outcome::Stored; 500]);
    clusters.extra.leave(&clusters.first.nodes[0]);
    clusters.join_second();
    clusters.require_stays(&map, stored).await;
}

/// The same with a new server at the address of a dead one.
#[tokio::test]
async fn server_of_another_cluster_at_a_dead_members_address_takes_no_instance_there() {
    let mut clusters = Clusters::start();
    let map = open_at(&clusters.url(), None);
    wait_until_ready(&map).await;
    let stored = entries(500);
    assert_eq!(put(&map, &stored).await, vec![Outcome::Stored; 500]);
    let folder = clusters.folder.path().join("another");
    clusters.extra.replace(&folder, &[]);
    clusters.join_second();
    clusters.require_stays(&map, stored).await;
}

/// The same at the address of a dead primary that was replaced, whose slots it gets in its own cluster.
#[tokio::test]
async fn server_of_another_cluster_at_a_dead_primarys_address_takes_no_instance_there() {
    let mut clusters = Clusters::start();
    clusters.promote_extra();
    let map = open_at(&clusters.url(), None);
    wait_until_ready(&map).await;
    let stored = entries(500);
    assert_eq!(put(&map, &stored).await, vec![Outcome::Stored; 500]);
    clusters.extra.kill();
    clusters.first.nodes[1].wait_until("a replica is promoted", |_| {
        clusters.first.primaries().len() == 3
    });
    clusters.first.wait_until_whole();
    let folder = clusters.folder.path().join("another");
    clusters.extra.replace(&folder, &[]);
    clusters.join_second();
    clusters.promote_extra();
    clusters.require_stays(&map, stored).await;
    assert!(clusters.extra.ask::<Vec<String>>(&["KEYS", "*"]).is_empty());
}

/// All members are replaced, one at a time: the instance follows them.
#[tokio::test]
async fn members_may_all_be_replaced_one_at_a_time() {
    let mut cluster = RedisCluster::start();
    let folder = tempfile::tempdir().unwrap();
    let map = open_at(&cluster.url(), None);
    wait_until_ready(&map).await;
    let mut stored = entries(500);
    assert_eq!(put(&map, &stored).await, vec![Outcome::Stored; 500]);
    let mut spare = RedisServer::start(&folder.path().join("6"), &[]);
    let is_primary = |node: &RedisServer| node.info("role").as_deref() == Some("master");
    for index in [3, 4, 5, 0, 1, 2] {
        let shard = [index % 3, index % 3 + 3];
        let primary = shard
            .into_iter()
            .find(|node| is_primary(&cluster.nodes[*node]));
        let primary = primary.expect("each shard has a primary");
        let members: Vec<&RedisServer> = cluster.nodes.iter().collect();
        spare.join(&cluster.nodes[primary], &members);
        if primary == index {
            let _: () = spare.ask(&["CLUSTER", "FAILOVER"]);
            spare.wait_until("it is the primary", is_primary);
            cluster.nodes[index].wait_until("it is a replica", |node| !is_primary(node));
            // A member that does not know yet of the failover would not replicate the new primary.
            let id = spare.node_id();
            for node in &cluster.nodes {
                node.wait_until("it knows the new primary", |node| {
                    let known: String = node.ask(&["CLUSTER", "NODES"]);
                    let mut lines = known.lines().filter(|line| line.starts_with(&id));
                    lines.any(|line| line.contains("master"))
                });
            }
        }
        let old = std::mem::replace(&mut cluster.nodes[index], spare);
        old.leave(&cluster.nodes[index]);
        cluster.wait_until_whole();
        wait_for(&map, |health| {
            let mut checks = health.checks.iter();
            let is_used = checks.any(|check| check.name == format!("primary {}", old.address()));
            health.not_ready.is_none() && !is_used
        })
        .await;
        let folder = folder.path().join(format!("again-{index}"));
        spare = old;
        spare.replace(&folder, &[]);
    }
    let more = entries(500);
    let put_again = async {
        while !put(&map, &more)
            .await
            .iter()
            .all(|outcome| matches!(outcome, Outcome::Stored | Outcome::Duplicate))
        {}
    };
    let put_again = tokio::time::timeout(testing::process::PATIENCE, put_again).await;
    put_again.expect("all partitions accept entries");
    stored.extend(more);
    assert_eq!(read(&*map, Bounds::default()).await.unwrap(), stored);
}

/// A member that `--map` names by another host than the cluster does is one member.
#[tokio::test]
async fn member_with_another_name_is_not_another_member() {
    let cluster = RedisCluster::start();
    let location = format!("redis://localhost:{}", cluster.nodes[0].port);
    let map = open_at(&location, None);
    wait_until_ready(&map).await;
    let stats = map.stats().await;
    let mut members: Vec<String> = stats.members.into_iter().map(|row| row.member).collect();
    members.sort();
    let mut nodes: Vec<String> = cluster.nodes.iter().map(RedisServer::address).collect();
    nodes.sort();
    assert_eq!(members, nodes);
}

/// Another server, and then a member of a cluster, at the address of a single server.
#[tokio::test]
async fn single_server_that_is_replaced_takes_no_instance_along() {
    let folder = tempfile::tempdir().unwrap();
    let mut server = RedisServer::single(&folder.path().join("first"));
    let location = format!("redis://{}", server.address());
    let map = open_at(&location, None);
    wait_until_ready(&map).await;
    let id = map.id();
    let stored = entries(10);
    assert_eq!(put(&map, &stored).await, vec![Outcome::Stored; 10]);

    // A server with another map.
    server.replace(&folder.path().join("second"), &SINGLE);
    let other = open_at(&location, None);
    wait_until_ready(&other).await;
    assert_ne!(other.id(), id);
    wait_until_missing(&map, "hold map").await;
    assert!(put(&map, &entries(10)).await.iter().all(is_partition_down));
    assert!(map.get(stored[0].uuid).await.is_err());
    assert!(read(&*map, Bounds::default()).await.is_err());
    drop(other);

    // A member of a cluster.
    let cluster = RedisCluster::start();
    server.replace(&folder.path().join("third"), &[]);
    let members: Vec<&RedisServer> = cluster.nodes.iter().collect();
    server.join(&cluster.nodes[0], &members);
    wait_until_missing(&map, "none of the redis servers that answer is a member").await;
    assert!(put(&map, &entries(10)).await.iter().all(is_partition_down));
    assert!(map.get(stored[0].uuid).await.is_err());
    for primary in &cluster.nodes[..3] {
        assert!(primary.ask::<Vec<String>>(&["KEYS", "*"]).is_empty());
    }

    // The first one again.
    server.replace(&folder.path().join("first"), &SINGLE);
    wait_until_ready(&map).await;
    assert_eq!(map.id(), id);
    assert_eq!(read(&*map, Bounds::default()).await.unwrap(), stored);
}
