//! All routes of the service, and `/readyz`.

use axum::Router;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, Request, State};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::Response;
use axum::routing::get;
use common::health::{Check, ReadinessQuery, check_running, livez, readiness};
use common::middleware::{RequestLog, with_middleware};
use common::problem::Problem;
use uuid::Uuid;

use crate::readiness::check_all;
use crate::state::App;
use crate::{get, metrics, post, stats};

pub fn router(app: App) -> Router {
    metrics::describe();
    let routes = Router::new()
        .route("/", get(get::list).post(post::create))
        .route("/{uuid}", get(get::show).fallback(get::refuse_method))
        .route("/stats", get(stats::show))
        .route("/metrics", get(metrics::show))
        .route("/livez", get(livez))
        .route("/readyz", get(readyz))
        .with_state(app.clone());
    with_middleware(routes, RequestLog::On).layer(from_fn_with_state(app, count))
}

/// Ready while any logging instance can read and store. With `?verbose` it lists every instance and
/// the messages service, which readiness does not need. A clock step that breaks the order of
/// messages is listed in either case.
async fn readyz(
    State(app): State<App>,
    query: Result<Query<ReadinessQuery>, QueryRejection>,
) -> Result<Response, Problem> {
    let Query(query) = query?;
    let clock_step = app.pool.identifiers.clock_step().map(|step| Check {
        name: "clock".to_owned(),
        ok: false,
        detail: step.to_string(),
    });
    let (ready, checks) = match query.is_verbose() {
        true => check_all(&app.pool, &app.messages).await,
        false => (app.readiness.any_instance(&app.pool).await, Vec::new()),
    };
    let checks: Vec<Check> = checks.into_iter().chain(clock_step).collect();
    let ready = check_running(&app.stop).and(ready);
    Ok(readiness(ready, &checks))
}

/// Counts all requests but those of operators.
async fn count(State(app): State<App>, request: Request, next: Next) -> Response {
    let path = request.uri().path();
    if matches!(path, "/stats" | "/metrics" | "/livez" | "/readyz") {
        return next.run(request).await;
    }
    if path == "/" || Uuid::try_parse(&path[1..]).is_ok() {
        app.counters.count_request(request.method());
    }
    let response = next.run(request).await;
    app.counters.count_answer(response.status());
    response
}
