//! The body of a GET: the log's entries, streamed by one logging instance after the other, then the
//! reply of the messages service, which was asked in parallel.
//!
//! A body that ends properly is complete, and its count proves it. One that cannot be finished is
//! aborted: the connection breaks before the last chunk.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use common::body::holding;
use common::entry::{Entry, is_control};
use common::json;
use common::problem::Problem;
use common::read::{Bounds, Order};
use futures_util::{StreamExt, stream};
use memchr::memchr_iter;
use serde::Serialize;
use tokio::sync::OwnedSemaphorePermit;
use tokio_util::task::AbortOnDropHandle;
use uuid::Uuid;

use crate::App;
use crate::client::UpstreamError;
use crate::entry_stream::{EntryStream, Part};
use crate::get::{Format, answer_unreadable};
use crate::pool::{Instance, Pool, is_worth_waiting};

/// What a GET asked for.
#[derive(Debug)]
pub(crate) struct Read {
    pub(crate) bounds: Bounds,
    pub(crate) limit: Option<u64>,
    pub(crate) format: Format,
    pub(crate) request_id: Option<String>,
}

/// Begins the answer once an instance begins to stream; `place` is held until the body ends.
///
/// # Errors
/// 503 when no logging instance does so within the read deadline.
pub(crate) async fn answer(
    app: App,
    read: Read,
    place: OwnedSemaphorePermit,
) -> Result<Response, Problem> {
    let mut cursor = Cursor {
        bounds: read.bounds,
        left: read.limit,
        request_id: read.request_id.clone(),
        patience: app.read_deadline,
        pool: app.pool,
        source: None,
    };
    let messages = app.messages;
    let reply = async move { messages.reply(read.request_id.as_deref()).await };
    let reply = AbortOnDropHandle::new(tokio::spawn(reply));
    let first = cursor.open(is_worth_waiting).await;
    let first = first.map_err(|error| answer_unreadable(&error))?;
    let body = MergedBody {
        cursor,
        first: Some(first),
        format: read.format,
        reply,
        count: 0,
        is_finished: false,
    };
    let rest = stream::try_unfold(body, |mut body| async move {
        let chunk = body.next_chunk().await.inspect_err(|error| {
            tracing::warn!(%error, entries = body.count, "a GET is cut off, no instance can go on");
        })?;
        Ok::<_, UpstreamError>(chunk.map(|chunk| (chunk, body)))
    });
    let head = Bytes::from_static(read.format.head());
    let content_type = [(header::CONTENT_TYPE, read.format.content_type())];
    let body = Body::from_stream(stream::iter([Ok(head)]).chain(rest));
    Ok(holding((content_type, body).into_response(), place))
}

/// Where a read is. Whichever instance streams, it goes on from the last UUID on another one when
/// that one is gone, hangs, or hands the read over.
struct Cursor {
    pool: Arc<Pool>,
    /// What is still to be read.
    bounds: Bounds,
    left: Option<u64>,
    request_id: Option<String>,
    patience: Duration,
    source: Option<Source>,
}

/// An instance and what it streams.
struct Source {
    instance: Arc<Instance>,
    stream: EntryStream,
}

impl Cursor {
    /// Has an instance begin a stream, and gives what comes first. Asks until one does or the read
    /// deadline is over, while `may_wait` allows it for the error.
    async fn open(
        &mut self,
        may_wait: impl Fn(&UpstreamError) -> bool,
    ) -> Result<Part, UpstreamError> {
        let (bounds, left, request_id) = (self.bounds, self.left, self.request_id.clone());
        let begin = move |instance: Arc<Instance>| {
            let request_id = request_id.clone();
            async move {
                let answer = instance.client.read(bounds, left, request_id.as_deref());
                let answer = answer.await?;
                let bounds = match (bounds.order, answer.end) {
                    (Order::Asc, Some(end)) => bounds.ending_before(end),
                    _ => bounds,
                };
                let mut stream = EntryStream::new(answer.chunks, bounds, left);
                let first = stream.next().await?;
                Ok((Source { instance, stream }, first))
            }
        };
        let asked = self.pool.ask_patiently(self.patience, may_wait, begin);
        let (source, first) = asked.await?;
        (self.bounds, self.left) = source.stream.rest();
        self.source = Some(source);
        Ok(first)
    }

