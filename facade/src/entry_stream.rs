//! Checks the stream of a logging instance: whole lines of valid entries, in order, within bounds.

use std::fmt;

use bytes::{Buf, Bytes, BytesMut};
use common::api::{
    EntryLine, LINE_BEGIN_BYTES, LINE_END, MAX_LINE, StreamEnd, parse_line_begin, whole_characters,
};
use common::bounds::{Bounds, Order};
use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use memchr::{memchr, memchr_iter, memrchr};
use reqwest::StatusCode;
use uuid::Uuid;

use crate::upstream::UpstreamError;

/// The bytes of an answer as they arrive. A lost connection or a timeout is an error.
pub type Chunks = BoxStream<'static, Result<Bytes, UpstreamError>>;

/// The longest line, in bytes, that is returned whole; a longer one comes in fragments, so that the memory of a
/// read does not depend on its messages.
pub(crate) const LONGEST_WHOLE: usize = 64 * 1024;

/// The longest escape in a JSON string, and so more than the longest cut character.
const LONGEST_ESCAPE: usize = 6;

pub(crate) struct EntryStream {
    chunks: Chunks,
    longest_whole: usize,
    /// The bounds of the entries still to come.
    bounds: Bounds,
    left: Option<u64>,
    count: u64,
    /// The beginning of a line that has not arrived whole.
    cut_line: BytesMut,
    /// The line that is being returned in fragments.
    fragmented: Option<Fragmented>,
    /// The entry that another stream has returned a part of, and how many bytes of its message as JSON.
    resumed: Option<(Uuid, usize)>,
    /// Bytes that arrived and were not returned yet.
    chunk: Bytes,
    end: Option<StreamEnd>,
}

impl fmt::Debug for EntryStream {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = formatter.debug_struct("EntryStream");
        shown.field("bounds", &self.bounds).finish_non_exhaustive()
    }
}

#[derive(Debug)]
pub(crate) enum Part {
    /// At least one whole line of an entry, each with its newline, and their number.
    Entries(Bytes, u64),
    /// A part of the line of one entry.
    Fragment(Fragment),
    /// The end, with the cursor to continue from when the limit ended the stream.
    End(Option<Uuid>),
}

/// A part of a large message, in order and without a gap.
#[derive(Debug)]
pub(crate) struct Fragment {
    pub(crate) uuid: Uuid,
    /// Whole characters and escapes of the message's JSON string.
    pub(crate) json: Bytes,
    pub(crate) is_first: bool,
    pub(crate) is_last: bool,
}

impl Fragment {
    pub(crate) fn text(&self) -> String {
        let string = [b"\"", &self.json[..], b"\""].concat();
        serde_json::from_slice(&string).expect("its characters were checked")
    }
}

#[derive(Debug)]
struct Fragmented {
    uuid: Uuid,
    /// How many bytes of the message's JSON were returned, or skipped because the stream before returned them.
    returned: usize,
    /// How many are still to be skipped.
    skip: usize,
}

impl EntryStream {
    /// `bounds` and `limit` are those of the request.
    pub(crate) fn new(chunks: Chunks, bounds: Bounds, limit: Option<u64>) -> Self {
        Self {
            chunks,
            longest_whole: MAX_LINE,
            fragmented: None,
            resumed: None,
            bounds,
            left: limit,
            count: 0,
            cut_line: BytesMut::new(),
            chunk: Bytes::new(),
            end: None,
        }
    }

    /// Returns lines longer than [`LONGEST_WHOLE`] in fragments, and of the first entry only what follows
    /// `resumed`: see [`Self::cut`].
    pub(crate) fn in_fragments(self, resumed: Option<(Uuid, usize)>) -> Self {
        Self {
            longest_whole: LONGEST_WHOLE,
            resumed,
            ..self
        }
    }

    /// The entry of which fragments were returned, but not the last one, and how many bytes of its message as
    /// JSON. Another stream continues there, as every instance makes the same line of an entry.
    pub(crate) fn cut(&self) -> Option<(Uuid, usize)> {
        let begun = self.fragmented.as_ref();
        begun.map_or(self.resumed, |line| {
            Some((line.uuid, line.returned + line.skip))
        })
    }

    /// The bounds and the limit of the entries that were not returned yet.
    pub(crate) fn rest(&self) -> (Bounds, Option<u64>) {
        (self.bounds, self.left)
    }

