//! Parses a request body into a message, by the rules of its content type.
//!
//! Unexpected parts of a body are refused, never dropped: a silently cut message is a lost message.

use std::convert::Infallible;
use std::str::Utf8Error;

use axum::http::{HeaderMap, header};
use bytes::Bytes;
use common::api::MAX_BATCH_BYTES;
use common::json::{MAX_EXPANSION, may_begin_escape};
use common::problem::Problem;
use futures_util::stream;
use mediatype::{MediaType, ReadParams, names};
use multer::Multipart;
use percent_encoding::percent_decode_str;
use serde::Deserialize;

use crate::batcher::TARGET_BATCH_BYTES;
use crate::error::{too_large, unsupported};

/// The largest `--max-message`, in bytes: escaped in JSON, it still fits into a batch.
pub(crate) const MESSAGE_SIZE_LIMIT: u64 = 1024 * 1024;
const _: () = assert!(
    TARGET_BATCH_BYTES + MESSAGE_SIZE_LIMIT as usize * MAX_EXPANSION + ENTRY_OVERHEAD
        < MAX_BATCH_BYTES,
    "an instance must accept a batch just below its limit and the largest entry behind it"
);

/// The most bytes of an entry's JSON besides its message: UUID, request id, and field names.
const ENTRY_OVERHEAD: usize = 1024;

/// The most bytes of a body around its message: `{"msg":"…"}` and white space.
const BODY_OVERHEAD: usize = 1024;

const FORM: &str = "application/x-www-form-urlencoded";

/// Working commands, quoted in errors.
const COMMANDS: &str = "with curl: --data-urlencode 'msg=TEXT', or --json '{\"msg\":\"TEXT\"}', or \
                        -H 'content-type: text/plain' --data-binary 'TEXT'";

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
pub(crate) enum MessageFormat {
    Body(BodyFormat),
    /// A form with the one field `msg`, as `curl -F` sends it.
    Multipart {
        boundary: String,
    },
}

pub(crate) enum ContentType {
    OneMessage(MessageFormat),
    /// One message a line.
    Ndjson,
}

impl ContentType {
    pub(crate) fn of(headers: &HeaderMap) -> Result<Self, Problem> {
        let is_other = |name, plain: &str| {
            let mut values = headers.get_all(name).iter();
            values.any(|value| !value.as_bytes().eq_ignore_ascii_case(plain.as_bytes()))
        };
        if is_other(header::CONTENT_ENCODING, "identity")
            || is_other(header::TRANSFER_ENCODING, "chunked")
        {
            return Err(unsupported("send the body without compression"));
        }
        let mut content_types = headers.get_all(header::CONTENT_TYPE).iter();
        let content_type = match (content_types.next(), content_types.next()) {
            (None, _) => return Ok(Self::body(BodyFormat::Text)),
            (Some(form), None) if form == FORM => return Ok(Self::body(BodyFormat::Form)),
            (Some(content_type), None) => content_type.to_str().ok(),
            (Some(_), Some(_)) => None,
        };
        let media_type = content_type
            .and_then(|text| MediaType::parse(text).ok())
            .ok_or_else(|| unsupported("send one valid content-type header"))?;
        require_utf8(&media_type)?;
        let essence = media_type.essence().to_string().to_ascii_lowercase();
        match essence.as_str() {
            FORM => Ok(Self::body(BodyFormat::Form)),
            "application/json" => Ok(Self::body(BodyFormat::Json)),
            "text/plain" => Ok(Self::body(BodyFormat::Text)),
            "application/x-ndjson" => Ok(Self::Ndjson),
            "multipart/form-data" => match media_type.get_param(names::BOUNDARY) {
                Some(boundary) => Ok(Self::OneMessage(MessageFormat::Multipart {
                    boundary: boundary.unquoted_str().into_owned(),
                })),
                None => Err(unsupported("the content-type header has no boundary")),
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

/// The largest body of a message of `max_message` bytes, as JSON or a form may escape each byte.
pub(crate) fn body_limit(max_message: usize) -> usize {
    max_message * MAX_EXPANSION + BODY_OVERHEAD
}

/// An upper bound for the bytes of a message as a JSON string without its quotes.
pub(crate) fn json_length(msg: &str) -> usize {
    let is_escaped =
        |byte: &u8| *byte < b' ' || matches!(byte, b'"' | b'\\') || may_begin_escape(*byte);
    let escaped = msg.bytes().filter(is_escaped).count();
    msg.len() + escaped * (MAX_EXPANSION - 1)
}

/// Parses a body by the rules of its format.
///
/// # Errors
/// 400 with what to do about it, or 413 when the message is larger than `max_message` bytes.
pub fn message(format: BodyFormat, body: Bytes, max_message: usize) -> Result<String, Problem> {
    let msg = match format {
        BodyFormat::Form if body.contains(&b'=') => form_message(&body)?,
        BodyFormat::Form | BodyFormat::Text => utf8(&body)?.to_owned(),
        BodyFormat::Json => json_message(&body)?,
    };
    check_size(&msg, max_message)?;
    Ok(msg)
}

pub(crate) fn check_size(msg: &str, max_message: usize) -> Result<(), Problem> {
    if msg.is_empty() {
        return Err(Problem::bad_request("the message is empty"));
    }
    if msg.len() > max_message {
        return Err(too_large(max_message));
    }
    Ok(())
}

/// A form must be one field `msg`: a second field, or a `&` inside the message, would be lost.
fn form_message(body: &[u8]) -> Result<String, Problem> {
    let body = utf8(body)?;
    let field = match body.split_once('=') {
        Some(("msg", value)) if !value.contains('&') => value,
        Some((name, value)) if !body.contains('&') && decode_form(name)? == "msg" => value,
        _ => {
            return Err(Problem::bad_request(format!(
                "a form needs exactly one field, msg, with & and = encoded inside it; {COMMANDS}"
            )));
        }
    };
    decode_form(field)
}

/// A multipart body must be one text field `msg`: a second field or a file would be lost.
pub(crate) async fn multipart_message(
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
    let msg = utf8(&field.bytes().await.map_err(broken)?)?.to_owned();
    if form.next_field().await.map_err(broken)?.is_some() {
        return Err(more());
    }
    check_size(&msg, max_message)?;
    Ok(msg)
}

fn decode_form(text: &str) -> Result<String, Problem> {
    let mut decoded = Vec::with_capacity(text.len());
    for (index, part) in text.split('+').enumerate() {
        if index > 0 {
            decoded.push(b' ');
        }
        decoded.extend(percent_decode_str(part));
    }
    String::from_utf8(decoded).map_err(|error| not_utf8(error.utf8_error()))
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

fn utf8(bytes: &[u8]) -> Result<&str, Problem> {
    std::str::from_utf8(bytes).map_err(not_utf8)
}

fn not_utf8(error: Utf8Error) -> Problem {
    let at = error.valid_up_to();
    Problem::bad_request(format!("the message is not UTF-8 from byte {at} on"))
}
