//! Error responses: `application/problem+json` (RFC 9457) with a `detail` that tells the caller what to
//! do. Causes and addresses go to the log, not into a problem.

use std::time::Duration;

use axum::extract::rejection::QueryRejection;
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use problem_details::ProblemDetails;
use serde::Serialize;
use serde_json::{Map, Value};

use crate::json;

/// The greatest length of a detail, in bytes; it may quote the request.
const MAX_DETAIL: usize = 500;

/// Cuts a text that may quote the request, so that error responses stay small.
pub fn truncate_detail(mut text: String) -> String {
    if text.len() > MAX_DETAIL {
        text.truncate(text.floor_char_boundary(MAX_DETAIL));
        text.push('…');
    }
    text
}

impl From<QueryRejection> for Problem {
    fn from(rejection: QueryRejection) -> Self {
        Self::bad_request(rejection.body_text())
    }
}

/// An error response: a status, a detail, further members, and headers.
#[derive(Debug)]
pub struct Problem {
    details: Box<ProblemDetails<Map<String, Value>>>,
    headers: HeaderMap,
}

impl Problem {
    /// A problem with this status and a detail meant for the caller.
    pub fn new(status: StatusCode, detail: impl Into<String>) -> Self {
        let details = ProblemDetails::from_status_code(status)
            .with_detail(truncate_detail(detail.into()))
            .with_extensions(Map::new());
        Self {
            details: Box::new(details),
            headers: HeaderMap::new(),
        }
    }

    /// A 400: the request is malformed.
    pub fn bad_request(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, detail)
    }

    /// A 503 with a `Retry-After` of this time, in whole seconds, at least one.
    pub fn unavailable(detail: impl Into<String>, retry_after: Duration) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, detail).retry_after(retry_after)
    }

    /// Adds a `Retry-After` of this time, in whole seconds, at least one.
    #[must_use]
    pub fn retry_after(self, wait: Duration) -> Self {
        let seconds = HeaderValue::from(wait.as_secs().max(1));
        self.with_headers([(header::RETRY_AFTER, seconds)])
    }

    /// Adds headers; a name may occur several times.
    #[must_use]
    pub fn with_headers<const N: usize>(mut self, headers: [(HeaderName, HeaderValue); N]) -> Self {
        for (name, value) in headers {
            self.headers.append(name, value);
        }
        self
    }

    /// Adds a member beside the standard ones.
    #[must_use]
    pub fn with(mut self, member: &str, value: impl Serialize) -> Self {
        let value = serde_json::to_value(value).expect("members are plain values");
        self.details.extensions.insert(member.to_owned(), value);
        self
    }

    /// The detail.
    pub fn detail(&self) -> &str {
        self.details.detail.as_deref().unwrap_or_default()
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let status = self
            .details
            .status
            .expect("each problem is made with a status");
        let content_type = [(header::CONTENT_TYPE, "application/problem+json")];
        let mut body = Vec::new();
        json::write_line(&mut body, &self.details);
        (status, self.headers, content_type, body).into_response()
    }
}
