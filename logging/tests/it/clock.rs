//! Clocks that differ from the map's: an instance's own, a member's, the machine's after a boot.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use async_trait::async_trait;
use common::api::{MapStats, READ_END, READ_SETTLED, write_entry};
use common::bounds::Bounds;
use common::entry::{Entry, Outcome, first_uuid_at};
use common::health::Check;
use logging::map::{
    Access, Clocks, Cursor, DistributedMap, Health, MapError, Options, Piece, PieceLimit, open,
};
use reqwest::{Client, Response};
use testing::engine::Engine;
use testing::fake_clock::FakeClock;
use testing::process::{LOOK_AGAIN, PATIENCE, Process, free_address};
use testing::redis_servers::{RedisCluster, RedisServer};
use testing::requirements::unshare;
use uuid::Uuid;

use crate::folder::BOOT_ID;
use crate::http::Instance;
use crate::processes::{LOGGING, location, logging, mark_of};
use crate::redis::{entry_at, is_whole, wait_for, wait_until_ready};

const HOUR: Duration = Duration::from_secs(3600);

/// A map with entries, and what its clock calls settled.
#[derive(Debug)]
struct FixedMap {
    entries: BTreeMap<Uuid, String>,
    settled: SystemTime,
}

#[async_trait]
impl DistributedMap for FixedMap {
    fn id(&self) -> Option<Uuid> {
        None
    }

    async fn put(&self, _entries: Arc<[Entry]>) -> Vec<Outcome> {
        unreachable!("nobody posts")
    }

    async fn get(&self, uuid: Uuid) -> Result<Option<String>, MapError> {
        Ok(self.entries.get(&uuid).cloned())
    }

    async fn part(&self, _uuid: Uuid, _from: usize, _bytes: usize) -> Result<String, MapError> {
        unreachable!("no message is large")
    }

    fn read(&self, bounds: Bounds) -> Box<dyn Cursor> {
        let after = bounds.after.map_or(Bound::Unbounded, Bound::Excluded);
        let above = self.entries.range((after, Bound::Unbounded));
        let within = above.take_while(|(uuid, _)| bounds.contains(**uuid));
        let mut piece = Piece::default();
        for (uuid, msg) in within {
            write_entry(&mut piece.lines, *uuid, msg);
            piece.count += 1;
            piece.last = Some(*uuid);
        }
        Box::new(OnePiece(piece))
    }

    async fn last(&self) -> Result<Option<Uuid>, MapError> {
        Ok(self.entries.last_key_value().map(|(uuid, _)| *uuid))
    }

    fn clocks(&self) -> Option<Clocks> {
        None
    }

    fn settle_window(&self) -> Option<Duration> {
        None
    }

    async fn settle(&self, _clock: SystemTime) -> Result<SystemTime, MapError> {
        Ok(self.settled)
    }

    async fn health(&self) -> Health {
        Health {
            not_ready: None,
            checks: Vec::new(),
        }
    }

    async fn stats(&self) -> MapStats {
        MapStats {
            engine: "none".to_owned(),
            layout: 1,
            members: Vec::new(),
            problem: None,
        }
    }

    fn measure(&self) {}
}

#[derive(Debug)]
struct OnePiece(Piece);

#[async_trait]
impl Cursor for OnePiece {
    async fn next(&mut self, _limit: PieceLimit) -> Result<Piece, MapError> {
        Ok(std::mem::take(&mut self.0))
    }
}

fn header(response: &Response, name: &str) -> Uuid {
    let value = response.headers()[name].to_str().unwrap();
    value.parse().unwrap()
}

/// The facade moves a follower's position to what is settled, so a poll must have read all up to there: also
/// what an instance's own clock takes for the future.
#[tokio::test]
async fn poll_reads_up_to_what_is_settled_whatever_the_own_clock_is() {
    let now = SystemTime::now();
    for settled in [now - HOUR, now, now + HOUR] {
        let second = Duration::from_secs(1);
        let times = [settled - 2 * second, settled - second, settled + second];
        let entries = times.map(|time| (first_uuid_at(time), "hello".to_owned()));
        let uuids = entries.each_ref().map(|(uuid, _)| *uuid);
        let entries = BTreeMap::from(entries);
        let instance = Instance::on_map(Arc::new(FixedMap { entries, settled }));
        let position = first_uuid_at(times[0] - second);
        let poll = format!("/?poll=settle&after={position}");
        let response = instance.get(&poll).await;
        assert_eq!(header(&response, READ_SETTLED), first_uuid_at(settled));
        assert!(header(&response, READ_END) >= first_uuid_at(settled));
        let text = response.text().await.unwrap();
        for uuid in &uuids[..2] {
            assert!(text.contains(&uuid.to_string()), "{text}");
        }
        // The first poll of all followers begins where the map is settled.
        let first = instance.text("/?poll=settle").await;
        assert!(!first.contains(&uuids[1].to_string()), "{first}");
        // What is not settled is shown as soon as the instance's own clock has come near.
        let is_shown = settled <= now;
        assert_eq!(first.contains(&uuids[2].to_string()), is_shown, "{first}");
        let recent = format!("/?poll=recent&after={position}");
        let recent = instance.text(&recent).await;
        assert_eq!(recent.contains(&uuids[2].to_string()), is_shown, "{recent}");
    }
}

