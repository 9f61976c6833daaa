//! All routes of the service, and `/readyz`.

use std::sync::Arc;

use axum::Router;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, Request, State};
use axum::http::StatusCode;
use axum::response::Response;
use axum::routing::{MethodRouter, get};
use common::health::{Health, ReadinessQuery, check_running, livez, readiness};
use common::middleware::{Count, RequestLog, with_middleware};
use common::problem::Problem;
use uuid::Uuid;

use crate::error::without_addresses;
use crate::state::App;
use crate::{console, docs, get, metrics, openapi, post, stats};

pub fn router(app: Arc<App>) -> Router {
    metrics::describe();
    let mut router = console::routes();
    for (path, methods) in routes() {
        router = router.route(path, methods);
    }
    let routes = router.with_state(app.clone());
    with_middleware(routes, RequestLog::On, app.door.clone(), Some(app))
}

/// The routes of the API, which are those of `assets/openapi.json`.
pub fn routes() -> [(&'static str, MethodRouter<Arc<App>>); 9] {
    [
        ("/", get(get::list).post(post::create)),
        ("/{uuid}", get(get::show).fallback(get::refuse_method)),
        ("/stats", get(stats::show)),
        ("/metrics", get(metrics::show)),
        ("/livez", get(livez)),
        ("/readyz", get(readyz)),
        ("/openapi.json", get(openapi::show)),
        ("/docs", get(docs::show)),
        ("/docs/{file}", get(docs::show_file)),
    ]
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
