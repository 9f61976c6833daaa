//! Uploads of many messages as NDJSON: one message a line, each stored like a POST of its own.
//!
//! Reading, storing and answering overlap within a window, in order: an upload may have any length.

use std::future;
use std::io::{self, ErrorKind};
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::http::request::Parts;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::{Bytes, BytesMut};
use common::body::{BodyError, holding};
use common::client::Client;
use common::door::Access;
use common::entry;
use common::json::{self, JsonLine};
use common::middleware::request_id;
use common::pace::Pace;
use common::permits::Exhausted;
use common::problem::{Problem, truncate_detail};
use futures_util::{Stream, StreamExt, stream};
use serde::{Deserialize, Serialize};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout, timeout_at};
use tokio_util::codec::{AnyDelimiterCodec, AnyDelimiterCodecError, Decoder, FramedRead};
use tokio_util::io::StreamReader;
use tokio_util::sync::CancellationToken;
use tracing::Span;
use uuid::Uuid;

use crate::batcher::Held;
use crate::delivery::{Message, Stored, WhenOverloaded, deliver};
use crate::error::{RETRY_AFTER, not_stored_detail, stopping, too_many, without_addresses};
use crate::format::{Format, negotiate};
use crate::judge::{Key, NotStored};
use crate::message::{body_limit, check_size};
use crate::state::App;
use crate::upstream::MaybeStored;

/// Lines of one upload in progress, in bytes: enough for full batches. Reading waits beyond it.
const WINDOW_BYTES: usize = 1024 * 1024;

/// Lines of one upload in progress, in number.
const WINDOW_LINES: usize = 4096;

/// Errors that a summary lists; the rest are only counted.
const MAX_ERRORS: usize = 100;

/// How long the rest of an upload is read and discarded when it is broken off.
const DISCARD_FOR: Duration = Duration::from_secs(2);

/// The most results in one chunk of a streamed reply.
const RESULTS_PER_CHUNK: usize = 256;

/// The formats of a reply: the summary, or a result for each line.
const REPLY_FORMATS: [Format; 2] = [Format::Json, Format::Ndjson];

/// Stores each line of the body. The reply is a summary after the last line, because many clients
/// read nothing before they have sent everything; as NDJSON it streams each line's result at once.
pub(crate) async fn create(app: Arc<App>, parts: Parts, body: Body) -> Result<Response, Problem> {
    let headers = &parts.headers;
    if headers.contains_key("idempotency-key") {
        return Err(Problem::bad_request(
            "an upload of many messages takes no idempotency-key; give each line its own uuid",
        ));
    }
    let permit = app.uploads.take(Client::of(&parts.extensions), 1);
    let permit = permit.map_err(|Exhausted| too_many("uploads").with("stored", "no"))?;
    let permit: Held = Arc::new(permit);
    let reply = negotiate(headers, &REPLY_FORMATS)?;
    let upload = Upload {
        request_id: request_id(headers).map(str::to_owned),
        permit: permit.clone(),
        began: Instant::now(),
        app,
    };
    let access = parts.extensions.get::<Access>().cloned();
    let broken_off = broken_off(upload.app.stop.clone(), access);
    let results = store_lines(Arc::new(upload), body, broken_off);
    let answer = if reply == Format::Ndjson {
        stream_results(results)
    } else {
        summarize(results).await?
    };
    Ok(holding(answer, permit))
}

/// What became of one line of an upload.
#[derive(Debug, Serialize)]
struct LineResult {
    line: u64,
    uuid: Option<Uuid>,
    /// `yes`, `no`, or `unknown`: retry the line with this uuid.
    stored: &'static str,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    duplicate: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    /// Of a line that failed.
    #[serde(skip)]
    fault: Option<Fault>,
}

/// Why a line failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    /// It fails again however often it is sent.
    Line,
    Server,
}

/// The reply to an upload.
#[derive(Debug, Default, Serialize)]
struct Summary {
    stored: u64,
    failed: u64,
    /// The first hundred.
    errors: Vec<LineResult>,
    /// How many lines failed by their own fault.
    #[serde(skip)]
    lines_faults: u64,
}

impl Summary {
    fn count(&mut self, result: &LineResult) {
        match result.fault {
            None => self.stored += 1,
            Some(fault) => {
                self.failed += 1;
                self.lines_faults += u64::from(fault == Fault::Line);
            }
        }
    }