    /// The lines that have arrived, or the end.
    ///
    /// # Errors
    /// When the stream breaks off, hangs, is handed over, or is invalid.
    pub(crate) async fn next(&mut self) -> Result<Part, UpstreamError> {
        loop {
            if let Some(end) = self.end.take() {
                return match end.go_on_elsewhere {
                    None => Ok(Part::End(end.next)),
                    Some(reason) => Err(UpstreamError::Status(
                        StatusCode::SERVICE_UNAVAILABLE,
                        reason,
                    )),
                };
            }
            if self.fragmented.is_some() || self.resumed.is_some() {
                if let Some(fragment) = self.take_fragment()? {
                    return Ok(Part::Fragment(fragment));
                }
            } else if let Some(lines) = self.take_lines() {
                let (lines, count) = self.check(lines)?;
                if count > 0 {
                    return Ok(Part::Entries(lines, count));
                }
                continue;
            } else if self.cut_line.len() > self.longest_whole {
                if self.longest_whole == MAX_LINE {
                    return Err(garbled("a line is too long"));
                }
                self.begin_fragments()?;
                continue;
            }
            let next = self.chunks.next().await;
            self.chunk = next.unwrap_or_else(|| {
                Err(UpstreamError::Lost("the stream has no last line".into()))
            })?;
        }
    }

    /// The whole lines that have arrived; a line that arrived in pieces is returned alone.
    fn take_lines(&mut self) -> Option<Bytes> {
        if self.cut_line.is_empty() {
            let lines = memrchr(b'\n', &self.chunk).map(|at| self.chunk.split_to(at + 1));
            if lines.is_none() {
                self.cut_line = BytesMut::from(&*std::mem::take(&mut self.chunk));
            }
            return lines;
        }
        let end = memchr(b'\n', &self.chunk);
        let length = end.map_or(self.chunk.len(), |at| at + 1);
        let rest_of_line = self.chunk.split_to(length);
        self.cut_line.extend_from_slice(&rest_of_line);
        end.map(|_| std::mem::take(&mut self.cut_line).freeze())
    }

    /// Begins to return the line at whose beginning the stream is in fragments.
    fn begin_fragments(&mut self) -> Result<(), UpstreamError> {
        let uuid = parse_line_begin(&self.cut_line);
        let uuid = uuid.ok_or_else(|| garbled("a line is not an entry"))?;
        if !self.bounds.contains(uuid) {
            return Err(out_of_place(uuid));
        }
        let skip = match self.resumed.take() {
            None => 0,
            Some((resumed, returned)) if resumed == uuid => returned,
            Some(_) => return Err(garbled("an entry is missing")),
        };
        self.cut_line.advance(LINE_BEGIN_BYTES);
        self.fragmented = Some(Fragmented {
            uuid,
            returned: 0,
            skip,
        });
        Ok(())
    }

    /// What has arrived of the line, if that is more than was returned before.
    fn take_fragment(&mut self) -> Result<Option<Fragment>, UpstreamError> {
        let newline = memchr(b'\n', &self.chunk);
        let arrived = newline.map_or(self.chunk.len(), |at| at + 1);
        self.cut_line
            .extend_from_slice(&self.chunk.split_to(arrived));
        if self.fragmented.is_none() {
            if self.cut_line.len() < LINE_BEGIN_BYTES && newline.is_none() {
                return Ok(None);
            }
            self.begin_fragments()?;
        }
        let Some(line) = &mut self.fragmented else {
            return Ok(None);
        };
        let not_a_string = || garbled("a line is not an entry");
        let text = self.cut_line.strip_suffix(b"\n");
        let is_last = text.is_some();
        let text = text.unwrap_or(&self.cut_line);
        let whole = whole_characters(text).ok_or_else(not_a_string)?;
        let left = &text[whole..];
        let is_right = if is_last {
            left == LINE_END
        } else {
            left.len() <= LONGEST_ESCAPE + LINE_END.len()
        };
        if !is_right {
            return Err(not_a_string());
        }
        let mut json = self.cut_line.split_to(whole).freeze();
        let skipped = line.skip.min(json.len());
        json.advance(skipped);
        line.skip -= skipped;
        let is_first = line.returned == 0 && skipped == 0;
        line.returned += skipped + json.len();
        if line.returned > MAX_LINE {
            return Err(garbled("a line is too long"));
        }
        let uuid = line.uuid;
        if is_last {
            if line.skip > 0 {
                return Err(garbled("an entry is shorter than on another instance"));
            }
            self.fragmented = None;
            self.cut_line = BytesMut::new();
            self.count += 1;
            self.bounds = self.bounds.resumed_from(uuid);
            if let Some(left) = &mut self.left {
                let rest = left.checked_sub(1);
                *left = rest.ok_or_else(|| garbled("more entries than asked for"))?;
            }
        }
        let fragment = Fragment {
            uuid,
            json,
            is_first,
            is_last,
        };
        Ok((is_last || !fragment.json.is_empty()).then_some(fragment))
    }

