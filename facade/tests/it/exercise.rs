//! The requirements of the exercise, on real processes: its client, the instance that stored each message,
//! reads while instances are killed; and the next steps of its users.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::process::Command;
use std::time::{Duration, Instant};

use common::entry::Entry;
use futures_util::{StreamExt, stream};
use serde_json::Value;
use testing::process::{LOOK_AGAIN, PATIENCE, Process, free_address};
use uuid::Uuid;

use crate::processes::{Processes, binary};
use crate::system::{System, problem};

/// The client of the original exercise: Python requests, ten form POSTs, then a GET with a query that has
/// no meaning.
#[test]
fn client_of_the_exercise_works_unmodified() {
    const CLIENT: &str = r#"
import requests, sys
url = sys.argv[1]
for i in range(1, 11):
    response = requests.post(url, data={"msg": f"msg{i}"})
    print(response.status_code, response.text)
response = requests.get(url, params={"msg": "HELLO"})
print(response.status_code, response.text)
"#;
    let system = Processes::start();
    let output = Command::new("python3")
        .args(["-c", CLIENT, &system.facade.url()])
        .output()
        .unwrap();
    let printed = String::from_utf8(output.stdout).unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    // Responses end with a newline, and `print` adds another one.
    let lines = printed.lines().filter(|line| !line.is_empty());
    let lines: Vec<&str> = lines.collect();
    for (n, line) in (1..=10).zip(&lines) {
        assert!(line.starts_with("200 {\"uuid\":\""), "{line}");
        assert!(line.ends_with(&format!("\"msg\":\"msg{n}\"}}")), "{line}");
    }
    assert_eq!(lines[10], "200 {\"logging_service\":[");
    for (n, line) in (1..=10).zip(&lines[11..]) {
        assert!(line.contains(&format!("\"msg\":\"msg{n}\"")), "{line}");
    }
    assert!(lines[21].ends_with("Messages Service not Implemented\",\"count\":10}"));
}

/// Each of three instances is chosen for a third of the messages: chi-square with two degrees of freedom stays
/// below its 99.9 % quantile, 13.82. Headers and logs agree on the instance of each message.
///
/// A header names the instance that stored the message, which is the one that was chosen first only if that one
/// was not slow. So a round of POSTs counts for the shares when none took as long as a hedge waits.
#[tokio::test(flavor = "multi_thread")]
async fn messages_are_spread_uniformly_and_headers_agree_with_logs() {
    const POSTS: usize = 30_000;
    const ROUND: usize = 500;
    const MAX_ROUNDS: usize = 4 * POSTS / ROUND;
    const HEDGE_AFTER: Duration = Duration::from_millis(200);
    let processes = Processes::start();
    let system = System::in_front_of(&processes.logging, &processes.messages);
    let mut by_header: BTreeMap<String, String> = BTreeMap::new();
    let mut shares: HashMap<String, i32> = HashMap::new();
    let mut counted = 0;
    for round in 0.. {
        if counted == POSTS {
            break;
        }
        assert!(
            round < MAX_ROUNDS,
            "only {counted} POSTs were in rounds without a slow one"
        );
        let posts = futures_util::stream::iter(0..ROUND).map(async |n| {
            let begin = Instant::now();
            let response = system.post().body(n.to_string()).send().await.unwrap();
            let took = begin.elapsed();
            assert_eq!(response.status(), 200);
            let instance = response.headers()["x-logging-instance"].to_str().unwrap();
            let instance = instance.to_owned();
            let answer: Value = response.json().await.unwrap();
            (answer["uuid"].as_str().unwrap().to_owned(), instance, took)
        });
        let answers: Vec<_> = posts.buffer_unordered(128).collect().await;
        if answers.iter().all(|(_, _, took)| *took < HEDGE_AFTER) {
            counted += answers.len();
            for (_, instance, _) in &answers {
                *shares.entry(instance.clone()).or_default() += 1;
            }
        }
        assert_eq!(answers.len(), ROUND);
        by_header.extend(
            answers
                .into_iter()
                .map(|(uuid, instance, _)| (uuid, instance)),
        );
        assert_eq!(by_header.len(), (round + 1) * ROUND);
    }
    let expected = POSTS as f64 / 3.0;
    let deviation = |share: &i32| (f64::from(*share) - expected).powi(2) / expected;
    let chi_square: f64 = shares.values().map(deviation).sum();
    println!("shares {shares:?}, chi-square {chi_square:.2}");
    assert_eq!(shares.len(), 3);
    assert!(chi_square < 13.82, "{shares:?}: {chi_square}");

    // A hedged POST leaves a line on two instances.
    let mut logged = BTreeSet::new();
    for instance in &processes.logging {
        let name = instance.address.to_string();
        let named = by_header.iter().filter(|(_, named)| **named == name);
        let named: BTreeSet<String> = named.map(|(uuid, _)| uuid.clone()).collect();
        let waiting = async {
            loop {
                let uuids = acknowledged(&instance.log());
                if uuids.is_superset(&named) {
                    return uuids;
                }
                tokio::time::sleep(LOOK_AGAIN).await;
            }
        };
        let uuids = tokio::time::timeout(PATIENCE, waiting).await;
        logged.extend(
            uuids.expect("an instance has a log line for each message whose header names it"),
        );
    }
    assert!(logged.iter().eq(by_header.keys()));
}

