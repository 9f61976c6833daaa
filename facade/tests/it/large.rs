//! A log of a million entries, and a log of the largest messages: reads are complete and in order in each
//! format, and neither facade nor logging keeps the log, or the backlog of slow readers, in memory.

use std::io;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::api::write_entry;
use common::entry::Entry;
use futures_util::{TryStreamExt, stream};
use reqwest::{Body, RequestBuilder};
use testing::engine::Engine;
use testing::process::Process;
use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncReadExt};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};
use tokio_util::io::StreamReader;
use uuid::{Builder, Uuid};

use crate::processes::{Processes, binary};
use crate::system::engine_under_test;

/// The growth in anonymous memory that each process is allowed while the log is loaded and read.
const MAX_GROWTH_KIB: u64 = 32 * 1024;

const SLOW_READERS: usize = 10;
const SLOW_BYTES_PER_SECOND: usize = 8 * 1024;

/// The time for which slow readers read on the default engine.
const SLOW_READING: Duration = Duration::from_secs(60);

/// The same on the other engines, where the facade reads in the same way.
const SLOW_READING_ELSEWHERE: Duration = Duration::from_secs(15);

#[tokio::test(flavor = "multi_thread")]
async fn million_entries_are_read_whole_in_constant_memory() {
    let message = |n: usize| format!("message number {n}, long enough to be one that people write");
    read_within_memory(1_000_000, message).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn largest_messages_are_read_whole_in_constant_memory() {
    let message = |n: usize| {
        let start = format!("{n} ");
        let rest = (64 << 10) - start.len();
        start + "\u{1}".repeat(rest).as_str()
    };
    read_within_memory(1500, message).await;
}

/// Readers and followers that stop within a message: what each costs does not depend on its size.
#[tokio::test(flavor = "multi_thread")]
async fn stopped_readers_of_large_messages_cost_little() {
    const EACH: usize = 16;
    let system = Processes::start_with(&["--max-message", "1MiB"]);
    for n in 0..3 {
        let msg = format!("{n} {}", "\u{1}".repeat(1_000_000));
        assert_eq!(system.post(&msg).await.status(), 200);
    }
    let memory = MemoryWatch::start(&system);
    let mut stopped = Vec::new();
    for accept in ["application/json", "text/event-stream"] {
        for _ in 0..EACH {
            let log = system.http.get(system.facade.url());
            let mut body = read_body(log.header("accept", accept)).await;
            body.read_exact(&mut [0; 100_000]).await.unwrap();
            stopped.push(body);
        }
    }
    for (name, growth) in memory.finish() {
        println!("{name} grew by {growth} KiB");
        assert!(growth < 2 * MAX_GROWTH_KIB, "{name} grew by {growth} KiB");
    }
}

/// A map of before may hold a message whose line is longer than an instance accepts now.
#[tokio::test(flavor = "multi_thread")]
async fn message_that_is_six_times_as_long_when_it_is_escaped_is_read_and_moved() {
    let map = engine_under_test().empty_map();
    let folder = tempfile::tempdir().unwrap();
    let transfer = |task: &str, file: &str, map: &str| {
        let mut command = Command::new(binary("logging"));
        command
            .args(["--map", map, task])
            .arg(folder.path().join(file));
        let output = command.output().unwrap();
        assert!(output.status.success(), "{task}: {output:?}");
    };
    let posted = [1, 2].map(|second| Entry {
        uuid: Builder::from_unix_timestamp_millis(1000 * second, &[7; 10]).into_uuid(),
        msg: "\u{7f}".repeat(if second == 1 { 2_000_000 } else { 1 }),
    });
    let mut lines = Vec::new();
    for Entry { uuid, msg } in &posted {
        write_entry(&mut lines, *uuid, msg);
    }
    let whole = [&lines[..], b"{\"count\":2}\n"].concat();
    std::fs::write(folder.path().join("old"), &whole).unwrap();
    transfer("import", "old", &map.location);
    transfer("export", "new", &map.location);
    assert!(std::fs::read(folder.path().join("new")).unwrap() == whole);

    let system = Processes::on_map(&["--map", &map.location], &[]);
    assert!(system.read_all().await == posted);
    let one = format!("{}/{}", system.facade.url(), posted[0].uuid);
    let one: Entry = system
        .http
        .get(one)
        .send()
        .await
        .unwrap()
        .json()
        .await
        .unwrap();
    assert!(one == posted[0]);
    let all = format!("{}/?follow=true&after={}", system.facade.url(), Uuid::nil());
    let follower = system
        .http
        .get(all)
        .header("accept", "application/x-ndjson");
    let mut followed = vec![0; lines.len()];
    read_body(follower)
        .await
        .read_exact(&mut followed)
        .await
        .unwrap();
    assert!(followed == lines);
}

async fn read_within_memory(
    count: usize,
    message: impl Fn(usize) -> String + Copy + Send + 'static,
) {
    let system = Processes::start();
    let memory = MemoryWatch::start(&system);
    let lines = (0..count).map(move |n| {
        let line = serde_json::to_string(&message(n)).unwrap() + "\n";
        Ok::<_, io::Error>(line)
    });
    let upload = system
        .http
        .post(system.facade.url())
        .header("content-type", "application/x-ndjson")
        .body(Body::wrap_stream(stream::iter(lines)));
    let summary: serde_json::Value = upload.send().await.unwrap().json().await.unwrap();
    assert_eq!(summary["stored"], count, "{summary}");

    for (format, order) in [
        ("application/json", "asc"),
        ("application/x-ndjson", "asc"),
        ("text/plain", "asc"),
        ("application/x-ndjson", "desc"),
    ] {
        read_all(&system, format, order, count, message).await;
    }
    let readers = (0..SLOW_READERS).map(|_| {
        let log = system.http.get(system.facade.url());
        read_slowly(log)
    });
    readers.collect::<JoinSet<()>>().join_all().await;
    for (name, growth) in memory.finish() {
        println!("{name} grew by {growth} KiB while {count} messages were stored and read");
        assert!(growth < MAX_GROWTH_KIB, "{name} grew by {growth} KiB");
    }
}

/// Reads the log line by line and checks that it holds the messages 0 to `count`, each once, in ascending
/// or descending UUID order. On LMDB that is the order of the POSTs; on a cluster a message gets a later
/// UUID when its partition has no primary.
async fn read_all(
    system: &Processes,
    format: &str,
    order: &str,
    count: usize,
    message: impl Fn(usize) -> String,
) {
    let mut last = None;
    let mut seen = 0;
    let mut is_seen = vec![false; count];
    let mut tail = String::new();
    let url = format!("{}/?order={order}", system.facade.url());
    let mut body = read_body(system.http.get(url).header("accept", format)).await;
    let mut buffer = String::new();
    while body.read_line(&mut buffer).await.unwrap() > 0 {
        let whole = std::mem::take(&mut buffer);
        let line = whole.strip_suffix('\n').expect("each line ends");
        let entry = match format {
            "application/json" if seen < count => {
                if line == "{\"logging_service\":[" {
                    continue;
                }
                serde_json::from_str(line.trim_end_matches(',')).unwrap()
            }
            "application/x-ndjson" if seen < count => serde_json::from_str(line).unwrap(),
            "text/plain" if seen < count => {
                let (uuid, msg) = line.split_once(' ').unwrap();
                Entry {
                    uuid: uuid.parse().unwrap(),
                    msg: msg.replace("\\u{1}", "\u{1}"),
                }
            }
            _ => {
                tail += line;
                continue;
            }
        };
        let (is_next, posted) = match order {
            "desc" => (last.is_none_or(|last| entry.uuid < last), count - 1 - seen),
            _ => (last.is_none_or(|last| entry.uuid > last), seen),
        };
        assert!(is_next, "{} comes after {last:?}", entry.uuid);
        let mut words = entry.msg.split(|c: char| !c.is_ascii_digit());
        let number = words.find(|digits| !digits.is_empty()).unwrap();
        let number: usize = number.parse().unwrap();
        assert_eq!(entry.msg, message(number));
        assert!(
            !std::mem::replace(&mut is_seen[number], true),
            "message {number} occurs twice"
        );
        if engine_under_test() == Engine::Lmdb {
            assert_eq!(number, posted);
        }
        last = Some(entry.uuid);
        seen += 1;
    }
    assert_eq!(seen, count);
    let reply = "Messages Service not Implemented";
    let expected = match format {
        "application/json" => format!("],\"messages_service\":\"{reply}\",\"count\":{count}}}"),
        "application/x-ndjson" => format!("{{\"messages_service\":\"{reply}\",\"count\":{count}}}"),
        _ => format!("{count} messages{reply}"),
    };
    assert_eq!(tail, expected);
}

/// Reads 8 KiB a second, twice the minimum, and must get it each time.
async fn read_slowly(log: RequestBuilder) {
    let mut body = read_body(log).await;
    let slow_reading = match engine_under_test() {
        Engine::Lmdb => SLOW_READING,
        Engine::RedisServer | Engine::RedisCluster => SLOW_READING_ELSEWHERE,
    };
    let began = Instant::now();
    let mut buffer = [0; SLOW_BYTES_PER_SECOND];
    for second in 1.. {
        body.read_exact(&mut buffer).await.unwrap();
        let due = Duration::from_secs(second);
        if due > slow_reading {
            return;
        }
        sleep_until(began + due).await;
    }
}

/// The body of an answer; one that is cut off ends with an error.
async fn read_body(request: RequestBuilder) -> impl AsyncBufRead + Unpin {
    let response = request.send().await.unwrap();
    assert_eq!(response.status(), 200);
    StreamReader::new(response.bytes_stream().map_err(io::Error::other))
}

/// Samples the anonymous memory of facade and logging, which leaves out LMDB's file pages.
struct MemoryWatch {
    is_over: Arc<AtomicBool>,
    sampling: std::thread::JoinHandle<Vec<(String, u64)>>,
}

impl MemoryWatch {
    fn start(system: &Processes) -> Self {
        let name = |process: &Process| (process.address.to_string(), process.pid());
        let watched = system.logging.iter().chain([&system.facade]).map(name);
        let watched: Vec<(String, u32)> = watched.collect();
        let before: Vec<u64> = watched.iter().map(|(_, pid)| rss_anon_kib(*pid)).collect();
        let is_over = Arc::new(AtomicBool::new(false));
        let until = is_over.clone();
        let sampling = std::thread::spawn(move || {
            let mut most = before.clone();
            while !until.load(Ordering::Relaxed) {
                for (most, (_, pid)) in most.iter_mut().zip(&watched) {
                    *most = rss_anon_kib(*pid).max(*most);
                }
                std::thread::sleep(Duration::from_millis(20));
            }
            let growth = most.iter().zip(before).map(|(most, before)| most - before);
            let names = watched.into_iter().map(|(name, _)| name);
            names.zip(growth).collect()
        });
        Self { is_over, sampling }
    }

    fn finish(self) -> Vec<(String, u64)> {
        self.is_over.store(true, Ordering::Relaxed);
        self.sampling.join().unwrap()
    }
}

fn rss_anon_kib(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("RssAnon:"));
    line.unwrap()
        .split_whitespace()
        .nth(1)
        .unwrap()
        .parse()
        .unwrap()
}
