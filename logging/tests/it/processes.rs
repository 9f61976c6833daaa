//! The logging service as real processes: disks that fail, the log, signals and the command line.

use std::path::Path;
use std::process::Command;

use common::api::{MARK, Mark, PutResult};
use common::entry::{Entry, Outcome};
use reqwest::{Client, StatusCode};
use tempfile::TempDir;
use testing::command_line::{assert_help, assert_refused, one_line};
use testing::process::{LOOK_AGAIN, OnSmallDisk, Process, free_address};
use testing::redis_servers::RedisServer;
use testing::requirements::{skip, trial_run, unshare};
use uuid::Uuid;

pub(crate) const LOGGING: &str = env!("CARGO_BIN_EXE_logging");

pub(crate) fn logging(folder: &Path) -> Command {
    let mut command = Command::new(LOGGING);
    command.args(["--map", &location(folder)]);
    command
}

pub(crate) fn location(folder: &Path) -> String {
    format!("lmdb:{}", folder.join("map").display())
}

pub(crate) fn entry(msg: &str) -> Entry {
    Entry {
        uuid: Uuid::now_v7(),
        msg: msg.to_owned(),
    }
}

pub(crate) async fn put(
    http: &Client,
    url: &str,
    entries: &[Entry],
) -> reqwest::Result<Vec<Outcome>> {
    let response = http.post(url).json(entries).send().await?;
    let results: Vec<PutResult> = response.error_for_status()?.json().await?;
    Ok(results.into_iter().map(|result| result.outcome).collect())
}

pub(crate) async fn put_one(http: &Client, url: &str, entry: &Entry) -> Outcome {
    let outcomes = put(http, url, std::slice::from_ref(entry)).await.unwrap();
    outcomes.into_iter().next().unwrap()
}

