//! Logging instances that answer wrongly, proxies and other servers at their addresses, and bursts of
//! messages behind instances that hang.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use axum::body::Body;
use axum::extract::Request;
use axum::http::{HeaderValue, Method, StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::{get, post};
use axum::{Json, Router};
use common::api::{MARK, PutEntry, PutResult, WIRE_VERSIONS};
use common::entry::Outcome;
use futures_util::future::join_all;
use futures_util::{StreamExt, stream};
use serde_json::{Value, json};
use testing::load::Record;
use testing::process::{Process, free_address};
use testing::redis_servers::RedisCluster;
use tokio::net::TcpListener;
use uuid::Uuid;

use crate::bounds::peak_memory_kib;
use crate::follow::follower::Follower;
use crate::load;
use crate::processes::{Processes, binary, start_logging};
use crate::system::{
    Merged, Server, System, at, instances, logging_stub, nobody, problem, serve, serve_instance,
    with_stats,
};

/// One of three instances is paused while there is no load, so the facade has not marked it down. The
/// messages of a burst that it was given go to the others.
#[tokio::test(flavor = "multi_thread")]
async fn upload_behind_a_paused_instance_is_stored_whole() {
    const LINES: usize = 6000;
    let system = with_a_paused_instance().await;
    let lines: String = (0..LINES).map(|n| format!("\"line {n}\"\n")).collect();
    let upload = system.http.post(system.facade.url()).body(lines);
    let upload = upload.header(header::CONTENT_TYPE, "application/x-ndjson");
    let summary: Value = upload.send().await.unwrap().json().await.unwrap();
    assert_eq!(
        (&summary["stored"], &summary["failed"]),
        (&json!(LINES), &json!(0)),
        "{summary}"
    );
    assert_eq!(system.read_all().await.len(), LINES);
}

#[tokio::test(flavor = "multi_thread")]
async fn posts_behind_a_paused_instance_are_all_stored() {
    const POSTS: usize = 1500;
    /// Together with the facade's side of each, fewer than the 1,024 files that an ordinary user may open.
    const CONNECTIONS: usize = 400;
    let system = with_a_paused_instance().await;
    let posts = (0..POSTS).map(|n| {
        let request = system.http.post(system.facade.url()).body(n.to_string());
        async { request.send().await.unwrap().status() }
    });
    let statuses: Vec<StatusCode> = stream::iter(posts)
        .buffer_unordered(CONNECTIONS)
        .collect::<Vec<_>>()
        .await;
    let failed = statuses.iter().filter(|status| **status != 200).count();
    assert_eq!(failed, 0, "of {POSTS}");
    assert_eq!(system.read_all().await.len(), POSTS);
}

async fn with_a_paused_instance() -> Processes {
    let system = Processes::start();
    // Its writer is idle; paused inside a transaction it would block the others.
    let paused = &system.logging[1];
    let ready = system.http.get(format!("{}/readyz", paused.url())).send();
    assert_eq!(ready.await.unwrap().status(), 200);
    paused.signal("STOP");
    system
}

/// Beside two healthy instances: one whose POSTs hang while `/livez` answers, one that accepts connections
/// and closes them, and ones that answer 500 and 404.
#[tokio::test(flavor = "multi_thread")]
async fn no_post_fails_because_of_a_broken_instance_that_answers() {
    const POSTS: usize = 600;
    let sick = [
        ("hangs", hanging_but_live()),
        ("closes", closing().await),
        ("500", answering(StatusCode::INTERNAL_SERVER_ERROR)),
        ("404", answering(StatusCode::NOT_FOUND)),
    ];
    for (how, sick) in sick {
        let (mut logging, map) = instances(2).await;
        let address = sick.address.clone();
        logging.push(sick);
        let system = System::with_instances(logging, map, &[]);
        let posts = stream::iter(0..POSTS).map(async |n| {
            let response = system.post().body(n.to_string()).send().await.unwrap();
            assert_eq!(response.status(), 200, "{how}: {:?}", response.text().await);
            assert_ne!(response.headers()["x-logging-instance"], address, "{how}");
        });
        let answered = posts.buffer_unordered(8).count().await;
        assert_eq!(answered, POSTS);
        assert_eq!(system.read("").await.count, POSTS as u64, "{how}");
    }
}

/// An instance whose results name other entries, or come in another order, has stored nothing.
#[tokio::test(flavor = "multi_thread")]
async fn results_of_other_entries_fail_the_batch() {
    let (mut logging, map) = instances(1).await;
    let stores_nothing = async |Json(entries): Json<Vec<PutEntry>>| {
        let results = entries.iter().map(|entry| PutResult {
            uuid: Uuid::from_u128(entry.uuid.as_u128() + 1),
            outcome: Outcome::Stored,
        });
        Json(results.collect::<Vec<_>>())
    };
    logging.push(serve_instance(
        Router::new().route("/", post(stores_nothing)),
    ));
    let address = logging[1].address.clone();
    let system = System::with_instances(logging, map, &[]);
    for n in 0..40 {
        let response = system.post().body(n.to_string()).send().await.unwrap();
        assert_ne!(response.headers()["x-logging-instance"], address);
        assert_eq!(system.read("").await.count, n + 1);
    }
}

fn hanging_but_live() -> Server {
    serve(
        Router::new()
            .route("/", post(std::future::pending::<()>))
            .route("/livez", get(async || "alive\n")),
    )
}

fn answering(status: StatusCode) -> Server {
    serve(
        Router::new()
            .route("/livez", get(async || "alive\n"))
            .fallback(async move || status),
    )
}

/// Accepts connections and closes them.
async fn closing() -> Server {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    tokio::spawn(async move {
        loop {
            drop(listener.accept().await.unwrap());
        }
    });
    at(address)
}

/// An instance is readmitted when it answers a batch, not when `/livez` answers.
#[tokio::test(flavor = "multi_thread")]
async fn instance_is_readmitted_when_it_stores_again() {
    let is_sick = Arc::new(AtomicBool::new(true));
    let (trials, sick) = (Arc::new(AtomicUsize::new(0)), is_sick.clone());
    let count = trials.clone();
    let (logging, map) = instances(2).await;
    let inner = logging[0].url();
    let moody = proxy(inner, move || {
        count.fetch_add(1, Ordering::Relaxed);
        sick.load(Ordering::Relaxed)
            .then_some(StatusCode::BAD_GATEWAY)
    });
    let address = moody.address.clone();
    let [_behind_proxy, well] = <[Server; 2]>::try_from(logging).ok().unwrap();
    let system = System::with_instances(vec![moody, well], map, &[]);
    let is_from_moody = async || {
        let response = system.post().body("a").send().await.unwrap();
        assert_eq!(response.status(), 200);
        response.headers()["x-logging-instance"] == *address
    };
    for _ in 0..20 {
        assert!(!is_from_moody().await);
    }
    let tried = trials.load(Ordering::Relaxed);
    let trying = async {
        while trials.load(Ordering::Relaxed) < tried + 2 {
            tokio::task::yield_now().await;
        }
    };
    let waited = tokio::time::timeout(Duration::from_secs(30), trying).await;
    waited.expect("the instance that is down gets trials");
    is_sick.store(false, Ordering::Relaxed);
    let waiting = async { while !is_from_moody().await {} };
    let waited = tokio::time::timeout(Duration::from_secs(30), waiting).await;
    waited.expect("the readmitted instance gets messages");
}

/// Forwards requests to the instance at `url`; where `spoil` returns a status, it answers with that instead
/// of the instance's response, as a proxy does after its timeout.
fn proxy(
    url: String,
    spoil: impl Fn() -> Option<StatusCode> + Clone + Send + Sync + 'static,
) -> Server {
    let http = reqwest::Client::new();
    let forward = async move |request: Request| {
        let (parts, body) = request.into_parts();
        let path = parts.uri.path_and_query().map_or("/", |path| path.as_str());
        let body = reqwest::Body::wrap_stream(body.into_data_stream());
        let forwarded = http.request(parts.method, format!("{url}{path}"));
        let forwarded = forwarded.headers(parts.headers).body(body).send();
        let answer = forwarded.await.unwrap();
        if let Some(status) = spoil() {
            return status.into_response();
        }
        let (status, headers) = (answer.status(), answer.headers().clone());
        (status, headers, Body::from_stream(answer.bytes_stream())).into_response()
    };
    serve(Router::new().fallback(forward))
}

/// A proxy forwards a batch to an instance and then answers 503 itself: the message may be stored, so it
/// keeps its UUID.
#[tokio::test(flavor = "multi_thread")]
async fn message_is_stored_once_when_a_proxy_answers_503() {
    for status in [
        StatusCode::SERVICE_UNAVAILABLE,
        StatusCode::TOO_MANY_REQUESTS,
        StatusCode::NOT_FOUND,
        StatusCode::OK,
    ] {
        let (logging, map) = instances(1).await;
        let is_first = AtomicBool::new(true);
        let is_first = Arc::new(is_first);
        let spoil = move || is_first.swap(false, Ordering::Relaxed).then_some(status);
        let proxy = proxy(logging[0].url(), spoil);
        let system = System::with_instances(vec![proxy], map, &[]);
        system.store("once").await;
        assert_eq!(system.messages().await, ["once"], "{status}");
        drop(logging);
    }
}

/// An instance dies after the last entry that a GET asked for and before the end line: the next instance
/// tells whether there are more entries.
#[tokio::test(flavor = "multi_thread")]
async fn limited_get_that_lost_only_its_end_line_keeps_its_cursor() {
    let (logging, map) = instances(1).await;
    let url = logging[0].url();
    let cuts = Arc::new(AtomicUsize::new(0));
    let count = cuts.clone();
    let forward = async move |request: Request| {
        let (parts, body) = request.into_parts();
        let path = parts.uri.path_and_query().map_or("/", |path| path.as_str());
        let http = reqwest::Client::new();
        let body = reqwest::Body::wrap_stream(body.into_data_stream());
        let forwarded = http.request(parts.method.clone(), format!("{url}{path}"));
        let answer = forwarded
            .headers(parts.headers)
            .body(body)
            .send()
            .await
            .unwrap();
        let mut headers = answer.headers().clone();
        let text = answer.text().await.unwrap();
        let entries = text.matches("{\"uuid\"").count();
        if parts.method != Method::GET || entries == 0 {
            return (headers, text).into_response();
        }
        count.fetch_add(1, Ordering::Relaxed);
        headers.remove(header::CONTENT_LENGTH);
        headers.remove(header::TRANSFER_ENCODING);
        let lines = text[..text.trim_end().rfind('\n').unwrap() + 1].to_owned();
        let cut = stream::iter([Ok(lines), Err("cut")]).then(async |piece| {
            tokio::task::yield_now().await;
            piece
        });
        (headers, Body::from_stream(cut)).into_response()
    };
    let cutting = serve(Router::new().fallback(forward));
    let system = System::with_instances(vec![cutting], map, &[]);
    let mut uuids = Vec::new();
    for n in 0..3 {
        uuids.push(system.store(&n.to_string()).await);
    }
    for (query, next) in [
        ("?limit=2", Some(uuids[1])),
        ("?limit=3", None),
        ("?limit=2&order=desc", Some(uuids[1])),
        ("?limit=3&order=desc", None),
    ] {
        assert_eq!(system.read(query).await.next, next, "{query}");
    }
    assert_eq!(cuts.load(Ordering::Relaxed), 4);
    drop(logging);
}

/// Another server listens on the address of the second instance.
#[tokio::test(flavor = "multi_thread")]
async fn another_server_cannot_claim_that_a_message_is_not_there() {
    for status in [StatusCode::NOT_FOUND, StatusCode::OK] {
        let (mut logging, map) = instances(1).await;
        logging.push(answering(status));
        let system = System::with_instances(logging, map, &[]);
        let uuid = system.store("here").await;
        for _ in 0..40 {
            assert_eq!(system.get(&format!("/{uuid}")).await.status(), 200);
        }
        problem(system.get(&format!("/{}", Uuid::now_v7())).await, 404).await;
    }
}

/// During an upgrade an instance of another version runs beside one of this version: the facade recognizes
/// it by its mark, sends it no message, and `/readyz` names both versions.
#[tokio::test(flavor = "multi_thread")]
async fn instance_of_another_version_gets_no_messages_and_is_reported() {
    for version in [WIRE_VERSIONS.start() - 1, WIRE_VERSIONS.end() + 1] {
        let (mut logging, map) = instances(1).await;
        let posts = Arc::new(AtomicUsize::new(0));
        let count = posts.clone();
        let mark = HeaderValue::try_from(format!("{version}-{version} - -")).unwrap();
        let other = async move |request: Request| {
            let entries = axum::body::to_bytes(request.into_body(), usize::MAX)
                .await
                .unwrap();
            if entries.len() > "[]".len() {
                count.fetch_add(1, Ordering::Relaxed);
            }
            ([(MARK, mark)], "[]")
        };
        logging.push(serve(Router::new().fallback(other)));
        let name = logging[1].address.clone();
        let system = System::with_instances(logging, map, &[]);
        for n in 0..50 {
            system.store(&n.to_string()).await;
            assert_eq!(system.read("").await.count, n + 1);
        }
        assert_eq!(
            posts.load(Ordering::Relaxed),
            0,
            "messages sent to version {version}"
        );
        let readiness = system.get("/readyz?verbose").await.text().await.unwrap();
        let reason = format!("versions {version}-{version} of the wire, this process speaks");
        assert!(
            readiness.contains(&name) && readiness.contains(&reason),
            "{readiness}"
        );
    }
}

/// The facade asks further instances before the first one has timed out.
#[tokio::test(flavor = "multi_thread")]
async fn no_post_fails_when_nine_of_ten_instances_hang() {
    let (mut logging, map) = instances(1).await;
    logging.extend((0..9).map(|_| hanging_but_live()));
    let system = System::with_instances(logging, map, &[]);
    let posts = stream::iter(0..20).map(async |n| system.store(&n.to_string()).await);
    let stored = posts.buffer_unordered(20).count().await;
    assert_eq!(system.read("").await.count, stored as u64);
}

/// The first try may be executed when the key's time comes, so the answer must not be `"stored":"no"`.
#[tokio::test]
async fn key_in_the_future_stays_unknown_after_an_unknown_try() {
    let outcomes = [Outcome::unknown("lost"), Outcome::Early];
    let system = System::with_stubs(vec![script(&outcomes)], nobody(), &[]);
    let answer = problem(post_with_key(&system).await, 503).await;
    assert_eq!(answer["stored"], "unknown");
    let system = System::with_stubs(vec![script(&outcomes[1..])], nobody(), &[]);
    problem(post_with_key(&system).await, 409).await;
}

/// `duplicate` tells a caller of its own retries, not of those of the facade.
#[tokio::test]
async fn first_post_with_a_key_is_no_duplicate() {
    let outcomes = [Outcome::unknown("lost"), Outcome::Duplicate];
    let system = System::with_stubs(vec![script(&outcomes)], nobody(), &[]);
    let answer: Value = post_with_key(&system).await.json().await.unwrap();
    assert_eq!(answer.get("duplicate"), None, "{answer}");
    let system = System::with_stubs(vec![script(&outcomes[1..])], nobody(), &[]);
    let answer: Value = post_with_key(&system).await.json().await.unwrap();
    assert_eq!(answer["duplicate"], true, "{answer}");
}

/// An instance that returns these outcomes, one for each entry.
fn script(outcomes: &[Outcome]) -> Server {
    let outcomes = outcomes.to_vec();
    let next = Arc::new(AtomicUsize::new(0));
    logging_stub(move |_| outcomes[next.fetch_add(1, Ordering::Relaxed)].clone())
}

async fn post_with_key(system: &System) -> reqwest::Response {
    let key = Uuid::now_v7().to_string();
    let request = system.post().header("idempotency-key", key).body("a");
    request.send().await.unwrap()
}

/// The facade is ready when one instance can store now; instances that are only alive are not enough. The
/// first one that is ready decides, however long others hang.
#[tokio::test]
async fn facade_is_ready_when_one_instance_can_store() {
    let unready = || with_stats(0, Some("the disk is full"), json!([]));
    let system = System::with_stubs(vec![unready(), unready()], nobody(), &[]);
    problem(system.get("/readyz").await, 503).await;
    problem(system.get("/readyz?verbose").await, 503).await;

    let hanging = serve(Router::new().fallback(std::future::pending::<()>));
    let ready = with_stats(0, None, json!([]));
    let flags = ["--try-timeout", "1h"];
    let logging = vec![unready(), hanging, ready];
    let system = System::with_stubs(logging, nobody(), &flags);
    assert_eq!(system.get("/readyz").await.status(), 200);
}

/// A GET that begins while the only instance hangs waits for it, as it waits for a failover.
#[tokio::test]
async fn get_waits_for_an_instance_that_hangs() {
    let line = r#"{"uuid":"01890000-0000-7000-8000-000000000001","msg":"a"}"#;
    let hangs = Arc::new(AtomicUsize::new(3));
    let page = async move || {
        let left = hangs.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
            left.checked_sub(1)
        });
        if left.is_ok() {
            std::future::pending::<()>().await;
        }
        format!("{line}\n{{\"count\":1}}\n")
    };
    let logging = serve_instance(Router::new().route("/", get(page)));
    let flags = ["--try-timeout", "50ms"];
    let system = System::with_stubs(vec![logging], nobody(), &flags);
    assert_eq!(system.read("").await.count, 1);
}

