//! The whole system in one process: messages, three logging instances over one map, and the facade, each
//! on a free port. Dropping it ends everything.
//!
//! `TEST_ENGINE` names the engine of the map: `lmdb`, the default, `redis` for one server, or `cluster` for
//! a Redis Cluster.

use std::net::TcpListener;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use axum::{Json, Router, routing};
use clap::Parser;
use common::api::{MARK, Mark, PutEntry, PutResult};
use common::clock::MapClock;
use common::door::Door;
use common::entry::{Entry, Outcome};
use common::serve::Timeouts;
use facade::pool::Pool;
use facade::served_map::ServedMap;
use facade::{App, Config};
use logging::map::{Access, Location, Options, open};
use rand::SeedableRng;
use rand::rngs::StdRng;
use reqwest::{Client, RequestBuilder, Response};
use serde::Deserialize;
use serde_json::{Value, json};
use testing::engine::{EmptyMap, Engine, wait_until_ready};
use testing::process::{Process, free_address};
use tokio_util::sync::{CancellationToken, DropGuard};
use uuid::Uuid;

use crate::description::{assert_described, check_status};

/// Seed of the random choice of instances, so that a failing run can be repeated.
const SEED: u64 = 8086;

/// The defaults, but with a body timeout that a test can wait for.
const LIMITS: Timeouts = Timeouts {
    head: Duration::from_secs(30),
    idle: Duration::from_secs(75),
    body: Duration::from_secs(3),
    read: Duration::from_secs(30),
};

/// The store timeout of instances in this process: long, as a busy machine is slow.
const STORE_TIMEOUT: Duration = Duration::from_secs(30);

/// The engine that `TEST_ENGINE` names.
pub(crate) fn engine_under_test() -> Engine {
    match std::env::var("TEST_ENGINE").as_deref() {
        Err(_) | Ok("lmdb") => Engine::Lmdb,
        Ok("redis") => Engine::RedisServer,
        Ok("cluster") => Engine::RedisCluster,
        Ok(other) => panic!("TEST_ENGINE is {other}: write lmdb, redis or cluster"),
    }
}

/// A running system and a client for it.
pub(crate) struct System {
    pub(crate) http: Client,
    /// The facade's address, as a URL without a path.
    pub(crate) url: String,
    /// `HOST:PORT` of each logging instance.
    pub(crate) logging: Vec<String>,
    /// Cancelling it makes the facade stop.
    pub(crate) stop: CancellationToken,
    _servers: Vec<DropGuard>,
    _map: Option<EmptyMap>,
}

/// A body of `GET /` in JSON.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Merged {
    pub(crate) logging_service: Vec<Entry>,
    pub(crate) messages_service: Option<String>,
    pub(crate) messages_service_error: Option<String>,
    pub(crate) count: u64,
    pub(crate) scanned: Option<u64>,
    pub(crate) next: Option<Uuid>,
}

impl System {
    /// A system on an empty map.
    pub(crate) async fn start() -> Self {
        Self::start_with(&[]).await
    }

    /// The same, with further flags for the facade.
    pub(crate) async fn start_with(flags: &[&str]) -> Self {
        let (logging, map) = instances(3).await;
        let messages = serve(messages::router(CancellationToken::new()));
        Self::with_services(logging, messages, Some(map), flags)
    }

    /// A facade in front of instances, some of which may be stubs of the test.
    pub(crate) fn with_instances(logging: Vec<Server>, map: EmptyMap, flags: &[&str]) -> Self {
        Self::with_services(logging, nobody(), Some(map), flags)
    }

    /// A facade in front of stubs of the test.
    pub(crate) fn with_stubs(logging: Vec<Server>, messages: Server, flags: &[&str]) -> Self {
        Self::with_services(logging, messages, None, flags)
    }