/// The UUIDs of the entries that an instance's log reports as acknowledged.
fn acknowledged(log: &[String]) -> BTreeSet<String> {
    let entries = log
        .iter()
        .filter(|line| line.contains("entry acknowledged"));
    let uuids = entries.map(|line| {
        let line: Value = serde_json::from_str(line).unwrap();
        line["uuid"].as_str().unwrap().to_owned()
    });
    uuids.collect()
}

/// The id of a request to the facade is in the log of the instance that stored the message, and in the
/// logs of facade and messages.
#[tokio::test]
async fn request_id_is_passed_through_the_services() {
    let system = Processes::start();
    let request = system
        .http
        .post(system.facade.url())
        .header("x-request-id", "post-1");
    request.body("hello").send().await.unwrap();
    let request = system
        .http
        .get(system.facade.url())
        .header("x-request-id", "get-1");
    request.send().await.unwrap().bytes().await.unwrap();
    system
        .facade
        .wait_for_line(|line| line.contains("post-1") && line.contains("status=200"));
    system
        .facade
        .wait_for_line(|line| line.contains("get-1") && line.contains("status=200"));
    system
        .messages
        .wait_for_line(|line| line.contains("get-1") && line.contains("status=200"));
    let is_stored = |line: &String| line.contains("post-1") && line.contains("entry acknowledged");
    let stored = || {
        let instances = system.logging.iter();
        let stored = instances.filter(|instance| instance.log().iter().any(is_stored));
        stored.count()
    };
    let waiting = async {
        while stored() == 0 {
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    };
    let waited = tokio::time::timeout(PATIENCE, waiting).await;
    waited.expect("an instance logs the id");
    assert_eq!(stored(), 1);
}

/// With three, two and one logging instance alive, a GET returns all messages; with none, a 503; and all
/// messages again when one instance returns.
#[tokio::test]
async fn messages_stay_readable_while_one_logging_instance_lives() {
    let mut system = Processes::start();
    let expected: Vec<String> = (1..=10).map(|n| format!("msg{n}")).collect();
    for msg in &expected {
        assert_eq!(system.post(msg).await.status(), 200);
    }
    for victim in 0..3 {
        assert_eq!(system.messages_in_log().await, expected);
        system.logging[victim].kill();
    }
    problem(system.get().await, 503).await;
    system.restart_logging(1);
    assert_eq!(system.messages_in_log().await, expected);
}

/// A facade that is told to stop in the middle of a long GET still delivers every byte.
#[tokio::test(flavor = "multi_thread")]
async fn stopping_facade_finishes_bodies_in_flight() {
    for signal in ["TERM", "INT"] {
        let mut system = Processes::start();
        let lines: String = (0..200_000).map(|n| format!("\"message {n}\"\n")).collect();
        let upload = system.http.post(system.facade.url()).body(lines);
        let upload = upload.header("content-type", "application/x-ndjson").send();
        assert_eq!(upload.await.unwrap().status(), 200);
        let request = system
            .http
            .get(system.facade.url())
            .header("accept", "application/x-ndjson");
        let mut body = request.send().await.unwrap().bytes_stream();
        let mut read = body.next().await.unwrap().unwrap().to_vec();
        system.facade.signal(signal);
        system
            .facade
            .wait_for_line(|line| line.contains("stopping"));
        while let Some(chunk) = body.next().await {
            read.extend_from_slice(&chunk.unwrap());
        }
        let text = String::from_utf8(read).unwrap();
        assert_eq!(text.lines().count(), 200_001);
        assert!(text.ends_with("\"count\":200000}\n"));
        assert!(system.facade.wait().success());
        assert!(system.http.get(system.facade.url()).send().await.is_err());
    }
}

/// The body of a GET can be imported into another map, as JSON and as NDJSON.
#[tokio::test]
async fn body_of_a_get_can_be_imported() {
    let system = System::start().await;
    for msg in ["hello", "\"],\"count\":3}\n", "größe,", &"x".repeat(60_000)] {
        system.store(msg).await;
    }
    let folder = tempfile::tempdir().unwrap();
    let logging = |map: &str| {
        let mut command = Command::new(binary("logging"));
        command.args([
            "--map",
            &format!("lmdb:{}", folder.path().join(map).display()),
        ]);
        command
    };
    for format in ["json", "x-ndjson"] {
        let request = system.http.get(&system.url);
        let request = request.header("accept", format!("application/{format}"));
        let body = request.send().await.unwrap().bytes().await.unwrap();
        let file = folder.path().join("body");
        std::fs::write(&file, body).unwrap();
        let import = logging(format)
            .args(["--settle", "1s", "import"])
            .arg(&file)
            .output();
        let import = import.unwrap();
        assert!(import.status.success(), "{import:?}");
        let export = logging(format).arg("export").output().unwrap();
        let lines = String::from_utf8(export.stdout).unwrap();
        let mut lines: Vec<&str> = lines.lines().collect();
        assert_eq!(lines.pop(), Some("{\"count\":4}"));
        let entries = lines.iter().map(|line| serde_json::from_str(line).unwrap());
        let entries: Vec<Entry> = entries.collect();
        assert_eq!(entries, system.read("").await.logging_service);
    }
}

/// Four callers use a key at once, through two facades, two callers with each of two messages: one message
/// is stored, its callers get a 200, the others a 422.
#[tokio::test(flavor = "multi_thread")]
async fn key_used_by_many_callers_at_once_is_one_entry() {
    const KEYS: usize = 10_000;
    let system = Processes::start();
    let second = Process::start(system.another_facade(&[]), free_address());
    let urls = [system.facade.url(), second.url()];
    let http = &system.http;
    let winners = stream::iter(0..KEYS).map(|n| {
        let urls = urls.clone();
        async move {
            let key = Uuid::now_v7();
            let posts = ["heads", "tails"].iter().flat_map(|side| {
                let msg = format!("{side} {n}");
                urls.each_ref().map(|url| (url.clone(), msg.clone()))
            });
            let posts = posts.map(async |(url, msg)| {
                let request = http.post(url).header("idempotency-key", key.to_string());
                let status = request.body(msg.clone()).send().await.unwrap().status();
                (msg, status.as_u16())
            });
            let answers = futures_util::future::join_all(posts).await;
            let accepted = answers.iter().filter(|(_, status)| *status == 200);
            let accepted: HashSet<&String> = accepted.map(|(msg, _)| msg).collect();
            assert_eq!(accepted.len(), 1, "{answers:?}");
            let winner = (*accepted.iter().next().unwrap()).clone();
            for (msg, status) in &answers {
                let expected = if *msg == winner { 200 } else { 422 };
                assert_eq!(*status, expected, "{answers:?}");
            }
            (key, winner)
        }
    });
    let winners: BTreeMap<Uuid, String> = winners.buffer_unordered(16).collect().await;
    let stored = system.read_all().await;
    let stored: Vec<(Uuid, String)> = stored.into_iter().map(|e| (e.uuid, e.msg)).collect();
    assert_eq!(stored.len(), KEYS);
    assert!(
        stored.into_iter().eq(winners),
        "the log differs from the entries that callers were told are stored"
    );
}
