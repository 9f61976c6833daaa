//! Input that nobody would send on purpose, for the parsers of what comes from outside.

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::{Index, select};

#[derive(Clone, Debug)]
enum Change {
    Replace(Index, u8),
    Remove(Index),
    Repeat(Index, Index),
    Cut(Index),
}

/// Bytes near one of `samples`: as it is, or with some bytes replaced, removed, repeated or cut off; and one
/// time in five any bytes. `PROPTEST_CASES` is how many a test tries (256); those that have failed are kept in
/// the folder `proptest-regressions` and tried first.
pub fn near(samples: &'static [&'static [u8]]) -> impl Strategy<Value = Vec<u8>> {
    let change = prop_oneof![
        (any::<Index>(), any::<u8>()).prop_map(|(at, byte)| Change::Replace(at, byte)),
        any::<Index>().prop_map(Change::Remove),
        (any::<Index>(), any::<Index>()).prop_map(|(from, to)| Change::Repeat(from, to)),
        any::<Index>().prop_map(Change::Cut),
    ];
    let changed = (select(samples), vec(change, 0..5)).prop_map(|(sample, changes)| {
        let mut bytes = sample.to_vec();
        for change in &changes {
            apply(&mut bytes, change);
        }
        bytes
    });
    prop_oneof![4 => changed, 1 => vec(any::<u8>(), 0..300)]
}

fn apply(bytes: &mut Vec<u8>, change: &Change) {
    if bytes.is_empty() {
        return;
    }
    let length = bytes.len();
    match change {
        Change::Replace(at, byte) => bytes[at.index(length)] = *byte,
        Change::Remove(at) => drop(bytes.remove(at.index(length))),
        Change::Repeat(from, to) => {
            let (from, to) = (from.index(length), to.index(length));
            bytes.extend_from_within(from.min(to)..=from.max(to));
        }
        Change::Cut(at) => bytes.truncate(at.index(length)),
    }
}

/// The bytes in pieces of these lengths, in turn, as a connection may deliver them.
pub fn in_pieces(mut bytes: &[u8], lengths: &[usize]) -> Vec<Vec<u8>> {
    let mut pieces = Vec::new();
    for length in lengths.iter().cycle().filter(|length| **length > 0) {
        if bytes.is_empty() {
            break;
        }
        let (piece, rest) = bytes.split_at((*length).min(bytes.len()));
        pieces.push(piece.to_vec());
        bytes = rest;
    }
    pieces
}
