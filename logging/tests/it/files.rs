//! The files of an LMDB folder that are deleted, replaced, overwritten or cut: while instances run, between
//! runs, and before an export.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use common::entry::{Entry, Outcome};
use reqwest::{Client, StatusCode};
use testing::command_line::one_line;
use testing::process::{LOOK_AGAIN, PATIENCE, Process, free_address};
use testing::requirements::{skip, trial_run};
use tokio::time::timeout;

use crate::processes::{LOGGING, all, entry, location, logging, mark_of, put, put_one};

/// A folder with a map.
struct Folder {
    outer: tempfile::TempDir,
    http: Client,
}

impl Folder {
    fn new() -> Self {
        Self {
            outer: tempfile::tempdir().unwrap(),
            http: Client::new(),
        }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.outer.path().join("map").join(name)
    }

    fn data(&self) -> PathBuf {
        self.file("data.mdb")
    }

    fn start(&self) -> Process {
        let process = Process::start(logging(self.outer.path()), free_address());
        process.wait_until_ready();
        process
    }

    /// What an instance says that must not start.
    #[track_caller]
    fn refused_start(&self) -> String {
        let mut command = logging(self.outer.path());
        let output = command.args(["--listen", "127.0.0.1:0"]).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        one_line(&output)
    }

    fn task(&self, task: &str) -> Output {
        let mut command = Command::new(LOGGING);
        command.args(["--map", &location(self.outer.path()), task]);
        command.output().unwrap()
    }

    /// Makes a map of entries with small and large messages, and stops.
    async fn fill(&self) -> Vec<Entry> {
        let instance = self.start();
        let entries: Vec<Entry> = (0..300)
            .map(|n| entry(&"x".repeat(1 + n * 37 % 9000)))
            .collect();
        for some in entries.chunks(30) {
            let outcomes = put(&self.http, &instance.url(), some).await.unwrap();
            assert!(outcomes.iter().all(|outcome| *outcome == Outcome::Stored));
        }
        entries
    }

    /// Neither stores nor reads through an instance whose files are not those of the folder; returns the
    /// reason.
    async fn require_refused(&self, instance: &Process) -> String {
        let outcome = put_one(&self.http, &instance.url(), &entry("refused")).await;
        let Outcome::Refused { detail } = outcome else {
            panic!("{outcome:?}");
        };
        let read = self.http.get(instance.url()).send().await.unwrap();
        assert_eq!(read.status(), StatusCode::SERVICE_UNAVAILABLE, "{detail}");
        let unknown = format!("{}/{}", instance.url(), entry("").uuid);
        let looked_up = self.http.get(unknown).send().await.unwrap();
        assert_eq!(looked_up.status(), StatusCode::SERVICE_UNAVAILABLE);
        instance.wait_for_readiness(|text| text.starts_with("HTTP/1.1 503"));
        detail
    }
}

/// The end of the last page that LMDB counts.
fn end_of_pages(data: &Path) -> u64 {
    let data = File::open(data).unwrap();
    let number = |at: u64| {
        let mut bytes = [0; 8];
        data.read_exact_at(&mut bytes, at).unwrap();
        u64::from_ne_bytes(bytes)
    };
    let page = number(40) & 0xFFFF_FFFF;
    (number(136).max(number(page + 136)) + 1) * page
}

fn write_over(file: &Path, content: &[u8]) {
    let file = File::options().write(true).open(file).unwrap();
    file.write_all_at(content, 0).unwrap();
    file.set_len(content.len() as u64).unwrap();
}

