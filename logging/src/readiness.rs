//! `/readyz`: whether the map can be read and written, and the log be printed.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::response::Response;
use common::health::{Check, ReadinessQuery, check_running, readiness};
use common::output;
use common::problem::Problem;

use crate::state::App;

/// Ready while the map is and the log moves; `?verbose` also lists the map's parts.
pub(crate) async fn readyz(
    State(app): State<Arc<App>>,
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
    let output = check_output(app.store_timeout);
    if let Err(detail) = &output {
        checks.push(Check {
            name: "output".to_owned(),
            ok: false,
            detail: detail.clone(),
        });
    }
    let ready = check_running(&app.stop).and(map).and(output);
    Ok(match query.is_verbose() {
        true => readiness(ready, &checks),
        false => readiness(ready, &[]),
    })
}

/// Checks that standard output takes the log's lines: an entry is acknowledged only after its line is printed.
///
/// # Errors
/// A sentence for the caller, when it has taken nothing for `store_timeout`.
pub(crate) fn check_output(store_timeout: Duration) -> Result<(), String> {
    match output::stuck_for() > store_timeout {
        true => Err(
            "standard output takes no line of the log, and no entry is stored without its line: \
             unblock what reads it, or free its disk"
                .to_owned(),
        ),
        false => Ok(()),
    }
}
