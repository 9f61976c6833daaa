//! The error responses and their statuses; see [`common::api`] for what they mean to a facade.

use std::time::Duration;

use axum::http::StatusCode;
use common::problem::Problem;
use uuid::Uuid;

use crate::map::MapError;

/// A 429: a 503 would tell the facade that the map cannot be read.
pub(crate) fn busy() -> Problem {
    let detail = "this instance is busy and did nothing; retry in a moment";
    Problem::new(StatusCode::TOO_MANY_REQUESTS, detail)
}

/// A 507: nothing was done, and the facade marks the instance down until a trial gets another answer.
pub(crate) fn not_taken(detail: String) -> Problem {
    Problem::new(StatusCode::INSUFFICIENT_STORAGE, detail)
}

/// The response when the map could not be read.
pub(crate) fn unreadable(error: MapError) -> Problem {
    match error {
        MapError::Unavailable(detail) => {
            tracing::debug!(detail, "the map cannot be read");
            Problem::unavailable(detail, Duration::from_secs(1))
        }
        MapError::Damaged(uuid) => {
            tracing::error!(
                %uuid,
                "an entry of the map is damaged: check the disk and restore the map from a copy"
            );
            Problem::new(
                StatusCode::INTERNAL_SERVER_ERROR,
                format!("entry {uuid} is damaged; restore the map from a copy"),
            )
        }
    }
}

/// The response for a UUID that no entry has.
pub(crate) fn no_entry(uuid: Uuid) -> Problem {
    Problem::new(StatusCode::NOT_FOUND, format!("there is no entry {uuid}"))
}
