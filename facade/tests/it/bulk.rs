//! Uploads of many messages as NDJSON.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use common::entry::Outcome;
use futures_util::{StreamExt, stream};
use reqwest::{Body, RequestBuilder};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use uuid::Uuid;

use crate::system::{System, logging_stub, nobody, problem};

const NDJSON: &str = "application/x-ndjson";

fn upload(system: &System, body: impl Into<Body>) -> RequestBuilder {
    system.post().header("content-type", NDJSON).body(body)
}

#[tokio::test]
async fn summary_counts_and_lists_what_failed() {
    let system = System::start().await;
    let key = Uuid::now_v7();
    let lines = [
        r#""a string""#.to_owned(),
        r#"{"msg":"an object"}"#.to_owned(),
        String::new(),
        format!(r#"{{"uuid":"{key}","msg":"own uuid"}}"#),
        format!(r#"{{"uuid":"{key}","msg":"own uuid"}}"#),
        format!(r#"{{"uuid":"{key}","msg":"another message"}}"#),
        r#"{"uuid":"01890000-0000-7000-8000-000000000000","msg":"old"}"#.to_owned(),
        r#"{"uuid":"x","msg":"no uuid"}"#.to_owned(),
        r#"{"msg":"a","extra":1}"#.to_owned(),
        r#"{"msg":""}"#.to_owned(),
        "nonsense".to_owned(),
        "\"with a carriage return\"\r".to_owned(),
        r#""no newline at the end""#.to_owned(),
    ];
    let response = upload(&system, lines.join("\n")).send().await.unwrap();
    assert_eq!(response.status(), 207);
    assert_eq!(response.headers()["content-type"], "application/json");
    let summary: Value = response.json().await.unwrap();
    assert_eq!(
        (&summary["stored"], &summary["failed"]),
        (&json!(6), &json!(6))
    );
    let errors = summary["errors"].as_array().unwrap();
    let failed: Vec<u64> = errors.iter().map(|e| e["line"].as_u64().unwrap()).collect();
    assert_eq!(failed, [6, 7, 8, 9, 10, 11]);
    assert_eq!(errors[0]["uuid"], json!(key));
    assert!(errors.iter().all(|error| error["error"].is_string()));
    let expected = [
        "own uuid",
        "a string",
        "an object",
        "with a carriage return",
        "no newline at the end",
    ];
    let mut stored = system.messages().await;
    stored.sort_by_key(|msg| expected.iter().position(|expected| expected == msg));
    assert_eq!(stored, expected);
}

#[tokio::test]
async fn summary_lists_the_first_hundred_errors_only() {
    let system = System::start().await;
    let response = upload(&system, "nonsense\n".repeat(250))
        .send()
        .await
        .unwrap();
    let summary = problem(response, 400).await;
    assert_eq!(
        (&summary["stored"], &summary["failed"]),
        (&json!(0), &json!(250))
    );
    assert_eq!(summary["errors"].as_array().unwrap().len(), 100);
    assert_eq!(summary["errors"][99]["line"], 100);
}

#[tokio::test]
async fn empty_upload_is_an_empty_summary() {
    let system = System::start().await;
    let response = upload(&system, "\n\n").send().await.unwrap();
    assert_eq!(response.status(), 200);
    let summary: Value = response.json().await.unwrap();
    assert_eq!(summary, json!({"stored": 0, "failed": 0, "errors": []}));
}

#[tokio::test]
async fn line_results_come_in_order() {
    let system = System::start().await;
    let lines: String = (0..5000).map(|n| format!("\"message {n}\"\n")).collect();
    let request = upload(&system, lines).header("accept", NDJSON);
    let response = request.send().await.unwrap();
    assert_eq!(response.headers()["content-type"], NDJSON);
    let text = response.text().await.unwrap();
    let mut results: Vec<Value> = text
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let counts = results.pop().unwrap();
    assert_eq!(counts, json!({"stored": 5000, "failed": 0}));
    assert_eq!(results.len(), 5000);
    let entries = system.read("").await.logging_service;
    for (n, (result, entry)) in results.iter().zip(&entries).enumerate() {
        assert_eq!(
            *result,
            json!({"line": n + 1, "uuid": entry.uuid, "stored": "yes"})
        );
        assert_eq!(entry.msg, format!("message {n}"));
    }
    let failed = upload(&system, "nonsense").header("accept", NDJSON);
    let response = failed.send().await.unwrap();
    assert_eq!(response.status(), 200);
    let text = response.text().await.unwrap();
    let (result, counts) = text.split_once('\n').unwrap();
    assert_eq!(counts, "{\"stored\":0,\"failed\":1}\n");
    let failed: Value = serde_json::from_str(result).unwrap();
    assert_eq!(
        (&failed["stored"], &failed["uuid"]),
        (&json!("no"), &Value::Null)
    );
}

#[tokio::test]
async fn line_results_come_while_the_upload_still_runs() {
    let system = System::start().await;
    let (lines, body) = mpsc::channel::<Result<&'static str, std::io::Error>>(1);
    let body = stream::unfold(body, async |mut body| Some((body.recv().await?, body)));
    lines.send(Ok("\"first\"\n\"sec")).await.unwrap();
    let request = upload(&system, Body::wrap_stream(body)).header("accept", NDJSON);
    let mut results = request.send().await.unwrap().bytes_stream();
    let first: Value = serde_json::from_slice(&results.next().await.unwrap().unwrap()).unwrap();
    assert_eq!(first["line"], 1);
    assert_eq!(system.messages().await, ["first"]);
    lines.send(Ok("ond\"\n")).await.unwrap();
    let second: Value = serde_json::from_slice(&results.next().await.unwrap().unwrap()).unwrap();
    assert_eq!(second["line"], 2);
    drop(lines);
    let counts: Value = serde_json::from_slice(&results.next().await.unwrap().unwrap()).unwrap();
    assert_eq!(counts, json!({"stored": 2, "failed": 0}));
    assert!(results.next().await.is_none());
    assert_eq!(system.messages().await, ["first", "second"]);
}

#[tokio::test]
async fn line_that_is_too_long_fails_alone() {
    let system = System::start_with(&["--max-message", "100B"]).await;
    let long = "x".repeat(1 << 20);
    let lines = format!(
        "\"a\"\n\"{long}\"\n\"{}\"\n\"b\"\n\"{long}",
        "y".repeat(101)
    );
    let response = upload(&system, lines).send().await.unwrap();
    let summary: Value = response.json().await.unwrap();
    assert_eq!(
        (&summary["stored"], &summary["failed"]),
        (&json!(2), &json!(3))
    );
    assert_eq!(summary["errors"][0]["line"], 2);
    assert!(
        summary["errors"][0]["error"]
            .as_str()
            .unwrap()
            .contains("100 bytes")
    );
    assert_eq!(system.messages().await, ["a", "b"]);
}

#[tokio::test]
async fn cut_off_line_of_a_broken_upload_is_not_stored() {
    let system = System::start().await;
    let (lines, body) = mpsc::channel(1);
    let body = stream::unfold(body, async |mut body| Some((body.recv().await?, body)));
    let request = upload(&system, Body::wrap_stream(body)).header("accept", NDJSON);
    lines.send(Ok("\"whole\"\n\"cut o")).await.unwrap();
    let mut results = request.send().await.unwrap().bytes_stream();
    assert!(results.next().await.unwrap().is_ok());
    lines
        .send(Err(std::io::Error::other("the caller dies")))
        .await
        .unwrap();
    assert!(!matches!(results.next().await, Some(Ok(_))));
    assert_eq!(system.messages().await, ["whole"]);
}

/// Also when the upload breaks at the moment in which a line is stored.
#[tokio::test]
async fn results_before_a_break_are_not_lost() {
    let system = System::start().await;
    let mut connection = TcpStream::connect(system.url.trim_start_matches("http://")).unwrap();
    let head = "POST / HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/x-ndjson\r\n\
                accept: application/x-ndjson\r\ntransfer-encoding: chunked\r\n\r\n";
    let body = "f\r\n\"one\"\n\"two\"\n\"cu\r\nnonsense\r\n";
    let exchange = tokio::task::spawn_blocking(move || {
        connection
            .write_all(format!("{head}{body}").as_bytes())
            .unwrap();
        let mut answer = String::new();
        let _cut_off = connection.read_to_string(&mut answer);
        answer
    });
    let answer = exchange.await.unwrap();
    assert_eq!(answer.matches("\"stored\":\"yes\"").count(), 2, "{answer}");
    assert!(!answer.ends_with("0\r\n\r\n"), "{answer}");
}

#[tokio::test]
async fn upload_takes_no_idempotency_key_and_offers_two_replies() {
    let system = System::start().await;
    let with_key = upload(&system, "\"a\"").header("idempotency-key", Uuid::now_v7().to_string());
    problem(with_key.send().await.unwrap(), 400).await;
    let as_text = upload(&system, "\"a\"").header("accept", "text/plain");
    problem(as_text.send().await.unwrap(), 406).await;
    assert_eq!(system.read("").await.count, 0);
}

/// More lines are refused than the retry budget has retries: the lines wait for it instead of failing.
#[tokio::test]
async fn refused_lines_wait_for_the_retry_budget() {
    const LINES: u64 = 150;
    let tries = Arc::new(AtomicU64::new(0));
    let busy_at_first = logging_stub(move |_| match tries.fetch_add(1, Ordering::Relaxed) {
        0..LINES => Outcome::refused("busy"),
        _ => Outcome::Stored,
    });
    let system = System::with_stubs(vec![busy_at_first], nobody(), &["--deadline", "60s"]);
    let lines: String = (0..LINES).map(|n| format!("\"{n}\"\n")).collect();
    let response = upload(&system, lines).send().await.unwrap();
    let summary: Value = response.json().await.unwrap();
    assert_eq!(summary, json!({"stored": LINES, "failed": 0, "errors": []}));
}

/// The status says whether the lines or the server is at fault when no line is stored.
#[tokio::test]
async fn status_says_who_is_at_fault() {
    let system = System::start().await;
    let key = Uuid::now_v7();
    let first = format!(r#"{{"uuid":"{key}","msg":"a"}}"#);
    let response = upload(&system, first).send().await.unwrap();
    assert_eq!(response.status(), 200);
    let future = Uuid::from_u128(Uuid::now_v7().as_u128() + (3_600_000 << 80));
    let own_faults = format!(
        "{{\"message\":\"foreign\"}}\n{{\"uuid\":\"{key}\",\"msg\":\"b\"}}\n\
         {{\"uuid\":\"01890000-0000-7000-8000-000000000000\",\"msg\":\"old\"}}\n\
         {{\"uuid\":\"{future}\",\"msg\":\"early\"}}\n"
    );
    let answer = problem(upload(&system, own_faults).send().await.unwrap(), 400).await;
    assert_eq!(
        (&answer["stored"], &answer["failed"]),
        (&json!(0), &json!(4))
    );
    assert_eq!(answer["errors"].as_array().unwrap().len(), 4);

    for outcome in [Outcome::refused("full"), Outcome::unknown("lost")] {
        let fails = logging_stub(move |_| outcome.clone());
        let system = System::with_stubs(vec![fails], nobody(), &["--deadline", "200ms"]);
        let mixed = upload(&system, "\"a\"\nnonsense\n").send().await.unwrap();
        assert_eq!(mixed.status(), 207);
        let response = upload(&system, "\"a\"\n\"b\"\n").send().await.unwrap();
        assert!(response.headers().contains_key("retry-after"));
        let answer = problem(response, 503).await;
        assert_eq!(
            (&answer["stored"], &answer["failed"]),
            (&json!(0), &json!(2))
        );
    }
}

/// A line fails only at its deadline, and its result has the UUID.
#[tokio::test]
async fn line_that_no_instance_takes_fails_with_its_uuid() {
    let full = logging_stub(|_| Outcome::refused("full"));
    let system = System::with_stubs(vec![full], nobody(), &["--deadline", "200ms"]);
    let response = upload(&system, "\"a\"").send().await.unwrap();
    let summary = problem(response, 503).await;
    let error = &summary["errors"][0];
    assert_eq!(
        (&error["line"], &error["stored"]),
        (&json!(1), &json!("no"))
    );
    assert!(Uuid::try_parse(error["uuid"].as_str().unwrap()).is_ok());
}
