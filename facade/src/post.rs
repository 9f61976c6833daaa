//! POST: the body rules, and the answer for one message. Uploads of many are in `bulk`.
//!
//! What nobody asked for is refused, never dropped: a silently cut message is a lost message.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderName, StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use common::body::{BodyError, NoMemory, Reservation, holding, read_body};
use common::entry::{self, MAX_JSON_EXPANSION};
use common::json::JsonLine;
use common::problem::Problem;
use common::server;
use futures_util::stream;
use mediatype::{MediaType, ReadParams, names};
use multer::Multipart;
use percent_encoding::percent_decode_str;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::judge::{Key, NotStored};
use crate::store::{Post, Stored, WhenOverloaded, store};
use crate::{App, bulk, too_many};

/// Names the logging instance whose answer counted, as `HOST:PORT`.
const LOGGING_INSTANCE: HeaderName = HeaderName::from_static("x-logging-instance");

const IDEMPOTENCY_KEY: &str = "idempotency-key";

/// Room in a body for what surrounds the message: `{"msg":"…"}` and white space.
const BODY_OVERHEAD: usize = 1024;

/// The commands that work, for those who typed another one.
const COMMANDS: &str = "with curl: --data-urlencode 'msg=TEXT', or --json '{\"msg\":\"TEXT\"}', or \
                        -H 'content-type: text/plain' --data-binary 'TEXT'";

/// When a caller that got a 503 should come back.
pub(crate) const RETRY_AFTER: Duration = Duration::from_secs(1);

/// `POST /`: one message, or many as NDJSON.
pub(crate) async fn create(State(app): State<App>, request: Request) -> Result<Response, Problem> {
    let (parts, body) = request.into_parts();
    let format = match ContentType::of(&parts.headers)? {
        ContentType::OneMessage(format) => format,
        ContentType::Ndjson => return bulk::upload(app, &parts.headers, body).await,
    };
    let key = idempotency_key(&parts.headers)?;
    let limit = body_limit(app.max_message);
    if announced_length(&parts.headers).is_some_and(|length| length > limit) {
        return Err(too_large(app.max_message));
    }
    let no_memory = || too_many("messages").with("stored", "no");
    let reserved = Reservation::new(&app.posts, 0);
    let mut reserved = reserved.map_err(|NoMemory| no_memory())?;
    let body = read_body(body, limit, app.body_patience, &mut reserved);
    let body = body.await.map_err(|error| match error {
        BodyError::TooLarge(_) => too_large(app.max_message),
        BodyError::NoMemory => no_memory(),
        BodyError::TooSlow | BodyError::Broken => error.into(),
    })?;
    let body_length = body.len();
    let msg = match format {
        MessageFormat::Body(format) => message(format, body, app.max_message)?,
        MessageFormat::Multipart { boundary } => {
            multipart_message(body, boundary, app.max_message).await?
        }
    };
    // The answer repeats the message, and holds the memory until its caller has read it.
    let bytes = body_length.max(json_length(&msg));
    reserved.resize(bytes).map_err(|NoMemory| no_memory())?;
    let reserved = Arc::new(reserved);
    let post = Post {
        msg: msg.clone(),
        key,
        request_id: server::request_id(&parts.headers).map(str::to_owned),
        held: reserved.clone(),
        overload: WhenOverloaded::GiveUp,
    };
    let stored = store(&app.pool, post, app.deadline).await;
    let stored = stored.map_err(|error| answer_not_stored(&error))?;
    Ok(holding(answer_stored(&stored, &msg), reserved))
}

/// How a body holds its message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BodyFormat {
    /// `msg=…`, percent-encoded; without any `=` it is plain text, for `curl -d Hello`.
    Form,
    /// `{"msg":"…"}` or `"…"`.
    Json,
    /// The message itself.
    Text,
}

/// How a request carries one message.
enum MessageFormat {
    Body(BodyFormat),
    /// A form with the one field `msg`, as `curl -F` sends it.
    Multipart {
        boundary: String,
    },
}

/// What a request says it carries.
enum ContentType {
    OneMessage(MessageFormat),
    /// One message a line.
    Ndjson,
}