    /// A facade in this process, with a fixed seed, in front of services that are processes.
    pub(crate) fn in_front_of(logging: &[Process], messages: &Process) -> Self {
        let elsewhere = |process: &Process| at(process.address.to_string());
        let logging = logging.iter().map(elsewhere).collect();
        Self::with_stubs(logging, elsewhere(messages), &[])
    }

    fn with_services(
        logging: Vec<Server>,
        messages: Server,
        map: Option<EmptyMap>,
        flags: &[&str],
    ) -> Self {
        let urls: Vec<String> = logging.iter().map(Server::url).collect();
        let required = [
            "facade",
            "--logging",
            &urls.join(","),
            "--messages",
            &messages.url(),
        ];
        let config = Config::parse_from(required.iter().chain(flags));
        let stop = CancellationToken::new();
        let served_map = ServedMap::default();
        let pool = Arc::new(Pool::new(StdRng::seed_from_u64(SEED), served_map));
        let app = App::discovering(&config, LIMITS, pool, stop.clone()).unwrap();
        let router = facade::router(app).layer(axum::middleware::from_fn(check_status));
        let facade = serve(router);
        Self {
            http: Client::new(),
            url: facade.url(),
            logging: logging
                .iter()
                .map(|server| server.address.clone())
                .collect(),
            stop,
            _servers: logging
                .into_iter()
                .chain([messages, facade])
                .map(|server| server.stop)
                .collect(),
            _map: map,
        }
    }

    /// A POST to `/`.
    pub(crate) fn post(&self) -> RequestBuilder {
        self.http.post(&self.url)
    }

    /// Posts a text and returns its UUID.
    pub(crate) async fn store(&self, msg: &str) -> Uuid {
        let response = self.post().body(msg.to_owned()).send().await.unwrap();
        assert_eq!(response.status(), 200);
        response.json::<Entry>().await.unwrap().uuid
    }

    /// A GET of this path and query.
    pub(crate) async fn get(&self, path: &str) -> Response {
        let url = format!("{}{path}", self.url);
        self.http.get(url).send().await.unwrap()
    }

    /// The merged body for this query.
    pub(crate) async fn read(&self, query: &str) -> Merged {
        let response = self.get(&format!("/{query}")).await;
        assert_eq!(response.status(), 200);
        let merged: Value = response.json().await.unwrap();
        assert_described(&merged, "Messages");
        let merged: Merged = serde_json::from_value(merged).unwrap();
        assert_eq!(merged.count, merged.logging_service.len() as u64);
        merged
    }

    /// All messages, in order.
    pub(crate) async fn messages(&self) -> Vec<String> {
        let entries = self.read("").await.logging_service;
        entries.into_iter().map(|entry| entry.msg).collect()
    }
}

/// A server of this process; it ends when dropped.
pub(crate) struct Server {
    pub(crate) address: String,
    stop: DropGuard,
}

impl Server {
    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }
}

/// Logging instances on an empty map.
pub(crate) async fn instances(count: usize) -> (Vec<Server>, EmptyMap) {
    instances_with_settle(count, Duration::from_secs(10)).await
}

/// The same, with a settle window of the test's own.
pub(crate) async fn instances_with_settle(
    count: usize,
    settle: Duration,
) -> (Vec<Server>, EmptyMap) {
    let empty = engine_under_test().empty_map();
    let options = Options {
        store_timeout: STORE_TIMEOUT,
        settle: Some(settle),
        backups: None,
        access: Access::Serve,
    };
    let location: Location = empty.location.parse().unwrap();
    let map = open(&location, options).unwrap();
    wait_until_ready(&*map).await;
    let servers = (0..count).map(|_| {
        let app = logging::App::new(
            map.clone(),
            Door::default(),
            LIMITS,
            STORE_TIMEOUT,
            CancellationToken::new(),
        );
        serve(logging::router(app))
    });
    (servers.collect(), empty)
}

