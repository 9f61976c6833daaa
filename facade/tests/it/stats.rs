//! `GET /stats` of the facade, compared with the entries that were stored and read.

use std::time::Instant;

use reqwest::Client;
use serde_json::{Value, json};
use testing::engine::Engine;
use testing::process::{LOOK_AGAIN, PATIENCE};
use testing::redis_servers::RedisCluster;
use uuid::Uuid;

use crate::description::assert_described;
use crate::processes::Processes;
use crate::system::engine_under_test;

pub(crate) async fn wait_for(system: &Processes, is_wanted: impl Fn(&Value) -> bool) -> Value {
    let url = format!("{}/stats", system.facade.url());
    wait_for_stats(&system.http, &url, is_wanted).await
}

pub(crate) async fn wait_for_stats(
    http: &Client,
    url: &str,
    is_wanted: impl Fn(&Value) -> bool,
) -> Value {
    let begin = Instant::now();
    loop {
        let stats: Value = http.get(url).send().await.unwrap().json().await.unwrap();
        assert_described(&stats, "Stats");
        if is_wanted(&stats) {
            return stats;
        }
        assert!(begin.elapsed() < PATIENCE, "{stats:#}");
        tokio::time::sleep(LOOK_AGAIN).await;
    }
}

/// Waits until nothing is wrong and every backup is complete; then every entry must be counted once, by its
/// owner, and once by a replica.
pub(crate) async fn assert_counted(system: &Processes, entries: usize) {
    let settled = wait_for(system, |stats| {
        let total = &stats["map"]["total"];
        let is_counted = total["entries"] == entries && total["backups"] == total["entries"];
        stats["problems"] == json!([]) && is_counted
    });
    let stats = settled.await;
    let total = &stats["map"]["total"];
    assert_eq!(total["puts"], entries);
    assert_eq!(total.get("complete"), None, "{stats:#}");
}

fn sum(rows: &Value, column: &str) -> u64 {
    let rows = rows.as_array().unwrap().iter();
    rows.map(|row| row[column].as_u64().unwrap()).sum()
}

/// Entries are stored through all instances, some twice, while one of them is killed and restarted.
#[tokio::test(flavor = "multi_thread")]
async fn totals_equal_the_entries_stored_and_read() {
    let mut system = Processes::start();
    let empty = wait_for(&system, |stats| stats["problems"] == json!([])).await;
    assert_eq!(empty["map"]["total"]["entries"], 0);
    let mut stored = 0;
    for round in 0..3 {
        for n in 0..100 {
            let key = Uuid::now_v7().to_string();
            for _ in 0..=n % 2 {
                let post = system.http.post(system.facade.url());
                let post = post.header("idempotency-key", &key).body(n.to_string());
                assert_eq!(post.send().await.unwrap().status(), 200);
            }
            stored += 1;
        }
        system.logging[round].kill();
        system.restart_logging(round);
    }
    let read = system.read_all().await;
    assert_eq!(read.len() as u64, stored);

    let stats = wait_for(&system, |stats| {
        stats["problems"] == json!([]) && stats["map"]["total"]["gets"] == stored
    })
    .await;
    let (members, total) = (&stats["map"]["members"], &stats["map"]["total"]);
    assert_eq!(total["entries"], stored);
    assert_eq!(total["puts"], stored);
    assert_eq!(total["gets"], stored, "{stats:#}");
    assert_eq!(total.get("complete"), None);
    let (engine, rows, partitions, backups) = match engine_under_test() {
        Engine::Lmdb => ("lmdb", 1, 1, 0),
        Engine::RedisServer => ("redis", 1, 271, 0),
        Engine::RedisCluster => ("redis-cluster", 6, 2 * 271, stored),
    };
    assert_eq!(stats["map"]["engine"], engine);
    assert_eq!(members.as_array().unwrap().len(), rows);
    assert_eq!(sum(members, "partitions"), partitions);
    assert_eq!(total["backups"], backups);
    for column in [
        "entries",
        "gets",
        "puts",
        "entry_memory_bytes",
        "backups",
        "backup_memory_bytes",
    ] {
        assert_eq!(total[column], sum(members, column), "{column}");
    }
    assert!(total["entry_memory_bytes"].as_u64() > Some(0));
    assert_eq!(stats["facade"]["posts"], stored * 3 / 2);
    assert_eq!(stats["facade"]["gets"], 1);
    assert_eq!(stats["facade"]["errors"], json!({}));
}

