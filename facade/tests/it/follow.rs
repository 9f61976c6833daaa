//! GETs that follow the log: what is delivered, once and without a gap, and what bounds them.

/// While instances and primaries die.
mod failover;
/// A follower that checks each event.
pub(crate) mod follower;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use axum::Router;
use axum::body::Body;
use axum::extract::Query;
use axum::http::Request;
use axum::response::IntoResponse;
use axum::routing::get;
use bytes::Bytes;
use clap::Parser;
use common::api::{Batch, InstanceStats, Poll, PutResult, READ_SETTLED, ReadQuery};
use common::entry::{Entry, unix_millis};
use common::serve::Timeouts;
use facade::client::{LoggingApi, ReadAnswer};
use facade::names::Naming;
use facade::pool::Pool;
use facade::upstream::UpstreamError;
use facade::{App, Config, router};
use futures_util::{StreamExt, stream};
use rand::SeedableRng;
use rand::rngs::StdRng;
use reqwest::Response;
use serde_json::Value;
use testing::process::{LOOK_AGAIN, PATIENCE, Process, free_address};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpSocket;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tower::ServiceExt;
use uuid::{Builder, Uuid};

use self::follower::Follower;
use crate::processes::{Processes, facade};
use crate::stats::wait_for_stats;
use crate::system::{
    System, at, instances_with_settle, nobody, problem, serve_instance, served_map_on_tokios_clock,
};

/// Posts a message under a key of so many milliseconds ago.
async fn store_late(system: &System, millis: u64, msg: &str) -> Uuid {
    let time = unix_millis(Uuid::now_v7()) - millis;
    let key = Builder::from_unix_timestamp_millis(time, &[7; 10]).into_uuid();
    let post = system.post().header("idempotency-key", key.to_string());
    let response = post.body(msg.to_owned()).send().await.unwrap();
    assert_eq!(response.status(), 200);
    key
}

/// A system whose history is settled after a second and a half.
async fn quickly_settled() -> System {
    let (logging, map) = instances_with_settle(3, Duration::from_millis(500)).await;
    System::with_instances(logging, map, &[])
}

/// Waits until an entry is settled.
async fn wait_until_settled(system: &System, uuid: Uuid) {
    let waiting = async {
        loop {
            let url = format!("http://{}/?poll=settle", system.logging[0]);
            let response = system.http.get(url).send().await.unwrap();
            let settled: Uuid = response.headers()[READ_SETTLED]
                .to_str()
                .unwrap()
                .parse()
                .unwrap();
            if settled > uuid {
                return;
            }
            sleep(LOOK_AGAIN).await;
        }
    };
    timeout(PATIENCE, waiting).await.unwrap();
}

#[tokio::test]
async fn history_comes_first_and_then_what_is_new() {
    let system = quickly_settled().await;
    let mut uuids = Vec::new();
    for msg in ["a", "b", "c"] {
        uuids.push(system.store(msg).await);
    }
    wait_until_settled(&system, uuids[2]).await;
    system.store("d").await;
    let mut all = Follower::of(&system, "").await;
    let mut some = Follower::of(&system, &format!("?after={}", uuids[0])).await;
    let mut since = Follower::of(&system, "?since=1h&follow=true&order=asc").await;
    assert_eq!(all.next().await.uuid, uuids[0]);
    assert_eq!(all.id, Some(uuids[0]), "everything up to it was sent");
    assert_eq!(all.messages(3).await, ["b", "c", "d"]);
    assert_eq!(some.messages(3).await, ["b", "c", "d"]);
    assert_eq!(since.messages(4).await, ["a", "b", "c", "d"]);
    for n in 0..20 {
        system.store(&n.to_string()).await;
        for follower in [&mut all, &mut some, &mut since] {
            assert_eq!(follower.next().await.msg, n.to_string());
        }
    }
}

