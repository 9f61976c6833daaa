//! GET: bounds, the choice of a format, and single entries. `read` makes the body.

use std::sync::Arc;
use std::time::SystemTime;

use axum::body::HttpBody;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, Query, State};
use axum::http::{HeaderMap, Uri};
use axum::response::{IntoResponse, Response};
use common::body::holding;
use common::bounds::{Bounds, Order};
use common::client::Client;
use common::json::JsonLine;
use common::middleware::{answer_method_not_allowed, answer_not_found, request_id};
use common::permits::Exhausted;
use common::problem::Problem;
use common::traces::TRACES;
use percent_encoding::percent_decode_str;
use serde::Deserialize;
use tracing::{Instrument, debug_span};
use uuid::Uuid;

use crate::console;
use crate::error::{no_message, too_many, unreadable};
use crate::follow::{self, Follow};
use crate::format::{Format, negotiate, prefers_html};
use crate::message::body_limit;
use crate::moment::Moment;
use crate::pool::{Instance, is_worth_waiting};
use crate::read::{self, Read};
use crate::search::Text;
use crate::state::App;

/// The most entries that a follower may begin with: what it reads to find where they begin.
pub(crate) const MAX_TAIL: u64 = 10_000;

/// Unknown fields are ignored, because the first client of this system sends some.
#[derive(Debug, Deserialize)]
pub(crate) struct ListQuery {
    after: Option<Uuid>,
    before: Option<Uuid>,
    /// Inclusive.
    since: Option<Moment>,
    /// Exclusive.
    until: Option<Moment>,
    #[serde(default)]
    order: Order,
    limit: Option<u64>,
    pub(crate) contains: Option<Text>,
    #[serde(default)]
    follow: bool,
    tail: Option<u64>,
}

impl ListQuery {
    /// # Errors
    /// A 400 that names the field that is wrong.
    pub(crate) fn parse(uri: &Uri) -> Result<Self, Problem> {
        let Query(query) = Query::<Self>::try_from_uri(uri)?;
        if query.limit == Some(0) {
            return Err(Problem::bad_request("limit must be at least 1"));
        }
        // Decoded loosely, a text in another encoding would be searched for and never found.
        let decoded = percent_decode_str(uri.query().unwrap_or_default());
        if query.contains.is_some() && decoded.decode_utf8().is_err() {
            return Err(Problem::bad_request(
                "contains is not UTF-8: percent-encode the bytes of UTF-8",
            ));
        }
        Ok(query)
    }

    pub(crate) fn bounds(&self, now: SystemTime) -> Bounds {
        // No entry has the UUID of a moment itself: it has no version.
        let since = self.since.map(|since| since.first_uuid(now));
        let until = self.until.map(|until| until.first_uuid(now));
        Bounds {
            after: self.after.max(since),
            before: [self.before, until].into_iter().flatten().min(),
            order: self.order,
        }
    }
}

/// `GET /`: all messages within the bounds, merged with the messages service's reply; to a browser the
/// console.
pub(crate) async fn list(
    State(app): State<Arc<App>>,
    uri: Uri,
    headers: HeaderMap,
    client: Client,
) -> Result<Response, Problem> {
    if prefers_html(&headers) {
        return Ok(console::answer(&app, client, &uri).await);
    }
    let query = ListQuery::parse(&uri)?;
    let bounds = query.bounds(app.pool.clock());
    let format = negotiate(&headers, &Format::OF_THE_LOG)?;
    let request_id = request_id(&headers).map(str::to_owned);
    if query.follow || format == Format::EventStream {
        let follow = Follow {
            after: bounds.after.unwrap_or_default(),
            tail: query.tail,
            format,
            request_id,
        };
        let follow = resumed(following(follow, bounds, &query)?, &headers)?;
        return follow::answer(app, follow, client).await;
    }
    if query.tail.is_some() {
        return Err(Problem::bad_request(
            "tail is for following: add follow=true; for the newest messages write \
             order=desc&limit=N",
        ));
    }
    let read = Read {
        bounds,
        limit: query.limit,
        contains: query.contains,
        format,
        request_id,
    };
    let permit = app.reads.take(client, 1);
    let permit = permit.map_err(|Exhausted| too_many("reads"))?;
    read::answer(app, read, permit).await
}

/// Checks that a follower asks for nothing that would end it, as a following body has no end.
fn following(follow: Follow, bounds: Bounds, query: &ListQuery) -> Result<Follow, Problem> {
    let refusal = if !follow.format.can_be_followed() {
        "this format has an end and cannot be followed: accept text/event-stream, application/x-ndjson or \
         text/plain"
    } else if query.tail.is_some_and(|tail| tail > MAX_TAIL) {
        "tail may be 10000 at most; to begin earlier write after=UUID or since=TIME instead"
    } else if query.limit.is_some() {
        "limit cannot be combined with following; tail=N begins with the newest N messages"
    } else if query.contains.is_some() {
        "contains cannot be combined with following: search with a GET that has an end, or filter the lines"
    } else if bounds.before.is_some() {
        "before and until cannot be combined with following, which goes on with what is new"
    } else if bounds.order == Order::Desc {
        "order=desc cannot be combined with following; tail=N begins with the newest N messages"
    } else {
        return Ok(follow);
    };
    Err(Problem::bad_request(refusal))
}

/// A follower that comes back goes on behind the last id that it got, wherever it had begun.
fn resumed(follow: Follow, headers: &HeaderMap) -> Result<Follow, Problem> {
    let Some(id) = headers.get("last-event-id") else {
        return Ok(follow);
    };
    let after = Uuid::try_parse_ascii(id.as_bytes()).map_err(|_| {
        Problem::bad_request("Last-Event-ID is not a UUID; send back the id of the last event")
    })?;
    Ok(Follow {
        after,
        tail: None,
        ..follow
    })
}

/// `GET /{uuid}`: one entry.
pub(crate) async fn show(
    State(app): State<Arc<App>>,
    path: Result<Path<Uuid>, PathRejection>,
    client: Client,
) -> Result<Response, Problem> {
    let Ok(Path(uuid)) = path else {
        return Err(answer_not_found().await);
    };
    // Until its size is known, the message may be as large as any.
    let largest = body_limit(app.max_message);
    let reserved = app.lookups.take(client, largest);
    let mut reserved = reserved.map_err(|Exhausted| too_many("reads"))?;
    let ask = move |instance: Arc<Instance>| async move {
        let span = debug_span!(
            target: TRACES,
            "read from an instance",
            "otel.kind" = "client",
            "server.address" = instance.address,
        );
        instance.client.get(uuid).instrument(span).await
    };
    let asked = app
        .pool
        .ask_until_deadline(app.read_deadline, is_worth_waiting, ask);
    let entry = asked.await.map_err(|error| unreadable(&app.pool, &error))?;
    let entry = entry.ok_or_else(|| no_message(uuid))?;
    let answer = JsonLine(entry).into_response();
    let bytes = answer.body().size_hint().lower() as usize;
    let resized = reserved.resize(bytes);
    resized.map_err(|Exhausted| too_many("reads"))?;
    Ok(holding(answer, reserved))
}

/// A method other than GET on `/{uuid}` is a 405, or a 404 when the path is not a UUID.
pub(crate) async fn refuse_method(path: Result<Path<Uuid>, PathRejection>) -> Problem {
    match path {
        Ok(_) => answer_method_not_allowed().await,
        Err(_) => answer_not_found().await,
    }
}
