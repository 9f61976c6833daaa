//! Pool, batcher, retries and resumed reads on a simulated network, map and clock: delays, lost
//! requests and answers, late execution, crashes. Each seed is one run that can be repeated.
//!
//! Checked for each: a message is one entry however often it is repeated (promise 3), order
//! (promise 4), a body that ends properly is complete (promise 6), and while one instance lives
//! nothing fails (promise 7).

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use axum::body::{Body, to_bytes};
use axum::http::Request;
use clap::Parser;
use common::entry::{Entry, Outcome, PutEntry, PutResult};
use common::page::{Bounds, Order, PageEnd};
use common::server::Limits;
use facade::client::{Logging, Page, UpstreamError};
use facade::pool::Pool;
use facade::{App, Config, router};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde_json::Value;
use tokio::time::{Instant, sleep};
use tower::ServiceExt;
use uuid::Uuid;

const SEEDS: u64 = 1000;

/// What the facade gives one try, by its own clients' configuration.
const TRY_TIMEOUT: Duration = Duration::from_secs(1);

/// By then the last request that was delayed on its way has been executed.
const ALL_IS_OVER: Duration = Duration::from_secs(60);

#[test]
fn promises_hold_on_a_simulated_network() {
    let mut total = Tally::default();
    for seed in 0..SEEDS {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .start_paused(true)
            .build()
            .unwrap();
        let tally = runtime.block_on(run(seed));
        total.add(&tally);
    }
    println!("{SEEDS} seeds: {total:?}");
    assert!(
        total.stored > 10 * SEEDS && total.whole_reads > SEEDS,
        "{total:?}"
    );
    assert!(
        total.uncertain > 0 && total.cut_reads > 0,
        "too kind a network: {total:?}"
    );
    assert!(total.faults > 10 * SEEDS, "too kind a network: {total:?}");
}

/// What happened, so that a run in which nothing happened is noticed.
#[derive(Debug, Default)]
struct Tally {
    stored: u64,
    refused: u64,
    uncertain: u64,
    whole_reads: u64,
    cut_reads: u64,
    faults: u64,
}

impl Tally {
    fn add(&mut self, other: &Self) {
        self.stored += other.stored;
        self.refused += other.refused;
        self.uncertain += other.uncertain;
        self.whole_reads += other.whole_reads;
        self.cut_reads += other.cut_reads;
        self.faults += other.faults;
    }
}

/// One run: three writers, an upload and a reader against three instances.
async fn run(seed: u64) -> Tally {
    // Every other seed has an instance that never fails; in the others all may fail at once.
    let has_survivor = seed.is_multiple_of(2);
    let world = Arc::new(Mutex::new(World::new(seed)));
    let pool = Arc::new(Pool::new(StdRng::seed_from_u64(seed)));
    for index in 0..3 {
        let instance = Simulated {
            world: world.clone(),
            index,
            is_reliable: has_survivor && index == 0,
        };
        let name = format!("instance-{index}");
        pool.set_instances(&name, vec![(name.clone(), Arc::new(instance))]);
    }
    let config = Config::parse_from(["facade", "--messages", "http://127.0.0.1:9"]);
    let app = App::with_pool(&config, Limits::default(), pool, Default::default()).unwrap();
    let caller = Caller {
        app,
        seed,
        has_survivor,
        world: world.clone(),
    };
    let writers = (0..3).map(|writer| caller.write(writer));
    tokio::join!(
        caller.upload(),
        caller.read(),
        futures_util::future::join_all(writers)
    );
    sleep(ALL_IS_OVER).await;
    let world = world.lock().unwrap();
    world.check_fates(seed);
    world.tally()
}

/// What all instances share: the map, and what the callers know about it.
struct World {
    random: StdRng,
    map: BTreeMap<Uuid, String>,
    down_until: [Instant; 3],
    fates: HashMap<String, Fate>,
    reads: [u64; 2],
    faults: u64,
}

/// What a caller was told about its message.
#[derive(Clone, Copy, Debug)]
enum Fate {
    Asked,
    Stored(Uuid),
    NotStored,
    Unknown,
}

impl World {
    fn new(seed: u64) -> Self {
        Self {
            random: StdRng::seed_from_u64(seed),
            map: BTreeMap::new(),
            down_until: [Instant::now(); 3],
            fates: HashMap::new(),
            reads: [0; 2],
            faults: 0,
        }
    }

