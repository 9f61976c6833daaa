//! Running a router: connection limits, the middleware every service shares, stop signals and a
//! bounded shutdown.
//!
//! The caller owns the socket and decides when to stop. Timeouts of whole requests are not set
//! here: bodies may stream for as long as they make progress.

use std::any::Any;
use std::net::{SocketAddr, TcpListener};
use std::pin::Pin;
use std::time::Duration;

use axum::Router;
use axum::extract::Request;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum_server::Handle;
use axum_server::accept::Accept;
use hyper_util::rt::TokioTimer;
use serde::Serialize;
use tokio::net::TcpStream;
use tokio::signal::unix::{SignalKind, signal};
use tokio_io_timeout::TimeoutStream;
use tokio_util::sync::CancellationToken;
use tower::ServiceBuilder;
use tower::util::MapRequestLayer;
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::request_id::{
    MakeRequestUuid, PropagateRequestIdLayer, RequestId, SetRequestIdLayer,
};
use tower_http::trace::TraceLayer;
use tracing::Span;

use crate::json::JsonLine;
use crate::problem::Problem;

/// The name of the header that carries a request's id through the services.
pub const REQUEST_ID: &str = "x-request-id";

/// A longer request id is replaced by one of ours, so that callers cannot fill the logs.
const MAX_REQUEST_ID: usize = 128;

/// Response bytes that hyper may hold for one connection, which bounds the memory of a slow reader
/// (hyper's own default is about 400 KiB). Request heads must fit too: a larger one gets 431.
const CONNECTION_BUFFER: usize = 128 * 1024;

/// How long a connection may stall before it is cut.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// From the first wait for a request's head until the head is complete; idle keep-alive
    /// connections end after this time too.
    pub head: Duration,
    /// For a whole request body; for an upload of any length, between two pieces of it.
    pub body: Duration,
    /// Between two moments in which the reader of an answer takes something. TCP tells the sender
    /// about progress in steps of up to 64 KiB on loopback, so readers of 1 KiB/s need more than
    /// a minute.
    pub write_idle: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            head: Duration::from_secs(30),
            body: Duration::from_secs(30),
            write_idle: Duration::from_secs(180),
        }
    }
}

/// Whether a service logs one line for each request it answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestLog {
    /// One line at level info: what facade and messages do.
    On,
    /// Nothing: logging has its own line for each entry.
    Off,
}

/// Adds what all services share to their routes: problem+json for everything that goes wrong,
/// request ids and the request log.
pub fn with_middleware(routes: Router, log: RequestLog) -> Router {
    // From the outside in: an id for each request, given back in the answer; the span and line of
    // the log, which name it; panics become a 500 that both of them still see.
    let stack = ServiceBuilder::new()
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
        .layer(CatchPanicLayer::custom(answer_panic));
    routes
        .fallback(answer_not_found)
        .method_not_allowed_fallback(answer_method_not_allowed)
        .layer(stack)
}

/// Serves until `stop` is cancelled, then lets requests in flight finish for at most `grace`. Boxed so
/// that the HTTP server is compiled here, and not again in each binary and test.
///
/// # Errors
/// When the socket cannot be used.
pub fn serve(
    listener: TcpListener,
    router: Router,
    limits: Limits,
    stop: CancellationToken,
    grace: Duration,
) -> Pin<Box<dyn Future<Output = std::io::Result<()>> + Send>> {
    Box::pin(async move {
        listener.set_nonblocking(true)?;
        let handle = Handle::<SocketAddr>::new();
        tokio::spawn(stop_gracefully(handle.clone(), stop, grace));
        let mut server = axum_server::from_tcp(listener)?
            .handle(handle)
            .acceptor(WriteIdleAcceptor(limits.write_idle))
            .http1_only();
        server
            .http_builder()
            .http1()
            .timer(TokioTimer::new())
            .header_read_timeout(limits.head)
            .max_buf_size(CONNECTION_BUFFER);
        server.serve(router.into_make_service()).await
    })
}

async fn stop_gracefully(handle: Handle<SocketAddr>, stop: CancellationToken, grace: Duration) {
    stop.cancelled().await;
    tracing::info!(
        connections = handle.connection_count(),
        "stopping, requests in flight may finish"
    );
    handle.graceful_shutdown(None);
    tokio::time::sleep(grace).await;
    tracing::warn!(
        connections = handle.connection_count(),
        "grace period is over, cutting the connections that are left"
    );
    handle.shutdown();
}

