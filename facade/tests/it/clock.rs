//! Clocks that step: of a facade, of the machine, of a Redis server, of members of a cluster.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use reqwest::Client;
use testing::fake_clock::FakeClock;
use testing::process::{LOOK_AGAIN, PATIENCE, Process, free_address};
use testing::redis_servers::{RedisCluster, RedisServer};
use uuid::Uuid;

use crate::follow::follower::Follower;
use crate::load::{Load, post};
use crate::processes::{Processes, binary, facade};
use crate::system::{Merged, problem};

/// How long a clock is wrong.
const WRONG: Duration = Duration::from_secs(4);

/// POSTs answered between two steps.
const PHASE: u64 = 300;

const STEPS: [i64; 4] = [60, -60, 3600, 0];

/// The map's clock makes UUIDs, not the facade's: no POST is refused, and order is kept.
#[tokio::test(flavor = "multi_thread")]
async fn own_clock_of_a_facade_changes_nothing() {
    let clock = FakeClock::new();
    let system = Processes::start();
    let mut command = system.another_facade(&[]);
    command.envs(clock.environment());
    let facade = Process::start(command, free_address());
    let mut last = Uuid::nil();
    for step in STEPS {
        clock.step_to(step);
        for n in 0..PHASE {
            let record = post(&system.http, &facade.url(), format!("{step} {n}")).await;
            assert!(
                record.failed.is_empty(),
                "{step} s ahead: {:?}",
                record.failed
            );
            let (uuid, _) = record.acknowledged.first_key_value().unwrap();
            assert!(*uuid > last, "{uuid} after {last}, {step} s ahead");
            last = *uuid;
        }
    }
}

/// A key of a caller whose clock is right is refused while the map's is not; the answer says why.
#[tokio::test(flavor = "multi_thread")]
async fn refused_key_is_answered_with_the_difference_of_the_clocks() {
    let clock = FakeClock::new();
    let system = Processes::start();
    let mut command = system.another_facade(&[]);
    command.envs(clock.environment());
    let facade = Process::start(command, free_address());
    clock.step_to(60);
    let key = Uuid::from_u128(Uuid::now_v7().as_u128() + (60_000 << 80));
    let request = system.http.post(facade.url()).body("a");
    let request = request.header("idempotency-key", key.to_string());
    let refused = problem(request.send().await.unwrap(), 409).await;
    let detail = refused["detail"].as_str().unwrap();
    let difference = detail.contains(" s behind this machine's: make keys from `at` in /stats");
    assert!(difference, "{detail}");
}

