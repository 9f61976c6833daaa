//! The system as real processes: the exercise's client, who got what, kills, signals, the command
//! line.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::entry::Entry;
use futures_util::{StreamExt, stream};
use reqwest::Client;
use serde_json::Value;
use testing::command_line::{assert_help, assert_refused, one_line};
use testing::engine::EmptyMap;
use testing::process::{LOOK_AGAIN, PATIENCE, Process, free_address};
use uuid::Uuid;

use crate::system::{Merged, System, engine_under_test, problem};

/// All services as processes on one map, of the engine under test unless said otherwise.
pub(crate) struct Processes {
    pub(crate) messages: Process,
    pub(crate) logging: Vec<Process>,
    pub(crate) facade: Process,
    pub(crate) http: Client,
    logging_flags: Vec<String>,
    _map: Option<EmptyMap>,
}

impl Processes {
    pub(crate) fn start() -> Self {
        Self::start_with(&[])
    }

    /// With further flags for the facade.
    pub(crate) fn start_with(flags: &[&str]) -> Self {
        let map = engine_under_test().empty_map();
        let system = Self::on_map(&["--map", &map.location], flags);
        Self {
            _map: Some(map),
            ..system
        }
    }

    /// On a map that the test keeps, with flags for logging, which name it, and for the facade.
    pub(crate) fn on_map(logging_flags: &[&str], facade_flags: &[&str]) -> Self {
        let messages = Process::start(Command::new(binary("messages")), free_address());
        let start = |_| start_logging(logging_flags, free_address());
        let logging: Vec<Process> = (0..3).map(start).collect();
        let urls: Vec<String> = logging.iter().map(Process::url).collect();
        let facade = facade(&urls.join(","), &messages.url(), facade_flags);
        Self {
            messages,
            logging,
            facade: Process::start(facade, free_address()),
            http: Client::new(),
            logging_flags: logging_flags
                .iter()
                .map(|flag| (*flag).to_owned())
                .collect(),
            _map: None,
        }
    }

    /// Ends the facade and starts another one where it was.
    pub(crate) fn restart_facade(&mut self, flags: &[&str]) {
        self.facade.kill();
        let address = self.facade.address;
        self.facade = Process::start(self.another_facade(flags), address);
    }

    /// What starts one more facade in front of the same instances.
    pub(crate) fn another_facade(&self, flags: &[&str]) -> Command {
        let urls: Vec<String> = self.logging.iter().map(Process::url).collect();
        facade(&urls.join(","), &self.messages.url(), flags)
    }

    /// Starts a logging instance again where it was.
    pub(crate) fn restart_logging(&mut self, index: usize) {
        let address = self.logging[index].address;
        let flags: Vec<&str> = self.logging_flags.iter().map(String::as_str).collect();
        self.logging[index] = start_logging(&flags, address);
    }

    pub(crate) async fn post(&self, msg: &str) -> reqwest::Response {
        let request = self.http.post(self.facade.url()).body(msg.to_owned());
        request.send().await.unwrap()
    }

    pub(crate) async fn get(&self) -> reqwest::Response {
        self.http.get(self.facade.url()).send().await.unwrap()
    }

    /// The whole log.
    pub(crate) async fn read_all(&self) -> Vec<Entry> {
        let merged: Merged = self.get().await.json().await.unwrap();
        assert_eq!(merged.count, merged.logging_service.len() as u64);
        merged.logging_service
    }

    async fn messages_in_log(&self) -> Vec<String> {
        let entries = self.read_all().await;
        entries.into_iter().map(|entry| entry.msg).collect()
    }
}

/// A binary of the workspace, beside the facade's; testing the workspace builds them all.
pub(crate) fn binary(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_BIN_EXE_facade")).with_file_name(name);
    assert!(
        path.exists(),
        "{name} is not built: test the whole workspace, as scripts/test.sh does"
    );
    path
}

fn facade(logging: &str, messages: &str, flags: &[&str]) -> Command {
    let mut command = Command::new(binary("facade"));
    command.args(["--logging", logging, "--messages", messages]);
    command.args(flags);
    command
}

