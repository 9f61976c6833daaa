//! A facade whose standard output takes nothing, as a pipe that nobody reads: it goes on serving, counts the
//! lines that it drops, and ends when it is told to.

use std::net::SocketAddr;

use reqwest::Client;
use testing::process::{LOOK_AGAIN, PATIENCE, Process};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, timeout};

use crate::processes::Processes;

/// Sends so many requests on one connection, and reads all their answers.
async fn ask_often(address: SocketAddr, requests: usize) {
    let (mut answers, mut asking) = TcpStream::connect(address).await.unwrap().into_split();
    let id = "x".repeat(100);
    let path = "y".repeat(200);
    let request =
        format!("GET /nothing?{path} HTTP/1.1\r\nhost: localhost\r\nx-request-id: {id}\r\n\r\n");
    let last = request.replace("host:", "connection: close\r\nhost:");
    tokio::spawn(async move {
        for _ in 1..requests {
            asking.write_all(request.as_bytes()).await.unwrap();
        }
        asking.write_all(last.as_bytes()).await.unwrap();
        // Dropping this half would end the connection.
        std::future::pending::<()>().await;
    });
    let mut text = String::new();
    let read = timeout(PATIENCE, answers.read_to_string(&mut text));
    read.await.expect("the facade answers").unwrap();
    assert_eq!(text.matches("HTTP/1.1 404").count(), requests);
}

fn dropped_lines(metrics: &str) -> u64 {
    let line = metrics
        .lines()
        .find_map(|line| line.strip_prefix("log_lines_dropped_total "));
    line.unwrap().parse().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn facade_serves_and_ends_while_its_output_is_stuck() {
    const SOME: usize = 1000;
    let mut system = Processes::start();
    let http = Client::new();
    let metrics = format!("{}/metrics", system.facade.url());
    let dropped = async || {
        let answer = http.get(&metrics).send().await.unwrap();
        dropped_lines(&answer.text().await.unwrap())
    };
    assert_eq!(dropped().await, 0);
    system.facade.leave_unread();
    while dropped().await == 0 {
        ask_often(system.facade.address, SOME).await;
    }
    assert_eq!(system.post("hello").await.status(), 200);
    assert_eq!(system.messages_in_log().await, ["hello"]);
    system.facade.signal("TERM");
    assert!(system.facade.wait().success());
}

/// The others store what an instance with a stuck output refuses, and none of its lines is lost.
#[tokio::test(flavor = "multi_thread")]
async fn posts_go_to_instances_whose_output_moves() {
    let system = Processes::start();
    system.logging[0].leave_unread();
    let message = "x".repeat(16 * 1024);
    let mut posted = 0;
    while system.logging[0].readiness().starts_with("HTTP/1.1 200") {
        assert_eq!(system.post(&message).await.status(), 200);
        posted += 1;
    }
    for _ in 0..50 {
        assert_eq!(system.post("more").await.status(), 200);
        posted += 1;
    }
    let entries = system.read_all().await;
    assert_eq!(entries.len(), posted);
    system.logging[0].read_again();
    system.logging[0].wait_until_ready();
    let logs = || system.logging.iter().flat_map(Process::log);
    let begin = Instant::now();
    for entry in entries {
        let uuid = entry.uuid.to_string();
        while !logs().any(|line| line.contains(&uuid)) {
            assert!(begin.elapsed() < PATIENCE, "{uuid} has no line");
            sleep(LOOK_AGAIN).await;
        }
    }
}
