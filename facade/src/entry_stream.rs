//! Checks the stream of a logging instance: whole lines of valid entries, in order, within bounds.

use std::fmt;

use bytes::{Bytes, BytesMut};
use common::api::{EntryLine, MAX_LINE, StreamEnd};
use common::bounds::{Bounds, Order};
use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use memchr::{memchr, memchr_iter, memrchr};
use reqwest::StatusCode;
use uuid::Uuid;

use crate::upstream::UpstreamError;

/// The bytes of an answer as they arrive. A lost connection or a timeout is an error.
pub type Chunks = BoxStream<'static, Result<Bytes, UpstreamError>>;

pub(crate) struct EntryStream {
    chunks: Chunks,
    /// The bounds of the entries still to come.
    bounds: Bounds,
    left: Option<u64>,
    count: u64,
    /// The beginning of a line that has not arrived whole.
    cut_line: BytesMut,
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
    /// The end, with the cursor to continue from when the limit ended the stream.
    End(Option<Uuid>),
}

impl EntryStream {
    /// `bounds` and `limit` are those of the request.
    pub(crate) fn new(chunks: Chunks, bounds: Bounds, limit: Option<u64>) -> Self {
        Self {
            chunks,
            bounds,
            left: limit,
            count: 0,
            cut_line: BytesMut::new(),
            chunk: Bytes::new(),
            end: None,
        }
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
            if let Some(lines) = self.take_lines() {
                let (lines, count) = self.check(lines)?;
                if count > 0 {
                    return Ok(Part::Entries(lines, count));
                }
                continue;
            }
            if self.cut_line.len() > MAX_LINE {
                return Err(garbled("a line is too long"));
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
            && (end.count != self.count || (end.next.is_some() && self.left != Some(0)))
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
            [&two[..], b"{\"count\":2,\"more\":1}\n"].concat(),
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
        let (_, end) = read(vec![two], Some(1)).await;
        assert!(end.is_err());
    }
}
