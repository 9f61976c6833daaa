//! Pool, batcher, retries and resumed reads on a simulated network, map and clock: delays, lost
//! requests and answers, late execution, and instances that are dead, hang, close connections or
//! answer wrongly for some time. Each seed is one run that can be repeated.
//!
//! Each run checks that the answer about a message is true (promises 1 and 3), that an acknowledged message
//! is in every later read (promise 2) and one entry however often it is retried (promise 3), the order
//! (promise 4), that a body which ends properly is complete (promise 6), that nothing fails while one
//! instance is healthy (promise 7), and that every call ends in time (promise 8).

/// Followers of instances whose clocks are wrong.
mod following;
mod network;

use std::collections::{BTreeMap, HashMap};
use std::convert::Infallible;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::body::{Body, to_bytes};
use axum::http::{HeaderValue, Request, header};
use clap::Parser;
use common::bounds::Order;
use common::clock::MapClock;
use common::entry::Entry;
use common::serve::Timeouts;
use facade::identifiers::Identifiers;
use facade::names::Naming;
use facade::pool::Pool;
use facade::served_map::ServedMap;
use facade::{App, Config, router};
use futures_util::{StreamExt, stream};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde_json::{Value, json};
use tokio::time::{sleep, timeout};
use tower::ServiceExt;
use uuid::Uuid;

use self::network::{Network, Simulated};

const SEEDS: u64 = 1000;

/// No call takes longer: a POST its deadline, an upload of twelve lines the same, a GET of some
/// twenty pages far less than the read deadline for each.
const LONGEST_CALL: Duration = Duration::from_secs(120);

/// How far ahead of the clock some keys are; the map does not accept them yet.
const FUTURE: Duration = Duration::from_millis(2500);

/// After this time every delayed request has been executed.
const ALL_IS_OVER: Duration = Duration::from_secs(60);

#[test]
fn promises_hold_on_a_simulated_network() {
    let mut total = Tally::default();
    for tally in on_all_seeds(run) {
        total.add(&tally);
    }
    println!("{SEEDS} seeds: {total:?}");
    assert!(
        total.stored > 10 * SEEDS && total.whole_reads > SEEDS,
        "{total:?}"
    );
    assert!(
        total.uncertain > 0 && total.cut_reads > 0,
        "the network had too few faults to prove anything: {total:?}"
    );
    assert!(
        total.faults > 10 * SEEDS,
        "the network had too few faults to prove anything: {total:?}"
    );
}

/// An upload without any instance takes one deadline in all and not one for each window of lines, also when they
/// all died after its first line.
#[tokio::test(start_paused = true)]
async fn upload_without_instances_takes_one_deadline() {
    const LINES: u64 = 20_000;
    let network = Arc::new(Mutex::new(Network::new(1)));
    let app = facade_on(&network, 1, false);
    let post = async |lines: Body| {
        let request = Request::post("/")
            .header("content-type", "application/x-ndjson")
            .header(header::HOST, "localhost");
        let response = router(app.clone()).oneshot(request.body(lines).unwrap());
        response.await.unwrap()
    };
    let killing = network.clone();
    let lines = stream::iter(0..=LINES).then(move |n| {
        let killing = killing.clone();
        async move {
            if n == 1 {
                // By then the first line is stored.
                tokio::time::sleep(Duration::from_secs(5)).await;
                killing.lock().unwrap().kill_all();
            }
            Ok::<_, Infallible>(format!("\"{n}\"\n"))
        }
    });
    let began = tokio::time::Instant::now();
    let response = post(Body::from_stream(lines)).await;
    assert!(
        began.elapsed() < Duration::from_secs(5 + 11),
        "{:?}",
        began.elapsed()
    );
    assert_eq!(response.status(), 207);

    let began = tokio::time::Instant::now();
    let lines: String = (0..LINES).map(|n| format!("\"{n}\"\n")).collect();
    let response = post(Body::from(lines)).await;
    // The deadline is 10 s.
    assert!(began.elapsed() < Duration::from_secs(11));
    assert_eq!(response.status(), 503);
    assert!(response.headers().contains_key("retry-after"));
    let body = to_bytes(response.into_body(), usize::MAX).await.unwrap();
    let problem: Value = serde_json::from_slice(&body).unwrap();
    assert_eq!(
        (&problem["stored"], &problem["failed"]),
        (&json!(0), &json!(LINES))
    );
    assert_eq!(problem["errors"][0]["stored"], "no");
}

/// What a run returns for each seed; time passes as soon as all wait for it.
fn on_all_seeds<F: Future>(run: impl Fn(u64) -> F) -> impl Iterator<Item = F::Output> {
    (0..SEEDS).map(move |seed| {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .start_paused(true)
            .build()
            .unwrap();
        runtime.block_on(run(seed))
    })
}