/// Starts a logging instance and waits until it can reach its map.
pub(crate) fn start_logging(flags: &[&str], address: SocketAddr) -> Process {
    let mut command = Command::new(binary("logging"));
    command.args(["--log-format", "json"]).args(flags);
    let process = Process::start(command, address);
    process.wait_until_ready();
    process
}

/// The client of the original exercise: Python requests, ten form POSTs, then a GET with a query
/// that means nothing.
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
    // Answers end with a newline, and so does what the client prints.
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

/// Each of three instances gets its third: chi-square with two degrees of freedom stays below its
/// 99.9 % quantile, 13.82, and headers and logs agree on who got what.
#[tokio::test(flavor = "multi_thread")]
async fn messages_are_spread_uniformly_and_headers_agree_with_logs() {
    const POSTS: usize = 30_000;
    let processes = Processes::start();
    let system = System::in_front_of(&processes.logging, &processes.messages);
    let answers = futures_util::stream::iter(0..POSTS)
        .map(|n| system.post().body(n.to_string()).send())
        .buffer_unordered(128);
    let by_header: Vec<(String, String)> = answers
        .then(async |response| {
            let response = response.unwrap();
            assert_eq!(response.status(), 200);
            let instance = response.headers()["x-logging-instance"].to_str().unwrap();
            let instance = instance.to_owned();
            let answer: Value = response.json().await.unwrap();
            (answer["uuid"].as_str().unwrap().to_owned(), instance)
        })
        .collect()
        .await;
    let by_header: BTreeMap<String, String> = by_header.into_iter().collect();
    assert_eq!(by_header.len(), POSTS);

    let mut shares = HashMap::new();
    by_header
        .values()
        .for_each(|instance| *shares.entry(instance).or_insert(0) += 1);
    let expected = POSTS as f64 / 3.0;
    let deviation = |share: &i32| (f64::from(*share) - expected).powi(2) / expected;
    let chi_square: f64 = shares.values().map(deviation).sum();
    println!("shares {shares:?}, chi-square {chi_square:.2}");
    assert_eq!(shares.len(), 3);
    assert!(chi_square < 13.82, "{shares:?}: {chi_square}");

    // An instance that was asked beside a silent one has a line too, so there may be two for a message.
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
        logged.extend(uuids.expect("an instance logs what it is named for"));
    }
    assert!(logged.iter().eq(by_header.keys()));
}

/// The UUIDs that an instance's log says are acknowledged.
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

/// A request id given to the facade is in the log of the instance that stored the message, and in
/// those of facade and messages.
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

/// Three, two, one logging instance alive: everything is there each time. With none, a clear 503;
/// and everything again when one returns.
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

/// Told to stop in the middle of a long GET, the facade still delivers every byte.
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

