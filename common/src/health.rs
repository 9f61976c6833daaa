//! Whether a service can serve: `/livez`, `/readyz`, and the task `healthcheck`, which asks a running
//! service where there is no curl, as in the image.

use std::error::Error;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use axum::response::{IntoResponse, Response};
use clap::Subcommand;
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use crate::json::JsonLine;
use crate::problem::Problem;

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

/// The query of `/readyz`.
#[derive(Clone, Debug, Deserialize)]
pub struct ReadinessQuery {
    verbose: Option<String>,
}

impl ReadinessQuery {
    /// Whether all checks are asked for: `?verbose`, with any value.
    pub fn is_verbose(&self) -> bool {
        self.verbose.is_some()
    }
}

/// The first reason not to be ready: a service that was told to stop takes no new work.
///
/// # Errors
/// When `stop` is cancelled, in words.
pub fn check_running(stop: &CancellationToken) -> Result<(), String> {
    if stop.is_cancelled() {
        return Err("this process is stopping; use another one".to_owned());
    }
    Ok(())
}

/// The answer to `/livez`: the process runs and serves. It looks at nothing else.
pub async fn livez() -> &'static str {
    "alive\n"
}

/// How long the service may take to answer. Docker's own limit for a check has to be longer.
const TIMEOUT: Duration = Duration::from_secs(4);

/// What a service's binary does instead of serving.
#[derive(Clone, Copy, Debug, Subcommand)]
pub enum Task {
    /// Ask the service that listens on --listen whether it is ready, print what it says, and end
    /// with code 0 if it is, 1 if not
    Healthcheck,
}

/// Prints what the service on `listen` says about its readiness.
///
/// # Errors
/// Why it is not ready, in one line.
pub(crate) async fn healthcheck(listen: SocketAddr) -> Result<(), String> {
    let url = format!("http://{}/readyz?verbose", reachable(listen));
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
    let response = client.get(url).send().await?;
    Ok((response.status().is_success(), response.text().await?))
}

/// Where a service that listens on all addresses is reached from its own machine.
fn reachable(listen: SocketAddr) -> SocketAddr {
    let ip = match listen.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, listen.port())
}