impl ContentType {
    fn of(headers: &HeaderMap) -> Result<Self, Problem> {
        let is_other = |name, plain: &str| {
            let mut values = headers.get_all(name).iter();
            values.any(|value| !value.as_bytes().eq_ignore_ascii_case(plain.as_bytes()))
        };
        if is_other(header::CONTENT_ENCODING, "identity")
            || is_other(header::TRANSFER_ENCODING, "chunked")
        {
            return Err(unsupported("send the body as it is, without compression"));
        }
        let mut content_types = headers.get_all(header::CONTENT_TYPE).iter();
        let content_type = match (content_types.next(), content_types.next()) {
            (None, _) => return Ok(Self::body(BodyFormat::Text)),
            (Some(content_type), None) => content_type.to_str().ok(),
            (Some(_), Some(_)) => None,
        };
        let media_type = content_type
            .and_then(|text| MediaType::parse(text).ok())
            .ok_or_else(|| unsupported("the content-type header cannot be read"))?;
        require_utf8(&media_type)?;
        let essence = media_type.essence().to_string().to_ascii_lowercase();
        match essence.as_str() {
            "application/x-www-form-urlencoded" => Ok(Self::body(BodyFormat::Form)),
            "application/json" => Ok(Self::body(BodyFormat::Json)),
            "text/plain" => Ok(Self::body(BodyFormat::Text)),
            "application/x-ndjson" => Ok(Self::Ndjson),
            "multipart/form-data" => match media_type.get_param(names::BOUNDARY) {
                Some(boundary) => Ok(Self::OneMessage(MessageFormat::Multipart {
                    boundary: boundary.unquoted_str().into_owned(),
                })),
                None => Err(unsupported("the content-type header names no boundary")),
            },
            _ => Err(unsupported(
                "send a form with the field msg, application/json, text/plain, or \
                 application/x-ndjson for many messages",
            )),
        }
    }

    fn body(format: BodyFormat) -> Self {
        Self::OneMessage(MessageFormat::Body(format))
    }
}

fn require_utf8(media_type: &MediaType<'_>) -> Result<(), Problem> {
    let Some(charset) = media_type.get_param(names::CHARSET) else {
        return Ok(());
    };
    match charset.unquoted_str().to_ascii_lowercase().as_str() {
        "utf-8" | "utf8" | "us-ascii" => Ok(()),
        _ => Err(unsupported("send the message as UTF-8")),
    }
}

fn unsupported(detail: &str) -> Problem {
    Problem::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, detail)
}