/// An entry that is stored under an older UUID than those that were delivered comes too, and the
/// position that is announced never passes it.
#[tokio::test]
async fn late_arrival_is_delivered_and_not_skipped_by_a_resumption() {
    let system = System::start().await;
    let mut follower = Follower::of(&system, "").await;
    system.store("first").await;
    let first = follower.next().await;
    let position = follower.id;
    let late = store_late(&system, 9_000, "late").await;
    assert!(late < first.uuid);
    assert_eq!(follower.next().await.msg, "late");
    system.store("last").await;
    assert_eq!(follower.next().await.msg, "last");
    let all = BTreeSet::from(["late", "first", "last"].map(str::to_owned));
    let url = format!("{}/?tail=0", system.url);
    for id in [position, follower.id] {
        assert!(id.is_some_and(|id| id < late));
        let mut resumed = Follower::start(&system.http, &url, id).await;
        let messages = resumed.messages(3).await;
        assert_eq!(BTreeSet::from_iter(messages), all);
    }
}

#[tokio::test]
async fn tail_begins_with_the_newest() {
    let system = quickly_settled().await;
    let mut last = Uuid::nil();
    for msg in ["a", "b", "c"] {
        last = system.store(msg).await;
    }
    wait_until_settled(&system, last).await;
    let _window = Follower::of(&system, "?tail=0").await;
    let d = system.store("d").await;
    system.store("e").await;
    let mut followers = Vec::new();
    for (query, expected) in [
        ("?tail=0".to_owned(), ""),
        ("?tail=1".to_owned(), "e"),
        ("?tail=2".to_owned(), "de"),
        ("?tail=3".to_owned(), "cde"),
        ("?tail=5".to_owned(), "abcde"),
        ("?tail=9".to_owned(), "abcde"),
        (format!("?tail=9&after={last}"), "de"),
        (format!("?tail=9&after={d}"), "e"),
    ] {
        let mut follower = Follower::of(&system, &query).await;
        let begin = follower.messages(expected.len()).await.concat();
        assert_eq!(begin, expected, "{query}");
        followers.push(follower);
    }
    system.store("new").await;
    for follower in &mut followers {
        assert_eq!(follower.next().await.msg, "new");
    }
}

/// A tail that begins far below what the window has, and below what an instance sends at once.
#[tokio::test]
async fn tail_begins_many_pieces_below_the_newest() {
    const SETTLED: usize = 5_000;
    let system = quickly_settled().await;
    let message = |n: usize| format!("{n} {}", "x".repeat(100));
    let lines: String = (0..SETTLED)
        .map(|n| format!("\"{}\"\n", message(n)))
        .collect();
    let upload = system.post().body(lines);
    let upload = upload.header("content-type", "application/x-ndjson");
    assert_eq!(upload.send().await.unwrap().status(), 200);
    let last = system.read("?order=desc&limit=1").await.logging_service[0].uuid;
    wait_until_settled(&system, last).await;
    let _window = Follower::of(&system, "?tail=0").await;
    let new = system.store(&message(SETTLED)).await;
    let mut order: Vec<String> = system.messages().await;
    assert_eq!(order.pop(), Some(message(SETTLED)));
    for below in [1, 1_500, SETTLED - 1, SETTLED, SETTLED + 1] {
        let mut follower = Follower::of(&system, &format!("?tail={}", below + 1)).await;
        let expected = &order[SETTLED.saturating_sub(below)..];
        let begin = follower.messages(expected.len()).await;
        assert!(begin == expected, "{below}: {}", begin[0]);
        assert_eq!(follower.next().await.uuid, new, "{below}");
    }
}

/// What is stored after a follower began is new, whatever its UUID.
#[tokio::test]
async fn late_arrival_is_new_for_a_tail() {
    let system = System::start().await;
    system.store("old").await;
    let mut none = Follower::of(&system, "?tail=0").await;
    let mut one = Follower::of(&system, "?tail=1").await;
    store_late(&system, 9_000, "late").await;
    assert_eq!(none.next().await.msg, "late");
    assert_eq!(one.messages(2).await, ["old", "late"]);
}

