//! `GET /stats`: the map's members, and what this process did.

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use common::json::JsonLine;

use crate::state::App;

pub(crate) async fn show(State(app): State<App>) -> Response {
    let map = app.map.stats().await;
    JsonLine(app.counters.stats(map)).into_response()
}