/// The clock of the machine, on which all processes run.
#[tokio::test(flavor = "multi_thread")]
async fn steps_of_the_machines_clock_change_nothing_on_lmdb() {
    let clock = FakeClock::new();
    let folder = tempfile::tempdir().unwrap();
    let map = format!("lmdb:{}", folder.path().join("map").display());
    let mut system = Stepped::start(&map, Some(&clock)).await;
    for step in [60, -60, 3600] {
        system.step(&[&clock], step).await;
    }
    system.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn steps_of_a_redis_servers_clock_change_nothing() {
    let clock = FakeClock::new();
    let folder = tempfile::tempdir().unwrap();
    let alone = ["--cluster-enabled", "no", "--min-replicas-to-write", "0"];
    let server = RedisServer::start_with(folder.path(), &alone, &clock.environment());
    let map = format!("redis://{}", server.address());
    let mut system = Stepped::start(&map, None).await;
    for step in [60, -60] {
        system.step(&[&clock], step).await;
    }
    system.finish().await;
}

/// One member of a cluster, and all of its members at once.
#[tokio::test(flavor = "multi_thread")]
async fn steps_of_members_clocks_change_nothing() {
    let clocks: [FakeClock; 6] = std::array::from_fn(|_| FakeClock::new());
    let cluster = RedisCluster::start_with("127.0.0.1", &[], |node| clocks[node].environment());
    let mut system = Stepped::start(&cluster.url(), None).await;
    for (members, step) in [(1, 60), (1, -60), (6, 60)] {
        let stepped: Vec<&FakeClock> = clocks[..members].iter().collect();
        system.step(&stepped, step).await;
    }
    system.finish().await;
}

/// Two instances of which one is restarted after the step begin at different times, and serve the same.
#[tokio::test(flavor = "multi_thread")]
async fn instance_that_is_restarted_after_a_step_has_the_maps_clock() {
    let clock = FakeClock::new();
    let folder = tempfile::tempdir().unwrap();
    let alone = ["--cluster-enabled", "no", "--min-replicas-to-write", "0"];
    let server = RedisServer::start_with(folder.path(), &alone, &clock.environment());
    let redis = format!("redis://{}", server.address());
    let lmdb = format!("lmdb:{}", folder.path().join("map").display());
    for map in [redis, lmdb] {
        clock.step_to(0);
        let mut system = Stepped::start(&map, Some(&clock)).await;
        system.load.wait_for_more(PHASE).await;
        clock.step_to(60);
        system.logging[0].kill();
        let address = system.logging[0].address;
        system.logging[0] = start_logging(&map, Some(&clock), address);
        system.load.wait_for_more(PHASE).await;
        clock.step_to(0);
        system.finish().await;
    }
}

/// A system under load, with two followers that stay connected, and a reader of settled history.
struct Stepped {
    http: Client,
    facade: Process,
    logging: Vec<Process>,
    _messages: Process,
    load: Load,
    followers: [Arc<Mutex<Seen>>; 2],
    /// How many messages were below a settled position.
    pages: Vec<(Uuid, u64)>,
}

/// What a follower has got.
#[derive(Default)]
struct Seen {
    uuids: BTreeSet<Uuid>,
    settled: Uuid,
}

fn start_logging(map: &str, clock: Option<&FakeClock>, address: SocketAddr) -> Process {
    let mut command = Command::new(binary("logging"));
    command.args(["--map", map, "--settle", "2s"]);
    command.envs(clock.map(FakeClock::environment).unwrap_or_default());
    let process = Process::start(command, address);
    process.wait_until_ready();
    process
}

impl Stepped {
    /// The services go by `clock` if there is one.
    async fn start(map: &str, clock: Option<&FakeClock>) -> Self {
        let messages = Process::start(Command::new(binary("messages")), free_address());
        let logging = (0..2).map(|_| start_logging(map, clock, free_address()));
        let logging: Vec<Process> = logging.collect();
        let urls: Vec<String> = logging.iter().map(Process::url).collect();
        let mut command = facade(&urls.join(","), &messages.url(), &[]);
        command.envs(clock.map(FakeClock::environment).unwrap_or_default());
        let facade = Process::start(command, free_address());
        let http = Client::new();
        let followers = [Arc::default(), Arc::default()];
        for seen in &followers {
            let follower = Follower::start(&http, &facade.url(), None).await;
            tokio::spawn(follow(follower, Arc::clone(seen)));
        }
        Self {
            load: Load::start(&http, &facade.url()),
            http,
            facade,
            logging,
            _messages: messages,
            followers,
            pages: Vec::new(),
        }
    }

    /// Clocks are ahead by this many seconds for some time, and right again.
    async fn step(&mut self, clocks: &[&FakeClock], seconds_ahead: i64) {
        self.load.wait_for_more(PHASE).await;
        for ahead in [seconds_ahead, 0] {
            clocks.iter().for_each(|clock| clock.step_to(ahead));
            let stepped = Instant::now();
            while stepped.elapsed() < WRONG {
                self.load.wait_for_more(PHASE / 10).await;
                let settled = self.followers[0].lock().unwrap().settled;
                if let Some(count) = self.count_before(settled).await {
                    self.pages.push((settled, count));
                }
            }
        }
    }

    /// `None` while the map cannot be read.
    async fn count_before(&self, settled: Uuid) -> Option<u64> {
        let url = format!("{}/?before={settled}", self.facade.url());
        let response = self.http.get(url).send().await.unwrap();
        if response.status() == 503 {
            return None;
        }
        let merged: Merged = response.json().await.unwrap();
        Some(merged.count)
    }

    /// Nothing was refused, followers got everything, settled history is what it was.
    async fn finish(self) {
        for (settled, count) in &self.pages {
            let now = self.count_before(*settled).await;
            assert_eq!(now, Some(*count), "messages before {settled}");
        }
        let (record, _) = self.load.finish().await;
        let (failed, acknowledged) = (record.failed.len(), record.acknowledged.len());
        assert!(
            failed == 0,
            "{failed} of {acknowledged}: {:?}",
            record.failed[0]
        );
        let (last, _) = record.acknowledged.last_key_value().unwrap();
        let begin = Instant::now();
        let has_settled = |seen: &Arc<Mutex<Seen>>| seen.lock().unwrap().settled > *last;
        while !self.followers.iter().all(has_settled) {
            assert!(begin.elapsed() < PATIENCE, "{last} does not settle");
            // The position comes with the next message.
            post(&self.http, &self.facade.url(), "more".to_owned()).await;
            tokio::time::sleep(LOOK_AGAIN).await;
        }
        for seen in &self.followers {
            let seen = seen.lock().unwrap();
            let acknowledged = record.acknowledged.keys();
            let missed = acknowledged
                .filter(|uuid| !seen.uuids.contains(uuid))
                .count();
            assert_eq!(
                missed,
                0,
                "a follower missed {missed} of {}",
                record.acknowledged.len()
            );
        }
        println!(
            "{acknowledged} POSTs, none refused or missed; {} pages",
            self.pages.len()
        );
    }
}

/// Records what a follower gets until the facade ends.
async fn follow(mut follower: Follower, seen: Arc<Mutex<Seen>>) {
    while let Ok(Some(entry)) = follower.try_next().await {
        let mut seen = seen.lock().unwrap();
        assert!(seen.uuids.insert(entry.uuid), "{} came twice", entry.uuid);
        seen.settled = follower.id.unwrap_or_default();
    }
}
