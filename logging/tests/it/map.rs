//! The contract of the map, as one suite for every engine in [`ENGINES`]. The tests of a single engine
//! follow after the suite.

/// Reads in pieces.
mod reads;

use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use common::bounds::{Bounds, Order};
use common::entry::{Entry, Outcome, first_uuid};
use logging::map::{
    Access, DistributedMap, Location, MAX_AHEAD, MAX_SKEW, MapError, Options, PieceLimit, open,
};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use testing::engine::{EmptyMap, Engine, wait_until_ready};
use testing::process::LOOK_AGAIN;
use uuid::{NoContext, Timestamp, Uuid};

const SETTLE: Duration = Duration::from_secs(10);

const ENGINES: [Engine; 3] = [Engine::Lmdb, Engine::RedisServer, Engine::RedisCluster];

/// A map under test and what keeps it alive.
struct Subject {
    map: Arc<dyn DistributedMap>,
    location: Location,
    _keeper: EmptyMap,
}

impl Subject {
    async fn of(engine: Engine) -> Self {
        Self::with_settle(engine, SETTLE).await
    }

    async fn with_settle(engine: Engine, settle: Duration) -> Self {
        let empty = engine.empty_map();
        let location: Location = empty.location.parse().unwrap();
        let options = Options {
            settle: Some(settle),
            ..options()
        };
        Self {
            map: open_ready(&location, options).await,
            location,
            _keeper: empty,
        }
    }
}

fn options() -> Options {
    Options {
        store_timeout: Duration::from_secs(30),
        settle: Some(SETTLE),
        backups: None,
        access: Access::Serve,
    }
}

/// Opens a map and waits until it is ready. An LMDB map can be opened again only after its writer thread has
/// ended.
pub(crate) async fn open_ready(location: &Location, options: Options) -> Arc<dyn DistributedMap> {
    let map = loop {
        match open(location, options.clone()) {
            Ok(map) => break map,
            Err(error) if format!("{error:#}").contains("already open") => {
                tokio::task::yield_now().await;
            }
            Err(error) => panic!("{error:#}"),
        }
    };
    wait_until_ready(&*map).await;
    map
}

fn entry(msg: &str) -> Entry {
    Entry {
        uuid: Uuid::now_v7(),
        msg: msg.to_owned(),
    }
}

fn entry_at(time: SystemTime, msg: &str) -> Entry {
    let since_epoch = time.duration_since(SystemTime::UNIX_EPOCH).unwrap();
    let timestamp =
        Timestamp::from_unix(NoContext, since_epoch.as_secs(), since_epoch.subsec_nanos());
    Entry {
        uuid: Uuid::new_v7(timestamp),
        msg: msg.to_owned(),
    }
}

async fn put(map: &Arc<dyn DistributedMap>, entries: &[Entry]) -> Vec<Outcome> {
    map.put(entries.into()).await
}

async fn all(map: &Arc<dyn DistributedMap>) -> Vec<Entry> {
    read(&**map, Bounds::default()).await.unwrap()
}

/// Reads all entries within the bounds, in pieces of this limit.
pub(crate) async fn read_in_pieces(
    map: &dyn DistributedMap,
    bounds: Bounds,
    limit: PieceLimit,
) -> Result<Vec<Entry>, MapError> {
    let mut cursor = map.read(bounds);
    let mut read = Vec::new();
    loop {
        let piece = cursor.next(limit).await?;
        let lines = piece.lines.split_inclusive(|byte| *byte == b'\n');
        let entries: Vec<Entry> = lines
            .map(|line| serde_json::from_slice(line).unwrap())
            .collect();
        assert_eq!(piece.count, entries.len() as u64);
        assert!(piece.count <= limit.entries);
        assert_eq!(piece.last, entries.last().map(|entry| entry.uuid));
        if entries.is_empty() {
            return Ok(read);
        }
        read.extend(entries);
    }
}

/// Reads all entries within the bounds.
pub(crate) async fn read(map: &dyn DistributedMap, bounds: Bounds) -> Result<Vec<Entry>, MapError> {
    let limit = PieceLimit {
        entries: u64::MAX,
        bytes: 64 * 1024,
        message: usize::MAX,
    };
    read_in_pieces(map, bounds, limit).await
}

#[tokio::test]
async fn stored_entry_is_read_back() {
    for engine in ENGINES {
        let subject = Subject::of(engine).await;
        let map = subject.map;
        let entry = entry("hello");
        assert_eq!(map.get(entry.uuid).await.unwrap(), None);
        assert_eq!(map.last().await.unwrap(), None);
        assert_eq!(
            put(&map, std::slice::from_ref(&entry)).await,
            [Outcome::Stored]
        );
        assert_eq!(map.get(entry.uuid).await.unwrap().as_deref(), Some("hello"));
        assert_eq!(map.last().await.unwrap(), Some(entry.uuid));
        assert_eq!(all(&map).await, [entry]);
        assert_eq!(map.health().await.not_ready, None);
    }
}

