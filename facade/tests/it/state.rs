//! What operators are told of a system in which something is wrong, without a POST that finds it out: `/stats`,
//! `/readyz?verbose` and the gauges of `/metrics`.

use axum::http::StatusCode;
use axum::response::IntoResponse;
use axum::{Json, Router, routing};
use futures_util::StreamExt;
use futures_util::stream;
use reqwest::Client;
use serde_json::{Value, json};
use testing::process::{OnSmallDisk, Process, free_address};
use testing::redis_servers::{RedisCluster, RedisServer};

use crate::description::assert_described;
use crate::processes::{Processes, binary, facade};
use crate::stats::{wait_for, wait_for_stats};
use crate::system::{
    System, nobody, problem, serve, serve_instance, serve_stats, stats_of, with_stats,
};

fn has_problem(stats: &Value, words: &str) -> bool {
    let problems = stats["problems"].as_array().unwrap();
    let mut problems = problems.iter().map(|problem| problem.as_str().unwrap());
    problems.any(|problem| problem.contains(words))
}

/// The value of a gauge of the facade.
async fn gauge(http: &Client, url: &str, series: &str) -> Option<f64> {
    let metrics = http.get(format!("{url}/metrics")).send().await.unwrap();
    let metrics = metrics.text().await.unwrap();
    let mut lines = metrics.lines();
    let value = lines.find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
    value.map(|value| value.parse().unwrap())
}

async fn assert_gauges(system: &Processes, gauges: &[(&str, f64)]) {
    for (series, value) in gauges {
        let found = gauge(&system.http, &system.facade.url(), series).await;
        assert_eq!(found, Some(*value), "{series}");
    }
}

/// Nobody posts. The messages service dies, an instance is paused, the map's folder is deleted: each is told by
/// `/stats`, `/readyz?verbose` and the gauges, and so is its end.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_is_told_without_a_post() {
    let folder = tempfile::tempdir().unwrap();
    let map = folder.path().join("map");
    let location = format!("lmdb:{}", map.display());
    let mut system = Processes::on_map(&["--map", &location], &[]);
    let well = wait_for(&system, |stats| stats["problems"] == json!([])).await;
    for (index, row) in well["instances"].as_array().unwrap().iter().enumerate() {
        assert_eq!(row["name"], format!("logging-{}", index + 1));
        assert_eq!(row["instance"], system.logging[index].address.to_string());
        assert_eq!((&row["up"], &row["ready"]), (&json!(true), &json!(true)));
    }
    assert_gauges(
        &system,
        &[
            ("facade_instance_up{upstream=\"logging-2\"}", 1.0),
            ("facade_instance_ready{upstream=\"logging-2\"}", 1.0),
            ("facade_map_complete", 1.0),
            ("facade_messages_up", 1.0),
            ("facade_problems", 0.0),
        ],
    )
    .await;

    system.messages.kill();
    let gone = "the messages service refuses connections";
    let stats = wait_for(&system, |stats| has_problem(stats, gone)).await;
    assert_eq!(stats["messages"]["up"], false);
    assert_gauges(&system, &[("facade_messages_up", 0.0)]).await;
    let readiness = system.facade.readiness();
    assert!(readiness.starts_with("HTTP/1.1 200"), "{readiness}");
    assert!(readiness.contains("\"status\":\"degraded\""), "{readiness}");

    system.logging[1].signal("STOP");
    let stats = wait_for(&system, |stats| stats["instances"][1]["up"] == false).await;
    assert_eq!(stats["instances"][1]["ready"], false);
    let since = |stats: &Value, index: usize| stats["instances"][index]["since"].clone();
    assert_eq!(since(&stats, 0), since(&well, 0));
    assert_ne!(since(&stats, 1), since(&well, 1));
    assert_eq!(stats["instances"][1]["received"], Value::Null);
    assert_eq!(stats["map"]["total"]["complete"], false);
    assert!(
        has_problem(&stats, "logging-2 did not answer in time"),
        "{stats:#}"
    );
    assert_gauges(
        &system,
        &[
            ("facade_instance_up{upstream=\"logging-2\"}", 0.0),
            ("facade_instance_ready{upstream=\"logging-2\"}", 0.0),
            ("facade_map_complete", 1.0),
            ("facade_problems", 2.0),
        ],
    )
    .await;
    // However many ask meanwhile, all get an answer.
    let asked = stream::iter(0..300).map(async |_| {
        let url = format!("{}/stats", system.facade.url());
        system.http.get(url).send().await.unwrap().status()
    });
    let statuses: Vec<StatusCode> = asked.buffer_unordered(30).collect().await;
    let answered = statuses.iter().filter(|status| **status == StatusCode::OK);
    assert_eq!(answered.count(), 300);
    system.logging[1].signal("CONT");
    wait_for(&system, |stats| stats["instances"][1]["up"] == true).await;

    std::fs::remove_dir_all(&map).unwrap();
    let deleted = "all 3 logging instances are not ready: data.mdb in the map's folder";
    let stats = wait_for(&system, |stats| has_problem(stats, deleted)).await;
    assert_eq!(stats["problems"].as_array().unwrap().len(), 2, "{stats:#}");
    assert_eq!(stats["instances"][0]["up"], true);
    assert_eq!(stats["instances"][0]["ready"], false);
    assert_gauges(
        &system,
        &[
            ("facade_instance_up{upstream=\"logging-1\"}", 1.0),
            ("facade_instance_ready{upstream=\"logging-1\"}", 0.0),
        ],
    )
    .await;
    let instance = gauge(&system.http, &system.logging[0].url(), "logging_ready").await;
    assert_eq!(instance, Some(0.0));
    let readiness = system.facade.readiness();
    assert!(readiness.starts_with("HTTP/1.1 503"), "{readiness}");
    assert!(readiness.contains("was deleted"), "{readiness}");
    // A check of each second repeats no line.
    let log = system.logging[0].log();
    let failed = log
        .iter()
        .filter(|line| line.contains("a write transaction failed"));
    assert_eq!(failed.count(), 1);
}

