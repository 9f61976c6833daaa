//! All routes of the service, and the header that identifies its responses.

use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::HeaderValue;
use axum::middleware::map_response_with_state;
use axum::response::Response;
use axum::routing;
use common::api::{MARK, Mark};
use common::health::livez;
use common::middleware::{RequestLog, with_middleware};

use crate::state::App;
use crate::{get, metrics, put, readiness, stats};

/// All routes of the service.
pub fn router(app: Arc<App>) -> Router {
    metrics::describe();
    let routes = Router::new()
        .route("/", routing::get(get::list).post(put::create))
        .route("/{uuid}", routing::get(get::show))
        .route("/stats", routing::get(stats::show))
        .route("/metrics", routing::get(metrics::show))
        .route("/livez", routing::get(livez))
        .route("/readyz", routing::get(readiness::readyz))
        .with_state(app.clone());
    with_middleware(routes, RequestLog::Off, app.door.clone(), None)
        .layer(map_response_with_state(app, mark))
}

/// Marks a response as one of a logging instance.
async fn mark(State(app): State<Arc<App>>, mut response: Response) -> Response {
    let mark = Mark {
        map: app.map.id(),
        clock: app.map.clocks().map(|clocks| clocks.map),
    };
    let mark = mark.to_string();
    let value = HeaderValue::try_from(mark).expect("a mark is plain ASCII");
    response.headers_mut().insert(MARK, value);
    response
}