/// Entries of the last half minute, in all partitions: as of a put that was held up.
fn held_up(map: SystemTime) -> Vec<Entry> {
    let ages = (12..42).cycle().take(600).map(Duration::from_secs);
    ages.map(|age| entry_at(map - age)).collect()
}

/// What was told as settled stays: nothing is added below it, however far its server's clock steps back. New
/// entries are taken meanwhile.
#[tokio::test]
async fn nothing_is_added_to_settled_history_when_a_server_steps_back() {
    let clock = FakeClock::new();
    let folder = tempfile::tempdir().unwrap();
    let alone = ["--cluster-enabled", "no", "--min-replicas-to-write", "0"];
    let server = RedisServer::start_with(folder.path(), &alone, &clock.environment());
    let location = format!("redis://{}", server.address());
    let map = open_with(&location, Duration::from_secs(10));
    wait_until_ready(&map).await;
    // "Never" is told in one partition only, and the clock of an instance that starts later is behind it.
    let told = map.clocks().unwrap().map;
    let never = entry_at(told - Duration::from_secs(15));
    assert_eq!(map.put([never.clone()].into()).await, [Outcome::Stale]);
    clock.step_to(-60);
    let behind = open_with(&location, Duration::from_secs(10));
    wait_until_ready(&behind).await;
    assert_eq!(behind.put([never].into()).await, [Outcome::Stale]);
    drop(behind);
    clock.step_to(0);
    let told = map.clocks().unwrap().map;
    let settled = map.settle(told).await.unwrap();
    assert!(settled <= told - Duration::from_secs(11));
    for step in [-60, 3600, 0] {
        clock.step_to(step);
        let late = map.put(held_up(told).into()).await;
        assert!(
            late.iter().all(|outcome| *outcome == Outcome::Stale),
            "{step}: {late:?}"
        );
        let now = map.clocks().unwrap().map;
        let new: Vec<Entry> = (0..300).map(|_| entry_at(now)).collect();
        assert_eq!(
            map.put(new.into()).await,
            vec![Outcome::Stored; 300],
            "{step}"
        );
        if step != 0 {
            let words = if step < 0 {
                "behind the map's"
            } else {
                "ahead of the map's"
            };
            wait_for(&map, |health| {
                health
                    .checks
                    .iter()
                    .any(|check| !check.ok && check.detail.contains(words))
            })
            .await;
        }
    }
}

/// The floor goes to the replicas with `WAIT` before it is told.
#[tokio::test]
async fn nothing_is_added_to_settled_history_after_a_failover_to_a_clock_behind() {
    let clock = FakeClock::new();
    let is_behind = |node| match node {
        3 => clock.environment(),
        _ => Vec::new(),
    };
    clock.step_to(-60);
    let mut cluster = RedisCluster::start_with("127.0.0.1", &[], is_behind);
    let map = open_with(&cluster.url(), Duration::from_secs(10));
    wait_until_ready(&map).await;
    let told = map.clocks().unwrap().map;
    map.settle(told).await.unwrap();
    cluster.nodes[0].kill();
    cluster.nodes[3].wait_until("it is promoted", |node| {
        node.info("role").as_deref() == Some("master")
    });
    // Without a replica the new primary takes nothing.
    cluster.nodes[0].restart();
    cluster.wait_until_whole();
    let is_right = |check: &Check| check.ok || check.detail.contains("clock");
    wait_for(&map, |health| health.checks.iter().all(is_right)).await;
    let late = map.put(held_up(told).into()).await;
    assert_eq!(late, vec![Outcome::Stale; 600]);
}