    /// Adds the members to a problem.
    fn within(self, problem: Problem) -> Problem {
        problem
            .with("stored", self.stored)
            .with("failed", self.failed)
            .with("errors", self.errors)
    }

    /// The answer to an upload that was read to its end.
    fn answer(self) -> Result<Response, Problem> {
        let problem = match (self.stored, self.failed, self.lines_faults) {
            (_, 0, _) => return Ok(JsonLine(self).into_response()),
            (0, failed, faults) if faults == failed => Problem::bad_request(
                "no line was stored, and none can be as it is: see `errors`; with curl, send a \
                 file by --data-binary @FILE, as -d removes its line ends",
            ),
            (0, _, 0) => Problem::unavailable(
                "no line was acknowledged: see `errors`; upload them again, one with \
                 \"stored\":\"unknown\" under its uuid: lines that have uuids can always be repeated",
                RETRY_AFTER,
            ),
            _ => return Ok((StatusCode::MULTI_STATUS, JsonLine(self)).into_response()),
        };
        Err(self.within(problem))
    }
}

/// When the body breaks off, the problem has the counts of the lines before the break, from which the
/// caller can continue.
async fn summarize(
    results: impl Stream<Item = Result<LineResult, Broken>>,
) -> Result<Response, Problem> {
    let mut results = std::pin::pin!(results);
    let mut summary = Summary::default();
    while let Some(result) = results.next().await {
        let result = match result {
            Ok(result) => result,
            Err(Broken { problem, lines }) => {
                return Err(summary.within(problem).with("lines", lines));
            }
        };
        summary.count(&result);
        if result.fault.is_some() && summary.errors.len() < MAX_ERRORS {
            summary.errors.push(result);
        }
    }
    summary.answer()
}

fn stream_results(
    results: impl Stream<Item = Result<LineResult, Broken>> + Send + 'static,
) -> Response {
    let mut summary = Summary::default();
    let with_end = results.map(Some).chain(stream::iter([None]));
    let chunks = with_end
        .ready_chunks(RESULTS_PER_CHUNK)
        .flat_map(move |ready| {
            let mut chunk = Vec::new();
            let mut end = None;
            for result in ready {
                let broken = match result {
                    Some(Ok(result)) => {
                        summary.count(&result);
                        json::write_line(&mut chunk, &result);
                        continue;
                    }
                    Some(Err(broken)) => Some(broken),
                    None => None,
                };
                let last = LastLine {
                    stored: summary.stored,
                    failed: summary.failed,
                    lines: broken.as_ref().map(|broken| broken.lines),
                    error: broken.as_ref().map(|broken| broken.problem.detail()),
                };
                json::write_line(&mut chunk, &last);
                end = broken.is_some().then_some(Err("the upload broke off"));
                break;
            }
            stream::iter([Ok(chunk)].into_iter().chain(end))
        });
    // Yielding before an error lets the server write the earlier chunks to the caller.
    let chunks = chunks.then(async |chunk| {
        if chunk.is_err() {
            tokio::task::yield_now().await;
        }
        chunk
    });
    let content_type = [(header::CONTENT_TYPE, "application/x-ndjson")];
    (content_type, Body::from_stream(chunks)).into_response()
}

/// The end of streamed results.
#[derive(Serialize)]
struct LastLine<'a> {
    stored: u64,
    failed: u64,
    /// How many were read of an upload that broke off.
    #[serde(skip_serializing_if = "Option::is_none")]
    lines: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<&'a str>,
}

/// What the lines of one upload share.
struct Upload {
    app: Arc<App>,
    request_id: Option<String>,
    permit: Held,
    began: Instant,
}

/// Stores the lines of a body and yields their results in order. When the body breaks off, the last
/// item is an error; the lines before it have been processed.
fn store_lines(
    upload: Arc<Upload>,
    body: Body,
    broken_off: impl Future<Output = Problem> + Send + 'static,
) -> impl Stream<Item = Result<LineResult, Broken>> + Send + 'static {
    let window = Arc::new(Semaphore::new(WINDOW_BYTES));
    let app = &upload.app;
    let limit = body_limit(app.max_message);
    // Results may be streamed after the handler has returned.
    let span = Span::current();
    let lines = read_lines(body, limit, app.body_timeout, broken_off);
    let whole = lines.filter(|line| {
        let blank = |text: &[u8]| text.trim_ascii().is_empty();
        future::ready(!matches!(&line.content, Content::Text(text) if blank(text)))
    });
    let admitted = whole.then(move |line| admit(line, window.clone()));
    let stored = admitted.map(move |(line, window_permit)| {
        let upload = upload.clone();
        async move {
            let _until_stored = window_permit;
            upload.store(line).await
        }
    });
    let mut results = Box::pin(stored.buffered(WINDOW_LINES));
    stream::poll_fn(move |context| span.in_scope(|| results.poll_next_unpin(context)))
}