    /// What comes next, from whichever instance gives it within the read deadline.
    async fn next(&mut self) -> Result<Part, UpstreamError> {
        if let Some(Source { instance, stream }) = &mut self.source {
            match stream.next().await {
                Ok(part) => {
                    (self.bounds, self.left) = stream.rest();
                    return Ok(part);
                }
                Err(error) => {
                    // A connection may have been lost while a slow caller took nothing: that says
                    // nothing of the instance.
                    if matches!(error, UpstreamError::TimedOut) {
                        instance.health.note_failure(&error);
                    }
                    tracing::info!(instance = instance.name, %error, "a GET goes on elsewhere");
                }
            }
        }
        self.source = None;
        self.open(|_| true).await
    }
}

/// A merged body under way.
struct MergedBody {
    cursor: Cursor,
    /// What the first stream began with, until it is taken.
    first: Option<Part>,
    format: Format,
    reply: AbortOnDropHandle<Result<String, UpstreamError>>,
    count: u64,
    is_finished: bool,
}

impl MergedBody {
    async fn next_chunk(&mut self) -> Result<Option<Bytes>, UpstreamError> {
        if self.is_finished {
            return Ok(None);
        }
        let part = match self.first.take() {
            Some(first) => first,
            None => self.cursor.next().await?,
        };
        Ok(Some(match part {
            Part::Entries(lines, count) => {
                let rendered = self.format.render(lines, self.count == 0);
                self.count += count;
                rendered
            }
            Part::End(next) => {
                self.is_finished = true;
                let reply = (&mut self.reply).await;
                let reply = reply.unwrap_or_else(|error| {
                    let reason = format!("asking failed: {error}");
                    Err(UpstreamError::Garbled(reason))
                });
                self.render_tail(next, reply)
            }
        }))
    }

    fn render_tail(&self, next: Option<Uuid>, reply: Result<String, UpstreamError>) -> Bytes {
        let mut out = Vec::new();
        let (messages_service, messages_service_error) = match reply {
            Ok(reply) => (Some(reply), None),
            Err(error) => (None, Some(format!("the messages service {error}"))),
        };
        let tail = Tail {
            messages_service,
            messages_service_error,
            count: self.count,
            next,
        };
        match self.format {
            Format::Json => {
                let end_of_last_entry: &[u8] = if self.count > 0 { b"\n" } else { b"" };
                out.extend_from_slice(end_of_last_entry);
                out.extend_from_slice(b"],");
                let mut members = Vec::new();
                json::write_line(&mut members, &tail);
                out.extend_from_slice(&members[1..]);
            }
            Format::Ndjson => json::write_line(&mut out, &tail),
            Format::Text => tail.write_text(&mut out),
        }
        out.into()
    }
}

impl Format {
    /// What comes before the entries.
    fn head(self) -> &'static [u8] {
        match self {
            Self::Json => b"{\"logging_service\":[\n",
            Self::Ndjson | Self::Text => b"",
        }
    }

    /// Checked lines of entries in this form; `is_first` when none came before.
    fn render(self, lines: Bytes, is_first: bool) -> Bytes {
        if self == Self::Ndjson {
            return lines;
        }
        let mut out = Vec::with_capacity(lines.len() + lines.len() / 32);
        let mut begin = 0;
        for newline in memchr_iter(b'\n', &lines) {
            let line = &lines[begin..newline];
            if self == Self::Text {
                write_text_line(&mut out, line);
            } else {
                if begin > 0 || !is_first {
                    out.extend_from_slice(b",\n");
                }
                out.extend_from_slice(line);
            }
            begin = newline + 1;
        }
        out.into()
    }
}

/// What comes after the entries.
#[derive(Serialize)]
struct Tail {
    messages_service: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    messages_service_error: Option<String>,
    count: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    next: Option<Uuid>,
}

impl Tail {
    fn write_text(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(format!("{} messages", self.count).as_bytes());
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

/// `UUID msg`, where nothing in the message can pass for another line or change how one looks.
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
        if character == '\\' || is_control(character) {
            out.extend_from_slice(&text.as_bytes()[plain_from..at]);
            out.extend_from_slice(character.escape_default().to_string().as_bytes());
            plain_from = at + character.len_utf8();
        }
    }
    out.extend_from_slice(&text.as_bytes()[plain_from..]);
}