/// An instance that starts while a member is away has the clock of most others.
#[tokio::test]
async fn instance_that_starts_while_a_member_is_away_has_a_clock() {
    let cluster = RedisCluster::start();
    let before = open_with(&cluster.url(), Duration::from_secs(10));
    wait_until_ready(&before).await;
    for node in [1, 4] {
        cluster.nodes[node].signal("STOP");
    }
    let map = open_with(&cluster.url(), Duration::from_secs(10));
    let begin = Instant::now();
    while map.clocks().is_none() {
        assert!(begin.elapsed() < PATIENCE, "{:?}", map.health().await);
        tokio::time::sleep(LOOK_AGAIN).await;
    }
    let now = map.clocks().unwrap().map;
    let entries: Vec<Entry> = (0..100).map(|_| entry_at(now)).collect();
    let outcomes = map.put(entries.into()).await;
    assert!(outcomes.contains(&Outcome::Stored), "{outcomes:?}");
    for node in [1, 4] {
        cluster.nodes[node].signal("CONT");
    }
}

/// A machine boots with a clock that is an hour behind: the map's is not, and its history stays.
#[tokio::test]
async fn boot_with_a_slow_clock_does_not_change_settled_history() {
    let folder = tempfile::tempdir().unwrap();
    let boot_id = folder.path().join("boot_id");
    std::fs::write(&boot_id, "0b007000-0000-4000-8000-000000000000\n").unwrap();
    let trial = ["mount", "--bind", "/etc/hosts", BOOT_ID];
    let Some(mut command) = unshare(&["--mount"], &trial) else {
        return;
    };
    let http = Client::new();
    let mut before = Process::start(logging(folder.path()), free_address());
    let response = http.get(format!("{}/?poll=settle", before.url()));
    let settled = header(&response.send().await.unwrap(), READ_SETTLED);
    before.kill();

    let clock = FakeClock::new();
    clock.step_to(-3600);
    command
        .args(["sh", "-c"])
        .arg(format!("mount --bind \"$0\" {BOOT_ID} && exec \"$@\""))
        .arg(&boot_id)
        .args([LOGGING, "--map"])
        .arg(crate::processes::location(folder.path()))
        .envs(clock.environment());
    let after = Process::start(command, free_address());
    let told = mark_of(&http, &after.url()).await.clock.unwrap();
    assert!(
        first_uuid_at(told - Duration::from_secs(11)) >= settled,
        "{told:?}"
    );
    let late = [entry_at(told - Duration::from_secs(30)), entry_at(told)];
    let outcomes = crate::processes::put(&http, &after.url(), &late)
        .await
        .unwrap();
    assert_eq!(outcomes, [Outcome::Stale, Outcome::Stored]);
}

/// A map whose clock is ahead begins at the machine's time again when all processes were stopped.
#[tokio::test]
async fn map_clock_begins_at_the_machines_where_no_process_ran() {
    let clock = FakeClock::new();
    let folder = tempfile::tempdir().unwrap();
    let http = Client::new();
    for ahead in [60, 0] {
        clock.step_to(ahead);
        let mut command = logging(folder.path());
        command.envs(clock.environment());
        let mut instance = Process::start(command, free_address());
        let now = SystemTime::now() + Duration::from_secs(ahead as u64);
        let told = mark_of(&http, &instance.url()).await.clock.unwrap();
        assert!(told < now + Duration::from_secs(5), "{told:?} at {now:?}");
        let outcome = crate::processes::put_one(&http, &instance.url(), &entry_at(now)).await;
        assert_eq!(outcome, Outcome::Stored);
        instance.kill();
    }
}

/// An instance that opened the folder alone, and is held up before its first commit: the clock of the instance
/// that has served meanwhile stays.
#[tokio::test]
async fn map_clock_does_not_begin_again_where_another_process_has_served() {
    let clock = FakeClock::new();
    clock.step_to(-60);
    let folder = tempfile::tempdir().unwrap();
    let http = Client::new();
    let map = folder.path().join("map");
    std::fs::create_dir(&map).unwrap();
    let turns = std::fs::File::create(map.join("turns")).unwrap();
    turns.lock().unwrap();
    let mut command = logging(folder.path());
    command.envs(clock.environment());
    let held_up = Process::start(command, free_address());
    held_up.signal("STOP");
    let tasks = format!("/proc/{}/task", held_up.pid());
    let is_stopped = || {
        std::fs::read_dir(&tasks).unwrap().all(|task| {
            let stat = std::fs::read_to_string(task.unwrap().path().join("stat")).unwrap();
            stat.contains(") T ")
        })
    };
    let begin = Instant::now();
    while !is_stopped() {
        assert!(begin.elapsed() < PATIENCE, "it does not stop");
        tokio::time::sleep(LOOK_AGAIN).await;
    }
    drop(turns);
    let serving = Process::start(logging(folder.path()), free_address());
    serving.wait_until_ready();
    held_up.signal("CONT");
    held_up.wait_until_ready();
    for instance in [&serving, &held_up] {
        let entry = entry_at(SystemTime::now());
        let outcome = crate::processes::put_one(&http, &instance.url(), &entry).await;
        assert_eq!(outcome, Outcome::Stored);
    }
}