/// One of two instances sends its answers to GETs a byte at a time, from the beginning or after the first line.
/// The other one takes over, for followers too.
#[tokio::test(flavor = "multi_thread")]
async fn instance_that_dribbles_is_given_up() {
    const GETS: usize = 8;
    let (logging, map) = instances(2).await;
    let [behind, well] = <[Server; 2]>::try_from(logging).ok().unwrap();
    let dribbled = Arc::new(AtomicUsize::new(0));
    let dribbling = dribble(behind.url(), dribbled.clone());
    let system = System::with_instances(vec![dribbling, well], map, &[]);
    let mut uuids = Vec::new();
    for n in 0..3 {
        uuids.push(system.store(&format!("{n} {}", "x".repeat(1000))).await);
    }
    let mut follower = Follower::start(&system.http, &system.url, None).await;
    let reads = (0..GETS).map(|_| system.read(""));
    for read in join_all(reads).await {
        assert_eq!(read.count, 3);
    }
    let path = format!("/{}", uuids[0]);
    for answer in join_all((0..GETS).map(|_| system.get(&path))).await {
        assert_eq!(answer.status(), 200);
    }
    let before = dribbled.load(Ordering::Relaxed);
    assert!(before >= 2, "{before} answers were dribbled");
    uuids.push(system.store("new").await);
    let mut followed = Vec::new();
    while followed.len() < uuids.len() {
        followed.push(follower.next().await.uuid);
    }
    assert_eq!(followed, uuids);
    drop(behind);
}

