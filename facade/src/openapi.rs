//! `GET /openapi.json`: the description of the API in OpenAPI 3.1, which is kept by hand in `assets/openapi.json`.
//!
//! `tests/it/openapi.rs` compares it with the routes and the answers.

use std::sync::Arc;

use axum::extract::State;
use axum::http::header;
use axum::response::IntoResponse;

use crate::get::MAX_TAIL;
use crate::search::{MAX_SCANNED, MAX_TEXT};
use crate::state::App;

/// Names in braces stand for the values that [`show`] fills in.
const DESCRIPTION: &str = include_str!("../assets/openapi.json");

pub(crate) async fn show(State(app): State<Arc<App>>) -> impl IntoResponse {
    let mut description = DESCRIPTION.replace("{VERSION}", env!("CARGO_PKG_VERSION"));
    for (name, limit) in [
        ("{MAX_MESSAGE}", app.max_message.to_string()),
        ("{MAX_SCANNED}", MAX_SCANNED.to_string()),
        ("{MAX_TAIL}", MAX_TAIL.to_string()),
        ("{MAX_TEXT}", MAX_TEXT.to_string()),
    ] {
        let as_number = format!("\"{name}\"");
        description = description
            .replace(&as_number, &limit)
            .replace(name, &limit);
    }
    ([(header::CONTENT_TYPE, "application/json")], description)
}