#[tokio::test]
async fn contradictions_are_refused() {
    let system = System::start().await;
    let uuid = system.store("a").await;
    let get = async |query: &str, accept: &str, id: Option<&str>| {
        let request = system.http.get(format!("{}/{query}", system.url));
        let mut request = request.header("accept", accept);
        if let Some(id) = id {
            request = request.header("last-event-id", id);
        }
        problem(request.send().await.unwrap(), 400).await;
    };
    let events = "text/event-stream";
    for accept in [events, "application/x-ndjson", "text/plain"] {
        get("?follow=true&limit=5", accept, None).await;
        get("?follow=true&limit=0", accept, None).await;
        get(&format!("?follow=true&before={uuid}"), accept, None).await;
        get("?follow=true&until=1h", accept, None).await;
        get("?follow=true&order=desc", accept, None).await;
        get("?follow=true&tail=x", accept, None).await;
        get("?follow=true&tail=-1", accept, None).await;
        get("?follow=true&tail=10001", accept, None).await;
        get("?follow=yes", accept, None).await;
        get("?follow=true", accept, Some("x")).await;
        get("?follow=true", accept, Some("")).await;
    }
    get("?limit=5", events, None).await;
    get("?order=desc", events, None).await;
    get("?follow=true", "application/json", None).await;
    get("?follow=true", "*/*", None).await;
    get("?tail=5", "text/plain", None).await;
    // Neither is about following.
    assert_eq!(system.read("?follow=false").await.count, 1);
    let request = system.http.get(&system.url).header("last-event-id", "x");
    assert_eq!(request.send().await.unwrap().status(), 200);
}

/// `tail -f` for curl: lines as in an ordinary body, and no last line.
#[tokio::test]
async fn lines_can_be_followed() {
    let system = System::start().await;
    let first = system.store("a").await;
    let mut bodies = Vec::new();
    for accept in ["application/x-ndjson", "text/plain"] {
        let request = system.http.get(format!("{}/?follow=true", system.url));
        let response = request.header("accept", accept).send().await.unwrap();
        let content_type = response.headers()["content-type"].to_str().unwrap();
        assert!(content_type.starts_with(accept), "{content_type}");
        bodies.push(response);
    }
    let second = system.store("b\nc").await;
    let ndjson = format!(
        "{{\"uuid\":\"{first}\",\"msg\":\"a\"}}\n{{\"uuid\":\"{second}\",\"msg\":\"b\\nc\"}}\n"
    );
    let text = format!("{first} a\n{second} b\\nc\n");
    for (body, expected) in bodies.iter_mut().zip([&ndjson, &text]) {
        let mut read = String::new();
        while read.len() < expected.len() {
            read += std::str::from_utf8(&piece(body).await).unwrap();
        }
        assert_eq!(read, *expected);
    }
    system.stop.cancel();
    for mut body in bodies {
        assert_eq!(body.chunk().await.unwrap(), None);
    }
}

async fn piece(response: &mut Response) -> Bytes {
    let chunk = timeout(PATIENCE, response.chunk()).await.unwrap();
    chunk.unwrap().expect("the body goes on")
}

#[tokio::test]
async fn followers_are_bounded_and_counted() {
    let flags = ["--max-followers", "2", "--max-reads", "1"];
    let system = System::start_with(&flags).await;
    let first = Follower::of(&system, "").await;
    let _second = Follower::of(&system, "").await;
    wait_for_followers(&system, 2).await;
    let request = |accept| {
        let url = format!("{}/?follow=true", system.url);
        system.http.get(url).header("accept", accept).send()
    };
    let refused = request("application/x-ndjson").await.unwrap();
    assert!(refused.headers().contains_key("retry-after"));
    problem(refused, 503).await;
    // An `EventSource` does not come back after a 503.
    let refused = request("text/event-stream").await.unwrap();
    assert_eq!(refused.status(), 200);
    assert_eq!(refused.text().await.unwrap(), "retry: 5000\n\n");
    assert_eq!(system.read("").await.count, 0, "a GET is no follower");
    drop(first);
    wait_for_followers(&system, 1).await;
    let _third = Follower::of(&system, "").await;
}

