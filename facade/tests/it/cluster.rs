//! Redis servers that die, hang and return while messages are posted and read: a real cluster of
//! three primaries and three replicas with the shipped profile, and the services as processes.

use std::time::{Duration, Instant};

use testing::load::Record;
use testing::redis_servers::{RedisCluster, RedisServer};

use crate::load::{Load, keyed_posts, post};
use crate::processes::Processes;
use crate::stats::assert_counted;

/// POSTs answered between two events, so that every phase is under load.
const PHASE: u64 = 2000;

/// A POST whose UUID must stay waits for its shard: one with a key, and one that was on its way to the primary
/// that died. With one replica for each primary the shard takes entries again when both its members are there,
/// so keys and deadline outlast that here.
fn outlasting(cluster: &RedisCluster) -> Processes {
    let logging = ["--map", &cluster.url(), "--settle", "5m"];
    Processes::on_map(&logging, &["--deadline", "5m"])
}

/// A logging instance and a Redis primary are killed together, and another pair when the first node has
/// returned. POSTs go to other partitions or, when they have a key or may be stored, wait for the failover, as
/// GETs do. None fails, nothing is lost.
#[tokio::test(flavor = "multi_thread")]
async fn instance_and_primary_killed_together_lose_nothing() {
    let mut cluster = RedisCluster::start();
    let mut system = outlasting(&cluster);
    let load = Load::start(&system.http, &system.facade.url());
    let keyed = keyed_posts(&system);
    let mut phases = Vec::new();
    for pair in 0..2 {
        load.wait_for_more(PHASE).await;
        let killed = Instant::now();
        system.logging[pair].kill();
        cluster.nodes[pair].kill();
        system.read_all().await;
        let readable = Instant::now();
        // The new primary has no backup, but no instance is unready because of it.
        let is_degraded = |text: &str| text.contains("\"status\":\"degraded\"");
        let health = system.logging[2].wait_for_readiness(is_degraded);
        assert!(health.starts_with("HTTP/1.1 200 "), "{health}");
        load.wait_for_more(PHASE).await;
        cluster.nodes[pair].restart();
        cluster.wait_until_whole();
        system.restart_logging(pair);
        load.wait_for_more(PHASE).await;
        phases.push((killed, readable, Instant::now()));
    }
    let (mut record, reads) = load.finish().await;
    record.extend(keyed.finish().await);
    println!(
        "{} POSTs acknowledged, {} GETs, the longest without an answer {:.1} s",
        record.acknowledged.len(),
        reads.count,
        reads.silence.as_secs_f64()
    );
    for (pair, (killed, readable, over)) in phases.into_iter().enumerate() {
        let readable_after = readable - killed;
        let failed = record.failed_after(killed, over);
        println!("pair {pair}: readable after {readable_after:.1?}; {failed}");
    }
    assert!(record.failed.is_empty(), "{:?}", record.failed);
    let stored = system.read_all().await;
    record.assert_kept(&stored);
    assert_counted(&system, stored.len()).await;
}

/// A paused primary neither answers nor closes a connection. POSTs go to other partitions or wait for the
/// failover, as GETs do. None fails, and every entry that the primary acknowledged is still there when it
/// resumes.
#[tokio::test(flavor = "multi_thread")]
async fn paused_primary_is_replaced_and_no_acknowledged_entry_is_lost() {
    /// Longer than the failover and than the timeouts of the replica.
    const PAUSE: Duration = Duration::from_secs(30);
    let cluster = RedisCluster::start();
    let system = outlasting(&cluster);
    let load = Load::start(&system.http, &system.facade.url());
    let keyed = keyed_posts(&system);
    load.wait_for_more(PHASE).await;
    let paused = Instant::now();
    cluster.nodes[0].signal("STOP");
    system.read_all().await;
    let readable = Instant::now();
    while paused.elapsed() < PAUSE {
        load.wait_for_more(10).await;
    }
    cluster.nodes[0].signal("CONT");
    cluster.wait_until_whole();
    load.wait_for_more(PHASE).await;
    let (mut record, _) = load.finish().await;
    record.extend(keyed.finish().await);
    println!(
        "{} POSTs acknowledged; readable {:.1?} after the pause began; {}",
        record.acknowledged.len(),
        readable - paused,
        record.failed_after(paused, Instant::now())
    );
    assert!(record.failed.is_empty(), "{:?}", record.failed);
    record.assert_kept(&system.read_all().await);
    assert_eq!(cluster.nodes[0].info("role").as_deref(), Some("slave"));
}

/// All members are killed at once and restarted. The page cache survives this, so the test does not prove
/// that entries are fsynced.
#[tokio::test(flavor = "multi_thread")]
async fn all_members_killed_at_once_lose_nothing() {
    let mut cluster = RedisCluster::start();
    let system = Processes::on_map(&["--map", &cluster.url()], &[]);
    let load = Load::start(&system.http, &system.facade.url());
    load.wait_for_more(PHASE).await;
    cluster.nodes.iter_mut().for_each(RedisServer::kill);
    cluster.nodes.iter_mut().for_each(RedisServer::restart);
    cluster.wait_until_whole();
    load.wait_for_more(PHASE).await;
    let (record, _) = load.finish().await;
    println!(
        "{} POSTs acknowledged, {} failed meanwhile",
        record.acknowledged.len(),
        record.failed.len()
    );
    record.assert_kept(&system.read_all().await);
}

/// A primary dies after its replica was cut off. With `WAIT`, an entry that the replica lacks was not
/// acknowledged. The control run without `WAIT` must lose an entry; otherwise the test proves nothing.
#[tokio::test(flavor = "multi_thread")]
async fn entry_that_the_backup_lacks_is_not_acknowledged() {
    for (backups, must_lose) in [("1", false), ("0", true)] {
        let mut cluster = RedisCluster::start();
        let flags = ["--map", &cluster.url(), "--backups", backups];
        let system = Processes::on_map(&flags, &["--deadline", "1s"]);
        // Only `WAIT` may keep the primary from acknowledging.
        let _: () = cluster.nodes[0].ask(&["CONFIG", "SET", "min-replicas-to-write", "0"]);
        cluster.nodes[0].cut_off(&cluster.nodes[3]);
        let mut record = Record::default();
        for n in 0..200 {
            let url = system.facade.url();
            record.extend(post(&system.http, &url, n.to_string()).await);
        }
        assert!(
            record.acknowledged.len() > 100,
            "too few POSTs were acknowledged to prove anything"
        );
        cluster.nodes[0].kill();
        let stored = system.read_all().await;
        let lost = record.lost(&stored).len();
        println!(
            "backups {backups}: {} acknowledged, {lost} of them lost",
            record.acknowledged.len()
        );
        assert_eq!(lost > 0, must_lose, "with --backups {backups}");
        if !must_lose {
            record.assert_kept(&stored);
        }
    }
}
