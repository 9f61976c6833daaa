//! The body of a GET: the log's entries, streamed from one logging instance after the other, then
//! the reply of the messages service, which is asked in parallel.
//!
//! A body that ends properly is complete, as its count proves. An incomplete body is aborted: the
//! connection is closed before the last chunk.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use common::api::{Poll, ReadQuery};
use common::body::holding;
use common::bounds::{Bounds, Order};
use common::permits::Permit;
use common::problem::Problem;
use common::traces::TRACES;
use futures_util::{StreamExt, stream};
use metrics::counter;
use tokio_util::task::AbortOnDropHandle;
use tracing::{Instrument, Span, debug_span};
use uuid::Uuid;

use crate::entry_stream::{EntryStream, Part};
use crate::error::{unreadable, without_addresses};
use crate::format::{Format, Tail};
use crate::metrics::{READS_ABORTED, READS_RESUMED};
use crate::pool::{Instance, Pool, is_worth_waiting};
use crate::search::{MAX_SCANNED, Search, Text};
use crate::state::App;
use crate::upstream::UpstreamError;

#[derive(Debug)]
pub(crate) struct Read {
    pub(crate) bounds: Bounds,
    /// Of entries in the answer.
    pub(crate) limit: Option<u64>,
    pub(crate) contains: Option<Text>,
    pub(crate) format: Format,
    pub(crate) request_id: Option<String>,
}

/// Begins the answer when an instance begins to stream; the body holds `permit` until it ends.
///
/// # Errors
/// When no logging instance begins within the read deadline.
pub(crate) async fn answer(app: Arc<App>, read: Read, permit: Permit) -> Result<Response, Problem> {
    let search = read.contains.map(|text| Search::new(text, read.limit));
    let query = ReadQuery {
        bounds: read.bounds,
        limit: match search {
            Some(_) => Some(MAX_SCANNED),
            None => read.limit,
        },
        poll: None,
    };
    let mut cursor = Cursor::new(&app.pool, app.read_deadline, query, read.request_id.clone());
    let asking = app.clone();
    let reply = async move { asking.messages.reply(read.request_id.as_deref()).await };
    let reply = AbortOnDropHandle::new(tokio::spawn(reply.in_current_span()));
    let begun = cursor.begin().await;
    begun.map_err(|error| unreadable(&app.pool, &error))?;
    let head = Bytes::from_static(read.format.head());
    app.counters.count_read(head.len());
    let body = MergedBody {
        app,
        cursor,
        search,
        format: read.format,
        reply,
        count: 0,
        is_finished: false,
    };
    let rest = stream::try_unfold(body, |mut body| async move {
        let chunk = body.next_chunk().await.inspect_err(|error| {
            counter!(READS_ABORTED).increment(1);
            tracing::warn!(%error, entries = body.count, "a GET is aborted: no instance continues");
        })?;
        body.app
            .counters
            .count_read(chunk.as_ref().map_or(0, Bytes::len));
        Ok::<_, UpstreamError>(chunk.map(|chunk| (chunk, body)))
    });
    let content_type = [(header::CONTENT_TYPE, read.format.content_type())];
    let body = Body::from_stream(stream::iter([Ok(head)]).chain(rest));
    Ok(holding((content_type, body).into_response(), permit))
}

/// The position of a read. When an instance dies, hangs or hands the read over, the read continues
/// behind its last UUID on another instance.
pub(crate) struct Cursor {
    pool: Arc<Pool>,
    /// What is still to be read.
    rest: ReadQuery,
    request_id: Option<String>,
    timeout: Duration,
    source: Option<Source>,
    /// Whether long lines come in fragments, and the entry of which some were returned.
    lines: Lines,
    /// The first part, until it is taken.
    first: Option<Part>,
    /// What was settled when it began.
    settled: Option<Uuid>,
    /// The span of the request, which also covers its body.
    span: Span,
}

#[derive(Clone, Copy, Debug)]
enum Lines {
    Whole,
    /// With what is cut: see [`EntryStream::cut`].
    Fragments(Option<(Uuid, usize)>),
}

struct Source {
    instance: Arc<Instance>,
    stream: EntryStream,
}

impl Cursor {
    /// A read that has not begun; no silence of it lasts longer than `timeout`.
    pub(crate) fn new(
        pool: &Arc<Pool>,
        timeout: Duration,
        query: ReadQuery,
        request_id: Option<String>,
    ) -> Self {
        Self {
            pool: pool.clone(),
            rest: query,
            request_id,
            timeout,
            source: None,
            lines: Lines::Fragments(None),
            first: None,
            settled: None,
            span: Span::current(),
        }
    }

    /// Reads long lines whole: for a reader of which there is one.
    pub(crate) fn with_whole_lines(self) -> Self {
        Self {
            lines: Lines::Whole,
            ..self
        }
    }

    /// Ends the read on its instance; the next part is read from any.
    pub(crate) fn pause(&mut self) {
        self.source = None;
    }

    /// Returns the entry again of which fragments were returned, but not the last one.
    pub(crate) fn rewind_entry(&mut self) {
        self.source = None;
        self.lines = Lines::Fragments(None);
    }