/// All entries of an instance; panics unless the stream is complete.
pub(crate) async fn all(http: &Client, url: &str) -> Vec<Entry> {
    let text = http.get(url).send().await.unwrap().text().await.unwrap();
    let mut lines: Vec<&str> = text.lines().collect();
    let end = lines.pop().unwrap();
    assert_eq!(end, format!("{{\"count\":{}}}", lines.len()));
    lines
        .iter()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

/// On a full disk entries are refused and the map stays readable; with space entries are stored again.
#[tokio::test]
async fn full_disk_refuses_and_recovers() {
    let folder = tempfile::tempdir().unwrap();
    let disk = OnSmallDisk::start(Path::new(LOGGING), folder.path(), 4 << 20);
    let Some(disk) = disk else {
        return;
    };
    let http = Client::new();
    let url = disk.process.url();
    let mut stored = Vec::new();
    let refused = loop {
        let entry = entry(&"x".repeat(64 * 1024));
        match put_one(&http, &url, &entry).await {
            Outcome::Stored => stored.push(entry),
            outcome => break outcome,
        }
        assert!(
            stored.len() < 64,
            "more entries are acknowledged than the disk can hold"
        );
    };
    assert_eq!(
        refused,
        Outcome::refused("the disk that holds the map is full")
    );
    assert!(!stored.is_empty());
    assert_eq!(all(&http, &url).await, stored);

    disk.free_space();
    let entry = entry(&"y".repeat(64 * 1024));
    assert_eq!(put_one(&http, &url, &entry).await, Outcome::Stored);
    stored.push(entry);
    assert_eq!(all(&http, &url).await, stored);
}

/// The disk fails when the second entry's transaction is synced, before LMDB writes its meta page: the entry
/// is certainly not stored. (The very first sync is that of the map's id.)
#[tokio::test]
async fn failed_sync_is_refused_and_not_stored() {
    let Some(outcome) = outcome_with_fault("fdatasync:error=EIO:when=3").await else {
        return;
    };
    assert!(
        matches!(outcome.second, Outcome::Refused { .. }),
        "{outcome:?}"
    );
    assert!(!outcome.is_second_stored);
}

/// The disk fails when the second entry's meta page is written: the entry may or may not be stored.
#[tokio::test]
async fn failed_meta_page_is_unknown_and_the_map_is_opened_again() {
    let Some(outcome) = outcome_with_fault("pwrite64:error=EIO:when=4").await else {
        return;
    };
    assert!(
        matches!(outcome.second, Outcome::Unknown { .. }),
        "{outcome:?}"
    );
}

pub(crate) async fn mark_of(http: &Client, url: &str) -> Mark {
    let answer = http.get(format!("{url}/livez")).send().await.unwrap();
    let mark = answer.headers()[MARK].to_str().unwrap();
    mark.parse().unwrap()
}

#[derive(Debug)]
struct FaultOutcome {
    second: Outcome,
    is_second_stored: bool,
}

/// Puts three entries, the second while a system call of the writer thread fails; the first and the third
/// must be stored, also after a restart. `None` where processes cannot be traced: the test is skipped.
async fn outcome_with_fault(fault: &str) -> Option<FaultOutcome> {
    let trial = trial_run(Command::new("strace").args(["--output=/dev/null", "true"]));
    if let Err(why) = trial {
        skip(&format!("no tracer: {why}"), "REQUIRE_ALL");
        return None;
    }
    let folder = tempfile::tempdir().unwrap();
    let mut command = Command::new("strace");
    command
        .args([
            "--daemonize",
            "--quiet=all",
            "--follow-forks",
            "--output=/dev/null",
        ])
        .arg(format!("--inject={fault}"))
        .args([LOGGING, "--map", &location(folder.path())]);
    let mut process = Process::start(command, free_address());
    let http = Client::new();
    let url = process.url();
    // The map's id has a transaction of its own only when no entry is queued.
    while mark_of(&http, &url).await.map.is_none() {
        tokio::time::sleep(LOOK_AGAIN).await;
    }
    let entries = [entry("first"), entry("second"), entry("third")];
    assert_eq!(put_one(&http, &url, &entries[0]).await, Outcome::Stored);
    let second = put_one(&http, &url, &entries[1]).await;
    assert_eq!(put_one(&http, &url, &entries[2]).await, Outcome::Stored);
    let before = all(&http, &url).await;
    process.signal("TERM");
    process.wait();
    let process = Process::start(logging(folder.path()), free_address());
    let stored = all(&http, &process.url()).await;
    assert_eq!(stored, before);
    assert!(stored.contains(&entries[0]) && stored.contains(&entries[2]));
    Some(FaultOutcome {
        second,
        is_second_stored: stored.contains(&entries[1]),
    })
}

/// Each acknowledged entry is one log line, for any message.
#[tokio::test]
async fn acknowledged_entries_are_one_log_line_each() {
    let folder = tempfile::tempdir().unwrap();
    let forged = "x\nINFO entry acknowledged msg=\"forged\"\r\u{1b}[31m\u{0}\u{9b}\u{7f}\u{202e}\"";
    let entries = [entry("plain"), entry(forged)];
    let http = Client::new();
    for format in ["text", "json"] {
        let mut command = logging(folder.path());
        command.args(["--log-format", format]);
        let process = Process::start(command, free_address());
        let outcomes = put(&http, &process.url(), &entries).await.unwrap();
        let stale = entry_of_1970();
        let refused = put_one(&http, &process.url(), &stale).await;
        assert_eq!(refused, Outcome::Stale);
        let is_entry = |line: &&String| line.contains("entry acknowledged");
        process.wait_for_log(|lines| lines.iter().filter(is_entry).count() >= 2);
        let log = process.log();
        assert_eq!(log.iter().filter(is_entry).count(), 2, "{log:#?}");
        let word = match outcomes[0] {
            Outcome::Stored => "stored",
            _ => "duplicate",
        };
        for (entry, line) in entries.iter().zip(log.iter().filter(is_entry)) {
            assert!(line.contains(&entry.uuid.to_string()), "{line}");
            assert!(line.contains(word), "{line}");
            assert!(!line.contains(common::escape::needs_escape), "{line:?}");
            let quoted = match format {
                "text" => format!("msg={:?}", entry.msg),
                _ => {
                    let fields: serde_json::Value = serde_json::from_str(line).unwrap();
                    assert_eq!(fields["msg"], entry.msg.as_str());
                    continue;
                }
            };
            assert!(line.contains(&quoted), "{line} has no {quoted}");
        }
    }
}

fn entry_of_1970() -> Entry {
    Entry {
        uuid: "00000000-0001-7000-8000-000000000000".parse().unwrap(),
        msg: "old".to_owned(),
    }
}

#[test]
fn taken_port_is_reported() {
    let folder = tempfile::tempdir().unwrap();
    let first = Process::start(logging(folder.path()), free_address());
    let address = first.address.to_string();
    let other = tempfile::tempdir().unwrap();
    let output = logging(other.path())
        .args(["--listen", &address])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let made = std::fs::read_dir(other.path()).unwrap().count();
    assert_eq!(made, 0, "an instance that cannot listen makes no map");
    let line = one_line(&output);
    assert!(
        line.contains(&address) && line.contains("another process") && line.contains("--listen"),
        "{line}"
    );
}

/// The map is named once this process has read which one it is, wherever it was started, and what counts of its
/// `--settle`.
#[tokio::test]
async fn opened_map_is_named_when_it_was_read() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path().canonicalize().unwrap();
    let http = Client::new();
    let start = |flags: &[&str]| {
        let mut command = Command::new(LOGGING);
        command.args(["--map", "lmdb:data/map"]).args(flags);
        command.current_dir(&folder);
        Process::start(command, free_address())
    };
    let opened = async |process: &Process, place: &str| {
        process.wait_until_ready();
        let map = mark_of(&http, &process.url()).await.map.unwrap();
        let line = format!("opened the map map={map} at=\"{place}\" settle=10s");
        process.wait_for_line(|found| found.contains(&line));
    };
    let place = format!("lmdb:{}", folder.join("data/map").display());
    opened(&start(&["--settle", "10s"]), &place).await;
    let other = start(&["--settle", "20s"]);
    opened(&other, &place).await;
    let ignored = "the map's settle window is 10s, and --settle 20s is ignored: leave the flag out";
    let warnings = other.log();
    let warnings = warnings.iter().filter(|line| line.contains("WARN"));
    let warnings: Vec<&String> = warnings.collect();
    assert!(
        warnings.len() == 1 && warnings[0].ends_with(ignored),
        "{warnings:?}"
    );
    let readiness = other.readiness();
    assert!(
        readiness.contains("\"status\":\"degraded\"") && readiness.contains(ignored),
        "{readiness}"
    );

    let mut server = RedisServer::single(&folder.join("redis"));
    server.kill();
    let mut command = Command::new(LOGGING);
    let url = format!("redis://{}", server.address());
    command.args(["--map", &url]);
    let process = Process::start(command, free_address());
    process.wait_for_line(|line| line.contains("cannot be reached"));
    let log = process.log();
    assert!(!log.iter().any(|line| line.contains("opened")), "{log:?}");
    server.restart();
    opened(&process, &url).await;
}

