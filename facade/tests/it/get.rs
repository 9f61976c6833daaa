//! GET: formats, bounds, and single entries.

/// Services that are away or answer wrongly.
mod behind;

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use axum::Router;
use axum::routing::get;
use common::entry::{Entry, unix_millis};
use futures_util::StreamExt;
use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use serde_json::{Value, json};
use tokio::sync::Notify;
use uuid::{Builder, Uuid};

use crate::system::{Server, System, problem, serve, serve_instance};

async fn text(system: &System, path: &str, accept: &str) -> String {
    let url = format!("{}{path}", system.url);
    let request = system.http.get(url).header("accept", accept);
    request.send().await.unwrap().text().await.unwrap()
}

/// A terminal that shows an answer is not steered by a message, and a program reads the message as it was.
#[tokio::test]
async fn no_answer_has_characters_that_act_on_a_terminal() {
    let system = System::start().await;
    let hostile = "a\u{9b}31m \u{202e}b\u{2066}c\u{200f}\u{7f}\u{1b}]0;x\u{7}\u{2028} größer 👍";
    let posted = system.post().body(hostile).send().await.unwrap();
    let mut answers = vec![posted.text().await.unwrap()];
    let posted: Entry = serde_json::from_str(&answers[0]).unwrap();
    assert_eq!(posted.msg, hostile);
    for (path, accept) in [
        ("/", "application/json"),
        ("/", "application/x-ndjson"),
        ("/", "text/plain"),
        (&format!("/{}", posted.uuid), "application/json"),
        (&format!("/?limit={hostile}"), "application/json"),
    ] {
        let request = system.http.get(format!("{}{path}", system.url));
        let answer = request.header("accept", accept).send().await.unwrap();
        answers.push(answer.text().await.unwrap());
    }
    for answer in &answers {
        let acts = |one: &char| *one != '\n' && common::escape::needs_escape(*one);
        assert_eq!(answer.chars().find(acts), None, "{answer:?}");
        assert!(
            answer.contains("größer 👍") || answer.contains("limit"),
            "{answer:?}"
        );
    }
    assert_eq!(system.messages().await, [hostile]);
}

#[tokio::test]
async fn json_has_one_entry_a_line() {
    let system = System::start().await;
    let tail = r#"],"messages_service":"Messages Service not Implemented","count":"#;
    let empty = format!("{{\"logging_service\":[\n{tail}0}}\n");
    assert_eq!(text(&system, "/", "*/*").await, empty);
    let first = system.store("first").await;
    let second = system.store("\"second\"\n").await;
    let expected = format!(
        "{{\"logging_service\":[\n{{\"uuid\":\"{first}\",\"msg\":\"first\"}},\n\
         {{\"uuid\":\"{second}\",\"msg\":\"\\\"second\\\"\\n\"}}\n{tail}2}}\n"
    );
    for accept in [
        "*/*",
        "application/json",
        "application/*",
        "text/html;q=0.8,*/*",
    ] {
        assert_eq!(text(&system, "/", accept).await, expected, "{accept}");
    }
    let response = system.get("/").await;
    assert_eq!(response.headers()["content-type"], "application/json");
    let cut = text(&system, "/?limit=1", "*/*").await;
    assert!(
        cut.ends_with(&format!("{tail}1,\"next\":\"{first}\"}}\n")),
        "{cut}"
    );
}

#[tokio::test]
async fn ndjson_ends_with_the_messages_reply_and_count() {
    let system = System::start().await;
    let uuid = system.store("hello").await;
    let reply = r#""messages_service":"Messages Service not Implemented""#;
    let expected = format!("{{\"uuid\":\"{uuid}\",\"msg\":\"hello\"}}\n{{{reply},\"count\":1}}\n");
    let ndjson = "application/x-ndjson";
    assert_eq!(text(&system, "/", ndjson).await, expected);
    assert_eq!(
        text(&system, "/", "application/json;q=0.5,application/x-ndjson").await,
        expected
    );
    system.store("more").await;
    let cut = text(&system, "/?limit=1", ndjson).await;
    assert!(
        cut.ends_with(&format!("{{{reply},\"count\":1,\"next\":\"{uuid}\"}}\n")),
        "{cut}"
    );
}