fn idempotency_key(headers: &HeaderMap) -> Result<Key, Problem> {
    let mut keys = headers.get_all(IDEMPOTENCY_KEY).iter();
    let key = match (keys.next(), keys.next()) {
        (None, _) => return Ok(Key::Own),
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

/// The largest body that can hold a message of `max_message` bytes: in JSON or a form each of its
/// bytes may be escaped.
pub(crate) fn body_limit(max_message: usize) -> usize {
    max_message * MAX_JSON_EXPANSION + BODY_OVERHEAD
}

fn announced_length(headers: &HeaderMap) -> Option<usize> {
    let length = headers.get(header::CONTENT_LENGTH)?;
    length.to_str().ok()?.parse().ok()
}

/// At most how many bytes a message has as a JSON string without its quotes.
fn json_length(msg: &str) -> usize {
    let is_escaped = |byte: &u8| *byte < b' ' || matches!(byte, b'"' | b'\\');
    let escaped = msg.bytes().filter(is_escaped).count();
    msg.len() + escaped * (MAX_JSON_EXPANSION - 1)
}

fn too_large(max_message: usize) -> Problem {
    Problem::new(
        StatusCode::PAYLOAD_TOO_LARGE,
        format!("a message may have {max_message} bytes at most; split it or raise --max-message"),
    )
}

/// Takes the message out of a body, by the rules of its format.
///
/// # Errors
/// 400 with what to do about it, or 413 when the message is larger than `max_message` bytes.
pub fn message(format: BodyFormat, body: Bytes, max_message: usize) -> Result<String, Problem> {
    let msg = match format {
        BodyFormat::Form if body.contains(&b'=') => form_message(body)?,
        BodyFormat::Form | BodyFormat::Text => utf8(body.into())?,
        BodyFormat::Json => json_message(&body)?,
    };
    check_size(&msg, max_message)?;
    Ok(msg)
}

/// Every message has at least one byte and at most `max_message`.
pub(crate) fn check_size(msg: &str, max_message: usize) -> Result<(), Problem> {
    if msg.is_empty() {
        return Err(Problem::bad_request("the message is empty"));
    }
    if msg.len() > max_message {
        return Err(too_large(max_message));
    }
    Ok(())
}

/// A form must be one field `msg`: a second one, or a `&` that was meant to be part of the
/// message, would be lost.
fn form_message(body: Bytes) -> Result<String, Problem> {
    let body = utf8(body.into())?;
    let field = match body.split_once('=') {
        Some((name, value)) if !body.contains('&') && decode_form(name)? == "msg" => value,
        _ => {
            return Err(Problem::bad_request(format!(
                "a form needs exactly one field, msg, with & and = encoded inside it; {COMMANDS}"
            )));
        }
    };
    decode_form(field)
}

/// A multipart body must be one field `msg` with text: a second one, or a file, would be lost.
async fn multipart_message(
    body: Bytes,
    boundary: String,
    max_message: usize,
) -> Result<String, Problem> {
    let broken = |error| Problem::bad_request(format!("the form cannot be read: {error}"));
    let more = || {
        Problem::bad_request(
            "a form needs exactly one field, msg, and no file; with curl: -F 'msg=TEXT'",
        )
    };
    let whole = stream::iter([Ok::<_, Infallible>(body)]);
    let mut form = Multipart::new(whole, boundary);
    let field = form.next_field().await.map_err(broken)?.ok_or_else(more)?;
    if field.name() != Some("msg") || field.file_name().is_some() {
        return Err(more());
    }
    if let Some(content_type) = field.headers().get(header::CONTENT_TYPE) {
        let text = content_type.to_str().unwrap_or_default();
        let media_type = MediaType::parse(text).map_err(|_| more())?;
        if media_type.essence() != MediaType::new(names::TEXT, names::PLAIN) {
            return Err(unsupported("the field msg must be text/plain"));
        }
        require_utf8(&media_type)?;
    }
    let msg = utf8(field.bytes().await.map_err(broken)?.into())?;
    if form.next_field().await.map_err(broken)?.is_some() {
        return Err(more());
    }
    check_size(&msg, max_message)?;
    Ok(msg)
}

fn decode_form(text: &str) -> Result<String, Problem> {
    let spaced = text.replace('+', " ");
    utf8(percent_decode_str(&spaced).collect())
}

fn json_message(body: &[u8]) -> Result<String, Problem> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Object {
        msg: String,
    }
    let msg = if body.trim_ascii_start().starts_with(b"{") {
        serde_json::from_slice(body).map(|Object { msg }| msg)
    } else {
        serde_json::from_slice(body)
    };
    msg.map_err(|error| {
        Problem::bad_request(format!(
            "send {{\"msg\":\"…\"}} or a JSON string, and nothing else: {error}; {COMMANDS}"
        ))
    })
}

fn utf8(bytes: Vec<u8>) -> Result<String, Problem> {
    String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        Problem::bad_request(format!("the message is not UTF-8 from byte {at} on"))
    })
}

fn answer_stored(stored: &Stored, msg: &str) -> Response {
    #[derive(Serialize)]
    struct Answer<'a> {
        uuid: Uuid,
        msg: &'a str,
        #[serde(skip_serializing_if = "std::ops::Not::not")]
        duplicate: bool,
    }
    let answer = Answer {
        uuid: stored.uuid,
        msg,
        duplicate: stored.is_duplicate,
    };
    let instance = [(LOGGING_INSTANCE, stored.instance.clone())];
    (instance, JsonLine(answer)).into_response()
}

fn answer_not_stored(error: &NotStored) -> Problem {
    match error {
        NotStored::Conflict => Problem::new(StatusCode::UNPROCESSABLE_ENTITY, error.detail()),
        NotStored::Stale | NotStored::Early => Problem::new(StatusCode::CONFLICT, error.detail()),
        NotStored::GaveUp {
            uuid, certainty, ..
        } => Problem::unavailable(error.detail(), RETRY_AFTER)
            .with("stored", certainty.word())
            .with("uuid", uuid),
    }
}