    fn put(&mut self, entries: &[PutEntry]) -> Vec<PutResult> {
        let results = entries.iter().map(|entry| PutResult {
            uuid: entry.uuid,
            outcome: self.put_one(entry),
        });
        results.collect()
    }

    fn put_one(&mut self, entry: &PutEntry) -> Outcome {
        let roll = self.random.random_range(0..100);
        if roll < 3 {
            return Outcome::refused("not now");
        }
        if roll < 5 {
            return Outcome::unknown("not executed, but who knows");
        }
        let outcome = match self.map.get(&entry.uuid) {
            Some(msg) if *msg == entry.msg => Outcome::Duplicate,
            Some(_) => Outcome::Conflict,
            None => Outcome::Stored,
        };
        if outcome == Outcome::Stored {
            self.map.insert(entry.uuid, entry.msg.clone());
        }
        if roll < 7 {
            return Outcome::unknown("executed, but who knows");
        }
        outcome
    }

    fn page(&mut self, bounds: Bounds, limit: Option<u64>) -> Page {
        let size = self
            .random
            .random_range(1..5)
            .min(limit.unwrap_or(u64::MAX)) as usize;
        let within = self.map.iter().filter(|(uuid, _)| bounds.contains(**uuid));
        let mut entries: Vec<Entry> = within
            .map(|(uuid, msg)| Entry {
                uuid: *uuid,
                msg: msg.clone(),
            })
            .collect();
        if bounds.order == Order::Desc {
            entries.reverse();
        }
        let is_cut = entries.len() > size;
        entries.truncate(size);
        let next = entries.last().filter(|_| is_cut).map(|entry| entry.uuid);
        let last = self
            .map
            .last_key_value()
            .map(|(uuid, _)| uuid.as_u128() + 1);
        let end = last
            .map(Uuid::from_u128)
            .filter(|_| bounds.order == Order::Asc);
        let end = PageEnd {
            count: entries.len() as u64,
            next,
            before: next.and(end),
        };
        Page { entries, end }
    }

    /// Every message became what its caller was told.
    fn check_fates(&self, seed: u64) {
        let mut found: HashMap<&str, Vec<Uuid>> = HashMap::new();
        for (uuid, msg) in &self.map {
            assert!(
                self.fates.contains_key(msg),
                "seed {seed}: {msg} was never posted"
            );
            found.entry(msg).or_default().push(*uuid);
        }
        for (msg, fate) in &self.fates {
            let uuids = found.get(msg.as_str()).cloned().unwrap_or_default();
            let is_as_told = match fate {
                Fate::Stored(uuid) => uuids == [*uuid],
                Fate::NotStored => uuids.is_empty(),
                Fate::Unknown => uuids.len() <= 1,
                Fate::Asked => false,
            };
            assert!(
                is_as_told,
                "seed {seed}: {msg} was said to be {fate:?}, it is {uuids:?}"
            );
        }
    }

    fn tally(&self) -> Tally {
        let count = |is: fn(&Fate) -> bool| self.fates.values().filter(|fate| is(fate)).count();
        Tally {
            stored: count(|fate| matches!(fate, Fate::Stored(_))) as u64,
            refused: count(|fate| matches!(fate, Fate::NotStored)) as u64,
            uncertain: count(|fate| matches!(fate, Fate::Unknown)) as u64,
            whole_reads: self.reads[0],
            cut_reads: self.reads[1],
            faults: self.faults,
        }
    }
}

/// An instance with a network in front of it that does what the world's random numbers say.
#[derive(Clone)]
struct Simulated {
    world: Arc<Mutex<World>>,
    index: usize,
    is_reliable: bool,
}

impl std::fmt::Debug for Simulated {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "instance-{}", self.index)
    }
}

enum Fault {
    None,
    /// The process dies and refuses connections for some time.
    Crash {
        is_executed: bool,
    },
    /// The request never arrives, as when the network is cut one way.
    LostRequest,
    /// The request arrives after the facade has given up.
    LateRequest,
    /// The answer never arrives.
    LostAnswer,
}

