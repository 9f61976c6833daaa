//! The folder of an LMDB map, which several processes share: processes that must be refused, a folder that
//! is deleted, and readers that die or do not end.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use common::api::{MARK, Mark};
use common::entry::{Entry, Outcome};
use reqwest::Client;
use testing::command_line::one_line;
use testing::process::{LOOK_AGAIN, Process, free_address};
use testing::requirements::unshare;

use crate::processes::{LOGGING, all, entry, location, logging, put, put_one};

/// Two containers would damage a folder that they share, so the second one is refused with the reason.
#[test]
fn second_pid_namespace_is_refused() {
    let namespaces = ["--pid", "--fork", "--mount-proc"];
    let Some(unshare) = unshare(&namespaces, &["true"]) else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let _first = Process::start(logging(folder.path()), free_address());
    let reason = refused_second(unshare, folder.path());
    assert!(reason.contains("in another container or PID namespace"));
}

pub(crate) const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// The first PID namespace has the same number on every machine, so the boot id tells two machines apart.
#[test]
fn second_machine_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let boot_id = folder.path().join("boot_id");
    std::fs::write(&boot_id, "0b007000-0000-4000-8000-000000000000\n").unwrap();
    let trial = ["mount", "--bind", "/etc/hosts", BOOT_ID];
    let Some(mut command) = unshare(&["--mount"], &trial) else {
        return;
    };
    let _first = Process::start(logging(folder.path()), free_address());
    command
        .args(["sh", "-c"])
        .arg(format!("mount --bind \"$0\" {BOOT_ID} && exec \"$@\""))
        .arg(&boot_id);
    let reason = refused_second(command, folder.path());
    assert!(reason.contains("on another machine"));
}

