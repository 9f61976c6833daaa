//! What has arrived in the window, as a state that polls change: which entries are new, which are kept, and
//! how a follower that has everything up to a position goes on.

use std::collections::{BTreeSet, VecDeque};
use std::ops::Bound;
use std::sync::Arc;

use common::api::EntryLine;
use memchr::memchr_iter;
use reqwest::StatusCode;
use uuid::Uuid;

use crate::upstream::UpstreamError;

/// What the window keeps for followers that are behind, in bytes.
const KEPT_BYTES: usize = 4 * 1024 * 1024;

/// What the window keeps at most, in bytes, if there is so much above the settled position. When that
/// does not fit, followers that begin wait and read settled history meanwhile.
const MAX_BYTES: usize = 32 * 1024 * 1024;

/// Bytes of an arrival besides its line.
const ARRIVAL_OVERHEAD: usize = 64;

/// UUIDs above the settled position that are remembered at most; beyond it all followers are cut. At
/// 30,000 messages a second it takes half a minute without a settling poll.
const MAX_UNSETTLED: usize = 1_000_000;

#[derive(Debug, Default)]
pub(crate) struct State {
    /// Everything up to here has arrived; `None` before the first settling poll.
    pub(super) settled: Option<Uuid>,
    /// What has arrived above it.
    unsettled: BTreeSet<Uuid>,
    /// The newest arrivals, in order: all above `floor`, and some below.
    arrivals: VecDeque<Arrival>,
    /// The number of the first of them.
    first: u64,
    floor: Uuid,
    bytes: usize,
    /// The settling polls that have begun, and the last one that was completed.
    pub(super) begun: u64,
    pub(super) completed: u64,
    /// Why nothing arrives any more.
    pub(super) failure: Option<Arc<UpstreamError>>,
}

/// An entry, as a line without its newline.
#[derive(Debug)]
pub(crate) struct Arrival {
    pub(crate) uuid: Uuid,
    pub(crate) line: Box<[u8]>,
    /// The settled position then: everything up to it has arrived before.
    pub(crate) settled: Uuid,
}

/// How a follower that has everything up to a position goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// With the arrivals from this number on that are above its position.
    Arrivals(u64),
    /// With the log, up to this settled position.
    History(Uuid),
    /// When more is settled.
    Wait,
}

/// How a follower that wants the newest entries begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Newest {
    /// With those of the arrivals before the number `end` that are not below `from`; then with all.
    Arrivals { from: Uuid, end: u64 },
    /// With so many entries below a settled position, and then all above it.
    History { count: u64, settled: Uuid },
}

impl State {
    /// # Errors
    /// Why nothing arrives any more.
    pub(crate) fn check(&self) -> Result<(), Arc<UpstreamError>> {
        self.failure.clone().map_or(Ok(()), Err)
    }

    pub(crate) fn settled(&self) -> Uuid {
        self.settled.unwrap_or_default()
    }

    /// The number of the next arrival.
    fn end(&self) -> u64 {
        self.first + self.arrivals.len() as u64
    }

    /// The number of the oldest arrival that is kept.
    pub(crate) fn first(&self) -> u64 {
        self.first
    }

    /// The arrivals from a number on, all of which must be kept.
    pub(crate) fn arrivals_from(&self, number: u64) -> impl Iterator<Item = &Arrival> {
        self.arrivals.range((number - self.first) as usize..)
    }

    pub(crate) fn next_after(&self, position: Uuid) -> Next {
        if position >= self.floor {
            Next::Arrivals(self.first)
        } else if position < self.settled() {
            Next::History(self.settled())
        } else {
            Next::Wait
        }
    }

    /// The newest `count` entries above `after`.
    pub(crate) fn newest(&self, count: u64, after: Uuid) -> Newest {
        let settled = self.settled();
        let above = (Bound::Excluded(after), Bound::Unbounded);
        let mut newest_first = self.unsettled.range(above).rev();
        let mut from = Uuid::max();
        let mut found = 0;
        while found < count {
            let Some(uuid) = newest_first.next() else {
                let count = count - found;
                return Newest::History { count, settled };
            };
            from = *uuid;
            found += 1;
        }
        if self.floor > settled {
            // The window does not have all of them: better too many than one too few.
            return Newest::History { count: 0, settled };
        }
        let end = self.end();
        Newest::Arrivals { from, end }
    }

    /// Adds those lines that have not arrived before, and returns whether there are any.
    pub(super) fn add(&mut self, lines: &[u8]) -> bool {
        let end = self.end();
        let settled = self.settled();
        let mut begin = 0;
        for newline in memchr_iter(b'\n', lines) {
            let line = &lines[begin..newline];
            begin = newline + 1;
            let uuid = EntryLine::parse(line).expect("the line was checked").uuid();
            if uuid <= settled || !self.unsettled.insert(uuid) {
                continue;
            }
            self.bytes += line.len() + ARRIVAL_OVERHEAD;
            self.arrivals.push_back(Arrival {
                uuid,
                line: line.into(),
                settled,
            });
        }
        let has_grown = self.end() > end;
        self.trim();
        if self.unsettled.len() > MAX_UNSETTLED {
            let reason = "more messages than can be followed".to_owned();
            let error = UpstreamError::Status(StatusCode::SERVICE_UNAVAILABLE, reason);
            self.failure.get_or_insert(Arc::new(error));
        }
        has_grown
    }