/// Serves a router on a free port.
pub(crate) fn serve(router: Router) -> Server {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let stop = CancellationToken::new();
    let serving = common::serve::serve(
        listener,
        None,
        router,
        LIMITS.into(),
        stop.clone(),
        Duration::ZERO,
    );
    tokio::spawn(serving);
    Server {
        address,
        stop: stop.drop_guard(),
    }
}

/// A map whose clock begins at this machine's time and goes by tokio's, which a test may pause.
pub(crate) fn served_map_on_tokios_clock() -> ServedMap {
    let began = tokio::time::Instant::now();
    let clock = MapClock::with_ticks(move || began.elapsed());
    clock.set(SystemTime::now());
    ServedMap::with_clock(clock)
}

/// A logging service that returns an outcome of the test for each entry.
pub(crate) fn logging_stub(
    answer: impl Fn(&PutEntry) -> Outcome + Clone + Send + Sync + 'static,
) -> Server {
    let put = async move |Json(entries): Json<Vec<PutEntry>>| {
        let results = entries.iter().map(|entry| PutResult {
            uuid: entry.uuid,
            outcome: answer(entry),
        });
        Json(results.collect::<Vec<_>>())
    };
    serve_instance(Router::new().route("/", routing::post(put)))
}

/// Serves a stub as a logging instance: each response bears the mark.
pub(crate) fn serve_instance(router: Router) -> Server {
    let mark = async |mut response: axum::response::Response| {
        let mark = Mark {
            map: None,
            clock: Some(SystemTime::now()),
        };
        let mark = mark.to_string().parse().unwrap();
        response.headers_mut().insert(MARK, mark);
        response
    };
    serve(router.layer(axum::middleware::map_response(mark)))
}

/// A logging instance with these statistics, whose numbers are all `number`.
pub(crate) fn with_stats(number: u64, not_ready: Option<&str>, members: Value) -> Server {
    serve_stats(stats_of(number, not_ready, members))
}

pub(crate) fn stats_of(number: u64, not_ready: Option<&str>, members: Value) -> Value {
    let outcomes = json!({
        "stored": number, "duplicate": number, "conflict": number, "stale": number,
        "refused": number, "unknown": number,
    });
    json!({
        "at": "", "since": "", "version": "", "received": number, "received_lately": number,
        "outcomes": outcomes, "in_flight": number, "put_p50_ms": 1.0, "put_p99_ms": null,
        "health": {"not_ready": not_ready, "checks": []},
        "map": {"engine": "lmdb", "layout": 1, "members": members},
    })
}

/// A logging instance that tells these statistics.
pub(crate) fn serve_stats(stats: Value) -> Server {
    let show = async move || Json(stats.clone());
    serve_instance(Router::new().route("/stats", routing::get(show)))
}

/// An instance that answers trials and hangs on batches with entries.
pub(crate) fn hanging() -> Server {
    let answer = async |batch: String| {
        if batch != "[]" {
            std::future::pending::<()>().await;
        }
        batch
    };
    serve_instance(Router::new().route("/", routing::post(answer)))
}

/// A free address, on which no server listens.
pub(crate) fn nobody() -> Server {
    at(free_address().to_string())
}

/// A server that runs elsewhere.
pub(crate) fn at(address: String) -> Server {
    Server {
        address,
        stop: CancellationToken::new().drop_guard(),
    }
}

/// Asserts that a response is a problem of this status with a detail, and returns its body.
#[track_caller]
pub(crate) fn problem(response: Response, status: u16) -> impl Future<Output = serde_json::Value> {
    assert_eq!(response.status(), status);
    assert_eq!(
        response.headers()["content-type"],
        "application/problem+json"
    );
    async move {
        let problem: serde_json::Value = response.json().await.unwrap();
        assert_eq!(problem["status"], status);
        assert!(problem["detail"].as_str().unwrap().len() > 10, "{problem}");
        assert_described(&problem, "Problem");
        problem
    }
}
