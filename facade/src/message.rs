//! Parses a request body into a message, by the rules of its content type.
//!
//! Unexpected parts of a body are refused, never dropped: a silently cut message is a lost message.

use std::collections::HashMap;
use std::str::Utf8Error;

use axum::http::{HeaderMap, header};
use bytes::Bytes;
use common::api::MAX_BATCH_BYTES;
use common::json::MAX_EXPANSION;
use common::problem::Problem;
use mediatype::{MediaType, ReadParams, names};
use percent_encoding::percent_decode_str;
use serde::Deserialize;
use serde::de::IgnoredAny;

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
    /// Clients name no type, or an empty one, for any text: a form or a JSON object when it is one.
    Untyped,
    /// As [`Self::Untyped`], because `curl -d` and others name this type unasked; but a body with a `=` must be one.
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
            (None, _) => return Ok(Self::body(BodyFormat::Untyped)),
            (Some(empty), None) if empty.is_empty() => return Ok(Self::body(BodyFormat::Untyped)),
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

/// Parses a body by the rules of its format.
///
/// # Errors
/// 400 with what to do about it, or 413 when the message is larger than `max_message` bytes.
pub fn message(format: BodyFormat, body: Bytes, max_message: usize) -> Result<String, Problem> {
    let msg = match format {
        BodyFormat::Untyped | BodyFormat::Form => untyped_message(utf8(&body)?, format)?,
        BodyFormat::Text => utf8(&body)?.to_owned(),
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

/// A text that begins like a form or an object with `msg` and is none would be stored as what its sender did not
/// mean, or lose a field.
fn untyped_message(text: &str, format: BodyFormat) -> Result<String, Problem> {
    if let Some(msg) = json_object(text) {
        return msg.map_err(not_json);
    }
    let form = text.split_once('=');
    match form.filter(|(name, _)| decode_form(name).is_ok_and(|name| name == "msg")) {
        Some((_, field)) if !field.contains('&') => decode_form(field),
        None if form.is_none() || format == BodyFormat::Untyped => Ok(text.to_owned()),
        _ => Err(Problem::bad_request(format!(
            "a form needs exactly one field, msg, with & and = encoded inside it; {COMMANDS}"
        ))),
    }
}

/// The message of a text that is, or begins like, an object with `msg`, also of one that lost its quotes in a shell.
fn json_object(text: &str) -> Option<serde_json::Result<String>> {
    let is_before = |one: char| one.is_whitespace() || "\u{feff}'".contains(one);
    let is_around_name = |one: char| one.is_whitespace() || "\"'\\".contains(one);
    let members = text.trim_start_matches(is_before).strip_prefix('{')?;
    let rest = members
        .trim_start_matches(is_around_name)
        .strip_prefix("msg");
    let rest = rest.map(|rest| rest.trim_start_matches(is_around_name));
    let begins_with_msg = rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(':'));
    let has_msg = || {
        let members = serde_json::from_str::<HashMap<String, IgnoredAny>>(text);
        members.is_ok_and(|members| members.contains_key("msg"))
    };
    (begins_with_msg || has_msg()).then(|| serde_json::from_str(text).map(|Object { msg }| msg))
}

/// A multipart body must be one text field `msg`, with nothing before, beside or after it that would be lost.
pub(crate) fn multipart_message(
    body: Bytes,
    boundary: &str,
    max_message: usize,
) -> Result<String, Problem> {
    let delimiter = format!("\r\n--{boundary}");
    let form = utf8(&body)?
        .trim_ascii_start()
        .strip_prefix(&delimiter[2..]);
    let form = form.and_then(|form| form.strip_prefix("\r\n")?.split_once(&delimiter));
    let (part, end) = form.ok_or_else(not_one_field)?;
    if end.trim_ascii_end() != "--" {
        return Err(not_one_field());
    }
    let (headers, msg) = part.split_once("\r\n\r\n").ok_or_else(not_one_field)?;
    let mut is_msg = false;
    for header in headers.split("\r\n") {
        let (name, value) = header.split_once(':').ok_or_else(not_one_field)?;
        let value = value.trim_ascii();
        match name.to_ascii_lowercase().as_str() {
            "content-disposition" if !is_msg && names_only_msg(value) => is_msg = true,
            "content-type" => require_plain_text(value)?,
            "content-transfer-encoding" => require_unencoded(value)?,
            "content-length" => {}
            _ => return Err(not_one_field()),
        }
    }
    if !is_msg {
        return Err(not_one_field());
    }
    check_size(msg, max_message)?;
    Ok(msg.to_owned())
}

fn not_one_field() -> Problem {
    Problem::bad_request(
        "a form needs exactly one field, msg, no file, and nothing before or after it; with curl: -F 'msg=TEXT'",
    )
}

fn names_only_msg(disposition: &str) -> bool {
    let mut parameters = disposition.split(';').map(str::trim_ascii);
    let is_form = parameters
        .next()
        .is_some_and(|kind| kind.eq_ignore_ascii_case("form-data"));
    let is_msg = matches!(parameters.next(), Some("name=\"msg\"" | "name=msg"));
    is_form && is_msg && parameters.next().is_none()
}

fn require_plain_text(content_type: &str) -> Result<(), Problem> {
    let media_type = MediaType::parse(content_type).map_err(|_| not_one_field())?;
    if media_type.essence() != MediaType::new(names::TEXT, names::PLAIN) {
        return Err(unsupported("the field msg must be text/plain"));
    }
    require_utf8(&media_type)
}

fn require_unencoded(encoding: &str) -> Result<(), Problem> {
    match encoding.to_ascii_lowercase().as_str() {
        "7bit" | "8bit" | "binary" => Ok(()),
        _ => Err(unsupported(
            "send the field msg as it is, without content-transfer-encoding; with curl: -F 'msg=TEXT'",
        )),
    }
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

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Object {
    msg: String,
}

fn json_message(body: &[u8]) -> Result<String, Problem> {
    let msg = if body.trim_ascii_start().starts_with(b"{") {
        serde_json::from_slice(body).map(|Object { msg }| msg)
    } else {
        serde_json::from_slice(body)
    };
    msg.map_err(not_json)
}

fn not_json(error: serde_json::Error) -> Problem {
    Problem::bad_request(format!(
        "send {{\"msg\":\"…\"}} or a JSON string, and nothing else: {error}; {COMMANDS}"
    ))
}

fn utf8(bytes: &[u8]) -> Result<&str, Problem> {
    std::str::from_utf8(bytes).map_err(not_utf8)
}

fn not_utf8(error: Utf8Error) -> Problem {
    let at = error.valid_up_to();
    Problem::bad_request(format!("the message is not UTF-8 from byte {at} on"))
}