    /// The bounds of what is still to be read.
    pub(crate) fn bounds(&self) -> Bounds {
        self.rest.bounds
    }

    /// What was settled when it began, if it asked and the instance could tell.
    pub(crate) fn settled(&self) -> Option<Uuid> {
        self.settled
    }

    /// Waits for the first part. Fails at once when no instance is worth waiting for.
    pub(crate) async fn begin(&mut self) -> Result<(), UpstreamError> {
        self.first = Some(self.open(is_worth_waiting).await?);
        Ok(())
    }

    /// Opens a stream on an instance and returns its first part. Retries until the read deadline,
    /// while `may_wait` accepts the error.
    async fn open(
        &mut self,
        may_wait: impl Fn(&UpstreamError) -> bool,
    ) -> Result<Part, UpstreamError> {
        let (query, request_id) = (self.rest, self.request_id.clone());
        let lines = self.lines;
        let begin = move |instance: Arc<Instance>| {
            let request_id = request_id.clone();
            async move {
                let span = debug_span!(
                    target: TRACES,
                    "read from an instance",
                    "otel.kind" = "client",
                    "server.address" = instance.address,
                );
                let answer = instance.client.read(query, request_id.as_deref());
                let answer = answer.instrument(span).await?;
                let bounds = match (query.bounds.order, answer.end) {
                    (Order::Asc, Some(end)) => query.bounds.ending_before(end),
                    _ => query.bounds,
                };
                let mut stream = EntryStream::new(answer.chunks, bounds, query.limit);
                if let Lines::Fragments(cut) = lines {
                    stream = stream.in_fragments(cut);
                }
                let first = stream.next().await?;
                Ok((Source { instance, stream }, answer.settled, first))
            }
        };
        let asked = self.pool.ask_until_deadline(self.timeout, may_wait, begin);
        let (source, settled, first) = asked.instrument(self.span.clone()).await?;
        if query.poll == Some(Poll::Settle) {
            self.settled = settled;
            // Where it continues on another instance, more may be settled than what was read before.
            self.rest.poll = Some(Poll::Recent);
        }
        self.note_progress(&source.stream);
        self.source = Some(source);
        Ok(first)
    }

    fn note_progress(&mut self, stream: &EntryStream) {
        (self.rest.bounds, self.rest.limit) = stream.rest();
        if let Lines::Fragments(cut) = &mut self.lines {
            *cut = stream.cut();
        }
    }

    /// The next part, from another instance when the current one fails.
    pub(crate) async fn next(&mut self) -> Result<Part, UpstreamError> {
        if let Some(first) = self.first.take() {
            return Ok(first);
        }
        let Some(mut source) = self.source.take() else {
            return self.open(|_| true).await;
        };
        let began = Instant::now();
        let error = match source.stream.next().await {
            Ok(part) => {
                self.note_progress(&source.stream);
                self.source = Some(source);
                return Ok(part);
            }
            Err(error) => error,
        };
        let Source { instance, .. } = source;
        // A lost connection may be due to a slow caller, so only a hang counts as a failure of the
        // instance.
        if matches!(error, UpstreamError::TimedOut) {
            instance.health.note_failure(&error);
        }
        let why = format!("{} {error}", instance.name);
        let part = self.open(|_| true).await?;
        counter!(READS_RESUMED).increment(1);
        if let Some(Source { instance, .. }) = &self.source {
            let after_ms = began.elapsed().as_millis();
            let name = &instance.name;
            tracing::info!(after_ms, why, "a GET was continued on {name}");
        }
        Ok(part)
    }
}

struct MergedBody {
    app: Arc<App>,
    cursor: Cursor,
    search: Option<Search>,
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
        let part = match &mut self.search {
            Some(search) => search.next(&mut self.cursor).await?,
            None => self.cursor.next().await?,
        };
        Ok(Some(match part {
            Part::Entries(lines, count) => {
                let rendered = self.format.render(lines, self.count == 0);
                self.count += count;
                rendered
            }
            Part::Fragment(fragment) => {
                let mut out = Vec::with_capacity(fragment.json.len() + 128);
                if fragment.is_first && self.count > 0 {
                    out.extend_from_slice(self.format.separator());
                }
                self.format
                    .write_fragment(&mut out, &fragment, fragment.uuid);
                self.count += u64::from(fragment.is_last);
                out.into()
            }
            Part::End(next) => {
                self.is_finished = true;
                let reply = (&mut self.reply).await;
                let reply = reply.unwrap_or_else(|error| {
                    let reason = format!("the request task failed: {error}");
                    Err(UpstreamError::Garbled(reason))
                });
                let (messages_service, messages_service_error) = match reply {
                    Ok(reply) => (Some(reply), None),
                    Err(error) => {
                        let reason = without_addresses(&error.to_string());
                        (None, Some(format!("the messages service {reason}")))
                    }
                };
                self.format.render_tail(&Tail {
                    messages_service,
                    messages_service_error,
                    count: self.count,
                    scanned: self.search.as_ref().map(|search| search.scanned),
                    next,
                })
            }
        }))
    }
}
