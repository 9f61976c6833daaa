//! The middleware that all services share: request ids, the request log, and problem+json for requests
//! that no handler answers.

use std::any::Any;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Instant;

use axum::Router;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use futures_util::FutureExt;
use tracing::field::Empty;
use tracing::{Instrument, Span};
use uuid::Uuid;

use crate::client::Client;
use crate::door::Door;
use crate::metrics::{Durations, Measurement};
use crate::problem::Problem;
use crate::traces::TRACE_ID;

/// The name of the header that carries a request's id through the services.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// A longer request id is replaced by a generated one, so that callers cannot fill the logs.
const MAX_REQUEST_ID: usize = 128;

/// What a line of the log shows of a request's method and path, in bytes.
const MAX_SHOWN: usize = 256;

/// Whether a service logs one line for each request it answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestLog {
    /// One line at level info, for facade and messages; at level debug what is asked again and again.
    On,
    /// No line, for logging, which has a line for each entry.
    Off,
}

/// Counts the requests of a service, besides the metrics.
pub trait Count: Send + Sync {
    /// Counts a request that begins, and returns whether its answer is to be counted too.
    fn count_request(&self, request: &Request) -> bool;

    /// Counts an answer.
    fn count_answer(&self, status: StatusCode);
}

/// What the middleware of a service needs.
struct Service {
    log: RequestLog,
    door: Door,
    counts: Option<Arc<dyn Count>>,
    durations: Durations,
}

/// Adds the shared middleware to the routes of a service.
pub fn with_middleware(
    routes: Router,
    log: RequestLog,
    door: Door,
    counts: Option<Arc<dyn Count>>,
) -> Router {
    let service = Arc::new(Service {
        log,
        door,
        counts,
        durations: Durations::default(),
    });
    routes
        .fallback(answer_not_found)
        .method_not_allowed_fallback(answer_method_not_allowed)
        .layer(from_fn_with_state(service, observe))
}

/// Has the door and then a handler answer a request. Whoever answers, and if the handler panics, the answer
/// is measured and logged under the request's id, and has the headers of all answers.
///
/// One function, as each layer of a stack costs a box or two for every request.
async fn observe(
    State(service): State<Arc<Service>>,
    mut request: Request,
    next: Next,
) -> Response {
    let begin = Instant::now();
    let counts = service.counts.as_ref();
    let counts = counts.filter(|counts| counts.count_request(&request));
    let id = identify(request.headers_mut());
    let is_of_operators = matches!(
        request.uri().path(),
        "/livez" | "/readyz" | "/stats" | "/metrics"
    );
    let span = request_span(&request, &id);
    let answering = async {
        let measurement = Measurement::begin(&request);
        let answering = service.door.answer(request, next);
        let answering = answering.instrument(measurement.span.clone());
        let answer = AssertUnwindSafe(answering).catch_unwind().await;
        let response = answer.unwrap_or_else(|panic| answer_panic(&*panic));
        measurement.end(&response, &service.durations);
        if service.log == RequestLog::On {
            let elapsed_ms = begin.elapsed().as_micros() as f64 / 1000.0;
            let status = response.status().as_u16();
            if is_of_operators {
                tracing::debug!(status, elapsed_ms, "answered");
            } else {
                tracing::info!(status, elapsed_ms, "answered");
            }
        }
        response
    };
    let mut response = answering.instrument(span).await;
    if let Some(counts) = counts {
        counts.count_answer(response.status());
    }
    let headers = response.headers_mut();
    headers.insert(REQUEST_ID, id);
    headers.insert(
        header::X_CONTENT_TYPE_OPTIONS,
        HeaderValue::from_static("nosniff"),
    );
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(
        header::VARY,
        HeaderValue::from_static("accept, sec-fetch-mode"),
    );
    response
}

/// The request's id; makes one if it has none that can be used.
fn identify(headers: &mut HeaderMap) -> HeaderValue {
    let is_usable = |id: &&HeaderValue| {
        let bytes = id.as_bytes();
        (1..=MAX_REQUEST_ID).contains(&bytes.len()) && bytes.iter().all(u8::is_ascii_graphic)
    };
    if let Some(id) = headers.get(REQUEST_ID).filter(is_usable) {
        return id.clone();
    }
    let id = Uuid::new_v4().to_string();
    let id = HeaderValue::try_from(id).expect("a UUID is plain ASCII");
    headers.insert(REQUEST_ID, id.clone());
    id
}

/// The request id that [`with_middleware`] gave this request.
pub fn request_id(headers: &HeaderMap) -> Option<&str> {
    headers.get(REQUEST_ID)?.to_str().ok()
}

fn request_span(request: &Request, id: &HeaderValue) -> Span {
    tracing::info_span!(
        "request",
        id = id.to_str().ok(),
        method = shown(request.method().as_str()),
        path = shown(request.uri().path()),
        client = %Client::of(request.extensions()).0,
        { TRACE_ID } = Empty,
    )
}

/// The beginning of a text that a caller has chosen, so that it cannot fill the log.
fn shown(text: &str) -> &str {
    &text[..text.floor_char_boundary(MAX_SHOWN)]
}

fn answer_panic(panic: &(dyn Any + Send)) -> Response {
    let message = panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied());
    tracing::error!(panic = message, "a request handler panicked");
    Problem::new(
        StatusCode::INTERNAL_SERVER_ERROR,
        "this is a fault of the service; its log has the cause under this x-request-id",
    )
    .into_response()
}

/// The response to a path that is not served.
pub async fn answer_not_found() -> Problem {
    Problem::new(
        StatusCode::NOT_FOUND,
        "there is nothing at this path; post messages to /, read all of them from / or one from /UUID",
    )
}

/// The response to a method that a path does not accept.
pub async fn answer_method_not_allowed() -> Problem {
    Problem::new(
        StatusCode::METHOD_NOT_ALLOWED,
        "this path does not accept this method; the allow header lists those it accepts",
    )
}
