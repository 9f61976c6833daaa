//! Reads in pieces: complete, in order, within their bounds.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::time::{Duration, SystemTime};

use common::bounds::{Bounds, Order};
use common::entry::{Entry, Outcome};
use logging::map::PieceLimit;
use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use uuid::Uuid;

use super::{ENGINES, Subject, all, cases, entry, entry_at, put, read_in_pieces};

#[tokio::test]
async fn piece_is_cut_in_bytes_but_holds_one_entry() {
    for engine in ENGINES {
        let subject = Subject::of(engine).await;
        let entries: Vec<Entry> = (0..4).map(|_| entry(&"x".repeat(1000))).collect();
        put(&subject.map, &entries).await;
        for (bytes, most) in [(0, 1), (1500, 1), (2500, 2), (100_000, 4)] {
            let limit = PieceLimit {
                entries: u64::MAX,
                bytes,
                message: usize::MAX,
            };
            let mut cursor = subject.map.read(Bounds::default());
            let piece = cursor.next(limit).await.unwrap();
            assert!((1..=most).contains(&piece.count), "{bytes}: {piece:?}");
            let whole = read_in_pieces(&*subject.map, Bounds::default(), limit).await;
            assert_eq!(whole.unwrap(), entries, "with {bytes} bytes");
        }
    }
}

/// A large message is read in parts of whole characters, and the cursor goes on behind its entry.
#[tokio::test]
async fn large_message_is_read_in_parts() {
    for engine in ENGINES {
        let subject = Subject::of(engine).await;
        let entries = [entry("a"), entry(&"größe €𝄞".repeat(1000)), entry("b")];
        put(&subject.map, &entries).await;
        let limit = PieceLimit {
            entries: u64::MAX,
            bytes: 1500,
            message: 1500,
        };
        let mut cursor = subject.map.read(Bounds::default());
        let mut sizes = Vec::new();
        for entry in &entries {
            let piece = cursor.next(limit).await.unwrap();
            assert_eq!((piece.count, piece.last), (1, Some(entry.uuid)));
            assert_eq!(piece.lines.is_empty(), piece.large.is_some());
            sizes.push(piece.large);
        }
        let bytes = entries[1].msg.len();
        assert_eq!(sizes, [None, Some(bytes), None]);
        let mut msg = String::new();
        while msg.len() < bytes {
            let part = subject.map.part(entries[1].uuid, msg.len(), 1001).await;
            let part = part.unwrap();
            assert!((1..=1001).contains(&part.len()));
            msg += &part;
        }
        assert_eq!(msg, entries[1].msg);
        assert!(subject.map.part(entries[1].uuid, bytes, 1).await.is_err());
    }
}

/// For any bounds, any size of pieces and both orders, a cursor returns the same entries as a sorted map in
/// memory; so does a cursor that continues from an entry in the middle.
#[test]
fn reads_match_a_model() {
    const ENTRIES: usize = 30;
    let runtime = tokio::runtime::Runtime::new().unwrap();
    for engine in ENGINES {
        let subject = runtime.block_on(Subject::of(engine));
        let entries: Vec<Entry> = (0..ENTRIES)
            .map(|n| entry(&format!("message {n}")))
            .collect();
        runtime.block_on(put(&subject.map, &entries));
        let model = entries.iter().map(|entry| (entry.uuid, entry.msg.clone()));
        let model: BTreeMap<Uuid, String> = model.collect();
        let mut uuids: Vec<Uuid> = model.keys().copied().collect();
        uuids.extend([Uuid::nil(), Uuid::max()]);
        let bound = proptest::option::of(proptest::sample::select(uuids));
        let case = (bound.clone(), bound, any::<bool>(), 1..2 * ENTRIES as u64);
        TestRunner::new(cases(500))
            .run(&case, |(after, before, is_desc, limit)| {
                let order = if is_desc { Order::Desc } else { Order::Asc };
                let bounds = Bounds {
                    after,
                    before,
                    order,
                };
                let limit = PieceLimit {
                    entries: limit,
                    bytes: 1024 * 1024,
                    message: usize::MAX,
                };
                let read = async |bounds| read_in_pieces(&*subject.map, bounds, limit).await;
                let whole = runtime.block_on(read(bounds)).unwrap();
                prop_assert_eq!(&whole, &expected(&model, bounds));
                if let Some(middle) = whole.get(whole.len() / 2) {
                    let rest = runtime
                        .block_on(read(bounds.resumed_from(middle.uuid)))
                        .unwrap();
                    prop_assert_eq!(&rest[..], &whole[whole.len() / 2 + 1..]);
                }
                Ok(())
            })
            .unwrap();
    }
}

/// Entries of all sizes, dense and sparse in time, in one partition and in all, are read in pieces: each once,
/// in order.
#[tokio::test]
async fn uneven_entries_are_read_whole_in_pieces() {
    const ONE_PARTITION: u32 = 7;
    const SIZES: [usize; 5] = [1, 40, 700, 5000, 64 * 1024];
    for engine in ENGINES {
        let subject = Subject::of(engine).await;
        let mut entries = Vec::new();
        let now = SystemTime::now();
        for n in 0..1500 {
            let size = SIZES[n % 97 % SIZES.len()];
            let spread = now - Duration::from_millis(5000 - n as u64);
            entries.push(entry_at(spread, &"s".repeat(size)));
            entries.push(entry_at(now, &"c".repeat(40)));
        }
        while entries.len() < 3300 {
            let crowded = entry_at(now, "all of these are in one partition");
            if crc32fast::hash(crowded.uuid.as_bytes()) % 271 == ONE_PARTITION {
                entries.push(crowded);
            }
        }
        for batch in entries.chunks(500) {
            let outcomes = put(&subject.map, batch).await;
            assert!(outcomes.iter().all(|outcome| *outcome == Outcome::Stored));
        }
        entries.sort_by_key(|entry| entry.uuid);
        assert!(all(&subject.map).await == entries);
        for (order, bytes) in [
            (Order::Asc, 128 * 1024),
            (Order::Desc, 128 * 1024),
            (Order::Asc, 4000),
        ] {
            let bounds = Bounds {
                order,
                ..Bounds::default()
            };
            let limit = PieceLimit {
                entries: u64::MAX,
                bytes,
                message: usize::MAX,
            };
            let read = read_in_pieces(&*subject.map, bounds, limit).await;
            let mut read = read.unwrap();
            if order == Order::Desc {
                read.reverse();
            }
            assert!(
                read == entries,
                "{engine:?}, {order:?}, pieces of {bytes} bytes"
            );
        }
    }
}

fn expected(model: &BTreeMap<Uuid, String>, bounds: Bounds) -> Vec<Entry> {
    let is_empty = matches!((bounds.after, bounds.before), (Some(a), Some(b)) if a >= b);
    if is_empty {
        return Vec::new();
    }
    let after = bounds.after.map_or(Bound::Unbounded, Bound::Excluded);
    let before = bounds.before.map_or(Bound::Unbounded, Bound::Excluded);
    let ascending = model.range((after, before)).map(|(uuid, msg)| Entry {
        uuid: *uuid,
        msg: msg.clone(),
    });
    match bounds.order {
        Order::Asc => ascending.collect(),
        Order::Desc => ascending.rev().collect(),
    }
}