    /// Takes note of what is settled, after everything above the last position was read.
    pub(super) fn settle(&mut self, settled: Option<Uuid>) {
        let Some(settled) = settled else {
            return;
        };
        if self.settled.is_none() {
            // Above it if the first poll found more than the window holds.
            self.floor = self.floor.max(settled);
        }
        self.settled = self.settled.max(Some(settled));
        self.unsettled = self.unsettled.split_off(&self.settled());
        self.trim();
    }

    fn trim(&mut self) {
        let settled = self.settled();
        while let Some(oldest) = self.arrivals.front() {
            let max = if oldest.uuid > settled {
                MAX_BYTES
            } else {
                KEPT_BYTES
            };
            if self.bytes <= max {
                break;
            }
            self.bytes -= oldest.line.len() + ARRIVAL_OVERHEAD;
            self.floor = self.floor.max(oldest.uuid);
            self.first += 1;
            self.arrivals.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use common::api::write_entry;

    use super::*;

    fn uuid(n: u128) -> Uuid {
        Uuid::from_u128(n)
    }

    fn lines(numbers: &[u128], bytes: usize) -> Vec<u8> {
        let mut lines = Vec::new();
        let msg = "x".repeat(bytes);
        numbers
            .iter()
            .for_each(|n| write_entry(&mut lines, uuid(*n), &msg));
        lines
    }

    fn arrived(state: &State, from: u64) -> Vec<u128> {
        let arrivals = state.arrivals_from(from);
        arrivals.map(|arrival| arrival.uuid.as_u128()).collect()
    }

    /// A window after its first poll.
    fn begun(numbers: &[u128], settled: u128) -> State {
        let mut state = State::default();
        state.add(&lines(numbers, 1));
        state.settle(Some(uuid(settled)));
        state
    }

    /// The first poll of a busy log: what it found and could not keep must be read as history.
    #[test]
    fn what_the_first_poll_could_not_keep_is_not_skipped() {
        let mut state = State::default();
        state.add(&lines(&[11], MAX_BYTES));
        state.add(&lines(&[12], MAX_BYTES));
        state.settle(Some(uuid(10)));
        assert_eq!(state.next_after(uuid(10)), Next::Wait);
        let history = Newest::History {
            count: 0,
            settled: uuid(10),
        };
        assert_eq!(state.newest(1, uuid(0)), history);
    }

    #[test]
    fn entry_arrives_once_however_late() {
        let mut state = begun(&[11, 13], 10);
        assert!(state.add(&lines(&[11, 12, 13, 14], 1)));
        assert!(!state.add(&lines(&[11, 12, 13, 14], 1)));
        assert_eq!(arrived(&state, 0), [11, 13, 12, 14]);
        state.settle(Some(uuid(13)));
        assert!(!state.add(&lines(&[12, 14], 1)), "what is settled is known");
        state.settle(Some(uuid(9)));
        assert!(!state.add(&lines(&[11], 1)), "it never goes back");
        state.settle(None);
        assert_eq!(state.settled(), uuid(13));
        state.add(&lines(&[15], 1));
        let positions = state.arrivals_from(0);
        let positions: Vec<u128> = positions.map(|arrival| arrival.settled.as_u128()).collect();
        assert_eq!(positions, [0, 0, 10, 10, 13]);
    }

    #[test]
    fn follower_reads_history_up_to_what_the_window_has() {
        let mut state = begun(&[11, 12], 10);
        assert_eq!(state.next_after(uuid(0)), Next::History(uuid(10)));
        assert_eq!(state.next_after(uuid(10)), Next::Arrivals(0));
        assert_eq!(state.next_after(uuid(12)), Next::Arrivals(0));
        state.settle(Some(uuid(12)));
        assert_eq!(state.next_after(uuid(10)), Next::Arrivals(0));
        // One that has everything up to 10 would miss 11 then.
        state.add(&lines(&[13], KEPT_BYTES));
        assert_eq!(arrived(&state, state.first()), [13]);
        assert_eq!(state.next_after(uuid(10)), Next::History(uuid(12)));
        assert_eq!(state.next_after(uuid(12)), Next::Arrivals(2));
        // More than the window holds, and nothing of it is settled.
        state.add(&lines(&[14], MAX_BYTES));
        assert_eq!(state.next_after(uuid(12)), Next::Wait);
        assert_eq!(state.next_after(uuid(11)), Next::History(uuid(12)));
        state.settle(Some(uuid(15)));
        assert_eq!(state.next_after(uuid(12)), Next::History(uuid(15)));
    }

    #[test]
    fn newest_are_counted_by_uuid_above_a_position() {
        let mut state = begun(&[13, 11, 12], 10);
        let arrivals = |from| Newest::Arrivals { from, end: 3 };
        assert_eq!(state.newest(0, uuid(0)), arrivals(Uuid::max()));
        assert_eq!(state.newest(2, uuid(0)), arrivals(uuid(12)));
        assert_eq!(state.newest(3, uuid(0)), arrivals(uuid(11)));
        let settled = uuid(10);
        let history = |count| Newest::History { count, settled };
        assert_eq!(state.newest(5, uuid(0)), history(2));
        assert_eq!(state.newest(2, uuid(12)), history(1));
        state.add(&lines(&[14], MAX_BYTES));
        assert_eq!(state.newest(1, uuid(0)), history(0));
    }
}
