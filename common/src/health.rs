//! Liveness and readiness: `/livez`, `/readyz`, and the subcommand `healthcheck`, which asks a running
//! service where there is no curl, as in the image.

use std::error::Error;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use axum::body::Body;
use axum::http::{Request, StatusCode, header};
use axum::response::{IntoResponse, Response};
use clap::Subcommand;
use http_body_util::BodyExt;
use hyper_rustls::HttpsConnectorBuilder;
use hyper_util::client::legacy;
use hyper_util::rt::TokioExecutor;
use serde::{Deserialize, Serialize};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::json::JsonLine;
use crate::problem::Problem;
use crate::tls::trusting_anyone;

/// Whether a service can serve, for operators and load balancers.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub struct Health {
    /// Why it cannot serve; `None` when it is ready.
    pub not_ready: Option<String>,
    /// Its parts. One that is not `ok` makes a service that is ready degraded; a warning is `ok`.
    pub checks: Vec<Check>,
}

/// One check of `/readyz?verbose`.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct Check {
    /// The thing checked, for example `map` or `logging-1`.
    pub name: String,
    /// Whether the check passed.
    pub ok: bool,
    /// Its state, or the problem and the next step.
    pub detail: String,
}

/// The response to `/readyz`: 200 when `ready`, otherwise 503 with the reason. Both list the checks. A
/// service that is ready although a check failed says `degraded`.
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
    if checks.is_empty() {
        problem.into_response()
    } else {
        problem.with("checks", checks).into_response()
    }
}

/// The query of `/readyz`.
#[derive(Clone, Debug, Deserialize)]
pub struct ReadinessQuery {
    verbose: Option<String>,
}

impl ReadinessQuery {
    /// Whether the caller asks for all checks: `?verbose`, with any value.
    pub fn is_verbose(&self) -> bool {
        self.verbose.is_some()
    }
}

/// Checks that the service is not stopping; a stopping service is not ready.
///
/// # Errors
/// A sentence for the caller, when `stop` is cancelled.
pub fn check_running(stop: &CancellationToken) -> Result<(), String> {
    if stop.is_cancelled() {
        return Err("this process is stopping; use another one".to_owned());
    }
    Ok(())
}

/// The response to `/livez`: the process serves. It depends on no other service and no map.
pub async fn livez() -> &'static str {
    "alive\n"
}

/// The timeout of a health check. That of Docker must be longer.
const TIMEOUT: Duration = Duration::from_secs(4);

/// What the binary does instead of serving.
#[derive(Clone, Copy, Debug, Subcommand)]
pub enum Task {
    /// Ask the service on --listen whether it is ready, and print its answer; exit code 0 if it is
    /// ready, 1 if not
    Healthcheck,
}

/// Prints the readiness of the service on `listen`.
///
/// # Errors
/// One line with the reason, when the service is not ready or not reachable.
pub(crate) async fn healthcheck(scheme: &str, listen: SocketAddr) -> Result<(), String> {
    let url = format!("{scheme}://{}/readyz", reachable(listen));
    let answer = timeout(TIMEOUT, ask(&url)).await;
    let answer = answer.unwrap_or_else(|_| Err("no answer in time".into()));
    let (is_ready, text) = answer.map_err(|error| {
        let cause = error.source().map_or(String::new(), |c| format!(": {c}"));
        format!("{url}: {error}{cause}; is the service running, and on this --listen?")
    })?;
    if is_ready {
        println!("{}", text.trim_end());
        return Ok(());
    }
    Err(format!("not ready: {}", text.trim_end()))
}

async fn ask(url: &str) -> Result<(bool, String), Box<dyn Error + Send + Sync>> {
    let connector = HttpsConnectorBuilder::new()
        .with_tls_config(trusting_anyone()?)
        .https_or_http()
        .enable_http1()
        .build();
    let client = legacy::Client::builder(TokioExecutor::new()).build(connector);
    let ask = async |url: &str| {
        // Any service serves this host, whatever the names of the others.
        let request = Request::get(url).header(header::HOST, "localhost");
        let response = client.request(request.body(Body::empty())?).await?;
        let status = response.status();
        let body = response.into_body().collect().await?.to_bytes();
        let text = String::from_utf8_lossy(&body).into_owned();
        Ok::<_, Box<dyn Error + Send + Sync>>((status, text))
    };
    let (mut status, mut text) = ask(&format!("{url}?verbose")).await?;
    if status == StatusCode::UNAUTHORIZED {
        // The checks are for those who have a token; whether the service is ready is not.
        (status, text) = ask(url).await?;
    }
    Ok((status.is_success(), text))
}

/// The address of a service from its own machine: loopback, if it listens on all addresses.
fn reachable(listen: SocketAddr) -> SocketAddr {
    let ip = match listen.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, listen.port())
}
