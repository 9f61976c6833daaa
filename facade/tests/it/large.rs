//! A log of a million entries, and a log of the largest messages: reads are complete and in order in each
//! format, and neither facade nor logging keeps the log, or the backlog of slow readers, in memory.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::entry::Entry;
use futures_util::stream;
use reqwest::Body;
use testing::engine::Engine;
use testing::process::Process;

use crate::processes::Processes;
use crate::system::engine_under_test;

/// The growth in anonymous memory that each process is allowed while the log is loaded and read.
const MAX_GROWTH_KIB: u64 = 32 * 1024;

const SLOW_READERS: usize = 10;
const SLOW_BYTES_PER_SECOND: usize = 1024;

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
        start + &"\u{1}".repeat(rest)
    };
    read_within_memory(1500, message).await;
}

async fn read_within_memory(
    count: usize,
    message: impl Fn(usize) -> String + Copy + Send + 'static,
) {
    let system = Processes::start();
    let memory = MemoryWatch::start(&system);
    let lines = (0..count).map(move |n| {
        let line = serde_json::to_string(&message(n)).unwrap() + "\n";
        Ok::<_, std::io::Error>(line)
    });
    let upload = system
        .http
        .post(system.facade.url())
        .header("content-type", "application/x-ndjson")
        .body(Body::wrap_stream(stream::iter(lines)));
    let summary: serde_json::Value = upload.send().await.unwrap().json().await.unwrap();
    assert_eq!(summary["stored"], count, "{summary}");

    let address = system.facade.address;
    for (format, order) in [
        ("application/json", "asc"),
        ("application/x-ndjson", "asc"),
        ("text/plain", "asc"),
        ("application/x-ndjson", "desc"),
    ] {
        let read = move || read_all(address, format, order, count, message);
        tokio::task::spawn_blocking(read).await.unwrap();
    }
    let readers: Vec<_> = (0..SLOW_READERS)
        .map(|_| tokio::task::spawn_blocking(move || read_slowly(address)))
        .collect();
    for reader in readers {
        reader.await.unwrap();
    }
    for (name, growth) in memory.finish() {
        println!("{name} grew by {growth} KiB while {count} messages were stored and read");
        assert!(growth < MAX_GROWTH_KIB, "{name} grew by {growth} KiB");
    }
}

/// Reads the log line by line and checks that it holds the messages 0 to `count`, each once, in ascending
/// or descending UUID order. On LMDB that is the order of the POSTs; on a cluster a message gets a later
/// UUID when its partition has no primary.
fn read_all(
    address: SocketAddr,
    format: &str,
    order: &str,
    count: usize,
    message: impl Fn(usize) -> String,
) {
    let mut last = None;
    let mut seen = 0;
    let mut is_seen = vec![false; count];
    let mut tail = String::new();
    for line in BodyLines::get(address, &format!("/?order={order}"), format) {
        let entry = match format {
            "application/json" if seen < count => {
                if line == "{\"logging_service\":[" {
                    continue;
                }
                serde_json::from_str(line.trim_end_matches(',')).unwrap()
            }
            "application/x-ndjson" if seen < count => serde_json::from_str(&line).unwrap(),
            "text/plain" if seen < count => {
                let (uuid, msg) = line.split_once(' ').unwrap();
                Entry {
                    uuid: uuid.parse().unwrap(),
                    msg: msg.replace("\\u{1}", "\u{1}"),
                }
            }
            _ => {
                tail += &line;
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

/// Reads 1 KiB a second, and must get it each time.
fn read_slowly(address: SocketAddr) {
    let mut connection = get(address, "/", "application/json");
    let slow_reading = match engine_under_test() {
        Engine::Lmdb => SLOW_READING,
        Engine::RedisServer | Engine::RedisCluster => SLOW_READING_ELSEWHERE,
    };
    let began = Instant::now();
    let mut buffer = [0; SLOW_BYTES_PER_SECOND];
    for second in 1.. {
        connection.read_exact(&mut buffer).unwrap();
        let due = began + Duration::from_secs(second);
        if due.duration_since(began) > slow_reading {
            return;
        }
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
    }
}

fn get(address: SocketAddr, path: &str, accept: &str) -> TcpStream {
    let mut connection = TcpStream::connect(address).unwrap();
    let request = format!(
        "GET {path} HTTP/1.1\r\nhost: {address}\r\naccept: {accept}\r\nconnection: close\r\n\r\n"
    );
    connection.write_all(request.as_bytes()).unwrap();
    connection
}

/// The lines of a chunked body; panics when the body was aborted.
struct BodyLines {
    reader: BufReader<TcpStream>,
    buffer: Vec<u8>,
    taken: usize,
}

impl BodyLines {
    fn get(address: SocketAddr, path: &str, accept: &str) -> Self {
        let mut reader = BufReader::new(get(address, path, accept));
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            reader.read_line(&mut head).unwrap();
        }
        assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
        Self {
            reader,
            buffer: Vec::new(),
            taken: 0,
        }
    }
}

impl Iterator for BodyLines {
    type Item = String;

    fn next(&mut self) -> Option<String> {
        loop {
            let rest = &self.buffer[self.taken..];
            if let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
                let line = String::from_utf8(rest[..end].to_vec()).unwrap();
                self.taken += end + 1;
                return Some(line);
            }
            self.buffer.drain(..self.taken);
            self.taken = 0;
            let mut size = String::new();
            self.reader.read_line(&mut size).unwrap();
            let size = usize::from_str_radix(size.trim_end(), 16).expect("the body was cut off");
            let mut chunk = vec![0; size + 2];
            self.reader.read_exact(&mut chunk).unwrap();
            if size == 0 {
                assert!(self.buffer.is_empty());
                return None;
            }
            self.buffer.extend_from_slice(&chunk[..size]);
        }
    }
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