    /// Checks lines and returns the lines of entries with their number.
    fn check(&mut self, mut lines: Bytes) -> Result<(Bytes, u64), UpstreamError> {
        let mut begin = 0;
        let mut count = 0;
        let mut last: Option<EntryLine<'_>> = None;
        for newline in memchr_iter(b'\n', &lines) {
            let line = &lines[begin..newline];
            let Some(entry) = EntryLine::parse(line) else {
                let is_last = newline + 1 == lines.len() && self.chunk.is_empty();
                let end = serde_json::from_slice(line).ok().filter(|_| is_last);
                self.end = Some(end.ok_or_else(|| garbled("a line is not an entry"))?);
                break;
            };
            // Between the first and the last, the order alone keeps entries within the bounds.
            let is_in_place = match (last, self.bounds.order) {
                (None, _) => self.bounds.contains(entry.uuid()),
                (Some(last), Order::Asc) => last.uuid < entry.uuid,
                (Some(last), Order::Desc) => last.uuid > entry.uuid,
            };
            if !is_in_place {
                return Err(out_of_place(entry.uuid()));
            }
            last = Some(entry);
            count += 1;
            begin = newline + 1;
        }
        if let Some(last) = last.map(|last| last.uuid()) {
            if !self.bounds.contains(last) {
                return Err(out_of_place(last));
            }
            self.bounds = self.bounds.resumed_from(last);
        }
        lines.truncate(begin);
        self.count += count;
        if let Some(left) = &mut self.left {
            let rest = left.checked_sub(count);
            *left = rest.ok_or_else(|| garbled("more entries than asked for"))?;
        }
        if let Some(end) = &self.end
            && (end.count != self.count
                || (end.next.is_some() && self.left != Some(0))
                || end
                    .next
                    .is_some_and(|next| Some(next) != self.bounds.near()))
        {
            return Err(garbled("the last line has a wrong count or cursor"));
        }
        Ok((lines, count))
    }
}

fn out_of_place(uuid: Uuid) -> UpstreamError {
    garbled(&format!(
        "entry {uuid} is out of order or outside the bounds"
    ))
}

fn garbled(reason: &str) -> UpstreamError {
    UpstreamError::Garbled(reason.to_owned())
}

#[cfg(test)]
mod tests {
    use common::api::write_entry;
    use futures_util::stream;

    use super::*;

    fn whole(count: u128) -> Vec<u8> {
        let mut lines = Vec::new();
        for n in 1..=count {
            write_entry(&mut lines, Uuid::from_u128(n), "a \"message\"\n");
        }
        lines
    }

    /// The lines of a stream, and their number or the error.
    async fn read(pieces: Vec<Vec<u8>>, limit: Option<u64>) -> (Vec<u8>, Result<u64, String>) {
        read_within(Bounds::default(), pieces, limit).await
    }

    async fn read_within(
        bounds: Bounds,
        pieces: Vec<Vec<u8>>,
        limit: Option<u64>,
    ) -> (Vec<u8>, Result<u64, String>) {
        let chunks = stream::iter(pieces)
            .map(|piece| Ok(Bytes::from(piece)))
            .boxed();
        let mut stream = EntryStream::new(chunks, bounds, limit);
        let (mut read, mut count) = (Vec::new(), 0);
        loop {
            match stream.next().await {
                Ok(Part::Entries(lines, lines_count)) => {
                    read.extend_from_slice(&lines);
                    count += lines_count;
                }
                Ok(Part::Fragment(fragment)) => panic!("{fragment:?}"),
                Ok(Part::End(_)) => return (read, Ok(count)),
                Err(error) => return (read, Err(error.to_string())),
            }
        }
    }

    #[tokio::test]
    async fn lines_are_whole_wherever_the_stream_is_cut() {
        let lines = whole(3);
        let stream = [&lines[..], b"{\"count\":3}\n"].concat();
        for size in 1..stream.len() {
            let pieces = stream.chunks(size).map(<[u8]>::to_vec).collect();
            let (read, end) = read(pieces, None).await;
            assert_eq!(read, lines);
            assert_eq!(end, Ok(3));
        }
        for length in 0..stream.len() {
            let (read, end) = read_one(&stream[..length]).await;
            assert!(end.is_err(), "{length} bytes");
            assert!(lines.starts_with(&read));
            assert!(read.is_empty() || read.ends_with(b"\n"));
        }
    }