async fn admit(line: Line, window: Arc<Semaphore>) -> (Line, Option<OwnedSemaphorePermit>) {
    let permits = match &line.content {
        Content::Text(text) => text.len().min(WINDOW_BYTES) as u32,
        Content::TooLong | Content::Broken(_) => 0,
    };
    let permit = window.acquire_many_owned(permits).await;
    (line, permit.ok())
}

impl Upload {
    async fn store(&self, line: Line) -> Result<LineResult, Broken> {
        let app = &self.app;
        let Line { number, content } = line;
        let parsed = match content {
            Content::Text(text) => parse_line(&text, app.max_message),
            Content::TooLong => Err(format!(
                "a message may have {} bytes at most",
                app.max_message
            )),
            Content::Broken(problem) => {
                let lines = number - 1;
                return Err(Broken { problem, lines });
            }
        };
        let (msg, key) = match parsed {
            Ok(parsed) => parsed,
            Err(reason) => {
                let no = MaybeStored::No;
                return Ok(LineResult::failed(number, None, no, reason, Fault::Line));
            }
        };
        let error = match self.deliver(msg, key).await {
            Ok(stored) => {
                app.counters.count_posted(stored.msg.len());
                return Ok(LineResult {
                    line: number,
                    uuid: Some(stored.uuid),
                    stored: "yes",
                    duplicate: stored.is_duplicate,
                    error: None,
                    fault: None,
                });
            }
            Err(error) => error,
        };
        let (uuid, stored, fault) = match &error {
            NotStored::GaveUp {
                uuid, maybe_stored, ..
            } => (*uuid, *maybe_stored, Fault::Server),
            NotStored::Conflict | NotStored::Stale | NotStored::Early => {
                (key.caller(), MaybeStored::No, Fault::Line)
            }
        };
        let detail = not_stored_detail(&app.pool, &error);
        Ok(LineResult::failed(number, uuid, stored, detail, fault))
    }

    /// Stores the message of a line. While no instance has been up for the deadline, it is not tried: otherwise each window of lines would wait for the deadline.
    async fn deliver(&self, msg: String, key: Key) -> Result<Stored, NotStored> {
        let App { pool, deadline, .. } = &*self.app;
        if self.began.elapsed() >= *deadline && pool.down_for() >= *deadline {
            return Err(NotStored::GaveUp {
                uuid: key.caller(),
                maybe_stored: MaybeStored::No,
                detail: without_addresses(&pool.down_reasons()),
            });
        }
        let message = Message {
            msg,
            key,
            request_id: self.request_id.clone(),
            held: self.permit.clone(),
            overload: WhenOverloaded::Wait,
        };
        deliver(pool, message, *deadline).await
    }
}

impl LineResult {
    fn failed(
        line: u64,
        uuid: Option<Uuid>,
        maybe_stored: MaybeStored,
        error: String,
        fault: Fault,
    ) -> Self {
        Self {
            line,
            uuid,
            stored: maybe_stored.word(),
            duplicate: false,
            error: Some(truncate_detail(error)),
            fault: Some(fault),
        }
    }
}

/// A line is a JSON string, or an object with `msg` and an optional `uuid`.
pub(crate) fn parse_line(text: &[u8], max_message: usize) -> Result<(String, Key), String> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Object {
        msg: String,
        uuid: Option<String>,
    }
    let parsed = if text.trim_ascii_start().starts_with(b"{") {
        serde_json::from_slice(text)
    } else {
        serde_json::from_slice(text).map(|msg| Object { msg, uuid: None })
    };
    let Object { msg, uuid } = parsed.map_err(|error| {
        format!("a line is a JSON string or {{\"msg\":\"…\"}} with an optional uuid: {error}")
    })?;
    let key = match uuid {
        Some(uuid) => Key::Caller(entry::parse_entry_uuid(&uuid)?),
        None => Key::Generated,
    };
    check_size(&msg, max_message).map_err(|problem| problem.detail().to_owned())?;
    Ok((msg, key))
}

