//! The messages service: a stub that answers every GET with the same sentence, so that the facade
//! has a second service whose reply it merges.
//!
//! [`router`] has all routes. The page of [`common`] explains the workspace.

use std::net::SocketAddr;

use axum::Router;
use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::Response;
use axum::routing::get;
use clap::Parser;
use common::config::{self, ServiceConfig};
use common::door::Door;
use common::health::{self, Task, check_running, livez};
use common::metrics;
use common::middleware::{RequestLog, with_middleware};
use tokio_util::sync::CancellationToken;

/// The reply to every GET.
pub const REPLY: &str = "Messages Service not Implemented";

/// The stub beside the log: answers every GET with "Messages Service not Implemented"
#[derive(Clone, Debug, Parser)]
#[command(name = "messages", version)]
pub struct Config {
    /// Address to listen on
    #[arg(long, global = true, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:8081", value_parser = config::address)]
    pub listen: SocketAddr,

    #[command(flatten)]
    pub service: ServiceConfig,

    /// What to do instead of serving.
    #[command(subcommand)]
    pub task: Option<Task>,
}

/// All routes of the service. Readiness fails once `stop` is cancelled.
pub fn router(stop: CancellationToken) -> Router {
    let routes = Router::new()
        .route("/", get(reply))
        .route("/{*path}", get(reply))
        .route("/metrics", get(metrics))
        .route("/livez", get(livez))
        .route("/readyz", get(readyz))
        .with_state(stop);
    with_middleware(routes, RequestLog::On, Door::default(), None)
}

async fn reply() -> &'static str {
    REPLY
}

async fn metrics(headers: HeaderMap) -> Response {
    metrics::show(&headers)
}

async fn readyz(State(stop): State<CancellationToken>) -> Response {
    health::readiness(check_running(&stop), &[])
}
