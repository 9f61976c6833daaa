//! Redis servers that die, hang and return while messages are posted and read: a real cluster of
//! three primaries and three replicas with the shipped profile, and the services as processes.

use std::collections::{BTreeMap, HashSet};
use std::time::{Duration, Instant};

use futures_util::{StreamExt, stream};
use uuid::Uuid;

use crate::load::{Load, Record, post};
use crate::process::{Process, free_address};
use crate::processes::Processes;
use crate::redis_servers::{RedisCluster, RedisServer};

/// Posts that are answered between two events, so that every phase has its load.
const PHASE: u64 = 2000;

/// A logging instance and a Redis primary are killed together, and another pair when the first node
/// is back. POSTs go on elsewhere, GETs wait for the failover, nothing is lost.
#[tokio::test(flavor = "multi_thread")]
async fn pairs_that_are_killed_together_lose_nothing() {
    let mut cluster = RedisCluster::start();
    let mut system = Processes::on_map(&["--map", &cluster.url()], &[]);
    let load = Load::start(&system.http, &system.facade.url());
    let mut phases = Vec::new();
    for pair in 0..2 {
        load.wait_for_more(PHASE).await;
        let killed = Instant::now();
        system.logging[pair].kill();
        cluster.nodes[pair].kill();
        system.read_all().await;
        let readable = Instant::now();
        // The new primary has no backup, but takes nobody out.
        let health = system.logging[2].readiness();
        assert!(health.starts_with("HTTP/1.1 200 "), "{health}");
        assert!(health.contains("\"status\":\"degraded\""), "{health}");
        load.wait_for_more(PHASE).await;
        cluster.nodes[pair].restart();
        cluster.wait_until_whole();
        system.restart_logging(pair);
        load.wait_for_more(PHASE).await;
        phases.push((killed, readable, Instant::now()));
    }
    let record = load.finish().await;
    println!(
        "{} POSTs acknowledged, {} GETs, the longest without an answer {:.1} s",
        record.acknowledged.len(),
        record.reads,
        record.silence.as_secs_f64()
    );
    for (pair, (killed, readable, over)) in phases.into_iter().enumerate() {
        let readable_after = readable - killed;
        let failed = record.failed_after(killed, over);
        println!("pair {pair}: readable after {readable_after:.1?}; {failed}");
        record.assert_none_failed_between(readable, over);
    }
    record.assert_kept(&system.read_all().await);
}

/// A paused primary neither answers nor closes a connection. POSTs go on elsewhere, GETs wait for
/// the failover, and what the primary acknowledged before is there when it goes on.
#[tokio::test(flavor = "multi_thread")]
async fn paused_primary_is_replaced_and_has_acknowledged_nothing_that_is_missing() {
    /// Long enough for the primary to be replaced, and for its replica's patience to be over.
    const PAUSE: Duration = Duration::from_secs(30);
    let cluster = RedisCluster::start();
    let system = Processes::on_map(&["--map", &cluster.url()], &[]);
    let load = Load::start(&system.http, &system.facade.url());
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
    let record = load.finish().await;
    println!(
        "{} POSTs acknowledged; readable {:.1?} after the pause began; {}",
        record.acknowledged.len(),
        readable - paused,
        record.failed_after(paused, Instant::now())
    );
    record.assert_none_failed_between(readable, Instant::now());
    record.assert_kept(&system.read_all().await);
    assert_eq!(cluster.nodes[0].info("role").as_deref(), Some("slave"));
}

/// All members are killed at once and started again. What they had written is in the page cache
/// then, so this does not show that it is fsynced.
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
    let record = load.finish().await;
    println!(
        "{} POSTs acknowledged, {} failed meanwhile",
        record.acknowledged.len(),
        record.failed.len()
    );
    record.assert_kept(&system.read_all().await);
}

/// Whether a message is kept when its primary dies after its replica was cut off: with `WAIT`, what
/// the replica lacks was not acknowledged; the control run without it must lose something, or this
/// test proves nothing.
#[tokio::test(flavor = "multi_thread")]
async fn entry_that_the_backup_lacks_is_not_acknowledged() {
    for (backups, must_lose) in [("1", false), ("0", true)] {
        let mut cluster = RedisCluster::start();
        let flags = ["--map", &cluster.url(), "--backups", backups];
        let system = Processes::on_map(&flags, &["--deadline", "1s"]);
        // Only WAIT is to keep it from acknowledging.
        let _: () = cluster.nodes[0].ask(&["CONFIG", "SET", "min-replicas-to-write", "0"]);
        cut_replication(&cluster.nodes[0], &cluster.nodes[3]);
        let mut record = Record::default();
        for n in 0..200 {
            post(
                &system.http,
                &system.facade.url(),
                n.to_string(),
                &mut record,
            )
            .await;
        }
        assert!(
            record.acknowledged.len() > 100,
            "too little was acknowledged"
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

/// Ends the replication and keeps it from being taken up again: the replica logs in as somebody whom
/// the primary does not know. All else between them goes on.
fn cut_replication(primary: &RedisServer, replica: &RedisServer) {
    let _: () = replica.ask(&["CONFIG", "SET", "masteruser", "nobody"]);
    let _: () = replica.ask(&["CONFIG", "SET", "masterauth", "nothing"]);
    let _: i64 = primary.ask(&["CLIENT", "KILL", "TYPE", "replica"]);
    primary.wait_until("the replica is cut off", |primary| {
        primary.info("connected_slaves").as_deref() == Some("0")
    });
}

/// A key is used by four callers at once, through two facades, twice with each of two messages: one
/// message is stored, its posters are told so, the others that it is another's.
#[tokio::test(flavor = "multi_thread")]
async fn key_that_is_used_at_once_by_many_is_one_entry() {
    const KEYS: usize = 10_000;
    let system = Processes::start();
    let second = Process::start(system.another_facade(&[]), free_address());
    let urls = [system.facade.url(), second.url()];
    let http = &system.http;
    let winners = stream::iter(0..KEYS).map(|n| {
        let urls = urls.clone();
        async move {
            let key = Uuid::now_v7();
            let posts = ["heads", "tails"].iter().flat_map(|side| {
                let msg = format!("{side} {n}");
                urls.each_ref().map(|url| (url.clone(), msg.clone()))
            });
            let posts = posts.map(async |(url, msg)| {
                let request = http.post(url).header("idempotency-key", key.to_string());
                let status = request.body(msg.clone()).send().await.unwrap().status();
                (msg, status.as_u16())
            });
            let answers = futures_util::future::join_all(posts).await;
            let accepted = answers.iter().filter(|(_, status)| *status == 200);
            let accepted: HashSet<&String> = accepted.map(|(msg, _)| msg).collect();
            assert_eq!(accepted.len(), 1, "{answers:?}");
            let winner = (*accepted.iter().next().unwrap()).clone();
            for (msg, status) in &answers {
                let expected = if *msg == winner { 200 } else { 422 };
                assert_eq!(*status, expected, "{answers:?}");
            }
            (key, winner)
        }
    });
    let winners: BTreeMap<Uuid, String> = winners.buffer_unordered(16).collect().await;
    let stored = system.read_all().await;
    let stored: Vec<(Uuid, String)> = stored.into_iter().map(|e| (e.uuid, e.msg)).collect();
    assert_eq!(stored.len(), KEYS);
    assert!(
        stored.into_iter().eq(winners),
        "other entries than were accepted"
    );
}
