//! Liveness and readiness: `/livez`, `/readyz`, and the subcommand `healthcheck`, which asks a running
//! service where there is no curl, as in the image.

use std::error::Error;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use clap::Subcommand;
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;
use utoipa::ToSchema;

use crate::json::JsonLine;
use crate::problem::Problem;

/// One check of `/readyz?verbose`.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Check {
    /// The thing checked, for example `map` or `logging 127.0.0.1:8082`.
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
    match checks.is_empty() {
        true => problem.into_response(),
        false => problem.with("checks", checks).into_response(),
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
pub(crate) async fn healthcheck(listen: SocketAddr) -> Result<(), String> {
    let url = format!("http://{}/readyz", reachable(listen));
    let answer = ask(&url).await.map_err(|error| {
        let cause = error.source().map_or(String::new(), |c| format!(": {c}"));
        format!("{error}{cause}; is the service running, and on this --listen?")
    });
    let (is_ready, text) = answer?;
    if is_ready {
        println!("{}", text.trim_end());
        return Ok(());
    }
    Err(format!("not ready: {}", text.trim_end()))
}

async fn ask(url: &str) -> reqwest::Result<(bool, String)> {
    let client = reqwest::Client::builder()
        .no_proxy()
        .timeout(TIMEOUT)
        .build()?;
    // Any service serves this host, whatever the names of the others.
    let ask = async |url: &str| {
        client
            .get(url)
            .header(header::HOST, "localhost")
            .send()
            .await
    };
    let mut response = ask(&format!("{url}?verbose")).await?;
    if response.status() == StatusCode::UNAUTHORIZED {
        // The checks are for those who have a token; whether the service is ready is not.
        response = ask(url).await?;
    }
    Ok((response.status().is_success(), response.text().await?))
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
