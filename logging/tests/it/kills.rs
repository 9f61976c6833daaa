//! Processes on one LMDB folder that are killed while entries are put: no acknowledged entry is lost, and
//! the remaining processes keep storing.

use std::fs::File;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::entry::{Entry, Outcome};
use reqwest::Client;
use testing::load::{Load, Record};
use testing::process::{PATIENCE, Process, free_address};
use uuid::Uuid;

use crate::processes::{all, entry, logging, put, put_one};

/// Promises 1 and 3 on the embedded map, with everything that LMDB's locks must survive: three
/// processes on one folder, a random one killed every 50 ms for 30 s under load.
#[tokio::test(flavor = "multi_thread")]
async fn acknowledged_entries_survive_kills_of_random_processes() {
    const INTERVAL: Duration = Duration::from_millis(50);
    let mut began = None;
    let kills = kill_under_load(Duration::from_secs(30), move |processes, kills, _| {
        let due = *began.get_or_insert_with(Instant::now) + INTERVAL * kills;
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
        let victim = random_below(processes.len());
        processes[victim].kill();
        vec![victim]
    });
    let kills = kills.await;
    assert!(
        kills > 200,
        "the run was too slow to prove anything: {kills} kills"
    );
}

/// Two of three processes are killed at once, repeatedly: each time the third keeps storing, also when it
/// was waiting for its turn behind both.
#[tokio::test(flavor = "multi_thread")]
async fn survivor_keeps_storing_when_the_others_are_killed_at_once() {
    /// More entries than the eight writers can have in flight, so the survivor has stored some of them.
    const MORE: u64 = 100;
    let kills = kill_under_load(Duration::from_secs(15), |processes, _, load| {
        let survivor = random_below(processes.len());
        let victims: Vec<usize> = (0..processes.len())
            .filter(|index| *index != survivor)
            .collect();
        victims.iter().for_each(|victim| processes[*victim].kill());
        let goal = load.acknowledged() + MORE;
        let begin = Instant::now();
        while load.acknowledged() < goal {
            assert!(begin.elapsed() < PATIENCE, "the survivor stores nothing");
            std::thread::sleep(Duration::from_millis(1));
        }
        victims
    });
    let kills = kills.await;
    assert!(
        kills > 50,
        "the run was too slow to prove anything: {kills} kills"
    );
}

fn random_below(count: usize) -> usize {
    Uuid::new_v4().as_u128() as usize % count
}

/// Runs three processes on one folder under load. `kill` gets the processes, the number of kills so far and
/// the load; it kills some processes and returns their indexes, and they are restarted. At the end every
/// process must have every acknowledged entry, once and in order. Returns the number of
/// kills.
async fn kill_under_load(
    length: Duration,
    mut kill: impl FnMut(&mut [Process], u32, &Load) -> Vec<usize> + Send + 'static,
) -> u32 {
    let folder = tempfile::tempdir().unwrap();
    let addresses: Vec<SocketAddr> = (0..3).map(|_| free_address()).collect();
    let urls = addresses.iter().map(|address| format!("http://{address}"));
    let urls: Arc<[String]> = urls.collect();
    let client = Client::builder().timeout(Duration::from_secs(2));
    let writer = client.build().unwrap();
    let load = Load::start(8, move |number| {
        write_batch(writer.clone(), urls.clone(), number)
    });
    let path = folder.path().to_owned();
    let killed = tokio::task::spawn_blocking(move || {
        let start = |address: &SocketAddr| Process::start(quiet(&path), *address);
        let mut processes: Vec<Process> = addresses.iter().map(start).collect();
        let began = Instant::now();
        let mut kills = 0;
        while began.elapsed() < length {
            for victim in kill(&mut processes, kills, &load) {
                processes[victim] = start(&addresses[victim]);
                kills += 1;
            }
        }
        (processes, kills, load)
    });
    let (processes, kills, load) = killed.await.unwrap();
    let record = load.finish().await;
    let acknowledged = record.acknowledged.len();
    println!("{kills} kills, {acknowledged} entries acknowledged");
    assert!(acknowledged > 2000, "too little load to prove anything");
    let http = Client::new();
    for process in &processes {
        record.assert_kept(&all(&http, &process.url()).await);
    }
    kills
}

/// A writer waits for its turn at the lock of a file, which the kernel passes on however its holder ends,
/// and not at LMDB's own lock, whose wake-up can be lost.
#[tokio::test]
async fn turn_to_write_is_the_lock_of_a_file() {
    let folder = tempfile::tempdir().unwrap();
    let process = Process::start(logging(folder.path()), free_address());
    let http = Client::new();
    let url = process.url();
    let turns = File::open(folder.path().join("map/turns")).unwrap();
    turns.lock().unwrap();
    let kept_out = put_one(&http, &url, &entry("early")).await;
    assert!(matches!(kept_out, Outcome::Refused { .. }), "{kept_out:?}");
    turns.unlock().unwrap();
    let entry = entry("now");
    assert_eq!(put_one(&http, &url, &entry).await, Outcome::Stored);
    assert_eq!(all(&http, &url).await, [entry]);
}

/// Posts a batch to random instances until each entry is acknowledged, wherever that is.
async fn write_batch(http: Client, urls: Arc<[String]>, number: u64) -> Record {
    let entries: Vec<Entry> = (0..5).map(|n| entry(&format!("{number}/{n}"))).collect();
    let is_stored = |o: &Outcome| matches!(o, Outcome::Stored | Outcome::Duplicate);
    loop {
        match put(&http, &urls[random_below(urls.len())], &entries).await {
            Ok(outcomes) if outcomes.iter().all(is_stored) => break,
            Ok(_) => {}
            Err(_) => tokio::task::yield_now().await,
        }
    }
    let acknowledged = entries.into_iter().map(|entry| (entry.uuid, entry.msg));
    Record {
        acknowledged: acknowledged.collect(),
        failed: Vec::new(),
    }
}

fn quiet(folder: &Path) -> Command {
    let mut command = logging(folder);
    command.env("RUST_LOG", "warn,common=info,logging=info");
    command
}
