//! GET: bounds, the choice of a format, and single entries. The body itself is made in `merge`.

use std::sync::Arc;
use std::time::SystemTime;

use axum::body::HttpBody;
use axum::extract::rejection::{PathRejection, QueryRejection};
use axum::extract::{Path, Query, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use common::body::{NoMemory, Reservation, holding};
use common::json::JsonLine;
use common::problem::Problem;
use common::read::{Bounds, Order};
use common::server;
use headers_accept::Accept;
use mediatype::{MediaType, Name, ReadParams, names};
use serde::Deserialize;
use uuid::Uuid;

use crate::client::UpstreamError;
use crate::merge::{self, Read};
use crate::moment::Moment;
use crate::pool::{Instance, is_worth_waiting};
use crate::post::{RETRY_AFTER, body_limit};
use crate::{App, too_many};

/// The form of an answer that holds entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Json,
    Ndjson,
    Text,
}

impl Format {
    pub fn content_type(self) -> &'static str {
        match self {
            Self::Json => "application/json",
            Self::Ndjson => "application/x-ndjson",
            Self::Text => "text/plain; charset=utf-8",
        }
    }

    fn media_type(self) -> MediaType<'static> {
        const X_NDJSON: Name<'static> = Name::new_unchecked("x-ndjson");
        match self {
            Self::Json => MediaType::new(names::APPLICATION, names::JSON),
            Self::Ndjson => MediaType::new(names::APPLICATION, X_NDJSON),
            Self::Text => MediaType::new(names::TEXT, names::PLAIN),
        }
    }
}

/// The format, of those on offer, that the `Accept` headers like best; the first one if they do
/// not care. Ranges that cannot be read are passed over, as are parameters other than `q`.
///
/// # Errors
/// 406 when none of them is acceptable.
pub(crate) fn negotiate(headers: &HeaderMap, offer: &[Format]) -> Result<Format, Problem> {
    let values = headers.get_all(header::ACCEPT).iter();
    let values: Vec<&str> = values.filter_map(|value| value.to_str().ok()).collect();
    if values.iter().all(|value| value.trim().is_empty()) {
        return Ok(offer[0]);
    }
    let ranges = values.iter().flat_map(|value| value.split(','));
    let ranges: Vec<String> = ranges.filter_map(essence_and_quality).collect();
    let wanted: Option<Accept> = ranges.join(",").parse().ok();
    let available: Vec<MediaType<'_>> = offer.iter().map(|format| format.media_type()).collect();
    let chosen = wanted
        .as_ref()
        .and_then(|wanted| wanted.negotiate(&available));
    let format = offer
        .iter()
        .find(|format| chosen == Some(&format.media_type()));
    format.copied().ok_or_else(|| {
        let offered: Vec<&str> = offer.iter().map(|format| format.content_type()).collect();
        let detail = format!("accept one of: {}", offered.join(", "));
        Problem::new(StatusCode::NOT_ACCEPTABLE, detail)
    })
}

fn essence_and_quality(range: &str) -> Option<String> {
    let range = MediaType::parse(range.trim()).ok()?;
    let essence = range.essence();
    Some(match range.get_param(Name::new_unchecked("q")) {
        Some(quality) => format!("{essence};q={quality}"),
        None => essence.to_string(),
    })
}

/// The query of a read; unknown fields are ignored, as the first client of this system sends some.
#[derive(Clone, Copy, Debug, Deserialize)]
pub(crate) struct ListQuery {
    after: Option<Uuid>,
    before: Option<Uuid>,
    /// Only entries of this time or later.
    since: Option<Moment>,
    /// Only entries of an earlier time.
    until: Option<Moment>,
    #[serde(default)]
    order: Order,
    limit: Option<u64>,
}

impl ListQuery {
    fn bounds(&self, now: SystemTime) -> Bounds {
        let last_uuid_before = |since: Moment| {
            let first = since.first_uuid(now);
            Uuid::from_u128(first.as_u128().saturating_sub(1))
        };
        let since = self.since.map(last_uuid_before);
        let until = self.until.map(|until| until.first_uuid(now));
        Bounds {
            after: self.after.max(since),
            before: [self.before, until].into_iter().flatten().min(),
            order: self.order,
        }
    }
}

/// `GET /`: all messages within the bounds, merged with the messages service's reply.
pub(crate) async fn list(
    State(app): State<App>,
    query: Result<Query<ListQuery>, QueryRejection>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let Query(query) = query.map_err(|error| Problem::bad_request(error.body_text()))?;
    if query.limit == Some(0) {
        return Err(Problem::bad_request("limit must be at least 1"));
    }
    let read = Read {
        bounds: query.bounds(SystemTime::now()),
        limit: query.limit,
        format: negotiate(&headers, &[Format::Json, Format::Ndjson, Format::Text])?,
        request_id: server::request_id(&headers).map(str::to_owned),
    };
    let place = app.reads.clone().try_acquire_owned();
    let place = place.map_err(|_| too_many("reads"))?;
    merge::answer(app, read, place).await
}

/// `GET /{uuid}`: one entry.
pub(crate) async fn show(
    State(app): State<App>,
    path: Result<Path<Uuid>, PathRejection>,
) -> Result<Response, Problem> {
    let Ok(Path(uuid)) = path else {
        return Err(server::answer_not_found().await);
    };
    // Until it is known how large the message is, it may be as large as any.
    let largest = body_limit(app.max_message);
    let reserved = Reservation::new(&app.lookups, largest);
    let mut reserved = reserved.map_err(|NoMemory| too_many("reads"))?;
    let ask = move |instance: Arc<Instance>| async move { instance.client.get(uuid).await };
    let asked = app
        .pool
        .ask_patiently(app.read_deadline, is_worth_waiting, ask);
    let entry = asked.await.map_err(|error| answer_unreadable(&error))?;
    let Some(entry) = entry else {
        let detail = format!("there is no message {uuid}");
        return Err(Problem::new(StatusCode::NOT_FOUND, detail));
    };
    let answer = JsonLine(entry).into_response();
    let bytes = answer.body().size_hint().lower() as usize;
    let resized = reserved.resize(bytes);
    resized.map_err(|NoMemory| too_many("reads"))?;
    Ok(holding(answer, reserved))
}

/// What is not GET on `/{uuid}`: a path that is no message's is unknown, whatever the method.
pub(crate) async fn refuse_method(path: Result<Path<Uuid>, PathRejection>) -> Problem {
    match path {
        Ok(_) => server::answer_method_not_allowed().await,
        Err(_) => server::answer_not_found().await,
    }
}

/// The answer when no logging instance could be read from.
pub(crate) fn answer_unreadable(error: &UpstreamError) -> Problem {
    tracing::warn!(%error, "no logging instance could be read from");
    match error {
        UpstreamError::Status(StatusCode::INTERNAL_SERVER_ERROR, detail) => {
            Problem::new(StatusCode::INTERNAL_SERVER_ERROR, detail)
        }
        UpstreamError::Status(_, detail) => Problem::unavailable(
            format!("the messages cannot be read now, come back in a moment: {detail}"),
            RETRY_AFTER,
        ),
        UpstreamError::OtherMap(reason) => Problem::unavailable(
            format!("no logging instance can be read from; one {reason}"),
            RETRY_AFTER,
        ),
        UpstreamError::Unreachable(_)
        | UpstreamError::TimedOut
        | UpstreamError::Lost(_)
        | UpstreamError::Unmarked(..)
        | UpstreamError::Garbled(_) => Problem::unavailable(
            "no logging instance answers; come back in a moment, or see /readyz?verbose",
            RETRY_AFTER,
        ),
    }
}
