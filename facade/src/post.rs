//! POST of one message. `upload` has the POST of many.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderName, header};
use axum::response::{IntoResponse, Response};
use common::body::{BodyError, holding, read_body};
use common::client::Client;
use common::entry;
use common::json::{self, JsonLine};
use common::metrics::RouteName;
use common::middleware::request_id;
use common::permits::Exhausted;
use common::problem::Problem;
use serde::Serialize;
use uuid::Uuid;

use crate::delivery::{Message, Stored, WhenOverloaded, deliver};
use crate::error::{not_stored, too_large, too_many};
use crate::judge::Key;
use crate::message::{ContentType, MessageFormat, body_limit, message, multipart_message};
use crate::metrics::UPLOAD;
use crate::state::App;
use crate::upload;

/// `HOST:PORT` of the logging instance that reported the message stored.
const LOGGING_INSTANCE: HeaderName = HeaderName::from_static("x-logging-instance");

const IDEMPOTENCY_KEY: &str = "idempotency-key";

/// `POST /`, which hands NDJSON over to `upload`.
pub(crate) async fn create(
    State(app): State<Arc<App>>,
    request: Request,
) -> Result<Response, Problem> {
    let (parts, body) = request.into_parts();
    let format = match ContentType::of(&parts.headers)? {
        ContentType::OneMessage(format) => format,
        ContentType::Ndjson => {
            let mut response = upload::create(app, parts, body).await.into_response();
            response.extensions_mut().insert(RouteName(UPLOAD));
            return Ok(response);
        }
    };
    let key = idempotency_key(&parts.headers)?;
    let limit = body_limit(app.max_message);
    if announced_length(&parts.headers).is_some_and(|length| length > limit) {
        return Err(too_large(app.max_message));
    }
    let no_memory = || too_many("messages").with("stored", "no");
    let reserved = app.posts.take(Client::of(&parts.extensions), 0);
    let mut reserved = reserved.map_err(|Exhausted| no_memory())?;
    let body = read_body(body, limit, app.body_timeout, &mut reserved);
    let body = body.await.map_err(|error| match error {
        BodyError::TooLarge(_) => too_large(app.max_message),
        BodyError::NoMemory => no_memory(),
        BodyError::TooSlow | BodyError::Broken => error.into(),
    })?;
    let body_length = body.len();
    let msg = match format {
        MessageFormat::Body(format) => message(format, body, app.max_message)?,
        MessageFormat::Multipart { boundary } => {
            multipart_message(body, &boundary, app.max_message)?
        }
    };
    // The answer contains the message and keeps the reservation until its caller has read it.
    let bytes = body_length.max(json::length(&msg));
    reserved.resize(bytes).map_err(|Exhausted| no_memory())?;
    let reserved = Arc::new(reserved);
    let message = Message {
        msg,
        key,
        request_id: request_id(&parts.headers).map(str::to_owned),
        held: reserved.clone(),
        overload: WhenOverloaded::GiveUp,
    };
    let stored = deliver(&app.pool, message, app.deadline).await;
    let stored = stored.map_err(|error| not_stored(&app.pool, &error))?;
    app.counters.count_posted(stored.msg.len());
    Ok(holding(answer_stored(&stored), reserved))
}

fn idempotency_key(headers: &HeaderMap) -> Result<Key, Problem> {
    let mut keys = headers.get_all(IDEMPOTENCY_KEY).iter();
    let key = match (keys.next(), keys.next()) {
        (None, _) => return Ok(Key::Generated),
        (Some(key), None) => key.to_str().unwrap_or_default().trim(),
        (Some(_), Some(_)) => {
            return Err(Problem::bad_request(
                "send one idempotency-key, not several",
            ));
        }
    };
    let unquoted = key
        .strip_prefix('"')
        .and_then(|key| key.strip_suffix('"'))
        .unwrap_or(key);
    match entry::parse_entry_uuid(unquoted) {
        Ok(uuid) => Ok(Key::Caller(uuid)),
        Err(reason) => Err(Problem::bad_request(format!(
            "the idempotency-key must be a version 7 UUID made for this message: {reason}"
        ))),
    }
}

fn announced_length(headers: &HeaderMap) -> Option<usize> {
    let length = headers.get(header::CONTENT_LENGTH)?;
    length.to_str().ok()?.parse().ok()
}

/// The answer to a message that is stored.
#[derive(Serialize)]
struct Answer<'a> {
    uuid: Uuid,
    msg: &'a str,
    /// Only when it is true: another request stored the message under this `Idempotency-Key`. Its absence
    /// proves nothing when a try of this request had no answer or an unknown outcome.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    duplicate: bool,
}

fn answer_stored(stored: &Stored) -> Response {
    let answer = Answer {
        uuid: stored.uuid,
        msg: &stored.msg,
        duplicate: stored.is_duplicate,
    };
    let instance = [(LOGGING_INSTANCE, stored.instance.address.as_str())];
    (instance, JsonLine(answer)).into_response()
}
