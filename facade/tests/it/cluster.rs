//! Redis servers that die, hang and return while messages are posted and read: a real cluster of
//! three primaries and three replicas with the shipped profile, and the services as processes.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use common::entry::Entry;
use futures_util::{StreamExt, stream};
use reqwest::Client;
use serde_json::Value;
use tokio::task::JoinHandle;
use uuid::Uuid;

use crate::process::{LOOK_AGAIN, Process, free_address};
use crate::processes::Processes;
use crate::redis_servers::{RedisCluster, RedisServer};
use crate::system::Merged;

const WRITERS: usize = 64;

/// How long a test waits for POSTs to be answered.
const PATIENCE: Duration = Duration::from_secs(60);

/// Posts that are answered between two events, so that every phase has its load.
const PHASE: u64 = 2000;

/// What posters and a reader saw.
#[derive(Default)]
struct Record {
    acknowledged: BTreeMap<Uuid, String>,
    failed: Vec<Failed>,
    /// The longest time in which no GET was answered, and how many were.
    silence: Duration,
    reads: usize,
}

/// A POST that was not answered with 200.
#[derive(Debug)]
struct Failed {
    msg: String,
    began: Instant,
    ended: Instant,
    /// The UUID under which it may be stored.
    unknown: Option<Uuid>,
    detail: String,
}

/// Posters, each one message after the other, and a reader, until it is finished.
struct Load {
    answered: Arc<AtomicU64>,
    is_over: Arc<AtomicBool>,
    writers: Vec<JoinHandle<Record>>,
    reader: JoinHandle<Record>,
}

impl Load {
    fn start(system: &Processes) -> Self {
        let answered = Arc::new(AtomicU64::new(0));
        let is_over = Arc::new(AtomicBool::new(false));
        let newest = Arc::new(std::sync::Mutex::new(Uuid::nil()));
        let posted = Arc::new(AtomicU64::new(0));
        let writers = (0..WRITERS).map(|_| {
            let (http, url) = (system.http.clone(), system.facade.url());
            let (answered, is_over) = (answered.clone(), is_over.clone());
            let (newest, posted) = (newest.clone(), posted.clone());
            tokio::spawn(async move {
                let mut record = Record::default();
                while !is_over.load(Ordering::Relaxed) {
                    let msg = format!("message {}", posted.fetch_add(1, Ordering::Relaxed));
                    if let Some(uuid) = post(&http, &url, msg, &mut record).await {
                        let mut newest = newest.lock().unwrap();
                        *newest = uuid.max(*newest);
                        answered.fetch_add(1, Ordering::Relaxed);
                    }
                }
                record
            })
        });
        let (http, url) = (system.http.clone(), system.facade.url());
        let over = is_over.clone();
        let newest = newest.clone();
        Self {
            writers: writers.collect(),
            answered,
            is_over,
            reader: tokio::spawn(async move {
                let mut record = Record::default();
                let mut answered = Instant::now();
                while !over.load(Ordering::Relaxed) {
                    let acknowledged = *newest.lock().unwrap();
                    if let Some(last) = read_last(&http, &url).await {
                        assert!(last >= acknowledged, "{acknowledged} is missing");
                        record.reads += 1;
                        record.silence = record.silence.max(answered.elapsed());
                        answered = Instant::now();
                    }
                }
                record
            }),
        }
    }

    /// Waits until so many more POSTs are answered with 200.
    async fn wait_for_more(&self, more: u64) {
        let target = self.answered.load(Ordering::Relaxed) + more;
        let waiting = async {
            while self.answered.load(Ordering::Relaxed) < target {
                assert!(!self.reader.is_finished(), "the reader has failed");
                tokio::time::sleep(LOOK_AGAIN).await;
            }
        };
        let waited = tokio::time::timeout(PATIENCE, waiting).await;
        waited.expect("POSTs are answered");
    }

    async fn finish(self) -> Record {
        self.is_over.store(true, Ordering::Relaxed);
        let mut record = self.reader.await.unwrap();
        assert!(record.reads > 0);
        for writer in self.writers {
            let written = writer.await.unwrap();
            record.acknowledged.extend(written.acknowledged);
            record.failed.extend(written.failed);
        }
        record
    }
}

