//! `/readyz`: whether the map can be read and written.

use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::response::Response;
use common::health::{Check, ReadinessQuery, check_running, readiness};
use common::problem::Problem;

use crate::state::App;

/// Ready while the map is; `?verbose` also lists the map's parts.
pub(crate) async fn readyz(
    State(app): State<App>,
    query: Result<Query<ReadinessQuery>, QueryRejection>,
) -> Result<Response, Problem> {
    let Query(query) = query?;
    let health = app.map.health().await;
    let map = health.not_ready.map_or(Ok(()), Err);
    let mut checks = vec![Check {
        name: "map".to_owned(),
        ok: map.is_ok(),
        detail: map.clone().err().unwrap_or("answers".to_owned()),
    }];
    checks.extend(health.checks);
    let ready = check_running(&app.stop).and(map);
    Ok(match query.is_verbose() {
        true => readiness(ready, &checks),
        false => readiness(ready, &[]),
    })
}