/// A facade in front of three simulated instances, of which the first never fails if `has_survivor`.
fn facade_on(network: &Arc<Mutex<Network>>, seed: u64, has_survivor: bool) -> Arc<App> {
    let clock = network.lock().unwrap().clock;
    let map_clock = MapClock::with_ticks(move || clock.began.elapsed());
    map_clock.set(clock.base);
    let served_map = ServedMap::with_clock(map_clock);
    let pool = Arc::new(Pool::new(StdRng::seed_from_u64(seed), served_map));
    for index in 0..3 {
        let instance = Simulated {
            network: network.clone(),
            index,
            is_reliable: has_survivor && index == 0,
        };
        let name = format!("instance-{index}");
        pool.set_instances(
            &name,
            &Naming::default(),
            vec![(name.clone(), Arc::new(instance))],
        );
    }
    let config = Config::parse_from(["facade", "--messages", "http://127.0.0.1:9"]);
    App::with_pool(&config, Timeouts::default(), pool, Default::default()).unwrap()
}

/// Counts of events, so that runs without faults are noticed.
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
    let network = Arc::new(Mutex::new(Network::new(seed)));
    let record = Arc::new(Mutex::new(Record::default()));
    let app = facade_on(&network, seed, has_survivor);
    let caller = Caller {
        app,
        seed,
        has_survivor,
        network: network.clone(),
        record: record.clone(),
        keys: Identifiers::default(),
        future_keys: Identifiers::default(),
    };
    let writers = (0..3).map(|writer| caller.write(writer));
    tokio::join!(
        caller.upload(),
        caller.read(),
        futures_util::future::join_all(writers)
    );
    sleep(ALL_IS_OVER).await;
    let (network, record) = (network.lock().unwrap(), record.lock().unwrap());
    record.check_fates(&network.map, seed);
    record.tally(network.faults)
}

/// The record of the callers: the answer about each message, and the number of whole and aborted reads.
#[derive(Default)]
struct Record {
    fates: HashMap<String, Fate>,
    reads: [u64; 2],
}

/// The answer to the caller about its message.
#[derive(Clone, Copy, Debug)]
enum Fate {
    Asked,
    Stored(Uuid),
    NotStored,
    Unknown,
}