/// Forwards requests to the instance at `url`, and its answers to GETs at 20 bytes a second.
fn dribble(url: String, dribbled: Arc<AtomicUsize>) -> Server {
    let http = reqwest::Client::new();
    let forward = async move |request: Request| {
        let (parts, body) = request.into_parts();
        let path = parts.uri.path_and_query().map_or("/", |path| path.as_str());
        let body = reqwest::Body::wrap_stream(body.into_data_stream());
        let forwarded = http.request(parts.method.clone(), format!("{url}{path}"));
        let forwarded = forwarded.headers(parts.headers).body(body).send();
        let answer = forwarded.await.unwrap();
        let mut headers = answer.headers().clone();
        headers.remove(header::CONTENT_LENGTH);
        headers.remove(header::TRANSFER_ENCODING);
        let answer = answer.bytes().await.unwrap();
        if parts.method != Method::GET {
            return (headers, answer).into_response();
        }
        let number = dribbled.fetch_add(1, Ordering::Relaxed);
        let first_line = answer.iter().position(|byte| *byte == b'\n').unwrap();
        let at_once = if number.is_multiple_of(2) {
            0
        } else {
            first_line + 1
        };
        let crumbs = (at_once..answer.len()).map(|at| (at, at + 1));
        let pieces = stream::iter(std::iter::once((0, at_once)).chain(crumbs));
        let pieces = pieces.then(move |(from, to)| {
            let piece = answer.slice(from..to);
            async move {
                if to == from + 1 {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
                Ok::<_, std::io::Error>(piece)
            }
        });
        (headers, Body::from_stream(pieces)).into_response()
    };
    serve(Router::new().fallback(forward))
}

/// The folder of running instances is deleted, and one of them restarts on a new map: GETs keep reading the
/// map that the facade began with, and `/readyz` names the problem.
#[tokio::test(flavor = "multi_thread")]
async fn facade_serves_the_map_that_it_began_with() {
    let folder = tempfile::tempdir().unwrap();
    let map = folder.path().join("map");
    let location = format!("lmdb:{}", map.display());
    let mut system = Processes::on_map(&["--map", &location], &["--deadline", "500ms"]);
    for n in 0..20 {
        assert_eq!(system.post(&n.to_string()).await.status(), 200);
    }
    std::fs::remove_dir_all(&map).unwrap();
    system.logging[1].kill();
    system.restart_logging(1);
    for _ in 0..20 {
        assert_eq!(system.read_all().await.len(), 20);
    }
    let is_told = |text: &str| text.contains("this facade serves the map");
    system.facade.wait_for_readiness(is_told);
    // The folder of the others is deleted, so no message may be stored in it, nor in the other map.
    problem(system.post("lost").await, 503).await;
    assert_eq!(system.read_all().await.len(), 20);
}

/// A facade that begins in front of two maps serves neither and reports this; when one of them is gone, it
/// serves the other.
#[tokio::test(flavor = "multi_thread")]
async fn facade_that_begins_with_two_maps_serves_neither() {
    let folder = tempfile::tempdir().unwrap();
    let start = |name: &str| {
        let map = format!("lmdb:{}", folder.path().join(name).display());
        start_logging(&["--map", &map], free_address())
    };
    let (first, mut second) = (start("first"), start("second"));
    let mut command = std::process::Command::new(binary("facade"));
    let logging = format!("{},{}", first.url(), second.url());
    command.args(["--logging", &logging, "--deadline", "2s"]);
    let facade = Process::start(command, free_address());
    let http = reqwest::Client::new();
    let get = async |path: &str| {
        let url = format!("{}{path}", facade.url());
        http.get(url).send().await.unwrap()
    };
    for path in ["/", "/readyz"] {
        let refused = problem(get(path).await, 503).await;
        assert!(refused.to_string().contains("serves none"), "{refused}");
    }
    let post = async || {
        let request = http.post(facade.url()).body("a");
        request.send().await.unwrap()
    };
    let refused = problem(post().await, 503).await;
    assert!(refused.to_string().contains("serves none"), "{refused}");
    second.kill();
    facade.wait_for_line(|line| line.contains("is up again"));
    assert_eq!(post().await.status(), 200);
}

/// The second map's id is in a shard that is away, so its instance does not know which map it serves: it gets
/// no message.
#[tokio::test(flavor = "multi_thread")]
async fn instance_that_does_not_know_its_map_gets_no_messages() {
    let folder = tempfile::tempdir().unwrap();
    let first = format!("lmdb:{}", folder.path().join("first").display());
    let first = start_logging(&["--map", &first], free_address());
    let cluster = RedisCluster::start();
    let mut second = start_logging(&["--map", &cluster.url()], free_address());
    second.kill();
    // The slot of partition 0 is theirs.
    for node in [2, 5] {
        cluster.nodes[node].signal("STOP");
    }
    let mut command = std::process::Command::new(binary("logging"));
    command.args(["--map", &cluster.url()]);
    let second = Process::start(command, free_address());
    let mut command = std::process::Command::new(binary("facade"));
    let logging = format!("{},{}", first.url(), second.url());
    command.args(["--logging", &logging]);
    let facade = Process::start(command, free_address());
    second.wait_for_line(|line| line.contains("takes entries"));
    let http = reqwest::Client::new();
    let mut record = Record::default();
    for n in 0..60 {
        record.extend(load::post(&http, &facade.url(), n.to_string()).await);
    }
    assert_eq!(record.acknowledged.len(), 60, "{:?}", record.failed);
    let stored = http.get(facade.url()).send().await.unwrap();
    let stored: Merged = stored.json().await.unwrap();
    record.assert_kept(&stored.logging_service);
    for node in [2, 5] {
        cluster.nodes[node].signal("CONT");
    }
}

/// The facade cuts the connection of an instance whose response to a batch does not end.
#[tokio::test(flavor = "multi_thread")]
async fn endless_response_does_not_fill_the_memory() {
    const GROWTH_KIB: u64 = 32 * 1024;
    let flood = async |batch: String| {
        let piece = bytes::Bytes::from(vec![b' '; 1 << 20]);
        let pieces = stream::repeat_with(move || Ok::<_, std::io::Error>(piece.clone()));
        match batch.as_str() {
            "[]" => Body::from(batch),
            _ => Body::from_stream(pieces),
        }
    };
    let flooding = serve_instance(Router::new().route("/", post(flood)));
    let mut command = std::process::Command::new(binary("facade"));
    command.args(["--logging", &flooding.url(), "--deadline", "3s"]);
    let facade = Process::start(command, free_address());
    let before = peak_memory_kib(facade.pid());
    let request = reqwest::Client::new().post(facade.url()).body("a");
    let answer = problem(request.send().await.unwrap(), 503).await;
    assert_eq!(answer["stored"], "unknown");
    let grown = peak_memory_kib(facade.pid()) - before;
    assert!(grown < GROWTH_KIB, "{grown} KiB");
}