impl Simulated {
    /// One call: the request travels, is executed, and the answer travels.
    async fn call<T: Send + 'static>(
        &self,
        execute: impl FnOnce(&mut World) -> T + Send + 'static,
    ) -> Result<T, UpstreamError> {
        let (fault, delay) = {
            let mut world = self.world.lock().unwrap();
            if Instant::now() < world.down_until[self.index] {
                return Err(UpstreamError::Unreachable("connection refused".into()));
            }
            (self.fault(&mut world), world.random.random_range(0..150))
        };
        sleep(Duration::from_millis(delay)).await;
        let world = self.world.clone();
        let execute = move || execute(&mut world.lock().unwrap());
        match fault {
            Fault::None => {
                let answer = execute();
                sleep(Duration::from_millis(delay)).await;
                Ok(answer)
            }
            Fault::Crash { is_executed } => {
                if is_executed {
                    execute();
                }
                Err(UpstreamError::Lost("connection reset".into()))
            }
            Fault::LostRequest => {
                sleep(TRY_TIMEOUT).await;
                Err(UpstreamError::TimedOut)
            }
            Fault::LateRequest => {
                tokio::spawn(async move {
                    sleep(3 * TRY_TIMEOUT).await;
                    execute();
                });
                sleep(TRY_TIMEOUT).await;
                Err(UpstreamError::TimedOut)
            }
            Fault::LostAnswer => {
                execute();
                sleep(TRY_TIMEOUT).await;
                Err(UpstreamError::TimedOut)
            }
        }
    }

    fn fault(&self, world: &mut World) -> Fault {
        if self.is_reliable {
            return Fault::None;
        }
        let fault = match world.random.random_range(0..100) {
            0..8 => {
                let down = Duration::from_millis(world.random.random_range(0..8000));
                world.down_until[self.index] = Instant::now() + down;
                let is_executed = world.random.random();
                Fault::Crash { is_executed }
            }
            8..14 => Fault::LostRequest,
            14..20 => Fault::LateRequest,
            20..26 => Fault::LostAnswer,
            _ => return Fault::None,
        };
        world.faults += 1;
        fault
    }
}

#[async_trait]
impl Logging for Simulated {
    async fn put(&self, batch: Vec<u8>) -> Result<Vec<PutResult>, UpstreamError> {
        let entries: Vec<PutEntry> = serde_json::from_slice(&batch).unwrap();
        self.call(move |world| world.put(&entries)).await
    }

    async fn page(
        &self,
        bounds: Bounds,
        limit: Option<u64>,
        _request_id: Option<&str>,
    ) -> Result<Page, UpstreamError> {
        self.call(move |world| world.page(bounds, limit)).await
    }

    async fn get(&self, uuid: Uuid) -> Result<Option<Entry>, UpstreamError> {
        self.call(move |world| {
            let msg = world.map.get(&uuid).cloned();
            msg.map(|msg| Entry { uuid, msg })
        })
        .await
    }

    async fn probe(&self) -> Result<(), UpstreamError> {
        self.call(|_| ()).await
    }
}

/// Those who post and read, and remember what they were told.
struct Caller {
    app: App,
    seed: u64,
    has_survivor: bool,
    world: Arc<Mutex<World>>,
}

impl Caller {
    async fn write(&self, writer: usize) {
        let mut last = Uuid::nil();
        for n in 0..8 {
            let pause = self.world.lock().unwrap().random.random_range(0..700);
            sleep(Duration::from_millis(pause)).await;
            let msg = format!("{}/{writer}/{n}", self.seed);
            let is_keyed = n % 4 == 3;
            let mut key = is_keyed.then(Uuid::now_v7);
            let uuid = self.post(&msg, &mut key).await;
            if let Some(uuid) = uuid.filter(|_| !is_keyed) {
                assert!(uuid > last, "seed {}: {uuid} after {last}", self.seed);
                last = uuid;
            }
        }
    }

    /// Posts once; with a key, until it is stored, as a careful caller does.
    async fn post(&self, msg: &str, key: &mut Option<Uuid>) -> Option<Uuid> {
        for _ in 0..10 {
            self.told(msg, Fate::Asked);
            let request = Request::post("/");
            let request = match key {
                Some(key) => request.header("idempotency-key", key.to_string()),
                None => request,
            };
            let (status, body) = self
                .send(request.body(Body::from(msg.to_owned())).unwrap())
                .await;
            let answer: Value = serde_json::from_slice(&body.unwrap()).unwrap();
            assert!(
                !self.has_survivor || status == 200,
                "seed {}: {answer}",
                self.seed
            );
            let uuid: Uuid = answer["uuid"].as_str().unwrap().parse().unwrap();
            if status == 200 {
                self.told(msg, Fate::Stored(uuid));
                return Some(uuid);
            }
            assert_eq!(status, 503, "seed {}: {answer}", self.seed);
            // A first try with this key may have been unknown, so a later "no" says less.
            match answer["stored"].as_str().unwrap() {
                "no" if key.is_none() => self.told(msg, Fate::NotStored),
                _ => self.told(msg, Fate::Unknown),
            }
            if key.is_none() {
                return None;
            }
        }
        None
    }