/// An `EventSource` gives up after any other status than 200.
#[tokio::test]
async fn event_source_outlives_an_outage_and_lines_are_refused() {
    let (mut logging, map) = instances_with_settle(1, Duration::from_millis(500)).await;
    let working = logging.remove(0);
    let address = working.address.clone();
    let flags = ["--read-deadline", "2s"];
    let system = System::with_stubs(vec![nobody()], nobody(), &flags);
    let request = |accept| {
        let url = format!("{}/?follow=true", system.url);
        system.http.get(url).header("accept", accept).send()
    };
    problem(request("text/plain").await.unwrap(), 503).await;
    let waits = request("text/event-stream").await.unwrap();
    assert_eq!(waits.status(), 200);
    let body = waits.text().await.expect("it ends properly");
    assert!(body.starts_with("retry: 2000\n: waits"), "{body}");
    assert!(!body.contains("data"), "{body}");

    // The first block of a new map has a position.
    let served = System::with_stubs(vec![at(address)], nobody(), &[]);
    for query in ["", "?tail=0"] {
        let url = format!("{}/{query}", served.url);
        let request = served.http.get(url).header("accept", "text/event-stream");
        let mut response = request.send().await.unwrap();
        let mut body = String::new();
        while !body.contains("\n\n") {
            body += std::str::from_utf8(&piece(&mut response).await).unwrap();
        }
        let (block, _) = body.split_once("\n\n").unwrap();
        assert!(block.starts_with("retry: 2000\n"), "{block}");
        assert!(block.contains("\nid: "), "{block}");
    }
    drop((working, map));
}

/// Also of one whose messages are all from before the follower.
#[tokio::test]
async fn first_event_of_a_new_map_has_an_id() {
    let system = System::start().await;
    system.store("first").await;
    for query in ["", "?tail=1"] {
        let mut follower = Follower::of(&system, query).await;
        assert_eq!(follower.next().await.msg, "first");
        assert!(follower.id.is_some(), "{query}");
    }
}

/// A follower that does not take its history lets others read theirs.
#[tokio::test(flavor = "multi_thread")]
async fn slow_followers_keep_no_turn_to_read_history() {
    const TURNS: usize = 64;
    // In bytes more than the largest buffers of a connection on Linux hold.
    const MESSAGES: usize = 6;
    let (logging, map) = instances_with_settle(1, Duration::from_millis(500)).await;
    let flags = ["--max-message", "1MiB", "--read-deadline", "5s"];
    let system = System::with_instances(logging, map, &flags);
    let mut last = Uuid::nil();
    for n in 0..MESSAGES {
        let msg = format!("{n} {}", "größe \"\u{1}\" ".repeat(65_536));
        last = system.store(&msg).await;
    }
    wait_until_settled(&system, last).await;
    let address = system.url.strip_prefix("http://").unwrap();
    let mut slow = Vec::new();
    for _ in 0..TURNS {
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_recv_buffer_size(4096).unwrap();
        let mut stream = socket.connect(address.parse().unwrap()).await.unwrap();
        let request = "GET / HTTP/1.1\r\nhost: localhost\r\naccept: text/event-stream\r\n\r\n";
        stream.write_all(request.as_bytes()).await.unwrap();
        // The head and a part of the history.
        stream.read_exact(&mut [0; 4096]).await.unwrap();
        slow.push(stream);
    }
    let mut quick = Follower::of(&system, "").await;
    let messages = quick.messages(MESSAGES).await;
    for (n, msg) in messages.iter().enumerate() {
        assert!(msg.starts_with(&format!("{n} ")));
        assert!(msg.ends_with("größe \"\u{1}\" "));
    }
}

