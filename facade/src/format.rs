//! The formats of an answer with entries: negotiation, and the head, entries and tail of each.

use axum::http::{HeaderMap, StatusCode, header};
use bytes::Bytes;
use common::api::{EntryLine, LINE_END, begin_line};
use common::entry::Entry;
use common::escape::needs_escape;
use common::json;
use common::problem::Problem;
use headers_accept::Accept;
use mediatype::{MediaType, Name, ReadParams};
use memchr::{memchr_iter, memmem};
use serde::Serialize;
use uuid::Uuid;

use crate::entry_stream::Fragment;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Json,
    Ndjson,
    Text,
    /// Server-sent events, for followers only.
    EventStream,
}

impl Format {
    /// Those of a GET of the log; the first is the default.
    pub(crate) const OF_THE_LOG: [Self; 4] =
        [Self::Json, Self::Ndjson, Self::Text, Self::EventStream];

    /// Whether a body can go on without an end.
    pub(crate) fn can_be_followed(self) -> bool {
        match self {
            Self::Json => false,
            Self::Ndjson | Self::Text | Self::EventStream => true,
        }
    }

    pub fn content_type(self) -> &'static str {
        match self {
            Self::Json => "application/json",
            Self::Ndjson => "application/x-ndjson",
            Self::Text => "text/plain; charset=utf-8",
            Self::EventStream => "text/event-stream",
        }
    }

    fn media_type(self) -> MediaType<'static> {
        let parsed = MediaType::parse(self.content_type());
        let MediaType { ty, subty, .. } = parsed.expect("each is a media type");
        MediaType::new(ty, subty)
    }
}

/// The offered format that the `Accept` headers prefer, by default the first. Invalid ranges and
/// parameters other than `q` are ignored.
///
/// # Errors
/// 406 when no offered format is acceptable.
pub(crate) fn negotiate(headers: &HeaderMap, offer: &[Format]) -> Result<Format, Problem> {
    let available: Vec<MediaType<'_>> = offer.iter().map(|format| format.media_type()).collect();
    let chosen = preferred(headers, &available);
    let chosen = chosen.map(|index| offer[index]);
    chosen.ok_or_else(|| {
        let offered: Vec<&str> = offer.iter().map(|format| format.content_type()).collect();
        let detail = format!("accept one of: {}", offered.join(", "));
        Problem::new(StatusCode::NOT_ACCEPTABLE, detail)
    })
}

/// Whether a browser navigates here, to show what it gets. Other clients may name `text/html` too, as
/// `URLConnection` of Java does, and do not mean a page.
pub(crate) fn prefers_html(headers: &HeaderMap) -> bool {
    let has = |name: &str, value: &[u8]| {
        let mut values = headers.get_all(name).iter();
        values.any(|one| memmem::find(one.as_bytes(), value).is_some())
    };
    has("sec-fetch-mode", b"navigate") || has("accept", b"application/xhtml+xml")
}