/// The settle window is the map's, whatever a later instance is told.
#[tokio::test]
async fn settle_window_is_a_property_of_the_map() {
    for engine in [Engine::Lmdb, Engine::RedisServer] {
        let empty = engine.empty_map();
        let first = open_with(&empty.location, Duration::from_secs(60));
        wait_until_ready(&first).await;
        assert_eq!(first.settle_window(), Some(Duration::from_secs(60)));
        assert!(is_whole(&first.health().await));
        drop(first);
        let other = open_again(&empty.location, Duration::from_secs(5)).await;
        assert_eq!(other.settle_window(), Some(Duration::from_secs(60)));
        let health = other.health().await;
        let named = "the map's settle window is 1m, and --settle 5s is ignored";
        assert!(
            health
                .checks
                .iter()
                .any(|check| !check.ok && check.detail.contains(named))
        );
        let now = other.clocks().unwrap().map;
        let entry = entry_at(now - Duration::from_secs(30));
        assert_eq!(other.put([entry].into()).await, [Outcome::Stored]);
    }
}

/// A map of before has no settle window: the first instance that serves it stores its own, an import does not. An
/// import that creates a map stores its own.
#[tokio::test]
async fn settle_window_of_a_map_of_before_is_stored_by_the_first_that_serves_it() {
    let folder = tempfile::tempdir().unwrap();
    let server = RedisServer::single(folder.path());
    let location = format!("redis://{}", server.address());
    let opened = async |seconds, access| {
        let options = Options {
            access,
            ..options(Duration::from_secs(seconds))
        };
        let map = open(&location.parse().unwrap(), options).unwrap();
        wait_until_ready(&map).await;
        map.settle_window().map(|settle| settle.as_secs())
    };
    assert_eq!(opened(20, Access::Import).await, Some(20));
    assert_eq!(opened(30, Access::Serve).await, Some(20));
    let _: i64 = server.ask(&["DEL", "id:{0}:settle"]);
    assert_eq!(opened(40, Access::Import).await, Some(40));
    assert_eq!(opened(50, Access::Serve).await, Some(50));
    assert_eq!(opened(60, Access::Serve).await, Some(50));
}

/// `logging clock` shows both clocks, and moves the map's ahead for all instances.
#[tokio::test]
async fn map_clock_is_shown_and_moved_ahead_by_the_task() {
    let clock = FakeClock::new();
    let folder = tempfile::tempdir().unwrap();
    let alone = ["--cluster-enabled", "no", "--min-replicas-to-write", "0"];
    let server = folder.path().join("redis");
    let server = RedisServer::start_with(&server, &alone, &clock.environment());
    let http = Client::new();
    for map in [
        location(folder.path()),
        format!("redis://{}", server.address()),
    ] {
        clock.step_to(0);
        let command = |task: &[&str]| {
            let mut command = Command::new(LOGGING);
            command
                .args(task)
                .args(["--map", &map])
                .envs(clock.environment());
            command
        };
        let instance = Process::start(command(&[]), free_address());
        instance.wait_until_ready();
        clock.step_to(60);
        let output = command(&["clock", "--forward"]).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        let text = String::from_utf8(output.stdout).unwrap();
        let told: Vec<&str> = text.lines().map(|line| &line[9..25]).collect();
        assert_eq!(told[0], told[1], "{text}");
        let is_ahead = async || {
            let clock = mark_of(&http, &instance.url()).await.clock.unwrap();
            clock > SystemTime::now() + Duration::from_secs(55)
        };
        let begin = Instant::now();
        while !is_ahead().await {
            assert!(
                begin.elapsed() < PATIENCE,
                "the instance's clock is not moved"
            );
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }
}

fn open_with(location: &str, settle: Duration) -> Arc<dyn DistributedMap> {
    open(&location.parse().unwrap(), options(settle)).unwrap()
}

/// Opens a map again once the writer thread of the one before has ended.
async fn open_again(location: &str, settle: Duration) -> Arc<dyn DistributedMap> {
    let location = location.parse().unwrap();
    crate::map::open_ready(&location, options(settle)).await
}

fn options(settle: Duration) -> Options {
    Options {
        store_timeout: Duration::from_millis(800),
        settle: Some(settle),
        backups: None,
        access: Access::Serve,
    }
}
