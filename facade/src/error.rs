//! Maps errors to answers: a status and a detail for the caller.

use std::net::IpAddr;
use std::time::Duration;

use axum::http::StatusCode;
use common::problem::Problem;
use uuid::Uuid;

use crate::judge::NotStored;
use crate::pool::Pool;
use crate::upstream::UpstreamError;

/// The `Retry-After` of a 503.
pub(crate) const RETRY_AFTER: Duration = Duration::from_secs(1);

/// A reason as the public may read it: without the addresses of the services behind, which the log has. `…`
/// stands for each URL, `HOST:PORT` and IP address.
pub(crate) fn without_addresses(reason: &str) -> String {
    let is_address = |word: &str| {
        let port = word.rsplit_once(':').map(|(_, port)| port);
        let is_number =
            |port: &str| !port.is_empty() && port.bytes().all(|digit| digit.is_ascii_digit());
        word.contains("://") || port.is_some_and(is_number) || word.parse::<IpAddr>().is_ok()
    };
    let words = reason.split(' ').map(|word| {
        let begin = word.trim_start_matches(PUNCTUATION);
        let bare = begin.trim_end_matches(PUNCTUATION);
        if is_address(bare) {
            word.replace(bare, "…")
        } else {
            word.to_owned()
        }
    });
    words.collect::<Vec<_>>().join(" ")
}

const PUNCTUATION: [char; 9] = [',', ';', ':', '.', '(', ')', '"', '\'', '/'];

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

/// Why a message was not stored. A key that is refused for its time may be right by its caller's clock.
pub(crate) fn not_stored_detail(pool: &Pool, error: &NotStored) -> String {
    let detail = error.detail();
    match (error, pool.served_map.clock_difference()) {
        (NotStored::Stale | NotStored::Early, Some(difference)) => {
            format!("{detail}; {difference}: make keys from `at` in /stats")
        }
        _ => detail,
    }
}

pub(crate) fn not_stored(pool: &Pool, error: &NotStored) -> Problem {
    let detail = not_stored_detail(pool, error);
    match error {
        NotStored::Conflict => Problem::new(StatusCode::UNPROCESSABLE_ENTITY, detail),
        NotStored::Stale | NotStored::Early => Problem::new(StatusCode::CONFLICT, detail),
        NotStored::GaveUp {
            uuid, maybe_stored, ..
        } => {
            let problem = Problem::unavailable(detail, RETRY_AFTER);
            let problem = problem.with("stored", maybe_stored.word());
            match uuid {
                Some(uuid) => problem.with("uuid", uuid),
                None => problem,
            }
        }
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
    let down = pool.down_reasons();
    tracing::warn!(%error, down, "a GET failed: no logging instance could serve it");
    match error {
        UpstreamError::Status(StatusCode::INTERNAL_SERVER_ERROR, detail) => {
            Problem::new(StatusCode::INTERNAL_SERVER_ERROR, without_addresses(detail))
        }
        UpstreamError::Status(_, detail) => Problem::unavailable(
            without_addresses(&format!(
                "the messages cannot be read now, retry in a moment: {detail}"
            )),
            RETRY_AFTER,
        ),
        UpstreamError::OtherMap(reason) => Problem::unavailable(
            without_addresses(&format!(
                "no logging instance can serve a GET; one {reason}"
            )),
            RETRY_AFTER,
        ),
        UpstreamError::Unreachable(_)
        | UpstreamError::TimedOut
        | UpstreamError::Lost(_)
        | UpstreamError::Unmarked(..)
        | UpstreamError::Unauthorized(_)
        | UpstreamError::Garbled(_) => Problem::unavailable(
            without_addresses(&format!("retry in a moment: {down}")),
            RETRY_AFTER,
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_lose_their_addresses_and_nothing_else() {
        for (reason, public) in [
            (
                "logging 127.0.0.1:8082 answered 503: redis 10.86.91.11:6379 refuses: NOREPLICAS",
                "logging … answered 503: redis … refuses: NOREPLICAS",
            ),
            (
                "logging [fd00::1]:8082 did not answer; logging h:1, too",
                "logging … did not answer; logging …, too",
            ),
            (
                "redis (redis-1.internal:6379) and fd00::1 or 10.0.0.1.",
                "redis (…) and … or ….",
            ),
            (
                "the disk that holds the map is full: 1.5 of 2 GiB",
                "the disk that holds the map is full: 1.5 of 2 GiB",
            ),
            (
                "it serves 01a203b3-3bb1-7319-90b9-a08e864b5eeb: 2",
                "it serves 01a203b3-3bb1-7319-90b9-a08e864b5eeb: 2",
            ),
            (
                "answered 502: no route to http://10.0.0.5/reply, tried redis://a.internal:1/",
                "answered 502: no route to …, tried …/",
            ),
            ("", ""),
        ] {
            assert_eq!(without_addresses(reason), public);
        }
    }
}