/// The error of a second instance on the folder, which `command` starts and which must end at once.
#[track_caller]
fn refused_second(mut command: Command, folder: &Path) -> String {
    command.args([LOGGING, "--map"]).arg(location(folder));
    let output = command.args(["--listen", "127.0.0.1:0"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    one_line(&output)
}

/// Another user of the machine who could open the file of the write lock could hold it and stop all writes.
#[test]
fn folder_and_files_are_closed_to_other_users() {
    let outer = tempfile::tempdir().unwrap();
    let folder = outer.path().join("map");
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    let check = || {
        let _instance = Process::start(logging(outer.path()), free_address());
        for file in fs::read_dir(&folder).unwrap() {
            let file = file.unwrap().path();
            assert_eq!(mode(&file), 0o600, "{}", file.display());
        }
    };
    check();
    assert_eq!(mode(&folder), 0o700);
    // As an earlier version left it.
    fs::set_permissions(folder.join("turns"), Permissions::from_mode(0o644)).unwrap();
    check();
}

/// The mark of an instance's responses, which names its map.
async fn mark(http: &Client, url: &str) -> Mark {
    let response = http.get(format!("{url}/livez")).send().await.unwrap();
    let mark = response.headers()[MARK].to_str().unwrap();
    mark.parse().unwrap()
}

/// The files of a deleted folder still exist for the instances that have them open. An instance that starts
/// later has another map.
#[tokio::test]
async fn deleted_folder_refuses_entries_and_its_successor_is_another_map() {
    let folder = tempfile::tempdir().unwrap();
    let http = Client::new();
    let start = || {
        let process = Process::start(logging(folder.path()), free_address());
        process.wait_until_ready();
        process
    };
    let (old, mut restarted) = (start(), start());
    let before = entry("before");
    assert_eq!(put_one(&http, &old.url(), &before).await, Outcome::Stored);
    let map = mark(&http, &old.url()).await.map;
    assert!(map.is_some());
    assert_eq!(mark(&http, &restarted.url()).await.map, map);

    std::fs::remove_dir_all(folder.path().join("map")).unwrap();
    restarted.kill();
    let restarted = start();
    let refused = put_one(&http, &old.url(), &entry("after")).await;
    assert!(
        matches!(&refused, Outcome::Refused { detail, .. } if detail.contains("was deleted")),
        "{refused:?}"
    );
    let readiness = old.wait_for_readiness(|text| text.starts_with("HTTP/1.1 503"));
    assert!(readiness.contains("was deleted"), "{readiness}");
    assert_eq!(all(&http, &old.url()).await, [before]);
    assert_eq!(mark(&http, &old.url()).await.map, map);
    let successor = mark(&http, &restarted.url()).await.map;
    assert!(successor.is_some() && successor != map, "{successor:?}");
}

/// Readers that were killed in the middle of a read would prevent the reuse of pages for ever.
#[tokio::test(flavor = "multi_thread")]
async fn readers_of_killed_processes_are_cleared() {
    let folder = tempfile::tempdir().unwrap();
    let http = Client::new();
    let entries: Vec<Entry> = (0..500).map(|_| entry(&"x".repeat(2000))).collect();
    // LMDB keeps its table of readers while another process has it open.
    let _witness = Process::start(logging(folder.path()), free_address());
    for _ in 0..100 {
        let mut process = Process::start(logging(folder.path()), free_address());
        let has_cleared = |line: &String| line.contains("cleared LMDB readers of dead processes");
        if process.log().iter().any(has_cleared) {
            return;
        }
        put(&http, &process.url(), &entries).await.unwrap();
        let mut reads = tokio::task::JoinSet::new();
        for _ in 0..8 {
            let (http, url) = (http.clone(), process.url());
            reads.spawn(async move {
                while let Ok(response) = http.get(&url).send().await {
                    let _cut_off_at_the_end = response.bytes().await;
                }
            });
        }
        let first_is_read = http.get(process.url()).send().await.unwrap().bytes().await;
        first_is_read.unwrap();
        process.kill();
        reads.join_all().await;
    }
    panic!("no reader was found stale in 100 kills");
}

/// A process that is paused in the middle of a read prevents LMDB from reusing pages: the others report it
/// until it resumes.
#[tokio::test(flavor = "multi_thread")]
async fn process_paused_inside_a_read_is_reported() {
    /// Longer than the time after which a read is reported.
    const SWEEPS: Duration = Duration::from_secs(7);
    let folder = tempfile::tempdir().unwrap();
    let http = Client::new();
    let writing = Process::start(logging(folder.path()), free_address());
    let reading = Process::start(logging(folder.path()), free_address());
    let entries: Vec<Entry> = (0..2000).map(|_| entry(&"x".repeat(2000))).collect();
    put(&http, &writing.url(), &entries).await.unwrap();
    let mut reads = tokio::task::JoinSet::new();
    for _ in 0..16 {
        let (http, url) = (http.clone(), reading.url());
        reads.spawn(async move {
            while let Ok(response) = http.get(&url).send().await {
                let _cut_off_at_the_end = response.bytes().await;
            }
        });
    }
    let name = format!("\"name\":\"reader {}\"", reading.pid());
    let is_named_within = async |patience: Duration| {
        let begin = Instant::now();
        while begin.elapsed() < patience {
            put_one(&http, &writing.url(), &entry("grows")).await;
            if writing.readiness().contains(&name) {
                return true;
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
        false
    };
    // Not every pause hits a read.
    let mut pauses = 0;
    let readiness = loop {
        reading.signal("STOP");
        if is_named_within(SWEEPS).await {
            break writing.readiness();
        }
        reading.signal("CONT");
        pauses += 1;
        assert!(pauses < 10, "no paused reader was named");
    };
    assert!(readiness.starts_with("HTTP/1.1 200"), "{readiness}");
    assert!(readiness.contains("transactions behind"), "{readiness}");
    let is_logged = |line: &str| {
        line.contains("holds an old read transaction") && line.contains(&reading.pid().to_string())
    };
    writing.wait_for_line(is_logged);
    reading.signal("CONT");
    let begin = Instant::now();
    while writing.readiness().contains(&name) {
        assert!(begin.elapsed() < SWEEPS, "{}", writing.readiness());
        tokio::time::sleep(LOOK_AGAIN).await;
    }
    reads.shutdown().await;
}