/// One client's followers leave half of the turns to others, however long they need theirs.
#[tokio::test(flavor = "multi_thread")]
async fn client_has_half_of_the_turns_to_read_history() {
    const TURNS: u64 = 64;
    let begun = Arc::new(AtomicU64::new(0));
    let count = begun.clone();
    let log = async move |Query(query): Query<ReadQuery>| {
        if query.poll.is_some() {
            let settled = "01890000-0000-7000-8000-000000000002";
            return ([(READ_SETTLED, settled)], "{\"count\":0}\n").into_response();
        }
        if query.bounds.after == Some(Uuid::nil()) {
            count.fetch_add(1, Ordering::Relaxed);
            std::future::pending::<()>().await;
        }
        "{\"count\":0}\n".into_response()
    };
    let logging = serve_instance(Router::new().route("/", get(log)));
    let flags = ["--trusted-proxy", "127.0.0.1", "--try-timeout", "1h"];
    let command = facade(&logging.url(), &nobody().url(), &flags);
    let facade = Process::start(command, free_address());
    let http = reqwest::Client::new();
    let follow = |client: &str, after: &str| {
        let query = format!("?follow=true&tail=5&after={after}");
        let request = http.get(format!("{}/{query}", facade.url()));
        let request = request.header("accept", "application/x-ndjson");
        request.header("x-forwarded-for", client).send()
    };
    let mut waiting = JoinSet::new();
    for _ in 0..TURNS {
        waiting.spawn(follow("192.0.2.1", "00000000-0000-0000-0000-000000000000"));
    }
    let stats = format!("{}/stats", facade.url());
    wait_for_stats(&http, &stats, |stats| stats["facade"]["followers"] == TURNS).await;
    while begun.load(Ordering::Relaxed) < TURNS / 2 {
        sleep(LOOK_AGAIN).await;
    }
    let other = follow("192.0.2.2", "01890000-0000-7000-8000-000000000000");
    assert_eq!(other.await.unwrap().status(), 200);
    assert!(waiting.try_join_next().is_none(), "it waited for them");
}

async fn wait_for_followers(system: &System, count: u64) {
    let waiting = async {
        loop {
            let stats: Value = system.get("/stats").await.json().await.unwrap();
            if stats["facade"]["followers"] == count {
                return;
            }
            sleep(LOOK_AGAIN).await;
        }
    };
    let waited = timeout(PATIENCE, waiting).await;
    waited.unwrap_or_else(|_| panic!("there are not {count} followers"));
}

/// A follower that takes nothing is cut when the window has moved on, not when it reads again; others
/// are not delayed by it, and it resumes from its id.
#[tokio::test(flavor = "multi_thread")]
async fn slow_follower_is_cut_and_resumes() {
    // In bytes more than the window and the largest buffers of a connection on Linux hold.
    const MESSAGES: usize = 112;
    let flags = ["--max-message", "1MiB"];
    let system = System::start_with(&flags).await;
    let mut slow = Follower::of(&system, "").await;
    let mut quick = Follower::of(&system, "").await;
    wait_for_followers(&system, 2).await;
    for round in 0..MESSAGES / 8 {
        let mut stored = BTreeSet::new();
        for n in 0..8 {
            let msg = format!("{round} {n} {}", "x".repeat(1_000_000));
            stored.insert(system.store(&msg).await);
        }
        while !stored.is_empty() {
            assert!(stored.remove(&quick.next().await.uuid));
        }
    }
    wait_for_followers(&system, 1).await;
    let mut received = BTreeSet::new();
    let cut = loop {
        match slow.try_next().await {
            Ok(Some(entry)) => assert!(received.insert(entry.uuid), "{} came twice", entry.uuid),
            Ok(None) => panic!("the body ended as if it were complete"),
            Err(error) => break error,
        }
    };
    assert!(received.len() < MESSAGES, "{cut}");
    // More is above the settled position than the window holds, so this one waits until less is.
    let url = format!("{}/", system.url);
    let mut resumed = Follower::start(&system.http, &url, slow.id).await;
    while received.len() < MESSAGES {
        received.insert(resumed.next().await.uuid);
    }
}

/// However long the grace is.
#[tokio::test(flavor = "multi_thread")]
async fn followers_end_when_the_facade_stops() {
    let mut system = Processes::start_with(&["--grace", "1h"]);
    let mut follower = Follower::start(&system.http, &system.facade.url(), None).await;
    system.post("a").await;
    assert_eq!(follower.next().await.msg, "a");
    system.facade.signal("TERM");
    assert_eq!(follower.try_next().await.unwrap(), None);
    let stopped = tokio::task::spawn_blocking(move || system.facade.wait().success());
    assert!(timeout(PATIENCE, stopped).await.unwrap().unwrap());
}