#[test]
fn folder_of_another_user_is_reported_with_its_owner() {
    let own = tempfile::tempdir().unwrap();
    // Only root can give a folder away, and it may open all files unless it does without that right.
    let is_root = std::os::unix::fs::chown(own.path(), Some(65534), None).is_ok();
    let without = "--bounding-set=-dac_override,-dac_read_search";
    let (program, foreign) = if is_root {
        (&["setpriv", without, LOGGING][..], own.path())
    } else {
        (&[LOGGING][..], Path::new("/root"))
    };
    for map in [foreign.to_owned(), foreign.join("below")] {
        let map = format!("lmdb:{}", map.display());
        let mut command = Command::new(program[0]);
        command.args(&program[1..]).args(["--map", &map]);
        let output = command.args(["--listen", "127.0.0.1:0"]).output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        let line = one_line(&output);
        let owner = format!("error: {} belongs to user ", foreign.display());
        assert!(
            line.starts_with(&owner) && line.contains("and this process runs as user "),
            "{line}"
        );
    }
}

/// An ordinary user may not listen on a port below 1024. Here it is the root of a user namespace, which has
/// no privileges outside of it.
#[test]
fn port_below_1024_is_reported_with_the_reason() {
    let folder = tempfile::tempdir().unwrap();
    let namespaces = ["--user", "--map-root-user"];
    let Some(mut unshare) = unshare(&namespaces, &["true"]) else {
        return;
    };
    let command = unshare.args([LOGGING, "--listen", "127.0.0.1:80", "--map"]);
    let output = command.arg(location(folder.path())).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let line = one_line(&output);
    assert!(
        line.contains("ports below 1024") && !line.contains("stop it"),
        "{line}"
    );
}

