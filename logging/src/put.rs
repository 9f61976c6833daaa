//! `POST /`: stores batches of entries.

use std::sync::Arc;
use std::time::Instant;

use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use common::api::{Batch, MAX_BATCH_BYTES, PutEntry, PutResult};
use common::body::{BodyError, NoMemory, Reservation, holding, read_body};
use common::entry::{Entry, Outcome};
use common::json::JsonLine;
use common::problem::Problem;

use crate::error::busy;
use crate::state::App;

/// `POST /`: a batch, answered with a list of results in its order, or one entry, with its result.
pub(crate) async fn create(State(app): State<App>, request: Request) -> Result<Response, Problem> {
    let mut reserved = Reservation::new(&app.posts, 0).map_err(|NoMemory| busy())?;
    let body = request.into_body();
    let body = read_body(body, MAX_BATCH_BYTES, app.body_timeout, &mut reserved).await;
    let body = body.map_err(|error| match error {
        BodyError::NoMemory => busy(),
        BodyError::TooLarge(_) | BodyError::TooSlow | BodyError::Broken => error.into(),
    })?;
    let posted = Batch::decode(&body).map_err(Problem::bad_request)?;
    let is_single = !body.trim_ascii_start().starts_with(b"[");
    drop(body);
    let mut entries = Vec::with_capacity(posted.len());
    let mut request_ids = Vec::with_capacity(posted.len());
    for PutEntry {
        uuid,
        msg,
        request_id,
    } in posted
    {
        entries.push(Entry { uuid, msg });
        request_ids.push(request_id);
    }
    let entries: Arc<[Entry]> = entries.into();
    let begin = Instant::now();
    let in_flight = app.counters.in_flight();
    let outcomes = app.map.put(entries.clone()).await;
    drop(in_flight);
    app.counters.count_put(&outcomes, begin.elapsed());
    log_acknowledged(&entries, &request_ids, &outcomes);
    let results = entries.iter().zip(outcomes).map(|(entry, outcome)| {
        let uuid = entry.uuid;
        PutResult { uuid, outcome }
    });
    let mut results: Vec<PutResult> = results.collect();
    let answer = match is_single {
        true => JsonLine(results.remove(0)).into_response(),
        false => JsonLine(results).into_response(),
    };
    Ok(holding(answer, reserved))
}

/// Logs one line for each acknowledged entry: the exercise's proof of which instance stored it.
/// String fields are quoted and escaped, so no message can forge a line.
fn log_acknowledged(entries: &[Entry], request_ids: &[Option<String>], outcomes: &[Outcome]) {
    for ((entry, request_id), outcome) in entries.iter().zip(request_ids).zip(outcomes) {
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
            request_id,
            "entry acknowledged"
        );
    }
}
