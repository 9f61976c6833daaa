//! `POST /`: stores batches of entries.

use std::sync::Arc;
use std::time::Instant;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use common::api::{Batch, MARK, MAX_BATCH_BYTES, Mark, Posted, PutEntry, PutResult};
use common::body::{BodyError, holding, read_body};
use common::client::Client;
use common::entry::{Entry, Outcome};
use common::json::JsonLine;
use common::output;
use common::permits::Exhausted;
use common::problem::Problem;
use common::traces::{TRACE_ID, TRACES, continue_trace, trace_id};
use tokio::time::timeout;
use tracing::{Span, debug_span};
use uuid::Uuid;

use crate::error::{busy, not_taken};
use crate::readiness::check_output;
use crate::state::App;

/// `POST /`: a batch, answered with a list of results in its order, or one entry, with its result.
pub(crate) async fn create(
    State(app): State<Arc<App>>,
    request: Request,
) -> Result<Response, Problem> {
    require_json(request.headers())?;
    let reserved = app.posts.take(Client::of(request.extensions()), 0);
    let mut reserved = reserved.map_err(|Exhausted| busy())?;
    let (parts, body) = request.into_parts();
    let body = read_body(body, MAX_BATCH_BYTES, app.body_timeout, &mut reserved).await;
    let body = body.map_err(|error| match error {
        BodyError::NoMemory => busy(),
        BodyError::TooLarge(_) | BodyError::TooSlow | BodyError::Broken => error.into(),
    })?;
    let Posted { entries, is_single } = Batch::decode(&body).map_err(Problem::bad_request)?;
    drop(body);
    let map = app.map.id().filter(|_| app.map.clocks().is_some());
    require_same_map(&parts.headers, map)?;
    check_output(app.store_timeout).map_err(not_taken)?;
    let posted = entries.into_iter().map(|put: PutEntry| {
        let origin = Origin::new(put.request_id, put.traceparent.as_deref());
        let (uuid, msg) = (put.uuid, put.msg);
        (Entry { uuid, msg }, origin)
    });
    let (entries, origins): (Vec<Entry>, Vec<Origin>) = posted.unzip();
    let entries: Arc<[Entry]> = entries.into();
    let begin = Instant::now();
    let in_flight = app.counters.in_flight();
    let map_spans: Vec<Span> = origins.iter().map(Origin::map_span).collect();
    let reserved = Arc::new(reserved);
    let mut outcomes = app.map.put(entries.clone()).await;
    drop(map_spans);
    drop(in_flight);
    let took = begin.elapsed();
    let lines = output::collect(|| log_acknowledged(&entries, &origins, &outcomes));
    let mut printing = Box::pin(output::print(lines));
    let printed = timeout(app.store_timeout, &mut printing).await;
    app.counters.count_put(&outcomes, took);
    if printed.is_err() {
        doubt_acknowledged(&mut outcomes);
        let counted = reserved.clone();
        tokio::spawn(async move {
            printing.await;
            drop(counted);
        });
    }
    let results = entries.iter().zip(outcomes).map(|(entry, outcome)| {
        let uuid = entry.uuid;
        PutResult { uuid, outcome }
    });
    let mut results: Vec<PutResult> = results.collect();
    let answer = if is_single {
        JsonLine(results.remove(0)).into_response()
    } else {
        JsonLine(results).into_response()
    };
    Ok(holding(answer, reserved))
}

/// A page of another site can have a browser send forms and plain text, but not JSON.
fn require_json(headers: &HeaderMap) -> Result<(), Problem> {
    let content_type = headers.get(header::CONTENT_TYPE);
    let content_type = content_type.and_then(|value| value.to_str().ok());
    let essence = content_type.and_then(|value| value.split(';').next());
    if essence.is_some_and(|essence| essence.trim().eq_ignore_ascii_case(Batch::CONTENT_TYPE)) {
        return Ok(());
    }
    let detail = "this is a logging instance, which takes application/json; post messages to the facade, \
                  by default http://localhost:8086";
    Err(Problem::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, detail))
}

/// An instance takes nothing before it knows its map: the map could be another one than the facade's. A
/// facade that knows its map names it; a person at a terminal names none.
fn require_same_map(headers: &HeaderMap, map: Option<Uuid>) -> Result<(), Problem> {
    let Some(map) = map else {
        let detail = "this instance does not know its map's id and clock yet";
        return Err(not_taken(detail.to_owned()));
    };
    let Some(mark) = headers.get(MARK) else {
        return Ok(());
    };
    let mark = mark.to_str().unwrap_or_default().parse::<Mark>();
    let named = mark.map_err(|reason| not_taken(format!("the facade's mark: {reason}")))?;
    match named.map.filter(|named| *named != map) {
        None => Ok(()),
        Some(named) => Err(not_taken(format!(
            "this instance serves the map {map}, and the facade the map {named}"
        ))),
    }
}

/// The request that an entry came with.
struct Origin {
    request_id: Option<String>,
    /// The entry's part of the request's trace.
    span: Span,
}

impl Origin {
    fn new(request_id: Option<String>, traceparent: Option<&str>) -> Self {
        let span = match traceparent {
            None => Span::none(),
            Some(_) => debug_span!(target: TRACES, parent: None, "put", "otel.kind" = "server"),
        };
        continue_trace(&span, traceparent);
        Self { request_id, span }
    }

    /// The span of the map's work on the entry.
    fn map_span(&self) -> Span {
        if self.span.is_disabled() {
            Span::none()
        } else {
            debug_span!(target: TRACES, parent: &self.span, "put into the map")
        }
    }
}

/// What is stored and not printed is not acknowledged: killing this process could lose its line.
fn doubt_acknowledged(outcomes: &mut [Outcome]) {
    for outcome in outcomes {
        if matches!(outcome, Outcome::Stored | Outcome::Duplicate) {
            *outcome = Outcome::unknown("standard output did not take the entry's line in time");
        }
    }
}

/// Logs one line for each acknowledged entry: the exercise's proof of which instance stored it.
/// String fields are quoted and escaped, so no message can forge a line.
fn log_acknowledged(entries: &[Entry], origins: &[Origin], outcomes: &[Outcome]) {
    for ((entry, origin), outcome) in entries.iter().zip(origins).zip(outcomes) {
        let outcome = match outcome {
            Outcome::Stored => "stored",
            Outcome::Duplicate => "duplicate",
            Outcome::Conflict
            | Outcome::Stale
            | Outcome::Leaving
            | Outcome::Early
            | Outcome::Refused { .. }
            | Outcome::PartitionDown { .. }
            | Outcome::Unknown { .. } => continue,
        };
        tracing::info!(
            msg = entry.msg.as_str(),
            uuid = %entry.uuid,
            outcome,
            request_id = origin.request_id,
            { TRACE_ID } = trace_id(&origin.span),
            "entry acknowledged"
        );
    }
}