impl Record {
    /// Asserts that the answer about every message is true.
    fn check_fates(&self, map: &BTreeMap<Uuid, String>, seed: u64) {
        let mut found: HashMap<&str, Vec<Uuid>> = HashMap::new();
        for (uuid, msg) in map {
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

    fn tally(&self, faults: u64) -> Tally {
        let count = |is: fn(&Fate) -> bool| self.fates.values().filter(|fate| is(fate)).count();
        Tally {
            stored: count(|fate| matches!(fate, Fate::Stored(_))) as u64,
            refused: count(|fate| matches!(fate, Fate::NotStored)) as u64,
            uncertain: count(|fate| matches!(fate, Fate::Unknown)) as u64,
            whole_reads: self.reads[0],
            cut_reads: self.reads[1],
            faults,
        }
    }
}

fn never_will_be(answer: &Value) -> bool {
    let detail = answer["detail"].as_str().unwrap();
    detail.contains("no POST stored its message and none will")
}

/// The callers, which post and read and record the answers.
struct Caller {
    app: Arc<App>,
    seed: u64,
    has_survivor: bool,
    network: Arc<Mutex<Network>>,
    record: Arc<Mutex<Record>>,
    keys: Identifiers,
    future_keys: Identifiers,
}

impl Caller {
    async fn write(&self, writer: usize) {
        let mut last = Uuid::nil();
        for n in 0..8 {
            let pause = self.network.lock().unwrap().random.random_range(0..700);
            sleep(Duration::from_millis(pause)).await;
            let msg = format!("{}/{writer}/{n}", self.seed);
            let is_keyed = n % 4 == 3;
            let uuid = if is_keyed {
                self.post_with_key(&msg).await;
                None
            } else {
                self.post(&msg).await
            };
            if let Some(uuid) = uuid {
                assert!(uuid > last, "seed {}: {uuid} after {last}", self.seed);
                last = uuid;
            }
        }
    }

    /// Posts once, without a key.
    async fn post(&self, msg: &str) -> Option<Uuid> {
        let (status, answer) = self.try_post(msg, None).await;
        self.assert_served(status == 200, &answer);
        let uuid = answer["uuid"].as_str().unwrap().parse().unwrap();
        let fate = match (status, answer["stored"].as_str()) {
            (200, _) => Fate::Stored(uuid),
            (503, Some("no")) => Fate::NotStored,
            (503, Some("unknown")) => Fate::Unknown,
            _ => panic!("seed {}: {status} {answer}", self.seed),
        };
        self.told(msg, fate);
        (status == 200).then_some(uuid)
    }

    /// Posts under a key until the answer is final, as a careful caller does. Some keys are in the
    /// future.
    async fn post_with_key(&self, msg: &str) {
        let (is_future, now) = {
            let mut network = self.network.lock().unwrap();
            let is_future = network.random.random_range(0..4) == 0;
            (is_future, network.clock.now())
        };
        let key = if is_future {
            self.future_keys.next(now + FUTURE)
        } else {
            self.keys.next(now)
        };
        let mut fate = Fate::NotStored;
        for attempt in 0..10 {
            let (status, answer) = self.try_post(msg, Some(key)).await;
            if attempt == 0 {
                self.assert_served(status == 200 || is_future, &answer);
                let is_first = answer.get("duplicate").is_none();
                assert!(
                    is_first,
                    "seed {}: the facade's own retry is reported as a duplicate",
                    self.seed
                );
            }
            fate = match (status, answer["stored"].as_str()) {
                (200, _) => Fate::Stored(key),
                (409, _) if never_will_be(&answer) => Fate::NotStored,
                // An earlier attempt may still be executed, now or when the key's time comes.
                (409, _) => fate,
                (503, Some("no")) => fate,
                (503, Some("unknown")) => Fate::Unknown,
                _ => panic!("seed {}: {status} {answer}", self.seed),
            };
            self.told(msg, fate);
            if status != 503 {
                return;
            }
        }
    }

    async fn try_post(&self, msg: &str, key: Option<Uuid>) -> (u16, Value) {
        self.told(msg, Fate::Asked);
        let request = Request::post("/");
        let request = match key {
            Some(key) => request.header("idempotency-key", key.to_string()),
            None => request,
        };
        let request = request.body(Body::from(msg.to_owned())).unwrap();
        let (status, body) = self.send(request).await;
        (status, serde_json::from_slice(&body.unwrap()).unwrap())
    }

    /// Nothing fails while one instance is healthy.
    #[track_caller]
    fn assert_served(&self, is_served: bool, answer: &Value) {
        assert!(
            is_served || !self.has_survivor,
            "seed {}: {answer}",
            self.seed
        );
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
        let mut results: Vec<Value> = results
            .map(|line| serde_json::from_slice(line).unwrap())
            .collect();
        let counts = results.pop().unwrap();
        assert_eq!(results.len(), msgs.len());
        let stored = results.iter().filter(|result| result["stored"] == "yes");
        let stored = stored.count();
        let failed = msgs.len() - stored;
        assert_eq!(counts, json!({"stored": stored, "failed": failed}));
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
            let pause = self.network.lock().unwrap().random.random_range(0..1500);
            sleep(Duration::from_millis(pause)).await;
            let order = if n % 2 == 0 { Order::Asc } else { Order::Desc };
            let acknowledged = self.acknowledged();
            self.look_up(&acknowledged).await;
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
            self.record.lock().unwrap().reads[usize::from(!is_whole)] += 1;
            if let Some(body) = body.filter(|_| is_whole) {
                self.check_body(&body, order, &acknowledged);
            }
        }
    }

    /// An acknowledged message is found under its UUID and never gets a 404.
    async fn look_up(&self, acknowledged: &[(Uuid, String)]) {
        let Some((uuid, msg)) = acknowledged.last() else {
            return;
        };
        let request = Request::get(format!("/{uuid}"));
        let (status, body) = self.send(request.body(Body::empty()).unwrap()).await;
        let found: Value = serde_json::from_slice(&body.unwrap()).unwrap();
        match status {
            200 => assert_eq!(found["msg"], *msg, "seed {}", self.seed),
            _ => assert!(
                status == 503 && !self.has_survivor,
                "seed {}: {status} {found}",
                self.seed
            ),
        }
    }

    /// A body that ended properly has every message that was acknowledged before, once, in order.
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
        let record = self.record.lock().unwrap();
        let stored = record.fates.iter().filter_map(|(msg, fate)| match fate {
            Fate::Stored(uuid) => Some((*uuid, msg.clone())),
            Fate::Asked | Fate::NotStored | Fate::Unknown => None,
        });
        stored.collect()
    }

    fn told(&self, msg: &str, fate: Fate) {
        self.record
            .lock()
            .unwrap()
            .fates
            .insert(msg.to_owned(), fate);
    }

    /// The status, and the body unless it was aborted.
    async fn send(&self, mut request: Request<Body>) -> (u16, Option<Vec<u8>>) {
        let host = HeaderValue::from_static("localhost");
        request.headers_mut().insert(header::HOST, host);
        let sending = async {
            let response = router(self.app.clone()).oneshot(request).await.unwrap();
            let status = response.status().as_u16();
            let body = to_bytes(response.into_body(), usize::MAX).await;
            (status, body.ok().map(|body| body.to_vec()))
        };
        let sent = timeout(LONGEST_CALL, sending).await;
        sent.unwrap_or_else(|_| panic!("seed {}: a call does not end", self.seed))
    }
}
