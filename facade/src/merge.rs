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
use common::body::holding;
use common::entry::{Entry, is_control};
use common::json;
use common::page::{Bounds, Order};
use common::problem::Problem;
use futures_util::{StreamExt, stream};
use serde::Serialize;
use tokio::sync::OwnedSemaphorePermit;
use tokio::task::JoinError;
use tokio_util::task::AbortOnDropHandle;
use uuid::Uuid;

use crate::App;
use crate::client::{Logging, Page, UpstreamError};
use crate::get::{Format, answer_unreadable};
use crate::pool::{Pool, is_worth_waiting};

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
/// 503 when no logging instance can give the first page within the read deadline.
pub(crate) async fn answer(
    app: App,
    read: Read,
    place: OwnedSemaphorePermit,
) -> Result<Response, Problem> {
    let cursor = Cursor {
        bounds: read.bounds,
        left: read.limit,
        request_id: read.request_id.clone(),
        patience: app.read_deadline,
        pool: app.pool,
    };
    let messages = app.messages;
    let reply = async move { messages.reply(read.request_id.as_deref()).await };
    let reply = AbortOnDropHandle::new(tokio::spawn(reply));
    let page = cursor.ask_first().await;
    let page = page.map_err(|error| answer_unreadable(&error))?;
    let mut body = MergedBody {
        cursor,
        format: read.format,
        reply,
        count: 0,
        next: Next::Nothing,
    };
    let mut first = body.render_head();
    body.render_page(&page, &mut first);
    let rest = stream::try_unfold(body, |mut body| async move {
        let chunk = body.next_chunk().await.inspect_err(|error| {
            tracing::warn!(%error, entries = body.count, "a GET is cut off, no instance can go on");
        })?;
        Ok::<_, UpstreamError>(chunk.map(|chunk| (chunk, body)))
    });
    let content_type = [(header::CONTENT_TYPE, read.format.content_type())];
    let body = Body::from_stream(stream::iter([Ok(first)]).chain(rest));
    Ok(holding((content_type, body).into_response(), place))
}

/// Where a read is. Each page comes from whichever instance can give it, so a read goes on from
/// its last UUID when the instance that gave the page before is gone.
#[derive(Clone)]
struct Cursor {
    pool: Arc<Pool>,
    /// What is still to be read.
    bounds: Bounds,
    left: Option<u64>,
    request_id: Option<String>,
    patience: Duration,
}

impl Cursor {
    /// Asks for the first page until an instance gives it or the read deadline is over, for as long
    /// as there is hope that one will.
    async fn ask_first(&self) -> Result<Page, UpstreamError> {
        self.ask_while(is_worth_waiting).await
    }

    /// Asks for a further page until an instance gives it, or the read deadline is over.
    async fn ask_next(&self) -> Result<Page, UpstreamError> {
        self.ask_while(|_| true).await
    }

    async fn ask_while(
        &self,
        may_wait: impl Fn(&UpstreamError) -> bool,
    ) -> Result<Page, UpstreamError> {
        let (bounds, left) = (self.bounds, self.left);
        let ask = |logging: Arc<dyn Logging>| {
            let request_id = self.request_id.clone();
            async move { logging.page(bounds, left, request_id.as_deref()).await }
        };
        let pool = &self.pool;
        pool.ask_patiently(self.patience, may_wait, ask).await
    }

    /// The next page, asked for while the one before is on its way to the caller.
    fn ask_ahead(&self) -> AbortOnDropHandle<Result<Page, UpstreamError>> {
        let cursor = self.clone();
        AbortOnDropHandle::new(tokio::spawn(async move { cursor.ask_next().await }))
    }

    /// Moves behind a page that was read.
    fn advance(&mut self, page: &Page) {
        if let Some(last) = page.entries.last() {
            self.bounds = self.bounds.resumed_from(last.uuid);
        }
        if self.bounds.order == Order::Asc {
            self.bounds.before = page.end.before.or(self.bounds.before);
        }
        self.left = self.left.map(|left| left - page.end.count);
    }
}

/// A merged body under way.
struct MergedBody {
    cursor: Cursor,
    format: Format,
    reply: AbortOnDropHandle<Result<String, UpstreamError>>,
    count: u64,
    next: Next,
}

/// What comes next in the body.
enum Next {
    Page(AbortOnDropHandle<Result<Page, UpstreamError>>),
    /// The end; with the UUID to go on from when the limit cut it.
    Tail(Option<Uuid>),
    Nothing,
}

impl MergedBody {
    async fn next_chunk(&mut self) -> Result<Option<Vec<u8>>, UpstreamError> {
        let mut chunk = Vec::new();
        match std::mem::replace(&mut self.next, Next::Nothing) {
            Next::Page(asked_ahead) => {
                // What failed while a slow caller took its time may work now.
                let has_been_over = asked_ahead.is_finished();
                let page = match finish(asked_ahead).await {
                    Err(_) if has_been_over => self.cursor.ask_next().await?,
                    asked => asked?,
                };
                self.render_page(&page, &mut chunk);
            }
            Next::Tail(next) => {
                let reply = finish(&mut self.reply).await;
                self.render_tail(next, reply, &mut chunk);
            }
            Next::Nothing => return Ok(None),
        }
        Ok(Some(chunk))
    }

    fn render_head(&self) -> Vec<u8> {
        match self.format {
            Format::Json => b"{\"logging_service\":[\n".to_vec(),
            Format::Ndjson | Format::Text => Vec::new(),
        }
    }

    /// Appends a page, and has the next one fetched.
    fn render_page(&mut self, page: &Page, out: &mut Vec<u8>) {
        for entry in &page.entries {
            match self.format {
                Format::Json => {
                    if self.count > 0 {
                        out.extend_from_slice(b",\n");
                    }
                    serde_json::to_writer(&mut *out, entry).expect("an entry is plain JSON");
                }
                Format::Ndjson => entry.write_line(out),
                Format::Text => write_text_line(out, entry),
            }
            self.count += 1;
        }
        self.cursor.advance(page);
        let is_last = self.cursor.left == Some(0) || page.end.next.is_none();
        self.next = if is_last {
            Next::Tail(page.end.next)
        } else {
            Next::Page(self.cursor.ask_ahead())
        };
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
                json::write_line(&mut members, &tail);
                out.extend_from_slice(&members[1..]);
            }
            Format::Ndjson => json::write_line(out, &tail),
            Format::Text => tail.write_text(out),
        }
    }
}

/// The outcome of a task that asks a service.
async fn finish<T>(
    task: impl Future<Output = Result<Result<T, UpstreamError>, JoinError>>,
) -> Result<T, UpstreamError> {
    let asked = task.await;
    asked.unwrap_or_else(|error| Err(UpstreamError::Garbled(format!("asking failed: {error}"))))
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
