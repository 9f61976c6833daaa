//! The middleware that all services share: request ids, the request log, and problem+json for requests
//! that no handler answers.

use std::any::Any;
use std::time::Duration;

use axum::Router;
use axum::extract::Request;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::middleware::{from_fn, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use tower::ServiceBuilder;
use tower::util::MapRequestLayer;
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::request_id::{
    MakeRequestUuid, PropagateRequestIdLayer, RequestId, SetRequestIdLayer,
};
use tower_http::set_header::SetResponseHeaderLayer;
use tower_http::trace::TraceLayer;
use tracing::Span;
use tracing::field::Empty;

use crate::client::Client;
use crate::door::{Door, admit};
use crate::metrics::measure;
use crate::problem::Problem;
use crate::traces::TRACE_ID;

/// The name of the header that carries a request's id through the services.
pub const REQUEST_ID: &str = "x-request-id";

/// A longer request id is replaced by a generated one, so that callers cannot fill the logs.
const MAX_REQUEST_ID: usize = 128;

/// What a line of the log shows of a request's method and path, in bytes.
const MAX_SHOWN: usize = 256;

/// Whether a service logs one line for each request it answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestLog {
    /// One line at level info, for facade and messages.
    On,
    /// No line, for logging, which has a line for each entry.
    Off,
}

/// Adds the shared middleware to the routes of a service.
pub fn with_middleware(routes: Router, log: RequestLog, door: Door) -> Router {
    // From the outside in: headers of all answers; the request id, which the response repeats; the span and
    // the log line, which name that id; the metrics; the panic handler, inside all of them, so that its 500 is
    // seen; and the door, whose refusals are logged and counted.
    let stack = ServiceBuilder::new()
        .layer(SetResponseHeaderLayer::overriding(
            header::X_CONTENT_TYPE_OPTIONS,
            HeaderValue::from_static("nosniff"),
        ))
        .layer(SetResponseHeaderLayer::overriding(
            header::CACHE_CONTROL,
            HeaderValue::from_static("no-store"),
        ))
        .layer(MapRequestLayer::new(drop_unusable_request_id))
        .layer(SetRequestIdLayer::x_request_id(MakeRequestUuid))
        .layer(PropagateRequestIdLayer::x_request_id())
        .layer(
            TraceLayer::new_for_http()
                .make_span_with(request_span)
                .on_request(())
                .on_response(
                    move |response: &axum::http::Response<_>, elapsed, _: &Span| {
                        if log == RequestLog::On {
                            log_answer(response.status(), elapsed);
                        }
                    },
                )
                .on_body_chunk(())
                .on_eos(())
                .on_failure(()),
        )
        .layer(from_fn(measure))
        .layer(CatchPanicLayer::custom(answer_panic))
        .layer(from_fn_with_state(door, admit));
    routes
        .fallback(answer_not_found)
        .method_not_allowed_fallback(answer_method_not_allowed)
        .layer(stack)
}

/// The request id that [`with_middleware`] gave this request.
pub fn request_id(headers: &HeaderMap) -> Option<&str> {
    headers.get(REQUEST_ID)?.to_str().ok()
}

fn drop_unusable_request_id<B>(mut request: Request<B>) -> Request<B> {
    let usable = request.headers().get(REQUEST_ID).is_none_or(|id| {
        let bytes = id.as_bytes();
        (1..=MAX_REQUEST_ID).contains(&bytes.len()) && bytes.iter().all(u8::is_ascii_graphic)
    });
    if !usable {
        request.headers_mut().remove(REQUEST_ID);
    }
    request
}

fn request_span<B>(request: &Request<B>) -> Span {
    let id = request
        .extensions()
        .get::<RequestId>()
        .and_then(|id| id.header_value().to_str().ok());
    tracing::info_span!(
        "request",
        id,
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

fn log_answer(status: StatusCode, elapsed: Duration) {
    let elapsed_ms = elapsed.as_micros() as f64 / 1000.0;
    tracing::info!(status = status.as_u16(), elapsed_ms, "answered");
}

fn answer_panic(panic: Box<dyn Any + Send>) -> Response {
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
