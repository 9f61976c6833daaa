//! `GET /docs`: the description of the API as a page, by Swagger UI, whose files are in this binary.
//!
//! The page needs no other host, and its content security policy has browsers hold it to that.

use std::sync::Arc;

use axum::extract::Path;
use axum::http::{HeaderName, header};
use axum::response::{IntoResponse, Response};
use common::middleware::answer_not_found;
use common::problem::Problem;

/// The files that the page consists of.
pub(crate) const FILES: [&str; 4] = [
    "favicon-32x32.png",
    START,
    "swagger-ui-bundle.js",
    "swagger-ui.css",
];

/// The one that is not Swagger UI's.
const START: &str = "start.js";

/// Swagger UI adds styles to elements, and has images in its style sheet.
const POLICY: (HeaderName, &str) = (
    header::CONTENT_SECURITY_POLICY,
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; \
     connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
);

pub(crate) async fn show() -> impl IntoResponse {
    let content_type = (header::CONTENT_TYPE, "text/html; charset=utf-8");
    ([content_type, POLICY], include_str!("docs/page.html"))
}

/// `GET /docs/{file}`. Swagger UI's files are only there compressed, for which every browser asks.
pub(crate) async fn show_file(Path(file): Path<String>) -> Result<Response, Problem> {
    if file == START {
        let content_type = [(header::CONTENT_TYPE, "text/javascript")];
        return Ok((content_type, include_str!("docs/start.js")).into_response());
    }
    if !FILES.contains(&file.as_str()) {
        return Err(answer_not_found().await);
    }
    let Ok(Some(file)) = utoipa_swagger_ui::serve(&file, Arc::default()) else {
        return Err(answer_not_found().await);
    };
    let headers = [
        (header::CONTENT_TYPE, file.content_type),
        (header::CONTENT_ENCODING, "gzip".to_owned()),
    ];
    Ok((headers, file.bytes).into_response())
}
