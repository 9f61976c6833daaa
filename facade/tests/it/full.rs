//! A map that is full: a disk, the memory of a Redis server.

use std::process::Command;
use std::time::Instant;

use reqwest::Client;
use serde_json::Value;
use testing::process::{LOOK_AGAIN, OnSmallDisk, PATIENCE, Process, free_address};
use testing::redis_servers::RedisServer;

use crate::processes::{Processes, binary};
use crate::system::problem;

/// A Redis server whose memory is nearly full is reported, in words and by numbers. When it is full, a POST
/// gets a 503 with the reason, GETs succeed, and POSTs succeed again with a larger `maxmemory`.
#[tokio::test(flavor = "multi_thread")]
async fn full_memory_is_foretold_and_a_503_with_the_reason() {
    let folder = tempfile::tempdir().unwrap();
    let server = RedisServer::single(folder.path());
    // Beside it what connections take and give back is nothing.
    let _: i64 = server.ask(&["SETRANGE", "filler", "50000000", "x"]);
    let map = format!("redis://{}", server.address());
    let system = Processes::on_map(&["--map", &map], &["--deadline", "2s"]);
    let get = async |url: String, path: &str| {
        let response = system.http.get(format!("{url}{path}")).send().await;
        response.unwrap().text().await.unwrap()
    };
    let wait_until_said = async |url: String, path: &str, words: &str| {
        let begin = Instant::now();
        while !get(url.clone(), path).await.contains(words) {
            assert!(begin.elapsed() < PATIENCE, "{path}: {words}");
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    };
    let set_memory = |percent_used: u64| {
        let used: u64 = server.info("used_memory").unwrap().parse().unwrap();
        let most = (used * 100 / percent_used).to_string();
        let _: () = server.ask(&["CONFIG", "SET", "maxmemory", &most]);
    };
    assert_eq!(system.post("before").await.status(), 200);
    wait_until_said(system.facade.url(), "/stats", "\"problems\":[]").await;

    set_memory(93);
    assert_eq!(system.post("nearly full").await.status(), 200);
    wait_until_said(
        system.facade.url(),
        "/stats",
        "% of its memory, and refuses",
    )
    .await;
    let instance = system.logging[0].url();
    wait_until_said(instance.clone(), "/readyz?verbose", "% of its maxmemory").await;
    let limit: String = server.info("maxmemory").unwrap();
    let gauge = format!(
        "logging_map_server_max_memory_bytes{{server=\"{}\"}} {limit}\n",
        server.address()
    );
    wait_until_said(instance, "/metrics", &gauge).await;

    set_memory(110);
    let refused = system.post("full").await;
    assert_eq!(refused.status(), 503);
    let problem: Value = refused.json().await.unwrap();
    assert_eq!(problem["stored"], "no", "{problem}");
    let detail = problem["detail"].as_str().unwrap();
    assert!(detail.contains("its memory is full"), "{detail}");
    let stored: Vec<String> = system
        .read_all()
        .await
        .into_iter()
        .map(|entry| entry.msg)
        .collect();
    assert_eq!(stored, ["before", "nearly full"]);

    set_memory(50);
    wait_until_said(
        system.facade.url(),
        "/readyz?verbose",
        "\"status\":\"ready\"",
    )
    .await;
    assert_eq!(system.post("after").await.status(), 200);
}

/// On a full disk a POST gets a 503 with the reason, GETs succeed, and POSTs succeed again with space.
#[tokio::test(flavor = "multi_thread")]
async fn full_disk_is_a_503_with_the_reason() {
    let folder = tempfile::tempdir().unwrap();
    let disk = OnSmallDisk::start(&binary("logging"), folder.path(), 2 << 20);
    let Some(disk) = disk else {
        return;
    };
    let mut facade = Command::new(binary("facade"));
    facade.args(["--logging", &disk.process.url(), "--deadline", "300ms"]);
    let facade = Process::start(facade, free_address());
    let http = Client::new();
    let post = async || {
        let request = http.post(facade.url()).body("x".repeat(60_000));
        request.send().await.unwrap()
    };
    let mut stored = 0;
    let refused = loop {
        let response = post().await;
        if response.status() != 200 {
            break response;
        }
        stored += 1;
        assert!(
            stored < 32,
            "more messages are acknowledged than the disk can hold"
        );
    };
    let refused = problem(refused, 503).await;
    assert_eq!(refused["stored"], "no");
    assert!(
        refused["detail"]
            .as_str()
            .unwrap()
            .contains("disk that holds the map is full")
    );
    let read: Value = http
        .get(facade.url())
        .send()
        .await
        .unwrap()
        .json()
        .await
        .unwrap();
    assert_eq!(read["count"], stored);
    disk.free_space();
    assert_eq!(post().await.status(), 200);
}
