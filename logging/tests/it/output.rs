//! Standard output that takes nothing, as a pipe that nobody reads: the instance answers in time and loses
//! no line; and instances that are killed while they print.

use std::collections::HashSet;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use common::entry::{Entry, Outcome};
use reqwest::{Client, StatusCode};
use testing::command_line::one_line;
use testing::process::{LOOK_AGAIN, Process, free_address};
use tokio::task::JoinSet;
use uuid::Uuid;

use crate::processes::{all, entry, logging, put, put_one};

/// With a store timeout that a busy machine can keep.
fn instance(folder: &Path) -> Process {
    let mut command = logging(folder);
    command.args(["--store-timeout", "2s"]);
    Process::start(command, free_address())
}

/// Puts entries until one is not stored, as the pipe is full, and returns those that may be.
async fn fill_the_pipe(http: &Client, url: &str) -> Vec<Entry> {
    let mut stored = Vec::new();
    loop {
        let entry = entry(&"x".repeat(16 * 1024));
        let outcome = put_one(http, url, &entry).await;
        stored.push(entry);
        match outcome {
            Outcome::Stored => assert!(stored.len() < 64, "the pipe has no end"),
            Outcome::Unknown { .. } => return stored,
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn stuck_output_makes_an_instance_unready_and_loses_no_line() {
    let folder = tempfile::tempdir().unwrap();
    let process = instance(folder.path());
    process.leave_unread();
    let (http, url) = (Client::new(), process.url());
    let mut stored = fill_the_pipe(&http, &url).await;
    let refused = http
        .post(&url)
        .json(&[entry("refused")])
        .send()
        .await
        .unwrap();
    assert_eq!(refused.status(), StatusCode::INSUFFICIENT_STORAGE);
    let trial = http.post(&url).json(&[(); 0]).send().await.unwrap();
    assert_eq!(trial.status(), StatusCode::INSUFFICIENT_STORAGE);
    let readiness = process.wait_for_readiness(|text| text.starts_with("HTTP/1.1 503"));
    assert!(readiness.contains("standard output"), "{readiness}");
    let alive = http.get(format!("{url}/livez")).send().await.unwrap();
    assert_eq!(alive.status(), StatusCode::OK);
    assert_eq!(all(&http, &url).await, stored);

    process.read_again();
    process.wait_until_ready();
    let last = entry("printed again");
    assert_eq!(put_one(&http, &url, &last).await, Outcome::Stored);
    stored.push(last);
    process.wait_for_log(|lines| {
        let has_line = |entry: &Entry| {
            let uuid = entry.uuid.to_string();
            lines.iter().any(|line| line.contains(&uuid))
        };
        stored.iter().all(has_line)
    });
    assert_eq!(all(&http, &url).await, stored);
}

#[tokio::test(flavor = "multi_thread")]
async fn stuck_output_does_not_delay_the_end() {
    let folder = tempfile::tempdir().unwrap();
    let mut process = instance(folder.path());
    process.leave_unread();
    fill_the_pipe(&Client::new(), &process.url()).await;
    process.signal("TERM");
    assert!(process.wait().success());
}

/// An instance whose output nobody reads any more ends, so that a supervisor starts it again.
#[tokio::test]
async fn instance_ends_when_the_reader_of_its_output_is_gone() {
    let folder = tempfile::tempdir().unwrap();
    let address = free_address();
    let mut command = logging(folder.path());
    command.args(["--listen", &address.to_string()]);
    let pipes = command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = pipes.spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let is_serving = |line: std::io::Result<String>| line.unwrap().contains("serving requests");
    assert!(lines.any(is_serving));
    drop(lines);
    // The answer may not come any more.
    let _ = put(
        &Client::new(),
        &format!("http://{address}"),
        &[entry("hello")],
    )
    .await;
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let line = one_line(&output);
    assert!(
        line.contains("the reader of standard output is gone"),
        "{line}"
    );
}

/// An entry that was acknowledged has its line, when the process is killed the moment after.
#[tokio::test(flavor = "multi_thread")]
async fn killed_instance_has_printed_what_it_acknowledged() {
    const WRITERS: usize = 8;
    const ENOUGH: usize = 400;
    let folder = tempfile::tempdir().unwrap();
    let mut process = instance(folder.path());
    let acknowledged = Arc::new(AtomicUsize::new(0));
    let mut writers = JoinSet::new();
    for _ in 0..WRITERS {
        let (url, acknowledged) = (process.url(), acknowledged.clone());
        writers.spawn(async move {
            let http = Client::new();
            let mut stored: Vec<Uuid> = Vec::new();
            loop {
                let batch = [entry("one"), entry("two"), entry("three")];
                let Ok(outcomes) = put(&http, &url, &batch).await else {
                    return stored;
                };
                for (entry, outcome) in batch.iter().zip(outcomes) {
                    if outcome == Outcome::Stored {
                        stored.push(entry.uuid);
                        acknowledged.fetch_add(1, Ordering::Relaxed);
                    }
                }
            }
        });
    }
    while acknowledged.load(Ordering::Relaxed) < ENOUGH {
        tokio::time::sleep(LOOK_AGAIN).await;
    }
    process.kill();
    let acknowledged = writers.join_all().await.concat();
    assert!(acknowledged.len() >= ENOUGH);
    process.wait_for_log(|lines| {
        let printed: HashSet<&str> = lines
            .iter()
            .flat_map(|line| line.split(' '))
            .filter_map(|word| word.strip_prefix("uuid="))
            .collect();
        acknowledged
            .iter()
            .all(|uuid| printed.contains(uuid.to_string().as_str()))
    });
}