/// A full disk makes the instance unready as soon as an entry was refused, and is a problem before.
#[tokio::test(flavor = "multi_thread")]
async fn full_disk_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let Some(disk) = OnSmallDisk::start(&binary("logging"), folder.path(), 2 << 20) else {
        return;
    };
    let flags = ["--deadline", "300ms"];
    let command = facade(&disk.process.url(), &nobody().url(), &flags);
    let facade = Process::start(command, free_address());
    let http = Client::new();
    let url = format!("{}/stats", facade.url());
    let full = "the disk that holds the map is full";
    let stats = wait_for_stats(&http, &url, |stats| has_problem(stats, full)).await;
    assert_eq!(stats["instances"][0]["ready"], true);
    let post = async |length: usize| {
        let request = http.post(facade.url()).body("x".repeat(length));
        request.send().await.unwrap().status()
    };
    while post(60_000).await == 200 {}
    wait_for_stats(&http, &url, |stats| stats["instances"][0]["ready"] == false).await;
    assert!(facade.readiness().starts_with("HTTP/1.1 503"));
    disk.free_space();
    assert_eq!(post(60_000).await, 200);
    wait_for_stats(&http, &url, |stats| stats["instances"][0]["ready"] == true).await;
}

/// A shard whose backup is away, and then one that has died as a whole.
#[tokio::test(flavor = "multi_thread")]
async fn lost_backup_and_lost_shard_are_told() {
    let mut cluster = RedisCluster::start();
    let system = Processes::on_map(&["--map", &cluster.url()], &[]);
    let well = wait_for(&system, |stats| stats["problems"] == json!([])).await;
    assert_eq!(well["map"]["total"].get("complete"), None);
    cluster.nodes[3].kill();
    let (primary, replica) = (cluster.nodes[0].address(), cluster.nodes[3].address());
    let without = format!("redis {primary}: 0 of 1 backups");
    let is_told = |stats: &Value| {
        stats["map"]["total"]["complete"] == false
            && has_problem(stats, &format!("redis {replica}"))
            && (has_problem(stats, &without) || has_problem(stats, "NOREPLICAS"))
    };
    wait_for(&system, is_told).await;
    assert_gauges(&system, &[("facade_map_complete", 0.0)]).await;
    let readiness = system.facade.readiness();
    assert!(readiness.starts_with("HTTP/1.1 200"), "{readiness}");
    assert!(readiness.contains("\"status\":\"degraded\""), "{readiness}");
    assert!(
        readiness.contains(&format!("primary {primary}")),
        "{readiness}"
    );

    cluster.nodes[0].kill();
    let lost = format!("redis {primary} cannot be reached");
    let stats = wait_for(&system, |stats| has_problem(stats, &lost)).await;
    let rows = stats["map"]["members"].as_array().unwrap();
    let row = rows.iter().find(|row| row["member"] == primary.as_str());
    assert_eq!(row.unwrap()["up"], false, "{stats:#}");
    // Other partitions take messages, but no GET is whole.
    wait_for(&system, |stats| stats["instances"][0]["ready"] == false).await;
    let readiness = system.facade.readiness();
    assert!(readiness.starts_with("HTTP/1.1 503"), "{readiness}");
    assert!(readiness.contains(&lost), "{readiness}");
    assert_eq!(
        system.post("stored in another partition").await.status(),
        200
    );
}