/// On tokio's paused clock: an empty line, or a comment, each 15 s; about twenty polls a second
/// however many follow; and none once nobody does.
#[tokio::test(start_paused = true)]
async fn idle_followers_cost_polls_and_nobody_costs_nothing() {
    let polls = Arc::new(AtomicU64::new(0));
    let pool = Arc::new(Pool::new(
        StdRng::seed_from_u64(1),
        served_map_on_tokios_clock(),
    ));
    let empty = Arc::new(EmptyInstance {
        polls: polls.clone(),
    });
    pool.set_instances(
        "instance",
        &Naming::default(),
        vec![("instance".to_owned(), empty)],
    );
    let config = Config::parse_from(["facade"]);
    let app = App::with_pool(&config, Timeouts::default(), pool, Default::default()).unwrap();
    let facade = router(app);
    let follow = async |query: &str, accept: &str| {
        let request = Request::get(format!("/{query}"))
            .header("host", "localhost")
            .header("accept", accept);
        let request = request.body(Body::empty()).unwrap();
        let response = facade.clone().oneshot(request).await.unwrap();
        assert_eq!(response.status(), 200);
        response.into_body().into_data_stream()
    };
    let mut events = follow("", "text/event-stream").await;
    let mut lines = follow("?follow=true", "text/plain").await;
    let begin = tokio::time::Instant::now();
    let comments = async {
        for seconds in [0, 15, 30] {
            let block = events.next().await.unwrap().unwrap();
            let comment = block.strip_prefix(b"retry: 2000\n").unwrap_or(&block);
            assert_eq!(comment.len() < block.len(), seconds == 0);
            assert!(comment.starts_with(b":") && comment.ends_with(b"\n\n"));
            assert_eq!(begin.elapsed().as_secs(), seconds);
        }
    };
    let empty_lines = async {
        for seconds in [15, 30] {
            assert_eq!(lines.next().await.unwrap().unwrap(), "\n");
            assert_eq!(begin.elapsed().as_secs(), seconds);
        }
    };
    tokio::join!(comments, empty_lines);
    let polled = polls.load(Ordering::Relaxed);
    assert!((500..=660).contains(&polled), "{polled} polls in 30 s");
    drop((events, lines));
    sleep(Duration::from_secs(1)).await;
    let polled = polls.load(Ordering::Relaxed);
    sleep(Duration::from_secs(60)).await;
    assert_eq!(polls.load(Ordering::Relaxed), polled);
    drop(follow("", "text/event-stream").await);
    assert!(polls.load(Ordering::Relaxed) > polled);
}

/// An instance whose map is empty.
#[derive(Debug)]
struct EmptyInstance {
    polls: Arc<AtomicU64>,
}

#[async_trait]
impl LoggingApi for EmptyInstance {
    async fn put(&self, _batch: Batch) -> Result<Vec<PutResult>, UpstreamError> {
        Ok(Vec::new())
    }

    async fn read(
        &self,
        query: ReadQuery,
        _request_id: Option<&str>,
    ) -> Result<ReadAnswer, UpstreamError> {
        self.polls.fetch_add(1, Ordering::Relaxed);
        let settled = Uuid::from_u128(Uuid::now_v7().as_u128() - (11_000 << 80));
        Ok(ReadAnswer {
            end: None,
            settled: (query.poll == Some(Poll::Settle)).then_some(settled),
            chunks: stream::iter([Ok(Bytes::from_static(b"{\"count\":0}\n"))]).boxed(),
        })
    }

    async fn get(&self, _uuid: Uuid) -> Result<Option<Entry>, UpstreamError> {
        unreachable!("nobody reads one entry")
    }

    async fn stats(&self) -> Result<InstanceStats, UpstreamError> {
        unreachable!("nobody asks for statistics")
    }
}