#[tokio::test]
async fn text_line_cannot_be_forged() {
    let system = System::start().await;
    let forged = "a\n2 messages\r\u{1b}[2J\u{0}\u{85}\u{2028}\u{202e}\\n é🦀\"";
    let uuid = system.store(forged).await;
    let escaped = "a\\n2 messages\\r\\u{1b}[2J\\u{0}\\u{85}\\u{2028}\\u{202e}\\\\n é🦀\"";
    let expected = format!("{uuid} {escaped}\n1 messages\nMessages Service not Implemented\n");
    for accept in ["text/plain", "text/*", "text/plain; charset=utf-8, *; q=.2"] {
        assert_eq!(text(&system, "/", accept).await, expected);
    }
    system.store("b").await;
    let cut = text(&system, "/?limit=1", "text/plain").await;
    assert!(
        cut.contains(&format!("\n1 messages, next {uuid}\n")),
        "{cut}"
    );
}

#[tokio::test]
async fn unacceptable_formats_are_406() {
    let system = System::start().await;
    for accept in ["image/*", "image/png", "application/json;q=0", "nonsense"] {
        let request = system.http.get(&system.url).header("accept", accept);
        problem(request.send().await.unwrap(), 406).await;
    }
}

#[tokio::test]
async fn bounds_are_exclusive_and_unknown_fields_ignored() {
    let system = System::start().await;
    let mut uuids = Vec::new();
    for n in 0..5 {
        uuids.push(system.store(&n.to_string()).await);
    }
    let msgs = async |query: &str| -> Vec<String> {
        let read = system.read(query).await.logging_service;
        read.into_iter().map(|entry| entry.msg).collect()
    };
    let (second, fourth) = (uuids[1], uuids[3]);
    assert_eq!(msgs("?msg=HELLO").await, ["0", "1", "2", "3", "4"]);
    assert_eq!(msgs(&format!("?after={second}")).await, ["2", "3", "4"]);
    assert_eq!(msgs(&format!("?before={fourth}")).await, ["0", "1", "2"]);
    assert_eq!(
        msgs(&format!("?after={second}&before={fourth}")).await,
        ["2"]
    );
    assert_eq!(msgs("?order=desc&limit=2").await, ["4", "3"]);
    assert_eq!(msgs("?order=asc&limit=2").await, ["0", "1"]);
    assert!(
        msgs(&format!("?after={fourth}&before={second}"))
            .await
            .is_empty()
    );
    let exact = system.read("?limit=5").await;
    assert_eq!((exact.count, exact.next), (5, None));
    let malformed = [
        "after=x",
        "before=",
        "order=up",
        "order=",
        "limit=0",
        "limit=-1",
        "limit=x",
        "limit=",
        "limit=1&limit=2",
        "after=0",
    ];
    for query in malformed {
        problem(system.get(&format!("/?{query}")).await, 400).await;
    }
}

#[tokio::test]
async fn since_is_inclusive_and_until_is_not() {
    let system = System::start().await;
    let now = unix_millis(Uuid::now_v7());
    let times = [now - 6_000, now - 4_000, now - 2_000];
    for (time, msg) in times.iter().zip(["a", "b", "c"]) {
        let key = Builder::from_unix_timestamp_millis(*time, &[0; 10]).into_uuid();
        let post = system.post().header("idempotency-key", key.to_string());
        assert_eq!(post.body(msg).send().await.unwrap().status(), 200);
    }
    let at = |millis: u64| {
        let time = SystemTime::UNIX_EPOCH + Duration::from_millis(millis);
        humantime::format_rfc3339_millis(time).to_string()
    };
    let [_, b, c] = times;
    for (query, expected) in [
        (format!("since={}", at(b)), "bc"),
        (format!("since={}", at(b + 1)), "c"),
        (format!("until={}", at(b)), "a"),
        (format!("until={}", at(b + 1)), "ab"),
        (format!("since={}&until={}", at(b), at(c)), "b"),
        (format!("since={}&until={}", at(c), at(b)), ""),
        (format!("since={}&order=desc&limit=1", at(b)), "c"),
        ("since=1h".to_owned(), "abc"),
        ("until=1h".to_owned(), ""),
        (
            "since=2026-01-01T02:00:00%2B02:00&until=0s".to_owned(),
            "abc",
        ),
        ("since=100years".to_owned(), "abc"),
    ] {
        let read = system.read(&format!("?{query}")).await.logging_service;
        let msgs: String = read.into_iter().map(|entry| entry.msg).collect();
        assert_eq!(msgs, expected, "{query}");
    }
    let first = system.read("?limit=1").await.next.unwrap();
    let rest = system.read(&format!("?after={first}&since=1h")).await;
    assert_eq!(rest.count, 2);
    let rest = system.read(&format!("?before={first}&until=0s")).await;
    assert_eq!(rest.count, 0);
    for query in ["since=", "since=yesterday", "until=2026-11-24"] {
        let answer = problem(system.get(&format!("/?{query}")).await, 400).await;
        let detail = answer["detail"].as_str().unwrap();
        assert!(detail.contains("2026-11-24T20:00:00Z"), "{detail}");
    }
}