/// A partition of a server is deleted behind the instances' back.
#[tokio::test(flavor = "multi_thread")]
async fn lost_partition_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let server = RedisServer::single(folder.path());
    let map = format!("redis://{}", server.address());
    let system = Processes::on_map(&["--map", &map], &[]);
    wait_for(&system, |stats| stats["problems"] == json!([])).await;
    let _: i64 = server.ask(&["DEL", "entries:{7}"]);
    wait_for(&system, |stats| {
        has_problem(stats, "lacks 1 of its 271 partitions")
            && stats["map"]["total"]["complete"] == false
    })
    .await;
    let readiness = system.facade.readiness();
    assert!(readiness.contains("lacks 1 of its 271"), "{readiness}");
}

/// Names are in statistics, log and errors; `x-logging-instance` stays `HOST:PORT`.
#[tokio::test(flavor = "multi_thread")]
async fn instances_have_names() {
    let other = nobody().url();
    let urls = format!(
        "red={},{},logging-2={other}",
        nobody().url(),
        nobody().url()
    );
    let command = facade(&urls, &nobody().url(), &["--deadline", "500ms"]);
    let process = Process::start(command, free_address());
    let http = Client::new();
    let url = format!("{}/stats", process.url());
    let stats = wait_for_stats(&http, &url, |stats| {
        stats["instances"].as_array().unwrap().len() == 3
    })
    .await;
    let names = stats["instances"]
        .as_array()
        .unwrap()
        .iter()
        .map(|row| &row["name"]);
    assert_eq!(names.collect::<Vec<_>>(), ["red", "logging-2", "logging-1"]);
    let all = "all 3 logging instances refuse connections";
    assert!(has_problem(&stats, all), "{stats:#}");
    let post = http.post(process.url()).body("a").send().await.unwrap();
    let get = http.get(process.url()).send().await.unwrap();
    for refused in [post, get] {
        let refused = problem(refused, 503).await;
        let detail = refused["detail"].as_str().unwrap();
        assert!(detail.contains(all), "{detail}");
        assert!(!detail.contains("127.0.0.1"), "{detail}");
    }
    process.wait_for_line(|line| line.contains("red is down: it refuses connections"));
}

/// What an instance tells of itself cannot stop the facade's statistics.
#[tokio::test]
async fn numbers_of_an_instance_may_be_anything() {
    let most = u64::MAX;
    let member = json!({
        "member": "map", "role": "folder", "up": true, "partitions": most, "entries": most,
        "gets": most, "puts": most, "entry_memory_bytes": most, "backups": most,
        "backup_memory_bytes": most, "used_memory_bytes": most,
    });
    let instance = || with_stats(most, None, json!([member, member]));
    let system = System::with_stubs(vec![instance(), instance()], nobody(), &[]);
    let stats = system.get("/stats").await;
    assert_eq!(stats.status(), 200);
    let stats: Value = stats.json().await.unwrap();
    assert_described(&stats, "Stats");
    assert_eq!(stats["map"]["total"]["entries"], u64::MAX);
    assert_eq!(stats["instances"][1]["share"], 1.0);
}

/// An instance's share is of what all received lately, not since they began.
#[tokio::test]
async fn share_is_of_what_was_received_lately() {
    let instance = |received: u64, lately: u64| {
        let mut stats = stats_of(received, None, json!([]));
        stats["received_lately"] = json!(lately);
        serve_stats(stats)
    };
    let logging = vec![instance(1000, 10), instance(10, 30)];
    let system = System::with_stubs(logging, nobody(), &[]);
    let stats: Value = system.get("/stats").await.json().await.unwrap();
    let shares = [0, 1].map(|index| stats["instances"][index]["share"].as_f64());
    assert_eq!(shares, [Some(0.25), Some(0.75)]);
}

/// The tail of a GET says why the messages service gave no reply, and not where it asked.
#[tokio::test]
async fn error_of_the_messages_service_names_no_address() {
    let reply = async || {
        let problem = json!({
            "status": 502,
            "detail": "10.1.2.3:9000 and http://10.1.2.3/reply and messages.internal:80 are away",
        });
        (StatusCode::BAD_GATEWAY, Json(problem)).into_response()
    };
    let messages = serve(Router::new().route("/", routing::get(reply)));
    let page = "{\"count\":0}\n";
    let empty = serve_instance(Router::new().route("/", routing::get(async move || page)));
    let system = System::with_stubs(vec![empty], messages, &[]);
    let error = system.read("").await.messages_service_error.unwrap();
    assert_eq!(
        error,
        "the messages service answered 502 Bad Gateway: … and … and … are away"
    );
}

/// Two equal names, and a name that is none.
#[test]
fn wrong_names_are_refused() {
    for (urls, words) in [
        ("a=http://127.0.0.1:1,a=http://127.0.0.1:2", "the name a"),
        ("a/b=http://127.0.0.1:1", "NAME=http://HOST:PORT"),
        ("=http://127.0.0.1:1", "NAME=http://HOST:PORT"),
        ("a=127.0.0.1:1", "http://127.0.0.1:1"),
    ] {
        testing::command_line::assert_refused(&binary("facade"), &["--logging", urls], words);
    }
}
