//! `GET /stats`: the map's members as of the last check, and what this process did.

use std::sync::Arc;

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use common::json::JsonLine;

use crate::state::App;

pub(crate) async fn show(State(app): State<Arc<App>>) -> Response {
    let report = app.report.get().await;
    JsonLine(app.counters.stats(app.clock(), &report)).into_response()
}