#[tokio::test]
async fn repeated_entry_is_a_duplicate_and_one_entry() {
    for engine in ENGINES {
        let subject = Subject::of(engine).await;
        let map = subject.map;
        let entry = entry("once");
        let twice = [entry.clone(), entry.clone()];
        let outcomes = put(&map, &twice).await;
        assert_eq!(outcomes, [Outcome::Stored, Outcome::Duplicate]);
        assert_eq!(put(&map, &twice[..1]).await, [Outcome::Duplicate]);
        assert_eq!(all(&map).await, [entry]);
    }
}

#[tokio::test]
async fn conflicting_entry_changes_nothing() {
    for engine in ENGINES {
        let subject = Subject::of(engine).await;
        let map = subject.map;
        let first = entry("first");
        let other = Entry {
            uuid: first.uuid,
            msg: "other".to_owned(),
        };
        let outcomes = put(&map, &[first.clone(), other.clone()]).await;
        assert_eq!(outcomes, [Outcome::Stored, Outcome::Conflict]);
        assert_eq!(put(&map, &[other]).await, [Outcome::Conflict]);
        assert_eq!(all(&map).await, [first]);
    }
}

#[tokio::test]
async fn entry_outside_the_settle_window_is_stale() {
    let margin = Duration::from_secs(1);
    for engine in ENGINES {
        let subject = Subject::of(engine).await;
        let map = subject.map;
        let now = map.clocks().unwrap().map;
        let too_old = entry_at(now - SETTLE - MAX_SKEW - margin / 2, "too old");
        let leaving = entry_at(now - SETTLE - margin / 2, "leaving");
        let old = entry_at(now - SETTLE + margin, "old");
        let new = entry_at(now + MAX_AHEAD - margin, "new");
        let too_new = entry_at(now + MAX_AHEAD + margin, "too new");
        let entries = [too_old, leaving, old.clone(), new.clone(), too_new];
        let outcomes = put(&map, &entries).await;
        use Outcome::{Early, Leaving, Stale, Stored};
        assert_eq!(outcomes, [Stale, Leaving, Stored, Stored, Early]);
        assert_eq!(all(&map).await, [old, new]);
    }
}

/// Entries are put at the very edge of the settle window, and behind it, while what is settled is read: what
/// was read never grows, and an entry is settled in time.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_added_before_what_is_settled() {
    const BATCHES: u64 = 300;
    for engine in ENGINES {
        let settle = Duration::from_millis(200);
        let Subject { map, _keeper, .. } = Subject::with_settle(engine, settle).await;
        let before = |time: SystemTime| {
            let since_epoch = time.duration_since(SystemTime::UNIX_EPOCH).unwrap();
            Bounds {
                before: Some(first_uuid(since_epoch.as_millis() as u64)),
                ..Bounds::default()
            }
        };
        let writing = map.clone();
        let writer = tokio::spawn(async move {
            let mut last = SystemTime::now();
            for n in 0..BATCHES {
                last = SystemTime::now() - settle + Duration::from_millis(n % 8);
                put(&writing, &[entry_at(last, "a")]).await;
                put(&writing, &[entry_at(last - 2 * MAX_SKEW, "too old")]).await;
            }
            last
        });
        let mut seen = Vec::new();
        while !writer.is_finished() {
            let settled = map.settle(SystemTime::now()).await.unwrap();
            let read = read(&*map, before(settled)).await.unwrap();
            seen.push((settled, read.len()));
        }
        let last = writer.await.unwrap();
        while map.settle(SystemTime::now()).await.unwrap() <= last {
            tokio::time::sleep(LOOK_AGAIN).await;
        }
        assert!(seen.len() > 5, "{} reads", seen.len());
        for (settled, count) in seen {
            let now = read(&*map, before(settled)).await.unwrap();
            assert_eq!(now.len(), count, "{engine:?}");
        }
    }
}

/// An entry becomes too old while many others are written in its transaction. (On Redis a script's entries are
/// visible as soon as their times were checked.)
#[tokio::test]
async fn entry_that_becomes_too_old_before_the_commit_is_not_added() {
    const OTHERS: usize = 100_000;
    let settle = Duration::from_millis(20);
    let Subject { map, _keeper, .. } = Subject::with_settle(Engine::Lmdb, settle).await;
    let ahead = SystemTime::now() + MAX_AHEAD - Duration::from_millis(100);
    let mut entries: Vec<Entry> = (0..=OTHERS).map(|_| entry_at(ahead, "others")).collect();
    let entry = entry_at(SystemTime::now(), "a");
    entries[0] = entry.clone();
    let outcomes = put(&map, &entries).await;
    assert!(
        matches!(outcomes[0], Outcome::Leaving | Outcome::Stale),
        "{:?}",
        outcomes[0]
    );
    assert_eq!(map.get(entry.uuid).await.unwrap(), None);
}