/// The task `healthcheck` says by its exit code whether the service is ready, on all addresses too, and
/// otherwise why not, in one line.
#[test]
fn healthcheck_asks_the_running_service() {
    let healthcheck = |address: SocketAddr| {
        let listen = ["--listen", &address.to_string()];
        let run = |arguments: &[&str]| {
            Command::new(binary("facade"))
                .args(arguments)
                .output()
                .unwrap()
        };
        let before = run(&[&listen[..], &["healthcheck"]].concat());
        let after = run(&[&["healthcheck"], &listen[..]].concat());
        assert_eq!(before.status, after.status);
        after
    };
    let everywhere = SocketAddr::from(([0, 0, 0, 0], free_address().port()));
    let nobody = one_line(&healthcheck(everywhere));
    assert!(nobody.contains("is the service running"), "{nobody}");

    let alone = facade("http://127.0.0.1:1", "http://127.0.0.1:1", &[]);
    let alone = Process::start(alone, everywhere);
    let output = healthcheck(alone.address);
    assert_eq!(output.status.code(), Some(1));
    let why = one_line(&output);
    assert!(
        why.contains("not ready: ") && why.contains("logging"),
        "{why}"
    );

    let system = Processes::start();
    let output = healthcheck(system.facade.address);
    assert!(output.status.success(), "{output:?}");
    let printed = String::from_utf8(output.stdout).unwrap();
    assert!(printed.contains(r#""status":"ready""#), "{printed}");
}

#[test]
fn wrong_configuration_is_one_line_and_exit_code_2() {
    let binary = binary("facade");
    assert_refused(
        &binary,
        &["--logging", "127.0.0.1:8082"],
        "http://HOST:PORT",
    );
    assert_refused(
        &binary,
        &["--logging", "http://a:1,ftp://b:2"],
        "http://HOST:PORT",
    );
    assert_refused(
        &binary,
        &["--messages", "http://a:1/path"],
        "http://HOST:PORT",
    );
    assert_refused(&binary, &["--max-message", "0"], "64KiB");
    assert_refused(&binary, &["--max-message", "2MiB"], "1MiB");
    assert_refused(&binary, &["--max-reads", "0"], "--max-reads");
    assert_refused(&binary, &["--deadline", "5"], "10s");
    assert_refused(&binary, &["--deadline", "0s"], "above zero");
    let endless = "18446744073709551615s";
    assert_refused(&binary, &["--deadline", endless], "365days");
    assert_refused(&binary, &["--logging", "http://:p@a:1"], "http://HOST:PORT");
    assert_refused(&binary, &["--try-timeout"], "--try-timeout");
    assert_refused(
        &binary,
        &["--logging", "localhost:9000"],
        "http://localhost:9000",
    );
    assert_refused(&binary, &["--messages", "https://a:1"], "only http");
}

/// What was set is named: the variable if the value came from it, otherwise the flag.
#[test]
fn wrong_value_is_blamed_on_what_was_set() {
    let mut by_variable = Command::new(binary("facade"));
    let output = by_variable.env("FACADE_DEADLINE", "soon").output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    let line = one_line(&output);
    assert!(
        line.contains("FACADE_DEADLINE") && !line.contains("--deadline"),
        "{line}"
    );
    for arguments in [&["--deadline", "late"][..], &["--deadline=late"]] {
        let mut by_both = Command::new(binary("facade"));
        let by_both = by_both.env("FACADE_DEADLINE", "soon").args(arguments);
        let line = one_line(&by_both.output().unwrap());
        assert!(line.contains("\"late\" for --deadline"), "{line}");
    }
}

#[test]
fn help_names_each_flag_with_its_environment_twin() {
    let three = "http://127.0.0.1:8082,http://127.0.0.1:8083,http://127.0.0.1:8084";
    let flags = [
        ("--listen", "FACADE_LISTEN", "127.0.0.1:8086"),
        ("--logging", "FACADE_LOGGING", three),
        ("--messages", "FACADE_MESSAGES", "http://127.0.0.1:8081"),
        ("--try-timeout", "FACADE_TRY_TIMEOUT", "1s"),
        ("--deadline", "FACADE_DEADLINE", "5s"),
        ("--read-deadline", "FACADE_READ_DEADLINE", "15s"),
        ("--messages-timeout", "FACADE_MESSAGES_TIMEOUT", "1s"),
        ("--max-message", "FACADE_MAX_MESSAGE", "64KiB"),
        ("--max-reads", "FACADE_MAX_READS", "64"),
        ("--grace", "FACADE_GRACE", "10s"),
        ("--log-format", "FACADE_LOG_FORMAT", "text"),
    ];
    assert_help(&binary("facade"), &flags);
    let flags = [
        ("--listen", "MESSAGES_LISTEN", "127.0.0.1:8081"),
        ("--grace", "MESSAGES_GRACE", "10s"),
        ("--log-format", "MESSAGES_LOG_FORMAT", "text"),
    ];
    assert_help(&binary("messages"), &flags);
}

/// What a GET gave can be put into another map, as JSON and as NDJSON.
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
            .args(["--settle", "0s", "import"])
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

/// A key is used by four callers at once, through two facades, twice with each of two messages: one
/// message is stored, its posters are told so, the others that it is another's.
#[tokio::test(flavor = "multi_thread")]
async fn key_that_is_used_at_once_by_many_is_one_entry() {
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
        "other entries than were accepted"
    );
}