/// Cancels the returned token on the first SIGINT or SIGTERM; a second one ends the process at
/// once.
///
/// # Errors
/// When the signal handlers cannot be installed.
pub fn stop_on_signal() -> std::io::Result<CancellationToken> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let stop = CancellationToken::new();
    let stopping = stop.clone();
    tokio::spawn(async move {
        for _ in 0..2 {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
            if stopping.is_cancelled() {
                std::process::exit(130);
            }
            stopping.cancel();
        }
    });
    Ok(stop)
}

/// The request id that [`with_middleware`] gave this request, as text.
pub fn request_id(headers: &HeaderMap) -> Option<&str> {
    headers.get(REQUEST_ID)?.to_str().ok()
}

/// Readiness as an answer: what is checked, whether it is so, and in words what is missing.
#[derive(Clone, Debug, Serialize)]
pub struct Check {
    /// What was looked at, for example `map` or `logging 127.0.0.1:8082`.
    pub name: String,
    /// Whether it is as it should be.
    pub ok: bool,
    /// What is so, or what is missing and what to do about it.
    pub detail: String,
}

/// The answer to `/readyz`: 200, or 503 with what is missing. Checks are listed in either case, and a
/// service that is ready though one of them failed says that it is degraded.
pub fn readiness(ready: Result<(), String>, checks: &[Check]) -> Response {
    #[derive(Serialize)]
    struct Ready<'a> {
        status: &'static str,
        #[serde(skip_serializing_if = "<[_]>::is_empty")]
        checks: &'a [Check],
    }
    let Err(detail) = ready else {
        let is_degraded = checks.iter().any(|check| !check.ok);
        let status = if is_degraded { "degraded" } else { "ready" };
        return JsonLine(Ready { status, checks }).into_response();
    };
    let problem = Problem::unavailable(detail, Duration::from_secs(1));
    match checks.is_empty() {
        true => problem.into_response(),
        false => problem.with("checks", checks).into_response(),
    }
}

/// Whether a query asks for all checks.
pub fn is_verbose(query: Option<&str>) -> bool {
    query.is_some_and(|query| {
        let mut fields = query.split('&');
        fields.any(|field| field == "verbose" || field.starts_with("verbose="))
    })
}

/// The first reason not to be ready: a service that was told to stop takes no new work.
///
/// # Errors
/// When `stop` is cancelled, in words.
pub fn not_stopping(stop: &CancellationToken) -> Result<(), String> {
    if stop.is_cancelled() {
        return Err("this process is stopping; use another one".to_owned());
    }
    Ok(())
}

/// The answer to `/livez`: the process runs and serves. It looks at nothing else.
pub async fn livez() -> &'static str {
    "alive\n"
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
        method = request.method().as_str(),
        path = request.uri().path(),
    )
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
        "this is a fault of the service; its log names it under this request's id",
    )
    .into_response()
}

/// The answer at a path that is not served.
pub async fn answer_not_found() -> Problem {
    Problem::new(
        StatusCode::NOT_FOUND,
        "there is nothing at this path; messages are posted to / and read from / or, each, from /UUID",
    )
}

/// The answer to a method that a path does not take.
pub async fn answer_method_not_allowed() -> Problem {
    Problem::new(
        StatusCode::METHOD_NOT_ALLOWED,
        "this path does not take this method; the allow header names those it takes",
    )
}

/// Accepts connections that are cut when the peer takes nothing for this long.
#[derive(Clone, Copy, Debug)]
struct WriteIdleAcceptor(Duration);

impl<S> Accept<TcpStream, S> for WriteIdleAcceptor {
    type Stream = Pin<Box<TimeoutStream<TcpStream>>>;
    type Service = S;
    type Future = std::future::Ready<std::io::Result<(Self::Stream, S)>>;

    fn accept(&self, stream: TcpStream, service: S) -> Self::Future {
        std::future::ready(stream.set_nodelay(true).map(|()| {
            let mut stream = TimeoutStream::new(stream);
            stream.set_write_timeout(Some(self.0));
            (Box::pin(stream), service)
        }))
    }
}