#[tokio::test]
async fn settled_entry_is_still_recognized() {
    for engine in ENGINES {
        let settle = Duration::from_millis(200);
        let Subject { map, _keeper, .. } = Subject::with_settle(engine, settle).await;
        let entry = entry("settled");
        put(&map, std::slice::from_ref(&entry)).await;
        let settled_at = SystemTime::now() + settle + MAX_SKEW;
        while map.clocks().unwrap().map < settled_at {
            tokio::time::sleep(LOOK_AGAIN).await;
        }
        let other = Entry {
            uuid: entry.uuid,
            msg: "other".to_owned(),
        };
        let never_stored = entry_at(SystemTime::now() - 2 * MAX_SKEW, "never");
        let outcomes = put(&map, &[entry, other, never_stored]).await;
        use Outcome::{Conflict, Duplicate, Stale};
        assert_eq!(outcomes, [Duplicate, Conflict, Stale]);
    }
}

#[tokio::test]
async fn entries_survive_a_restart() {
    for engine in ENGINES {
        let subject = Subject::of(engine).await;
        let entries: Vec<Entry> = (0..100).map(|n| entry(&format!("message {n}"))).collect();
        put(&subject.map, &entries).await;
        let Subject {
            map,
            location,
            _keeper,
        } = subject;
        drop(map);
        let map = open_ready(&location, options()).await;
        assert_eq!(all(&map).await, entries);
    }
}

/// The id is generated once, survives restarts, and is not an entry.
#[tokio::test]
async fn id_of_a_map_outlives_its_instances_and_differs_from_other_maps() {
    for engine in ENGINES {
        let mut ids = Vec::new();
        for _ in 0..2 {
            let Subject {
                map,
                location,
                _keeper,
            } = Subject::of(engine).await;
            let id = map.id().expect("a ready map has an id");
            assert_eq!(map.last().await.unwrap(), None);
            assert_eq!(all(&map).await, []);
            let stored = [entry("first")];
            put(&map, &stored).await;
            drop(map);
            let map = open_ready(&location, options()).await;
            assert_eq!(map.id(), Some(id));
            let newest_first = Bounds {
                order: Order::Desc,
                ..Bounds::default()
            };
            assert_eq!(read(&*map, newest_first).await.unwrap(), stored);
            ids.push(id);
        }
        assert_ne!(ids[0], ids[1], "{engine:?}");
    }
}

#[tokio::test]
async fn batches_at_once_are_all_answered_and_stored() {
    for engine in ENGINES {
        let subject = Subject::of(engine).await;
        let batches = (0..200).map(|batch| {
            let map = subject.map.clone();
            tokio::spawn(async move {
                let entries: Vec<Entry> = (0..10).map(|n| entry(&format!("{batch}/{n}"))).collect();
                let outcomes = put(&map, &entries).await;
                assert!(outcomes.iter().all(|outcome| *outcome == Outcome::Stored));
            })
        });
        for batch in batches.collect::<Vec<_>>() {
            batch.await.unwrap();
        }
        let stored = all(&subject.map).await;
        assert_eq!(stored.len(), 2000);
        assert!(stored.is_sorted_by(|left, right| left.uuid < right.uuid));
    }
}

fn cases(cases: u32) -> Config {
    Config {
        cases,
        failure_persistence: None,
        ..Config::default()
    }
}

/// Any text is read back byte for byte.
#[test]
fn messages_are_kept_byte_for_byte() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    for engine in ENGINES {
        let subject = runtime.block_on(Subject::of(engine));
        TestRunner::new(cases(200))
            .run(&"(?s).{1,300}", |msg| {
                let entry = entry(&msg);
                let entries = std::slice::from_ref(&entry);
                let outcomes = runtime.block_on(put(&subject.map, entries));
                prop_assert_eq!(outcomes, [Outcome::Stored]);
                let stored = runtime.block_on(subject.map.get(entry.uuid)).unwrap();
                prop_assert_eq!(stored, Some(msg));
                Ok(())
            })
            .unwrap();
    }
}

#[tokio::test]
async fn damaged_lmdb_entry_is_an_error_not_a_shorter_read() {
    let subject = Subject::of(Engine::Lmdb).await;
    let entries = [
        entry("intact"),
        entry("will be damaged"),
        entry("intact too"),
    ];
    put(&subject.map, &entries).await;
    let Location::Lmdb(folder) = &subject.location else {
        panic!("it is an LMDB map")
    };
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .open(folder.join("data.mdb"))
        .unwrap();
    let content = std::fs::read(folder.join("data.mdb")).unwrap();
    let needle = b"will be damaged";
    for at in 0..content.len() - needle.len() {
        if content[at..].starts_with(needle) {
            file.write_all_at(b"W", at as u64).unwrap();
        }
    }
    let damaged = entries[1].uuid;
    let is_damaged =
        |error: &MapError| matches!(error, MapError::Damaged(uuid) if *uuid == damaged);
    let whole = read(&*subject.map, Bounds::default()).await;
    assert!(is_damaged(&whole.unwrap_err()));
    assert!(is_damaged(&subject.map.get(damaged).await.unwrap_err()));
    let outcomes = put(&subject.map, &entries[1..2]).await;
    assert!(
        matches!(outcomes[..], [Outcome::Unknown { .. }]),
        "{outcomes:?}"
    );
    assert!(subject.map.get(entries[0].uuid).await.unwrap().is_some());
}