async fn post(http: &Client, url: &str, msg: String, record: &mut Record) -> Option<Uuid> {
    let began = Instant::now();
    let response = http.post(url).body(msg.clone()).send().await.unwrap();
    let status = response.status();
    let answer: Value = response.json().await.unwrap();
    let uuid = answer["uuid"].as_str().map(|uuid| uuid.parse().unwrap());
    if status == 200 {
        record.acknowledged.insert(uuid.unwrap(), msg);
        return uuid;
    }
    record.failed.push(Failed {
        msg,
        began,
        ended: Instant::now(),
        unknown: uuid.filter(|_| answer["stored"] != "no"),
        detail: answer["detail"].to_string(),
    });
    None
}

/// The newest entry; `None` when the map cannot be read.
async fn read_last(http: &Client, url: &str) -> Option<Uuid> {
    let response = http.get(format!("{url}/?order=desc&limit=1")).send().await;
    let response = response.unwrap();
    if response.status() == 503 {
        return None;
    }
    assert_eq!(response.status(), 200);
    let merged: Merged = response.json().await.unwrap();
    let last = merged.logging_service.first();
    Some(last.map_or(Uuid::nil(), |entry| entry.uuid))
}

impl Record {
    /// Nothing acknowledged is lost or changed; nothing is there twice, out of order, or that nobody
    /// posted: what was not acknowledged is there under the UUID that its poster was told, if at all.
    #[track_caller]
    fn assert_kept(&self, stored: &[Entry]) {
        assert!(stored.is_sorted_by(|left, right| left.uuid < right.uuid));
        let lost = self.lost(stored);
        assert!(lost.is_empty(), "{} lost: {:?}", lost.len(), lost[0]);
        let unknown = self.failed.iter();
        let unknown = unknown.filter_map(|failed| Some((failed.unknown?, failed.msg.as_str())));
        let unknown: BTreeMap<Uuid, &str> = unknown.collect();
        let mut messages = HashSet::new();
        for Entry { uuid, msg } in stored {
            let acknowledged = self.acknowledged.get(uuid).map(String::as_str);
            let posted = acknowledged.or_else(|| unknown.get(uuid).copied());
            assert_eq!(posted, Some(msg.as_str()), "{uuid} is a phantom");
            assert!(messages.insert(msg), "{msg} is there twice");
        }
    }

    fn lost(&self, stored: &[Entry]) -> Vec<Uuid> {
        let stored: BTreeMap<Uuid, &str> = stored
            .iter()
            .map(|entry| (entry.uuid, entry.msg.as_str()))
            .collect();
        let acknowledged = self.acknowledged.iter();
        let lost = acknowledged.filter(|(uuid, msg)| stored.get(*uuid) != Some(&msg.as_str()));
        lost.map(|(uuid, _)| *uuid).collect()
    }

    #[track_caller]
    fn assert_none_failed_between(&self, from: Instant, until: Instant) {
        let failed = self.failed.iter();
        let failed: Vec<_> = failed
            .filter(|failed| failed.began > from && failed.began < until)
            .collect();
        assert!(failed.is_empty(), "failed after the failover: {failed:?}");
    }

    /// How many POSTs failed, the last one of them how long after `fault`.
    fn failed_after(&self, fault: Instant, until: Instant) -> String {
        let failed = self.failed.iter();
        let failed: Vec<_> = failed
            .filter(|failed| failed.ended > fault && failed.began < until)
            .collect();
        match failed.iter().map(|failed| failed.began).max() {
            None => "no POST failed".to_owned(),
            Some(last) => format!(
                "{} POSTs failed, all begun within {:.1} s after it ({})",
                failed.len(),
                last.saturating_duration_since(fault).as_secs_f64(),
                failed[0].detail
            ),
        }
    }
}

/// A logging instance and a Redis primary are killed together, and another pair when the first node
/// is back. POSTs go on elsewhere, GETs wait for the failover, nothing is lost.
#[tokio::test(flavor = "multi_thread")]
async fn pairs_that_are_killed_together_lose_nothing() {
    let mut cluster = RedisCluster::start();
    let mut system = Processes::on_map(&["--map", &cluster.url()], &[]);
    let load = Load::start(&system);
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
    let load = Load::start(&system);
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
    let load = Load::start(&system);
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
