//! Every error that a facade is told, with its status; see [`common::api`] for what they mean.

use std::time::Duration;

use axum::http::StatusCode;
use common::problem::Problem;
use uuid::Uuid;

use crate::map::MapError;

/// Not a 503, with which the facade waits for a map that cannot be read.
pub(crate) fn busy() -> Problem {
    let detail = "this instance is busy, and nothing was done; ask again in a moment";
    Problem::new(StatusCode::TOO_MANY_REQUESTS, detail)
}

/// The answer when the map could not be read.
pub(crate) fn unreadable(error: MapError) -> Problem {
    match error {
        MapError::Unavailable(detail) => {
            tracing::debug!(detail, "the map cannot be read");
            Problem::unavailable(detail, Duration::from_secs(1))
        }
        MapError::Damaged(uuid) => {
            tracing::error!(%uuid, "an entry of the map is not what was put there; its disk may be failing");
            Problem::new(
                StatusCode::INTERNAL_SERVER_ERROR,
                format!("entry {uuid} is damaged; restore the map from a copy"),
            )
        }
    }
}

/// The answer for a UUID that no entry has.
pub(crate) fn no_entry(uuid: Uuid) -> Problem {
    Problem::new(StatusCode::NOT_FOUND, format!("there is no entry {uuid}"))
}
