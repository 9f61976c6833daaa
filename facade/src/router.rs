//! All routes of the service, and `/readyz`.

use std::sync::Arc;

use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, Request, State};
use axum::http::StatusCode;
use axum::response::Response;
use axum::routing::get;
use axum::{Extension, Router};
use common::health::{Health, ReadinessQuery, check_running, livez, readiness};
use common::middleware::{Count, RequestLog, with_middleware};
use common::problem::Problem;
use utoipa_axum::router::OpenApiRouter;
use uuid::Uuid;

use crate::error::without_addresses;
use crate::openapi::{self, at};
use crate::state::App;
use crate::{console, docs, get, metrics, post, stats};

pub fn router(app: Arc<App>) -> Router {
    metrics::describe();
    let served = openapi::Served::default();
    let (described, description) = OpenApiRouter::with_openapi(openapi::head())
        .routes(at(
            "/",
            openapi::messages(app.max_message),
            get(get::list).post(post::create),
        ))
        .routes(at(
            "/{uuid}",
            openapi::message(),
            get(get::show).fallback(get::refuse_method),
        ))
        .routes(at("/stats", openapi::stats(), get(stats::show)))
        .routes(at("/metrics", openapi::metrics(), get(metrics::show)))
        .routes(at("/livez", openapi::livez(), get(livez)))
        .routes(at("/readyz", openapi::readyz(), get(readyz)))
        .routes(at(
            "/openapi.json",
            openapi::itself(),
            get(openapi::show).layer(Extension(served.clone())),
        ))
        .routes(at("/docs", openapi::docs(), get(docs::show)))
        .routes(at(
            "/docs/{file}",
            openapi::docs_file(),
            get(docs::show_file),
        ))
        .split_for_parts();
    served.set(&description);
    let routes = described.merge(console::routes()).with_state(app.clone());
    with_middleware(routes, RequestLog::On, app.door.clone(), Some(app))
}

/// Ready while any logging instance can read and store. With `?verbose` it lists the checks of every instance and
/// the messages service, which readiness does not need.
async fn readyz(
    State(app): State<Arc<App>>,
    query: Result<Query<ReadinessQuery>, QueryRejection>,
) -> Result<Response, Problem> {
    let Query(query) = query?;
    let collected = app.collected.get().await;
    let Health { not_ready, checks } = &collected.health;
    let ready = check_running(&app.stop).and(not_ready.clone().map_or(Ok(()), Err));
    Ok(if query.is_verbose() {
        readiness(ready, checks)
    } else {
        readiness(ready.map_err(|why| without_addresses(&why)), &[])
    })
}

/// Counts all requests but those of operators.
impl Count for App {
    fn count_request(&self, request: &Request) -> bool {
        let path = request.uri().path();
        let is_operators = matches!(path, "/stats" | "/metrics" | "/livez" | "/readyz")
            || path.starts_with("/console");
        if is_operators {
            return false;
        }
        // The path of a CONNECT is empty.
        let below_root = path.strip_prefix('/');
        let is_messages = |name: &str| name.is_empty() || Uuid::try_parse(name).is_ok();
        if below_root.is_some_and(is_messages) {
            self.counters.count_request(request.method());
        }
        true
    }

    fn count_answer(&self, status: StatusCode) {
        self.counters.count_answer(status);
    }
}