/// For any bounds, any limit and both orders, following `next` returns the same entries as one GET.
#[test]
fn following_next_returns_all_entries_within_any_bounds() {
    const MESSAGES: usize = 40;
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let (system, all) = runtime.block_on(async {
        let system = System::start().await;
        for n in 0..MESSAGES {
            system.store(&format!("message {n}")).await;
        }
        let all = system.read("").await.logging_service;
        (system, all)
    });
    let uuids: Vec<Uuid> = all.iter().map(|entry| entry.uuid).collect();
    let bound = proptest::option::of(proptest::sample::select(uuids));
    let case = (bound.clone(), bound, any::<bool>(), 1..=MESSAGES + 1);
    let config = ProptestConfig {
        cases: 150,
        failure_persistence: None,
        ..ProptestConfig::default()
    };
    TestRunner::new(config)
        .run(&case, |(mut after, mut before, is_desc, limit)| {
            let is_within = |entry: &&Entry| {
                after.is_none_or(|after| entry.uuid > after)
                    && before.is_none_or(|before| entry.uuid < before)
            };
            let mut expected: Vec<Entry> = all.iter().filter(is_within).cloned().collect();
            if is_desc {
                expected.reverse();
            }
            let mut read = Vec::new();
            loop {
                let order = if is_desc { "desc" } else { "asc" };
                let mut query = format!("?order={order}&limit={limit}");
                after
                    .iter()
                    .for_each(|uuid| query += &format!("&after={uuid}"));
                before
                    .iter()
                    .for_each(|uuid| query += &format!("&before={uuid}"));
                let page = runtime.block_on(system.read(&query));
                prop_assert!(page.count <= limit as u64);
                read.extend(page.logging_service);
                match page.next {
                    Some(next) if is_desc => before = Some(next),
                    Some(next) => after = Some(next),
                    None => break,
                }
            }
            prop_assert_eq!(read, expected);
            Ok(())
        })
        .unwrap();
}

#[tokio::test]
async fn single_messages_are_found_by_uuid() {
    let system = System::start().await;
    let uuid = system.store("hello").await;
    let found: Value = system.get(&format!("/{uuid}")).await.json().await.unwrap();
    assert_eq!(found, json!({"uuid": uuid, "msg": "hello"}));
    problem(system.get(&format!("/{}", Uuid::now_v7())).await, 404).await;
    problem(system.get("/hello").await, 404).await;
    problem(system.get("/%FF").await, 404).await;
}

/// A read gets its end before the first entry, so it ends while writers keep writing.
#[tokio::test(flavor = "multi_thread")]
async fn read_ends_while_messages_keep_coming() {
    let system = Arc::new(System::start().await);
    let msg = "x".repeat(50_000);
    for _ in 0..20 {
        system.store(&msg).await;
    }
    let mut body = system.get("/").await.bytes_stream();
    let mut read = body.next().await.unwrap().unwrap().to_vec();
    while let Some(chunk) = body.next().await {
        system.store(&msg).await;
        read.extend_from_slice(&chunk.unwrap());
    }
    let merged: Value = serde_json::from_slice(&read).unwrap();
    assert_eq!(merged["count"], 20);
}

fn logging_of(system_entries: usize) -> Server {
    let entries = (0..system_entries).map(|n| Entry {
        uuid: Uuid::now_v7(),
        msg: n.to_string(),
    });
    let mut body = Vec::new();
    entries.for_each(|entry| common::json::write_line(&mut body, &entry));
    body.extend_from_slice(format!("{{\"count\":{system_entries}}}\n").as_bytes());
    serve_instance(Router::new().route("/", get(async move || body)))
}

#[tokio::test]
async fn reads_at_once_are_bounded_in_number() {
    let answer = Arc::new(Notify::new());
    let waiting = answer.clone();
    let reply = async move || waiting.notified().await;
    let slow = serve(Router::new().route("/", get(reply)));
    let flags = ["--max-reads", "1", "--messages-timeout", "30s"];
    let system = System::with_stubs(vec![logging_of(1)], slow, &flags);
    let first = system.get("/").await;
    let second = system.get("/").await;
    assert!(second.headers().contains_key("retry-after"));
    problem(second, 503).await;
    answer.notify_one();
    first.bytes().await.unwrap();
    answer.notify_one();
    tokio::time::timeout(Duration::from_secs(30), async {
        while system.get("/").await.status() != 200 {
            tokio::task::yield_now().await;
        }
    })
    .await
    .unwrap();
}