/// What each instance received since its start.
#[tokio::test(flavor = "multi_thread")]
async fn instances_have_their_shares_and_outcomes() {
    let mut system = Processes::start();
    let key = Uuid::now_v7().to_string();
    for (msg, status) in [("a", 200), ("a", 200), ("b", 422)] {
        let post = system.http.post(system.facade.url()).body(msg);
        let post = post.header("idempotency-key", &key).send().await.unwrap();
        assert_eq!(post.status(), status);
    }
    for n in 0..97 {
        assert_eq!(system.post(&n.to_string()).await.status(), 200);
    }
    let before = wait_for(&system, |stats| sum(&stats["instances"], "received") == 100).await;
    let instances = &before["instances"];
    let outcomes = |word: &str| -> u64 {
        let rows = instances.as_array().unwrap().iter();
        rows.map(|row| row["outcomes"][word].as_u64().unwrap())
            .sum()
    };
    assert_eq!(outcomes("stored"), 98);
    assert_eq!((outcomes("duplicate"), outcomes("conflict")), (1, 1));
    assert_eq!(before["facade"]["errors"], json!({"422": 1}));
    assert_eq!(before["facade"]["posts"], 100);
    for (row, process) in instances.as_array().unwrap().iter().zip(&system.logging) {
        assert_eq!(row["instance"], process.address.to_string());
        assert_eq!(row["up"], true);
        assert_eq!(row["in_flight"], 0);
        let share = row["received"].as_f64().unwrap() / 100.0;
        assert!((row["share"].as_f64().unwrap() - share).abs() < 0.001);
        assert!(row["put_p50_ms"].as_f64() > Some(0.0));
        assert!(row["put_p99_ms"].as_f64() >= row["put_p50_ms"].as_f64());
    }

    system.logging[1].kill();
    assert_eq!(system.read_all().await.len(), 98);
    let is_down = |stats: &Value| stats["instances"][1]["up"] == false;
    let down = wait_for(&system, is_down).await;
    assert_eq!(down["instances"][1]["received"], Value::Null);
    assert!(
        down["problems"][0]
            .as_str()
            .unwrap()
            .starts_with("logging-2 "),
        "{down:#}"
    );
    let total = &down["map"]["total"];
    assert_eq!(
        (&total["entries"], &total["complete"]),
        (&json!(98), &json!(false))
    );
}

/// A paused replica and a paused primary have rows with `"up":false`; the other rows keep their numbers.
#[tokio::test(flavor = "multi_thread")]
async fn member_that_hangs_is_a_row_without_numbers() {
    let cluster = RedisCluster::start();
    let system = Processes::on_map(&["--map", &cluster.url()], &[]);
    for n in 0..50 {
        assert_eq!(system.post(&n.to_string()).await.status(), 200);
    }
    wait_for(&system, |stats| stats["map"]["total"]["entries"] == 50).await;
    let paused = &cluster.nodes[4];
    paused.signal("STOP");
    let name = paused.address();
    let is_down = |stats: &Value| {
        let mut rows = stats["map"]["members"].as_array().unwrap().iter();
        rows.any(|row| row["member"] == name.as_str() && row["up"] == false)
    };
    let stats = wait_for(&system, is_down).await;
    paused.signal("CONT");
    let members = stats["map"]["members"].as_array().unwrap();
    let row = members
        .iter()
        .find(|row| row["member"] == name.as_str())
        .unwrap();
    assert_eq!((&row["up"], &row["entries"]), (&json!(false), &Value::Null));
    assert_eq!(stats["map"]["total"]["complete"], false);
    assert_eq!(stats["map"]["total"]["entries"], 50);
    let problem = format!("redis {name} does not answer");
    assert!(
        stats["problems"].to_string().contains(&problem),
        "{stats:#}"
    );
}
