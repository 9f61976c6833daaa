//! Error responses: `application/problem+json` (RFC 9457) with a `detail` that tells the caller what to
//! do. Causes and addresses go to the log, not into a problem.

use std::time::Duration;

use axum::extract::rejection::QueryRejection;
use axum::http::{HeaderValue, StatusCode, header};
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

/// An error response: a status, a detail, further members, and the time until a retry.
#[derive(Debug)]
pub struct Problem {
    details: Box<ProblemDetails<Map<String, Value>>>,
    retry_after: Option<Duration>,
}

impl Problem {
    /// A problem with this status and a detail meant for the caller.
    pub fn new(status: StatusCode, detail: impl Into<String>) -> Self {
        let details = ProblemDetails::from_status_code(status)
            .with_detail(truncate_detail(detail.into()))
            .with_extensions(Map::new());
        Self {
            details: Box::new(details),
            retry_after: None,
        }
    }

    /// A 400: the request is malformed.
    pub fn bad_request(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, detail)
    }

    /// A 503 with a `Retry-After` of this time, in whole seconds, at least one.
    pub fn unavailable(detail: impl Into<String>, retry_after: Duration) -> Self {
        Self {
            retry_after: Some(retry_after),
            ..Self::new(StatusCode::SERVICE_UNAVAILABLE, detail)
        }
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
        let mut response = (status, content_type, body).into_response();
        if let Some(wait) = self.retry_after {
            let seconds = wait.as_secs().max(1);
            response
                .headers_mut()
                .insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}
