//! `GET /stats`: the map's members, and what this process did.

use std::sync::Arc;

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use common::json::JsonLine;
use common::problem::Problem;

use crate::error::busy;
use crate::state::App;

pub(crate) async fn show(State(app): State<Arc<App>>) -> Result<Response, Problem> {
    let _permit = app.statistics.try_acquire().map_err(|_| busy())?;
    let map = app.map.stats().await;
    Ok(JsonLine(app.counters.stats(app.clock(), map)).into_response())
}