    /// A stream that continues a cut one returns what follows, wherever both are cut.
    #[tokio::test]
    async fn fragments_are_the_message_across_streams() {
        let uuid = Uuid::from_u128(1);
        let msg = "größe \u{1}\"\\ 👍".repeat(LONGEST_WHOLE / 8);
        let mut line = Vec::new();
        write_entry(&mut line, uuid, &msg);
        let whole = [&line[..], b"{\"count\":1}\n"].concat();
        for size in [997, 1 << 16] {
            let (mut json, mut cut, mut ends) = (Vec::new(), None, 0);
            for length in [line.len() / 2, line.len() / 4, line.len() - 2, whole.len()] {
                let pieces = whole[..length].chunks(size);
                let pieces: Vec<_> = pieces
                    .map(|piece| Ok(Bytes::copy_from_slice(piece)))
                    .collect();
                let chunks = stream::iter(pieces).boxed();
                let mut stream =
                    EntryStream::new(chunks, Bounds::default(), None).in_fragments(cut);
                while let Ok(part) = stream.next().await {
                    let Part::Fragment(fragment) = part else {
                        break;
                    };
                    assert_eq!(fragment.is_first, json.is_empty());
                    assert!(fragment.json.len() <= 2 * LONGEST_WHOLE);
                    json.extend_from_slice(&fragment.json);
                    ends += u64::from(fragment.is_last);
                }
                cut = stream.cut();
            }
            assert_eq!((ends, cut), (1, None));
            let json = [b"\"", &json[..], b"\""].concat();
            assert_eq!(
                serde_json::from_slice::<String>(&json).expect("a string"),
                msg
            );
        }
    }

    /// Entries 1 to 3, ascending, at once and one at a time.
    #[tokio::test]
    async fn entries_outside_the_bounds_are_an_error() {
        let stream = [&whole(3)[..], b"{\"count\":3}\n"].concat();
        let lines = stream.split_inclusive(|byte| *byte == b'\n');
        let lines: Vec<Vec<u8>> = lines.map(<[u8]>::to_vec).collect();
        for (after, before, order, is_right) in [
            (0, 4, Order::Asc, true),
            (1, 4, Order::Asc, false),
            (0, 3, Order::Asc, false),
            (0, 4, Order::Desc, false),
        ] {
            let bounds = Bounds {
                after: Some(Uuid::from_u128(after)),
                before: Some(Uuid::from_u128(before)),
                order,
            };
            for pieces in [vec![stream.clone()], lines.clone()] {
                let (_, end) = read_within(bounds, pieces, None).await;
                assert_eq!(end.is_ok(), is_right, "{bounds:?}: {end:?}");
            }
        }
    }

    async fn read_one(stream: &[u8]) -> (Vec<u8>, Result<u64, String>) {
        read(vec![stream.to_vec()], None).await
    }

    #[tokio::test]
    async fn what_was_not_agreed_on_is_an_error() {
        let two = whole(2);
        let line = &two[..two.len() / 2];
        for wrong in [
            [line, line, b"{\"count\":2}\n"].concat(),
            [&two[..], b"{\"count\":1}\n"].concat(),
            [
                &two[..],
                b"{\"count\":2,\"next\":\"00000000-0000-0000-0000-000000000002\"}\n",
            ]
            .concat(),
            [&two[..], b"{\"count\":2}\n{\"count\":2}\n"].concat(),
            [&two[..], b"{}\n"].concat(),
            [
                &two[..],
                b"{\"count\":2,\"go_on_elsewhere\":\"stopping\"}\n",
            ]
            .concat(),
        ] {
            let (_, end) = read_one(&wrong).await;
            assert!(end.is_err(), "{}", String::from_utf8_lossy(&wrong));
        }
        let (_, end) = read(vec![two.clone()], Some(1)).await;
        assert!(end.is_err());
        for (next, is_right) in [(1, false), (2, true), (3, false)] {
            let next = Uuid::from_u128(next);
            let last = format!("{{\"count\":2,\"next\":\"{next}\"}}\n");
            let stream = [&two[..], last.as_bytes()].concat();
            let (_, end) = read(vec![stream], Some(2)).await;
            assert_eq!(end.is_ok(), is_right, "{last}");
        }
    }
}
