//! Every error that a caller of the facade is told, with its status.

use std::time::Duration;

use axum::http::StatusCode;
use common::problem::Problem;
use uuid::Uuid;

use crate::judge::NotStored;
use crate::upstream::UpstreamError;

/// When a caller that got a 503 should come back.
pub(crate) const RETRY_AFTER: Duration = Duration::from_secs(1);

/// The answer to what would exceed a bound.
pub(crate) fn too_many(what: &str) -> Problem {
    let detail = format!("too many {what} at once, nothing was done; come back in a moment");
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

/// The answer when a message was not stored.
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

/// The answer for a UUID that no message has.
pub(crate) fn no_message(uuid: Uuid) -> Problem {
    Problem::new(StatusCode::NOT_FOUND, format!("there is no message {uuid}"))
}

/// The answer to an upload when the process is told to stop.
pub(crate) fn stopping() -> Problem {
    let detail = "this facade is stopping and read no further line than `lines` says: those of them \
                  that are not among the errors are stored; send the rest again, to another facade";
    Problem::unavailable(detail, RETRY_AFTER)
}

/// The answer when no logging instance could be read from.
pub(crate) fn unreadable(error: &UpstreamError) -> Problem {
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
