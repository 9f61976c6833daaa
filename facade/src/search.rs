//! `contains=TEXT`: which entries of a read match, and where a search ends.

use bytes::Bytes;
use common::api::EntryLine;
use memchr::memmem::Finder;
use memchr::{memchr, memchr_iter};
use serde::Deserialize;
use uuid::Uuid;

use crate::entry_stream::{Fragment, Part};
use crate::read::Cursor;
use crate::upstream::UpstreamError;

/// The most entries that one search looks at, and so the limit of its read on an instance. A search may find
/// nothing, and then its caller sees nothing until it ends: 100,000 messages of 65 bytes take 0.04 s on LMDB and
/// 0.13 s on a Redis Cluster, of 64 KiB 7 to 13 s (`bench/read.sh`, part `search`). The next request continues.
pub(crate) const MAX_SCANNED: u64 = 100_000;

/// The longest text, in bytes.
pub(crate) const MAX_TEXT: usize = 256;

/// The detail of a 400.
const WRITE_A_TEXT: &str =
    "write a text of 1 to 256 bytes, or leave contains out to get all messages";

/// The text that a search looks for, as it is in a message.
#[derive(Debug, Deserialize)]
#[serde(try_from = "String")]
pub(crate) struct Text(Finder<'static>);

impl TryFrom<String> for Text {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        match text.len() {
            1..=MAX_TEXT => Ok(Self(Finder::new(&text).into_owned())),
            _ => Err(WRITE_A_TEXT),
        }
    }
}

impl Text {
    pub(crate) fn as_str(&self) -> &str {
        std::str::from_utf8(self.0.needle()).expect("it was made of a string")
    }

    /// Whether it is in a message, which is given as a JSON string with its quotes.
    fn is_in(&self, json: &str) -> bool {
        let between_quotes = &json.as_bytes()[1..json.len() - 1];
        if memchr(b'\\', between_quotes).is_none() {
            return self.0.find(between_quotes).is_some();
        }
        let msg: String = serde_json::from_str(json).expect("the line was checked");
        self.0.find(msg.as_bytes()).is_some()
    }
}

/// A search that is under way.
#[derive(Debug)]
pub(crate) struct Search {
    text: Text,
    /// The matches that are still wanted; `None` wants all.
    left: Option<u64>,
    /// The number of entries looked at.
    pub(crate) scanned: u64,
    last_match: Option<Uuid>,
    /// Whether an entry follows the last wanted match.
    is_cut: bool,
    long: LongLine,
}

/// A line that comes in fragments.
#[derive(Debug)]
enum LongLine {
    /// It is looked for the text; with the end of what was looked at, in which a match may begin.
    Searched(Vec<u8>),
    /// It matches, and is passed on from its beginning.
    Matches,
}

impl Search {
    /// `limit` is the number of matches that are wanted.
    pub(crate) fn new(text: Text, limit: Option<u64>) -> Self {
        Self {
            text,
            left: limit,
            scanned: 0,
            last_match: None,
            is_cut: false,
            long: LongLine::Searched(Vec::new()),
        }
    }

    /// The next matches of a read, or its end. The end has the last entry looked at as the cursor to
    /// continue from, if the read has more.
    pub(crate) async fn next(&mut self, read: &mut Cursor) -> Result<Part, UpstreamError> {
        while !self.is_cut {
            let lines = match read.next().await? {
                Part::Entries(lines, _) => lines,
                Part::Fragment(fragment) => {
                    if let Some(fragment) = self.take_fragment(fragment, read) {
                        return Ok(Part::Fragment(fragment));
                    }
                    continue;
                }
                end @ Part::End(_) => return Ok(end),
            };
            let (matches, count) = self.matches(&lines);
            if count > 0 {
                return Ok(Part::Entries(matches, count));
            }
        }
        Ok(Part::End(self.last_match))
    }

    /// The fragment, if its line matches. A line that turns out to match after its first fragment is read again.
    fn take_fragment(&mut self, fragment: Fragment, read: &mut Cursor) -> Option<Fragment> {
        if self.left == Some(0) {
            self.is_cut = true;
            return None;
        }
        if let LongLine::Searched(looked_at) = &mut self.long {
            looked_at.extend_from_slice(fragment.text().as_bytes());
            if self.text.0.find(looked_at).is_some() {
                self.long = LongLine::Matches;
                if !fragment.is_first {
                    read.rewind_entry();
                    return None;
                }
            } else {
                let kept = looked_at.len().min(self.text.0.needle().len() - 1);
                looked_at.drain(..looked_at.len() - kept);
            }
        }
        let matches = matches!(self.long, LongLine::Matches);
        if fragment.is_last {
            self.long = LongLine::Searched(Vec::new());
            self.scanned += 1;
            if matches {
                self.last_match = Some(fragment.uuid);
                self.left = self.left.map(|left| left - 1);
            }
        }
        matches.then_some(fragment)
    }

    /// The lines of `lines` that match, and their number.
    fn matches(&mut self, lines: &[u8]) -> (Bytes, u64) {
        let mut matches = Vec::new();
        let mut count = 0;
        let mut begin = 0;
        for newline in memchr_iter(b'\n', lines) {
            if self.left == Some(0) {
                self.is_cut = true;
                break;
            }
            let entry = EntryLine::parse(&lines[begin..newline]).expect("the line was checked");
            self.scanned += 1;
            if self.text.is_in(entry.msg) {
                matches.extend_from_slice(&lines[begin..=newline]);
                count += 1;
                self.last_match = Some(entry.uuid());
                self.left = self.left.map(|left| left - 1);
            }
            begin = newline + 1;
        }
        (matches.into(), count)
    }
}
