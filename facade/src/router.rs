//! All routes of the service.

use axum::Router;
use axum::routing::get;
use common::health::livez;
use common::middleware::{RequestLog, with_middleware};

use crate::state::App;
use crate::{get, post, readiness};

/// All routes of the service.
pub fn router(app: App) -> Router {
    let routes = Router::new()
        .route("/", get(get::list).post(post::create))
        .route("/{uuid}", get(get::show).fallback(get::refuse_method))
        .route("/livez", get(livez))
        .route("/readyz", get(readiness::readyz))
        .with_state(app);
    with_middleware(routes, RequestLog::On)
}