    async fn upload(&self) {
        let msgs: Vec<String> = (0..12)
            .map(|n| format!("{}/upload/{n}", self.seed))
            .collect();
        let lines: String = msgs.iter().map(|msg| format!("\"{msg}\"\n")).collect();
        msgs.iter().for_each(|msg| self.told(msg, Fate::Asked));
        let request = Request::post("/")
            .header("content-type", "application/x-ndjson")
            .header("accept", "application/x-ndjson")
            .body(Body::from(lines));
        let (status, body) = self.send(request.unwrap()).await;
        assert_eq!(status, 200);
        let body = body.unwrap();
        let results = body
            .split(|byte| *byte == b'\n')
            .filter(|line| !line.is_empty());
        let results: Vec<Value> = results
            .map(|line| serde_json::from_slice(line).unwrap())
            .collect();
        assert_eq!(results.len(), msgs.len());
        for (msg, result) in msgs.iter().zip(results) {
            assert!(
                !self.has_survivor || result["stored"] == "yes",
                "seed {}: {result}",
                self.seed
            );
            self.told(
                msg,
                match result["stored"].as_str().unwrap() {
                    "yes" => Fate::Stored(result["uuid"].as_str().unwrap().parse().unwrap()),
                    "no" => Fate::NotStored,
                    _ => Fate::Unknown,
                },
            );
        }
    }

    async fn read(&self) {
        for n in 0..6 {
            let pause = self.world.lock().unwrap().random.random_range(0..1500);
            sleep(Duration::from_millis(pause)).await;
            let order = if n % 2 == 0 { Order::Asc } else { Order::Desc };
            let acknowledged = self.acknowledged();
            let query = if n % 2 == 0 {
                "/?order=asc"
            } else {
                "/?order=desc"
            };
            let request = Request::get(query).header("accept", "application/x-ndjson");
            let (status, body) = self.send(request.body(Body::empty()).unwrap()).await;
            let is_whole = status == 200 && body.is_some();
            assert!(
                !self.has_survivor || is_whole,
                "seed {}: {status}",
                self.seed
            );
            self.world.lock().unwrap().reads[usize::from(!is_whole)] += 1;
            if let Some(body) = body.filter(|_| is_whole) {
                self.check_body(&body, order, &acknowledged);
            }
        }
    }

    /// A body that ended properly has everything that was acknowledged before, once, in order.
    fn check_body(&self, body: &[u8], order: Order, acknowledged: &[(Uuid, String)]) {
        let text = std::str::from_utf8(body).unwrap();
        let mut lines: Vec<&str> = text.lines().collect();
        let tail: Value = serde_json::from_str(lines.pop().unwrap()).unwrap();
        assert_eq!(tail["count"], lines.len(), "seed {}", self.seed);
        let entries = lines.iter().map(|line| serde_json::from_str(line).unwrap());
        let mut entries: Vec<Entry> = entries.collect();
        if order == Order::Desc {
            entries.reverse();
        }
        let is_ordered = entries.is_sorted_by(|left, right| left.uuid < right.uuid);
        assert!(is_ordered, "seed {}: {entries:?}", self.seed);
        let held: BTreeMap<Uuid, String> = entries.into_iter().map(|e| (e.uuid, e.msg)).collect();
        for (uuid, msg) in acknowledged {
            assert_eq!(
                held.get(uuid),
                Some(msg),
                "seed {}: {msg} is missing",
                self.seed
            );
        }
    }

    fn acknowledged(&self) -> Vec<(Uuid, String)> {
        let world = self.world.lock().unwrap();
        let stored = world.fates.iter().filter_map(|(msg, fate)| match fate {
            Fate::Stored(uuid) => Some((*uuid, msg.clone())),
            Fate::Asked | Fate::NotStored | Fate::Unknown => None,
        });
        stored.collect()
    }

    fn told(&self, msg: &str, fate: Fate) {
        self.world
            .lock()
            .unwrap()
            .fates
            .insert(msg.to_owned(), fate);
    }

    /// The status, and the body unless it broke off.
    async fn send(&self, request: Request<Body>) -> (u16, Option<Vec<u8>>) {
        let response = router(self.app.clone()).oneshot(request).await.unwrap();
        let status = response.status().as_u16();
        let body = to_bytes(response.into_body(), usize::MAX).await;
        (status, body.ok().map(|body| body.to_vec()))
    }
}
