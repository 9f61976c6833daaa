//! The body of a GET: the log's entries, read page by page from whichever instance is up, then the
//! reply of the messages service, which was asked in parallel.
//!
//! A body that ends properly is complete, and its count proves it. One that cannot be finished is
//! aborted: the connection breaks before the last chunk.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use common::entry::Entry;
use common::page::{Bounds, Order};
use common::problem::Problem;
use futures_util::{StreamExt, stream};
use serde::Serialize;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{sleep, timeout};
use tokio_util::task::AbortOnDropHandle;
use uuid::Uuid;

use crate::App;
use crate::client::{Logging, Page, UpstreamError};
use crate::get::{Format, answer_unreadable};

/// Pause before all instances are asked again for a page that none of them gave.
const RETRY_PAUSE: Duration = Duration::from_millis(50);

/// What a GET asked for.
#[derive(Debug)]
pub(crate) struct Read {
    pub(crate) bounds: Bounds,
    pub(crate) limit: Option<u64>,
    pub(crate) format: Format,
    pub(crate) request_id: Option<String>,
}

/// Begins the answer once the first page is there; `place` is held until the body ends.
///
/// # Errors
/// 503 when no logging instance can give the first page.
pub(crate) async fn answer(
    app: App,
    read: Read,
    place: OwnedSemaphorePermit,
) -> Result<Response, Problem> {
    let messages = app.messages.clone();
    let request_id = read.request_id.clone();
    let reply = tokio::spawn(async move { messages.reply(request_id.as_deref()).await });
    let content_type = [(header::CONTENT_TYPE, read.format.content_type())];
    let mut body = MergedBody {
        bounds: read.bounds,
        left: read.limit,
        format: read.format,
        request_id: read.request_id,
        app,
        reply: AbortOnDropHandle::new(reply),
        count: 0,
        step: Step::Entries,
        _place: place,
    };
    let page = body.ask_for_page().await;
    let page = page.map_err(|error| answer_unreadable(&error))?;
    let mut first = body.render_head();
    body.render_page(page, &mut first);
    let rest = stream::try_unfold(body, |mut body| async move {
        let chunk = body.next_chunk().await.inspect_err(|error| {
            tracing::warn!(%error, entries = body.count, "a GET is cut off, no instance can go on");
        })?;
        Ok::<_, UpstreamError>(chunk.map(|chunk| (chunk, body)))
    });
    let body = Body::from_stream(stream::iter([Ok(first)]).chain(rest));
    Ok((content_type, body).into_response())
}

/// A merged body under way.
struct MergedBody {
    app: App,
    /// What is still to be read.
    bounds: Bounds,
    left: Option<u64>,
    format: Format,
    request_id: Option<String>,
    reply: AbortOnDropHandle<Result<String, UpstreamError>>,
    count: u64,
    step: Step,
    _place: OwnedSemaphorePermit,
}

/// What comes next in the body.
enum Step {
    Entries,
    /// The end; with the UUID to go on from when the limit cut it.
    Tail(Option<Uuid>),
    Nothing,
}

impl MergedBody {
    async fn next_chunk(&mut self) -> Result<Option<Vec<u8>>, UpstreamError> {
        let mut chunk = Vec::new();
        match self.step {
            Step::Entries => {
                let page = self.ask_until_page().await?;
                self.render_page(page, &mut chunk);
            }
            Step::Tail(next) => {
                self.step = Step::Nothing;
                let reply = (&mut self.reply).await;
                let reply = reply.unwrap_or_else(|error| {
                    Err(UpstreamError::Garbled(format!("asking failed: {error}")))
                });
                self.render_tail(next, reply, &mut chunk);
            }
            Step::Nothing => return Ok(None),
        }
        Ok(Some(chunk))
    }

    /// Asks each instance once, in random order, for the next page.
    async fn ask_for_page(&self) -> Result<Page, UpstreamError> {
        let (bounds, left) = (self.bounds, self.left);
        let ask = |logging: Arc<dyn Logging>| {
            let request_id = self.request_id.clone();
            async move { logging.page(bounds, left, request_id.as_deref()).await }
        };
        self.app.pool.ask(ask).await
    }

    /// Asks until an instance gives the next page, or the read deadline is over.
    async fn ask_until_page(&self) -> Result<Page, UpstreamError> {
        let mut failure = UpstreamError::TimedOut;
        let asking = async {
            loop {
                match self.ask_for_page().await {
                    Ok(page) => return page,
                    Err(error) => failure = error,
                }
                sleep(RETRY_PAUSE).await;
            }
        };
        let asked = timeout(self.app.read_deadline, asking).await;
        asked.map_err(|_| failure)
    }

    fn render_head(&self) -> Vec<u8> {
        match self.format {
            Format::Json => b"{\"logging_service\":[\n".to_vec(),
            Format::Ndjson | Format::Text => Vec::new(),
        }
    }

    /// Appends a page and remembers where the next one begins.
    fn render_page(&mut self, page: Page, out: &mut Vec<u8>) {
        for entry in &page.entries {
            match self.format {
                Format::Json => {
                    if self.count > 0 {
                        out.extend_from_slice(b",\n");
                    }
                    write_json(out, entry);
                }
                Format::Ndjson => entry.write_line(out),
                Format::Text => write_text_line(out, entry),
            }
            self.count += 1;
            self.bounds = self.bounds.resumed_from(entry.uuid);
        }
        self.left = self.left.map(|left| left - page.end.count);
        if self.bounds.order == Order::Asc {
            self.bounds.before = page.end.before.or(self.bounds.before);
        }
        let is_cut = self.left == Some(0);
        if is_cut || page.end.next.is_none() {
            self.step = Step::Tail(page.end.next);
        }
    }

    fn render_tail(
        &self,
        next: Option<Uuid>,
        reply: Result<String, UpstreamError>,
        out: &mut Vec<u8>,
    ) {
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
                write_json(&mut members, &tail);
                out.extend_from_slice(&members[1..]);
                out.push(b'\n');
            }
            Format::Ndjson => {
                write_json(out, &tail);
                out.push(b'\n');
            }
            Format::Text => tail.write_text(out),
        }
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

fn write_json(out: &mut Vec<u8>, value: &impl Serialize) {
    serde_json::to_writer(out, value).expect("writing to a Vec does not fail");
}

/// `UUID msg`, where nothing in the message can pass for another line or change how one looks.
fn write_text_line(out: &mut Vec<u8>, entry: &Entry) {
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

/// Control characters, Unicode's line ends, and the marks that change the direction of text.
fn is_control(character: char) -> bool {
    character.is_control()
        || matches!(
            character,
            '\u{061c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}'
        )
}