/// A file is deleted, or replaced by a copy of it, while two instances run, and one of them restarts. The
/// other one would write to a file, or under a lock, that the first does not know.
#[tokio::test]
async fn deleted_or_replaced_file_loses_no_acknowledged_entry() {
    for name in ["data.mdb", "lock.mdb", "turns", "namespace"] {
        for is_replaced in [false, true] {
            let folder = Folder::new();
            let http = &folder.http;
            let (running, mut restarted) = (folder.start(), folder.start());
            let mut acknowledged = Vec::new();
            for instance in [&running, &restarted] {
                let entry = entry("before");
                assert_eq!(
                    put_one(http, &instance.url(), &entry).await,
                    Outcome::Stored
                );
                acknowledged.push(entry);
            }
            let file = folder.file(name);
            let copy = folder.file("copy");
            fs::copy(&file, &copy).unwrap();
            if is_replaced {
                fs::rename(&copy, &file).unwrap();
            } else {
                fs::remove_file(&file).unwrap();
            }
            restarted.kill();
            let reason = folder.require_refused(&running).await;
            let expected = format!("{name} in the map's folder");
            assert!(reason.contains(&expected) && reason.contains("was deleted, replaced or cut"));
            if name == "data.mdb" && !is_replaced {
                let line = folder.refused_start();
                assert!(line.contains("has lost its map"), "{line}");
                // As docs/lmdb.md says: the deleted file is whole while an instance has it open.
                let open = fs::read_dir(format!("/proc/{}/fd", running.pid())).unwrap();
                let deleted = open.map(|file| file.unwrap().path()).find(|file| {
                    let target = fs::read_link(file).unwrap_or_default();
                    target.to_string_lossy().ends_with("data.mdb (deleted)")
                });
                fs::copy(deleted.unwrap(), &file).unwrap();
            }
            let restarted = folder.start();
            let entry = entry("after");
            assert_eq!(
                put_one(http, &restarted.url(), &entry).await,
                Outcome::Stored
            );
            acknowledged.push(entry);
            folder.require_refused(&running).await;
            drop((running, restarted));
            let kept = all(http, &folder.start().url()).await;
            assert_eq!(kept, acknowledged, "{name}, replaced: {is_replaced}");
        }
    }
}

/// A file that is only moved away and back is the same one.
#[tokio::test]
async fn file_that_comes_back_is_used_again() {
    let folder = Folder::new();
    let instance = folder.start();
    fs::rename(folder.data(), folder.file("moved")).unwrap();
    folder.require_refused(&instance).await;
    fs::rename(folder.file("moved"), folder.data()).unwrap();
    let stored = put_one(&folder.http, &instance.url(), &entry("a")).await;
    assert_eq!(stored, Outcome::Stored);
}

/// LMDB maps this file too.
#[tokio::test]
async fn cut_lock_file_is_refused_until_all_instances_have_stopped() {
    let folder = Folder::new();
    let instance = folder.start();
    let stored = entry("before");
    let outcome = put_one(&folder.http, &instance.url(), &stored).await;
    assert_eq!(outcome, Outcome::Stored);
    let lock = File::options().write(true).open(folder.file("lock.mdb"));
    for length in [100_000, 0] {
        lock.as_ref().unwrap().set_len(length).unwrap();
        let reason = folder.require_refused(&instance).await;
        assert!(reason.contains("lock.mdb"), "{reason}");
        folder.refused_start();
    }
    drop(instance);
    assert_eq!(all(&folder.http, &folder.start().url()).await, [stored]);
}

