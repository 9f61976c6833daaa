//! The task `healthcheck` of every service: asks a running one whether it is ready, for where there
//! is no curl, as in the image.

use std::error::Error;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use clap::Subcommand;

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
pub async fn healthcheck(listen: SocketAddr) -> Result<(), String> {
    let url = format!("http://{}/readyz?verbose", reachable(listen));
    let answer = readiness(&url).await.map_err(|error| {
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

async fn readiness(url: &str) -> reqwest::Result<(bool, String)> {
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
