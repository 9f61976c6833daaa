//! `GET /console`, the page for operators: `/stats` as tables, forms to post and to search, the newest messages.
//!
//! The page is complete without JavaScript. `console.js` keeps it up to date from `/stats` and `/`, and adds
//! what needs more than one answer: charts and the timeline.

mod messages;
mod values;

use std::sync::Arc;

use askama::Template;
use axum::Router;
use axum::extract::State;
use axum::http::{HeaderName, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use common::bounds::{Bounds, Order};
use common::client::Client;
use common::problem::Problem;
use serde_json::Value;

use self::messages::{Found, Message, Piece, find, newest};
use self::values::{
    ADVICE, Column, FACADE, INSTANCES, MEMBERS, advice, column, shown, shown_total, state,
};
use crate::get::ListQuery;
use crate::state::App;
use crate::stats::last;

const CONTENT_SECURITY_POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; \
     img-src 'self' data:; connect-src 'self'; form-action 'self'; base-uri 'none'; \
     frame-ancestors 'none'";

#[derive(Template)]
#[template(path = "console.html")]
struct Page {
    /// As `/stats` answers.
    stats: Value,
    tables: [Table; 2],
    problems: Vec<String>,
    newest: Result<Vec<Message>, String>,
    search: Search,
}

struct Table {
    id: &'static str,
    title: &'static str,
    columns: &'static [Column],
    rows: Vec<Value>,
    total: Option<Value>,
}

impl Page {
    fn text(&self, key: &'static str, kind: &'static str) -> String {
        shown(&self.stats, &column(key, "", kind))
    }
}

/// The form of a search, as it was filled in, and what was found.
struct Search {
    text: String,
    order: Order,
    found: Option<Result<Found, String>>,
    /// The query that searches on; empty when there is nothing more to search.
    rest: Vec<(&'static str, String)>,
}

/// The page and its files, which are no part of the API.
pub(crate) fn routes() -> Router<Arc<App>> {
    Router::new()
        .route("/console", get(show))
        .route("/console/console.css", get(style))
        .route("/console/console.js", get(script))
}

/// `GET /console`.
async fn show(State(app): State<Arc<App>>, client: Client, uri: Uri) -> Response {
    answer(&app, client, &uri).await
}

/// The page, also for a browser that asked for `/`. Its query may be that of a search.
pub(crate) async fn answer(app: &App, client: Client, uri: &Uri) -> Response {
    let query = ListQuery::parse(uri);
    let status = match query {
        Ok(_) => StatusCode::OK,
        Err(_) => StatusCode::BAD_REQUEST,
    };
    page(app, client, status, query).await
}

async fn style() -> Response {
    let content_type = [(header::CONTENT_TYPE, "text/css; charset=utf-8")];
    let style = include_str!("../assets/console.css");
    (HEADERS, content_type, style).into_response()
}

async fn script() -> Response {
    let content_type = [(header::CONTENT_TYPE, "text/javascript; charset=utf-8")];
    let script = include_str!("../assets/console.js");
    (HEADERS, content_type, script).into_response()
}

const HEADERS: [(HeaderName, &str); 2] = [
    (header::CONTENT_SECURITY_POLICY, CONTENT_SECURITY_POLICY),
    (header::REFERRER_POLICY, "same-origin"),
];

async fn page(
    app: &App,
    client: Client,
    status: StatusCode,
    query: Result<ListQuery, Problem>,
) -> Response {
    let (stats, newest, search) =
        tokio::join!(last(app), newest(app, client), search(app, client, query));
    let stats = serde_json::to_value(stats).expect("statistics are plain values");
    let problems = rows(&stats, "/problems");
    let problems = problems.iter().filter_map(Value::as_str);
    let problems = problems.map(str::to_owned).collect();
    let tables = [
        Table {
            id: "members",
            title: "Members of the map",
            columns: &MEMBERS,
            rows: rows(&stats, "/map/members"),
            total: Some(stats.pointer("/map/total").cloned().unwrap_or_default()),
        },
        Table {
            id: "instances",
            title: "Logging instances",
            columns: &INSTANCES,
            rows: rows(&stats, "/instances"),
            total: None,
        },
    ];
    let page = Page {
        stats,
        tables,
        problems,
        newest: newest.map_err(|problem| problem.detail().to_owned()),
        search,
    };
    let html = page.render().expect("writing to a string does not fail");
    let content_type = [(header::CONTENT_TYPE, "text/html; charset=utf-8")];
    (status, HEADERS, content_type, html).into_response()
}

fn rows(stats: &Value, pointer: &str) -> Vec<Value> {
    let rows = stats.pointer(pointer).and_then(Value::as_array);
    rows.cloned().unwrap_or_default()
}

/// What a query searches for, and the first matches.
async fn search(app: &App, client: Client, query: Result<ListQuery, Problem>) -> Search {
    let mut search = Search {
        text: String::new(),
        order: Order::Desc,
        found: None,
        rest: Vec::new(),
    };
    let query = match query {
        Ok(query) => query,
        Err(problem) => {
            search.found = Some(Err(problem.detail().to_owned()));
            return search;
        }
    };
    let bounds = query.bounds(app.pool.clock());
    let Some(text) = query.contains else {
        return search;
    };
    search.text = text.as_str().to_owned();
    search.order = bounds.order;
    let found = find(app, client, text, bounds).await;
    if let Ok(Found {
        next: Some(next), ..
    }) = found
    {
        let Bounds {
            after,
            before,
            order,
        } = bounds.resumed_from(next);
        let order = if order == Order::Asc { "asc" } else { "desc" };
        search.rest = vec![
            ("contains", search.text.clone()),
            ("order", order.to_owned()),
        ];
        for (name, bound) in [("after", after), ("before", before)] {
            search
                .rest
                .extend(bound.map(|uuid| (name, uuid.to_string())));
        }
    }
    search.found = Some(found.map_err(|problem| problem.detail().to_owned()));
    search
}