/// A file is deleted while a commit is under way: whether an instance that starts sees it, is not known.
#[tokio::test]
async fn file_deleted_during_a_commit_makes_its_outcome_unknown() {
    let trial = trial_run(Command::new("strace").args(["--output=/dev/null", "true"]));
    if let Err(why) = trial {
        return skip(&format!("no tracer: {why}"), "REQUIRE_ALL");
    }
    let folder = Folder::new();
    let mut command = Command::new("strace");
    command.args(["--daemonize", "--quiet=all", "--follow-forks"]);
    // The first sync is that of the map's id. The delay is long beside the deletion.
    command.args([
        "--output=/dev/null",
        "--inject=fdatasync:delay_enter=5s:when=2",
    ]);
    command.args([LOGGING, "--map", &location(folder.outer.path())]);
    command.args(["--store-timeout", "60s"]);
    let instance = Process::start(command, free_address());
    instance.wait_until_ready();
    let before = fs::metadata(folder.data()).unwrap();
    let putting = tokio::spawn({
        let (http, url) = (folder.http.clone(), instance.url());
        async move { put_one(&http, &url, &entry("a")).await }
    });
    // LMDB writes the pages before it syncs them.
    let pages_are_written = async {
        let time = |data: &fs::Metadata| (data.mtime(), data.mtime_nsec());
        while time(&fs::metadata(folder.data()).unwrap()) == time(&before) {
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    };
    timeout(PATIENCE, pages_are_written).await.unwrap();
    fs::remove_file(folder.file("lock.mdb")).unwrap();
    let outcome = putting.await.unwrap();
    assert!(
        matches!(&outcome, Outcome::Unknown { detail } if detail.contains("lock.mdb")),
        "{outcome:?}"
    );
    instance.signal("TERM");
}

/// `cp` writes into the file that is there.
#[tokio::test]
async fn data_file_overwritten_in_place_is_noticed() {
    let (folder, other) = (Folder::new(), Folder::new());
    let instance = folder.start();
    let older = fs::read(folder.data()).unwrap();
    let stored = put_one(&folder.http, &instance.url(), &entry("a")).await;
    assert_eq!(stored, Outcome::Stored);
    let current = fs::read(folder.data()).unwrap();
    write_over(&folder.data(), &older);
    let reason = folder.require_refused(&instance).await;
    assert!(reason.contains("an older copy"), "{reason}");

    other.fill().await;
    write_over(&folder.data(), &fs::read(other.data()).unwrap());
    let reason = folder.require_refused(&instance).await;
    assert!(reason.contains("no longer holds the map"), "{reason}");

    write_over(&folder.data(), &current);
    let stored = put_one(&folder.http, &instance.url(), &entry("b")).await;
    assert_eq!(stored, Outcome::Stored);
}

/// A folder that has had a map is never taken for a new one.
#[tokio::test]
async fn folder_that_lost_its_map_is_refused() {
    let (folder, other) = (Folder::new(), Folder::new());
    let entries = folder.fill().await;
    other.fill().await;
    let data = fs::read(folder.data()).unwrap();
    let without_id = {
        let new = Folder::new();
        fs::create_dir(new.file("")).unwrap();
        let turns = File::create(new.file("turns")).unwrap();
        turns.lock().unwrap();
        let _instance = Process::start(logging(new.outer.path()), free_address());
        fs::read(new.data()).unwrap()
    };
    let lost: [(&str, Option<Vec<u8>>); 5] = [
        ("missing or empty", None),
        ("missing or empty", Some(Vec::new())),
        ("is cut", Some(data[..data.len().min(20_000)].to_vec())),
        ("but its data.mdb holds no map", Some(without_id)),
        (
            "but its data.mdb holds the map",
            Some(fs::read(other.data()).unwrap()),
        ),
    ];
    for (reason, content) in lost {
        match &content {
            None => fs::remove_file(folder.data()).unwrap(),
            Some(content) => fs::write(folder.data(), content).unwrap(),
        }
        let line = folder.refused_start();
        assert!(line.contains(reason) && line.contains("copy"), "{line}");
        for task in ["export", "check"] {
            let output = folder.task(task);
            assert_eq!(output.status.code(), Some(1));
            assert_eq!(one_line(&output), line);
            assert!(output.stdout.is_empty());
        }
        assert_eq!(fs::read(folder.data()).ok(), content);
    }
    fs::write(folder.data(), &data).unwrap();
    assert_eq!(all(&folder.http, &folder.start().url()).await, entries);
}

/// The file `id` is written with a new map, and into a folder that an earlier version made.
#[tokio::test]
async fn folder_names_its_map() {
    let folder = Folder::new();
    let is_new = |line: &String| line.contains("as the folder has had none");
    let mut instance = folder.start();
    assert!(instance.log().iter().any(is_new));
    let id = mark_of(&folder.http, &instance.url()).await.map.unwrap();
    let recorded = || fs::read_to_string(folder.file("id")).unwrap();
    assert_eq!(recorded(), id.to_string());
    instance.kill();
    fs::remove_file(folder.file("id")).unwrap();
    let mut instance = folder.start();
    assert_eq!(mark_of(&folder.http, &instance.url()).await.map, Some(id));
    assert_eq!(recorded(), id.to_string());
    assert!(!instance.log().iter().any(is_new));
    instance.kill();
    fs::write(folder.file("id"), "").unwrap();
    let line = folder.refused_start();
    assert!(line.contains("the file id has no UUID"), "{line}");
}

/// Each length is refused before a page that is missing is read, which would end the process by a signal.
#[tokio::test]
async fn data_file_cut_at_any_length_is_refused_in_one_line() {
    const LENGTHS: u64 = 230;
    let folder = Folder::new();
    folder.fill().await;
    let whole = folder.task("export");
    assert!(whole.status.success());
    let data = fs::read(folder.data()).unwrap();
    let end = end_of_pages(&folder.data());
    let lengths = (0..LENGTHS).map(|n| n * end / LENGTHS);
    for length in lengths.chain([8191, 8192, end - 1]) {
        fs::write(folder.data(), &data[..length as usize]).unwrap();
        let output = folder.task("export");
        assert_eq!(
            output.status.code(),
            Some(1),
            "{length} of {end}: {output:?}"
        );
        let line = one_line(&output);
        assert!(line.contains("data.mdb"), "{line}");
        assert!(output.stdout.is_empty(), "{length}");
        if length % 16 == 0 {
            assert_eq!(folder.refused_start(), line);
        }
    }
    // What follows is a hole.
    fs::write(folder.data(), &data[..end as usize]).unwrap();
    assert_eq!(folder.task("export").stdout, whole.stdout);
}

/// A map that is cut while instances run, and is written back.
#[tokio::test]
async fn data_file_cut_while_instances_run_is_refused() {
    let folder = Folder::new();
    let mut stored = folder.fill().await;
    let instance = folder.start();
    let length = end_of_pages(&folder.data());
    for cut in (0..20).map(|n| n * length / 20).chain([length - 1]) {
        let data = fs::read(folder.data()).unwrap();
        let file = File::options().write(true).open(folder.data()).unwrap();
        file.set_len(cut).unwrap();
        let reason = folder.require_refused(&instance).await;
        assert!(reason.contains("data.mdb"), "{reason}");
        file.write_all_at(&data, 0).unwrap();
        let entry = entry("after");
        let outcome = put_one(&folder.http, &instance.url(), &entry).await;
        assert_eq!(outcome, Outcome::Stored, "{cut}");
        stored.push(entry);
    }
    assert_eq!(all(&folder.http, &instance.url()).await, stored);
}

/// LMDB counts pages that it does not write, so the writer makes the file longer than what a commit adds.
#[tokio::test]
async fn data_file_is_longer_than_its_last_page_and_takes_no_space_for_it() {
    let folder = Folder::new();
    let instance = folder.start();
    for n in 0..60 {
        let some: Vec<Entry> = (0..1 + n * 97 % 400)
            .map(|m| entry(&"x".repeat(1 + n * m * 31 % 5000)))
            .collect();
        put(&folder.http, &instance.url(), &some).await.unwrap();
        let data = fs::metadata(folder.data()).unwrap();
        let end = end_of_pages(&folder.data());
        assert!(data.len() > end + (4 << 20), "{} {end}", data.len());
        assert!(data.blocks() * 512 <= end, "{} {end}", data.blocks());
    }
}

/// LMDB ends a process that reads some damaged pages of its tree; the check reports them like any others.
#[tokio::test]
async fn check_survives_any_page_that_is_damaged() {
    const PAGE: usize = 4096;
    let folder = Folder::new();
    folder.fill().await;
    let whole = fs::read(folder.data()).unwrap();
    let mut faults = 0;
    // The first two are meta pages, which opening checks; behind the last one is a hole.
    let pages = (2..whole.len() / PAGE).filter(|page| whole[page * PAGE..][..PAGE] != [0; PAGE]);
    for page in pages.step_by(5) {
        let mut damaged = whole.clone();
        damaged[page * PAGE..][..PAGE].fill(0);
        fs::write(folder.data(), &damaged).unwrap();
        let output = folder.task("check");
        match output.status.code() {
            Some(0) => {}
            Some(1) => faults += 1,
            _ => panic!("page {page}: {output:?}"),
        }
    }
    assert!(faults > 0, "no page was in use");
}

/// `check` reads a map in use, and names what is damaged.
#[tokio::test]
async fn check_names_the_damaged_entry() {
    let folder = Folder::new();
    let entries = folder.fill().await;
    let instance = folder.start();
    let output = folder.task("check");
    assert!(output.status.success(), "{output:?}");
    assert_eq!(one_line(&output), "checked 300 entries: no fault found\n");
    let outcome = put_one(&folder.http, &instance.url(), &entry("will be damaged")).await;
    assert_eq!(outcome, Outcome::Stored);
    drop(instance);
    let mut data = fs::read(folder.data()).unwrap();
    let message = b"will be damaged";
    let at = data.windows(message.len()).position(|part| part == message);
    data[at.unwrap()] = b'W';
    fs::write(folder.data(), &data).unwrap();
    let output = folder.task("check");
    assert_eq!(output.status.code(), Some(1));
    let line = one_line(&output);
    assert!(
        line.contains("is damaged: restore the map from a copy"),
        "{line}"
    );
    assert!(
        entries
            .iter()
            .all(|entry| !line.contains(&entry.uuid.to_string()))
    );
}