/// An upload whose body broke off.
#[derive(Debug)]
struct Broken {
    problem: Problem,
    /// The number of lines read before the break.
    lines: u64,
}

/// One line of the body, numbered from 1.
pub(crate) struct Line {
    number: u64,
    pub(crate) content: Content,
}

pub(crate) enum Content {
    /// A copy, so that the read buffer can be freed.
    Text(Box<[u8]>),
    TooLong,
    Broken(Problem),
}

/// Waits until the process stops, or the upload's token no longer allows it.
async fn broken_off(stop: CancellationToken, access: Option<Access>) -> Problem {
    let lost = async {
        match access {
            None => future::pending().await,
            Some(access) => access.lost().await,
        }
    };
    tokio::select! {
        () = stop.cancelled() => stopping(),
        problem = lost => problem,
    }
}

/// The lines of a body, of which it buffers at most one of `limit` bytes. A body that breaks off,
/// falls behind by `slack`, or is broken off ends with [`Content::Broken`].
pub(crate) fn read_lines(
    body: Body,
    limit: usize,
    slack: Duration,
    broken_off: impl Future<Output = Problem> + Send + 'static,
) -> impl Stream<Item = Line> + Send + 'static {
    let begin = (
        body.into_data_stream(),
        Pace::new(slack),
        Box::pin(broken_off),
    );
    let pieces = stream::unfold(Some(begin), async |state| {
        let (mut body, mut pace, mut broken_off) = state?;
        let piece = tokio::select! {
            biased;
            problem = &mut broken_off => {
                // A caller that is still sending would otherwise get a connection reset
                // instead of the answer.
                tokio::spawn(timeout(DISCARD_FOR, async move {
                    while let Some(Ok(_)) = body.next().await {}
                }));
                return Some((Err(io::Error::other(BrokenOff(problem))), None));
            }
            piece = timeout_at(pace.wait(), body.next()) => piece,
        };
        let piece = match piece {
            Ok(piece) => piece?.map_err(io::Error::other),
            Err(too_slow) => Err(too_slow.into()),
        };
        pace.progress(piece.as_ref().map_or(0, Bytes::len));
        Some((piece, Some((body, pace, broken_off))))
    });
    let newline = vec![b'\n'];
    let codec = AnyDelimiterCodec::new_with_max_length(newline, Vec::new(), limit);
    let lines = FramedRead::new(StreamReader::new(pieces), LineDecoder(codec));
    let numbered = lines.zip(stream::iter(1..));
    numbered.map(|(content, number)| {
        let content = content.unwrap_or_else(|error| {
            Content::Broken(match error.downcast() {
                Ok(BrokenOff(problem)) => problem,
                Err(error) if error.kind() == ErrorKind::TimedOut => BodyError::TooSlow.into(),
                Err(_) => BodyError::Broken.into(),
            })
        });
        Line { number, content }
    })
}

/// The error that ends an upload before its body does.
#[derive(Debug, thiserror::Error)]
#[error("the upload is broken off")]
struct BrokenOff(Problem);

/// Splits off one line after the other. One that is too long is an item too, as [`FramedRead`] ends
/// after an error.
struct LineDecoder(AnyDelimiterCodec);

impl LineDecoder {
    fn content(line: Result<Option<Bytes>, AnyDelimiterCodecError>) -> io::Result<Option<Content>> {
        match line {
            Ok(line) => Ok(line.map(|line| Content::Text(Box::from(&*line)))),
            Err(AnyDelimiterCodecError::MaxChunkLengthExceeded) => Ok(Some(Content::TooLong)),
            Err(AnyDelimiterCodecError::Io(error)) => Err(error),
        }
    }
}

impl Decoder for LineDecoder {
    type Item = Content;
    type Error = io::Error;

    fn decode(&mut self, buffer: &mut BytesMut) -> io::Result<Option<Content>> {
        Self::content(self.0.decode(buffer))
    }

    fn decode_eof(&mut self, buffer: &mut BytesMut) -> io::Result<Option<Content>> {
        Self::content(self.0.decode_eof(buffer))
    }
}
