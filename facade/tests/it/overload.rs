//! More messages than the instances can store, on tokio's paused clock: the facade sends little more than
//! it accepts, and the instances spend their time on messages that are acknowledged.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use async_trait::async_trait;
use axum::body::{Body, to_bytes};
use axum::http::{Request, StatusCode};
use clap::Parser;
use common::api::{Batch, InstanceStats, PutResult, ReadQuery};
use common::entry::{Entry, Outcome};
use common::serve::Timeouts;
use facade::client::{LoggingApi, ReadAnswer};
use facade::names::Naming;
use facade::pool::Pool;
use facade::upstream::UpstreamError;
use facade::{App, Config, router};
use rand::SeedableRng;
use rand::rngs::StdRng;
use serde_json::Value;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};
use tower::ServiceExt;
use tower::retry::budget::Budget;
use uuid::Uuid;

use crate::system::served_map_on_tokios_clock;

const INSTANCES: u32 = 3;

/// The time that an instance needs for an entry.
const COST: Duration = Duration::from_millis(4);

/// The default `--try-timeout` of the facade.
const TRY_TIMEOUT: Duration = Duration::from_secs(1);

const OVERLOAD: u32 = 5;

const LASTS: Duration = Duration::from_secs(30);

/// Five times the capacity for thirty seconds: the facade sends at most 1.1 entries for each acknowledged
/// one, at least 0.8 of the capacity is acknowledged, and the excess load gets a 503 that says
/// `"stored":"no"`.
#[tokio::test(start_paused = true)]
async fn overload_is_turned_away_and_not_multiplied() {
    let sent = Arc::new(AtomicU64::new(0));
    let pool = Arc::new(Pool::new(
        StdRng::seed_from_u64(5),
        served_map_on_tokios_clock(),
    ));
    for index in 0..INSTANCES {
        let name = format!("instance-{index}");
        let slow = Arc::new(Slow { sent: sent.clone() });
        pool.set_instances(&name, &Naming::default(), vec![(name.clone(), slow)]);
    }
    let config = Config::parse_from(["facade", "--messages", "http://127.0.0.1:9"]);
    let app = App::with_pool(&config, Timeouts::default(), pool, Default::default()).unwrap();
    let facade = router(app);

    let began = Instant::now();
    let mut posts = JoinSet::new();
    while began.elapsed() < LASTS {
        for _ in 0..OVERLOAD * INSTANCES {
            let request = Request::post("/")
                .header("host", "localhost")
                .header("content-length", 5);
            let request = request.body(Body::from("hello")).unwrap();
            posts.spawn(facade.clone().oneshot(request));
        }
        sleep(COST).await;
    }
    let (mut posted, mut stored, mut unknown) = (0, 0, 0);
    while let Some(answered) = posts.join_next().await {
        let response = answered.unwrap().unwrap();
        posted += 1;
        match response.status() {
            StatusCode::OK => stored += 1,
            StatusCode::SERVICE_UNAVAILABLE => {
                assert!(response.headers().contains_key("retry-after"));
                let body = to_bytes(response.into_body(), 10_000).await.unwrap();
                let answer: Value = serde_json::from_slice(&body).unwrap();
                unknown += u64::from(answer["stored"] != "no");
            }
            other => panic!("{other}"),
        }
    }
    let sent = sent.load(Ordering::Relaxed);
    let capacity = LASTS.as_millis() as u64 / COST.as_millis() as u64 * u64::from(INSTANCES);
    println!(
        "{posted} posted, {stored} stored of a capacity of {capacity}, {sent} entries sent, \
         {unknown} of unknown fate"
    );
    assert!(posted > 4 * capacity, "too little load: {posted}");
    assert!(sent * 10 <= stored * 11, "{sent} sent for {stored} stored");
    assert!(stored * 10 >= capacity * 8, "{stored} of {capacity}");
    assert_eq!(unknown, 0);
}