#[test]
fn wrong_configuration_is_one_line_and_exit_code_2() {
    let binary = Path::new(LOGGING);
    assert_refused(binary, &["--map", "hazelcast:x"], "lmdb:");
    assert_refused(binary, &["--map", "lmdb:"], "lmdb:data/map");
    assert_refused(binary, &["--listen", "8082"], "127.0.0.1:8080");
    assert_refused(binary, &["--grace", "soon"], "10s");
    assert_refused(binary, &["--store-timeout", "0s"], "at least 10ms");
    for settle in ["0s", "999ms"] {
        assert_refused(binary, &["--settle", settle], "at least 1s");
        assert_refused(binary, &["--settle", settle, "import"], "at least 1s");
    }
    assert_refused(binary, &["--map", "lmdb:~/x"], "write lmdb:$HOME/FOLDER");
    assert_refused(binary, &["--map", "redis://host/1"], "database 0");
    assert_refused(binary, &["--map", "redis://user@host"], "USER:PASSWORD");
    assert_refused(binary, &["--backups", "1"], "write --backups 0");
    let missing = ["--map-password-file", "/no/such/file"];
    assert_refused(binary, &missing, "cannot read --map-password-file");
    let empty = ["--map-password-file", "/dev/null"];
    assert_refused(binary, &empty, "no password in its first line");
    assert_refused(
        binary,
        &["--map-password-file", "/etc/hostname"],
        "lmdb map has no password",
    );
    assert_refused(binary, &["--log-format", "xml"], "text, json");
    assert_refused(binary, &["--no-such-flag"], "--help");
    let output = Command::new(binary)
        .args(["--map", "redis://user:secret@host:port"])
        .output();
    let line = one_line(&output.unwrap());
    assert!(
        line.contains("redis://…@host:port") && !line.contains("secret"),
        "{line}"
    );
    for (variable, value) in [("LOGGING_SETTLE", "never"), ("RUST_LOG", "a=b=c")] {
        let output = Command::new(binary).env(variable, value).output().unwrap();
        assert_eq!(output.status.code(), Some(2));
        let line = one_line(&output);
        assert!(
            line.contains(variable) && !line.contains("--settle"),
            "{line}"
        );
    }
}

/// An error about a malformed `--map` never shows the password, whether it came from a flag or a variable.
#[test]
fn error_about_the_map_shows_no_password() {
    let locations = [
        "redis:user:secret@host",
        "redis:/user:secret@host",
        "redis//user:secret@host",
        "redis://user:secret@host:port",
        "redis://user:sec\nsecret@host:port",
        "redis://user:s' for 'secret@host:port",
        "user:secret@host",
    ];
    for location in locations {
        let by_variable = Command::new(LOGGING).env("LOGGING_MAP", location).output();
        let by_flag = Command::new(LOGGING).args(["--map", location]).output();
        let misspelt = format!("--mpa={location}");
        let misspelt = Command::new(LOGGING).arg(misspelt).output();
        let alone = Command::new(LOGGING).arg(location).output();
        for output in [by_variable, by_flag, misspelt, alone] {
            let output = output.unwrap();
            assert_eq!(output.status.code(), Some(2));
            let line = one_line(&output);
            assert!(!line.contains("secret"), "{line}");
        }
    }
    let by_variable = Command::new(LOGGING)
        .env("LOGGING_MAP", locations[0])
        .output();
    let line = one_line(&by_variable.unwrap());
    assert!(
        line.contains("\"redis:…@host\" for LOGGING_MAP: "),
        "{line}"
    );
}

#[test]
fn help_names_each_flag_with_its_environment_variable() {
    let flags = [
        ("--listen", "LOGGING_LISTEN", "127.0.0.1:8082"),
        ("--map", "LOGGING_MAP", "lmdb:data/map"),
        (
            "--backups",
            "LOGGING_BACKUPS",
            "1 on a Redis Cluster, otherwise 0",
        ),
        ("--store-timeout", "LOGGING_STORE_TIMEOUT", "800ms"),
        ("--settle", "LOGGING_SETTLE", "10s"),
        ("--grace", "LOGGING_GRACE", "10s"),
        ("--idle-timeout", "LOGGING_IDLE_TIMEOUT", "75s"),
        ("--log-format", "LOGGING_LOG_FORMAT", "text"),
    ];
    assert_help(Path::new(LOGGING), &flags);
}

/// A stopping instance ends with code 0, and the other instances keep using the map.
#[tokio::test]
async fn stopping_instance_ends_with_code_0() {
    let folder = TempDir::new().unwrap();
    let http = Client::new();
    for signal in ["INT", "TERM"] {
        let mut process = Process::start(logging(folder.path()), free_address());
        let entry = entry(signal);
        assert_eq!(
            put_one(&http, &process.url(), &entry).await,
            Outcome::Stored
        );
        let response = http.get(process.url()).send().await.unwrap();
        assert_eq!(response.status(), StatusCode::OK);
        drop(response);
        process.signal(signal);
        assert!(process.wait().success());
    }
    let process = Process::start(logging(folder.path()), free_address());
    assert_eq!(all(&http, &process.url()).await.len(), 2);
}