/// The index of the type that the `Accept` headers prefer; without them the first.
fn preferred(headers: &HeaderMap, available: &[MediaType<'_>]) -> Option<usize> {
    let values = headers.get_all(header::ACCEPT).iter();
    let values: Vec<&str> = values.filter_map(|value| value.to_str().ok()).collect();
    if values.iter().all(|value| value.trim().is_empty()) {
        return Some(0);
    }
    let ranges = values.iter().flat_map(|value| value.split(','));
    let ranges: Vec<String> = ranges.filter_map(essence_and_quality).collect();
    let wanted: Accept = ranges.join(",").parse().ok()?;
    let chosen = wanted.negotiate(available)?;
    available.iter().position(|one| one == chosen)
}

fn essence_and_quality(range: &str) -> Option<String> {
    let range = MediaType::parse(range.trim()).ok()?;
    let essence = range.essence();
    Some(match range.get_param(Name::new_unchecked("q")) {
        Some(quality) => format!("{essence};q={quality}"),
        None => essence.to_string(),
    })
}

impl Format {
    pub(crate) fn head(self) -> &'static [u8] {
        match self {
            Self::Json => b"{\"logging_service\":[\n",
            Self::Ndjson | Self::Text | Self::EventStream => b"",
        }
    }

    /// Renders checked lines of entries; `is_first` when they are the first of the answer.
    pub(crate) fn render(self, lines: Bytes, is_first: bool) -> Bytes {
        if self == Self::Ndjson {
            // A copy lets hyper reuse the buffer of which these lines are a slice.
            return Bytes::copy_from_slice(&lines);
        }
        let mut out = Vec::with_capacity(lines.len() + lines.len() / 32);
        let mut begin = 0;
        for newline in memchr_iter(b'\n', &lines) {
            let line = &lines[begin..newline];
            match self {
                Self::Text => write_text_line(&mut out, line),
                Self::EventStream => {
                    let entry = EntryLine::parse(line).expect("the line was checked");
                    write_event(&mut out, line, entry.uuid());
                }
                Self::Json | Self::Ndjson => {
                    if begin > 0 || !is_first {
                        out.extend_from_slice(self.separator());
                    }
                    out.extend_from_slice(line);
                }
            }
            begin = newline + 1;
        }
        out.into()
    }

    /// Writes a part of a large entry. In an event stream everything up to `position` was sent when its last
    /// part is.
    pub(crate) fn write_fragment(self, out: &mut Vec<u8>, fragment: &Fragment, position: Uuid) {
        let Fragment { uuid, json, .. } = fragment;
        if fragment.is_first {
            match self {
                Self::Text => out.extend_from_slice(format!("{uuid} ").as_bytes()),
                Self::EventStream => {
                    begin_event(out, position);
                    begin_line(out, *uuid);
                }
                Self::Json | Self::Ndjson => begin_line(out, *uuid),
            }
        }
        match self {
            Self::Text => write_escaped(out, &fragment.text()),
            Self::EventStream | Self::Json | Self::Ndjson => out.extend_from_slice(json),
        }
        if fragment.is_last {
            let end: [&[u8]; 2] = match self {
                Self::Text => [b"", b"\n"],
                Self::EventStream => [LINE_END, b"\n\n"],
                Self::Json => [LINE_END, b""],
                Self::Ndjson => [LINE_END, b"\n"],
            };
            out.extend_from_slice(&end.concat());
        }
    }

    /// What is between two entries of an answer.
    pub(crate) fn separator(self) -> &'static [u8] {
        match self {
            Self::Json => b",\n",
            Self::Ndjson | Self::Text | Self::EventStream => b"",
        }
    }

    pub(crate) fn render_tail(self, tail: &Tail) -> Bytes {
        let mut out = Vec::new();
        match self {
            Self::Json => {
                let end_of_last_entry: &[u8] = if tail.count > 0 { b"\n" } else { b"" };
                out.extend_from_slice(end_of_last_entry);
                out.extend_from_slice(b"],");
                let mut members = Vec::new();
                json::write_line(&mut members, tail);
                out.extend_from_slice(&members[1..]);
            }
            Self::Ndjson => json::write_line(&mut out, tail),
            Self::Text => tail.write_text(&mut out),
            Self::EventStream => {}
        }
        out.into()
    }

    /// Writes the line of a new entry for a follower; everything up to `position` was sent before.
    pub(crate) fn write_new(self, out: &mut Vec<u8>, line: &[u8], position: Uuid) {
        match self {
            Self::Text => write_text_line(out, line),
            Self::EventStream => write_event(out, line, position),
            Self::Json | Self::Ndjson => {
                out.extend_from_slice(line);
                out.push(b'\n');
            }
        }
    }

    /// Writes what keeps a follower's connection alive, and in an event stream the position.
    pub(crate) fn write_keep_alive(self, out: &mut Vec<u8>, position: Uuid) {
        if self == Self::EventStream {
            out.extend_from_slice(format!(": everything up to here\nid: {position}\n").as_bytes());
        }
        out.push(b'\n');
    }
}

/// The part of an answer after the entries.
#[derive(Serialize)]
pub(crate) struct Tail {
    /// Null when the messages service did not answer.
    pub(crate) messages_service: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) messages_service_error: Option<String>,
    /// The number of entries in this answer.
    pub(crate) count: u64,
    /// The number of entries that a search looked at; only in the answer to one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) scanned: Option<u64>,
    /// The cursor to continue from, when the limit ended the answer, or a search has looked at as many
    /// entries as one request does, and more follow.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) next: Option<Uuid>,
}

impl Tail {
    fn write_text(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(format!("{} messages", self.count).as_bytes());
        if let Some(scanned) = self.scanned {
            out.extend_from_slice(format!(" of {scanned} scanned").as_bytes());
        }
        if let Some(next) = self.next {
            out.extend_from_slice(format!(", next {next}").as_bytes());
        }
        out.push(b'\n');
        let reply = self.messages_service.as_ref();
        let line = reply.or(self.messages_service_error.as_ref());
        write_escaped(out, line.map_or("", String::as_str));
        out.push(b'\n');
    }
}

/// An event (<https://html.spec.whatwg.org/multipage/server-sent-events.html>). Without a position, the
/// follower keeps the one that it has.
fn write_event(out: &mut Vec<u8>, line: &[u8], position: Uuid) {
    begin_event(out, position);
    out.extend_from_slice(line);
    out.extend_from_slice(b"\n\n");
}

fn begin_event(out: &mut Vec<u8>, position: Uuid) {
    out.extend_from_slice(b"event: message\n");
    if !position.is_nil() {
        let mut buffer = Uuid::encode_buffer();
        let position = position.hyphenated().encode_lower(&mut buffer);
        out.extend_from_slice(b"id: ");
        out.extend_from_slice(position.as_bytes());
        out.push(b'\n');
    }
    out.extend_from_slice(b"data: ");
}

/// `UUID msg`, escaped so that no message can imitate or alter another line.
fn write_text_line(out: &mut Vec<u8>, line: &[u8]) {
    let entry: Entry = serde_json::from_slice(line).expect("the line was checked");
    out.extend_from_slice(entry.uuid.to_string().as_bytes());
    out.push(b' ');
    write_escaped(out, &entry.msg);
    out.push(b'\n');
}

fn write_escaped(out: &mut Vec<u8>, text: &str) {
    let mut plain_from = 0;
    for (at, character) in text.char_indices() {
        if character == '\\' || needs_escape(character) {
            out.extend_from_slice(&text.as_bytes()[plain_from..at]);
            out.extend_from_slice(character.escape_default().to_string().as_bytes());
            plain_from = at + character.len_utf8();
        }
    }
    out.extend_from_slice(&text.as_bytes()[plain_from..]);
}