/// Not even when the retry budget is used up: its caller would repeat it, and nothing would be saved.
#[tokio::test(start_paused = true)]
async fn message_that_may_be_stored_is_not_turned_away() {
    let pool = Arc::new(Pool::new(
        StdRng::seed_from_u64(5),
        served_map_on_tokios_clock(),
    ));
    let uncertain = Arc::new(Uncertain::default());
    pool.set_instances(
        "one",
        &Naming::default(),
        vec![("one".to_owned(), uncertain.clone())],
    );
    let config = Config::parse_from([
        "facade",
        "--messages",
        "http://127.0.0.1:9",
        "--deadline",
        "1h",
    ]);
    let app = App::with_pool(
        &config,
        Timeouts::default(),
        pool.clone(),
        Default::default(),
    )
    .unwrap();
    uncertain.pool.set(pool).unwrap();
    let request = Request::post("/")
        .header("host", "localhost")
        .header("content-length", 5);
    let request = request.body(Body::from("hello")).unwrap();
    let response = router(app).oneshot(request).await.unwrap();
    assert_eq!(response.status(), StatusCode::OK);
    let tried = uncertain.tried.lock().unwrap();
    assert_eq!(tried[..], [tried[0]; Uncertain::OUTCOMES]);
}

/// An instance that does not know the outcome of the first try, then refuses, and then stores. Whenever it
/// answers, the retry budget is used up.
#[derive(Debug, Default)]
struct Uncertain {
    pool: OnceLock<Arc<Pool>>,
    tried: Mutex<Vec<Uuid>>,
}

impl Uncertain {
    const OUTCOMES: usize = 5;
}

#[async_trait]
impl LoggingApi for Uncertain {
    async fn put(&self, batch: Batch) -> Result<Vec<PutResult>, UpstreamError> {
        let entries = Batch::decode(&batch.into_body()).unwrap().entries;
        let budget = &self.pool.get().unwrap().retry_budget;
        while budget.withdraw() {}
        let mut tried = self.tried.lock().unwrap();
        let results = entries.iter().map(|entry| {
            tried.push(entry.uuid);
            PutResult {
                uuid: entry.uuid,
                outcome: match tried.len() {
                    1 => Outcome::unknown("the primary died"),
                    Self::OUTCOMES => Outcome::Duplicate,
                    _ => Outcome::refused("the writer was busy"),
                },
            }
        });
        Ok(results.collect())
    }

    async fn read(
        &self,
        _query: ReadQuery,
        _request_id: Option<&str>,
    ) -> Result<ReadAnswer, UpstreamError> {
        unreachable!("nobody reads")
    }

    async fn get(&self, _uuid: Uuid) -> Result<Option<Entry>, UpstreamError> {
        unreachable!("nobody reads")
    }

    async fn stats(&self) -> Result<InstanceStats, UpstreamError> {
        unreachable!("nobody asks for statistics")
    }
}

/// An instance that needs [`COST`] for each entry.
#[derive(Debug)]
struct Slow {
    sent: Arc<AtomicU64>,
}

#[async_trait]
impl LoggingApi for Slow {
    async fn put(&self, batch: Batch) -> Result<Vec<PutResult>, UpstreamError> {
        let entries = Batch::decode(&batch.into_body()).unwrap().entries;
        let count = u32::try_from(entries.len()).unwrap();
        self.sent.fetch_add(count.into(), Ordering::Relaxed);
        let storing = timeout(TRY_TIMEOUT, sleep(COST * count));
        storing.await.map_err(|_| UpstreamError::TimedOut)?;
        let results = entries.iter().map(|entry| PutResult {
            uuid: entry.uuid,
            outcome: Outcome::Stored,
        });
        Ok(results.collect())
    }

    async fn read(
        &self,
        _query: ReadQuery,
        _request_id: Option<&str>,
    ) -> Result<ReadAnswer, UpstreamError> {
        unreachable!("nobody reads")
    }

    async fn get(&self, _uuid: Uuid) -> Result<Option<Entry>, UpstreamError> {
        unreachable!("nobody reads")
    }

    async fn stats(&self) -> Result<InstanceStats, UpstreamError> {
        unreachable!("nobody asks for statistics")
    }
}
