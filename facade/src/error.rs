//! Maps errors to answers: a status and a detail for the caller.

use std::time::Duration;

use axum::http::StatusCode;
use common::problem::Problem;
use uuid::Uuid;

use crate::judge::NotStored;
use crate::pool::Pool;
use crate::upstream::UpstreamError;

/// The `Retry-After` of a 503.
pub(crate) const RETRY_AFTER: Duration = Duration::from_secs(1);

/// The answer to a request beyond a concurrency or memory bound.
pub(crate) fn too_many(what: &str) -> Problem {
    let detail = format!("too many {what} at once: nothing was done; retry in a moment");
    Problem::unavailable(detail, RETRY_AFTER)
}

pub(crate) fn unsupported(detail: &str) -> Problem {
    Problem::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, detail)
}

pub(crate) fn too_large(max_message: usize) -> Problem {
    Problem::new(
        StatusCode::PAYLOAD_TOO_LARGE,
        format!("a message may have {max_message} bytes at most; split it or raise --max-message"),
    )
}

pub(crate) fn not_stored(error: &NotStored) -> Problem {
    match error {
        NotStored::Conflict => Problem::new(StatusCode::UNPROCESSABLE_ENTITY, error.detail()),
        NotStored::Stale | NotStored::Early => Problem::new(StatusCode::CONFLICT, error.detail()),
        NotStored::GaveUp {
            uuid, maybe_stored, ..
        } => Problem::unavailable(error.detail(), RETRY_AFTER)
            .with("stored", maybe_stored.word())
            .with("uuid", uuid),
    }
}

pub(crate) fn no_message(uuid: Uuid) -> Problem {
    Problem::new(StatusCode::NOT_FOUND, format!("there is no message {uuid}"))
}

/// The answer to an upload that is still being read when the process stops.
pub(crate) fn stopping() -> Problem {
    let detail = "this facade is stopping: it read `lines` lines, and each without an error is \
                  stored; send the remaining lines to another facade";
    Problem::unavailable(detail, RETRY_AFTER)
}

/// The answer to a GET that no logging instance of `pool` served, with the error most likely to go away.
pub(crate) fn unreadable(pool: &Pool, error: &UpstreamError) -> Problem {
    tracing::warn!(%error, "a GET failed: no logging instance could serve it");
    match error {
        UpstreamError::Status(StatusCode::INTERNAL_SERVER_ERROR, detail) => {
            Problem::new(StatusCode::INTERNAL_SERVER_ERROR, detail)
        }
        UpstreamError::Status(_, detail) => Problem::unavailable(
            format!("the messages cannot be read now, retry in a moment: {detail}"),
            RETRY_AFTER,
        ),
        UpstreamError::OtherMap(reason) => Problem::unavailable(
            format!("no logging instance can serve a GET; one {reason}"),
            RETRY_AFTER,
        ),
        UpstreamError::Unreachable(_)
        | UpstreamError::TimedOut
        | UpstreamError::Lost(_)
        | UpstreamError::Unmarked(..)
        | UpstreamError::Unauthorized(_)
        | UpstreamError::Garbled(_) => Problem::unavailable(
            format!("retry in a moment: {}", pool.down_reasons()),
            RETRY_AFTER,
        ),
    }
}
