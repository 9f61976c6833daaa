//! `GET /console`, the page for operators: `/stats` as tables, forms to post and to search, the newest messages.
//!
//! The page is complete without JavaScript. `console.js` keeps it up to date from `/stats` and `/`, and adds
//! what needs more than one answer: charts and the timeline.

mod messages;
mod values;

use std::sync::Arc;

use askama::Template;
use axum::Router;
use axum::body::to_bytes;
use axum::extract::{Query, Request, State};
use axum::http::{HeaderName, StatusCode, Uri, header};
use axum::response::{IntoResponse, Redirect, Response};
use axum::routing::get;
use common::bounds::{Bounds, Order};
use common::client::Client;
use common::problem::Problem;
use serde::Deserialize;
use serde_json::Value;
use uuid::Uuid;

use self::messages::{Found, Message, Piece, find, newest};
use self::values::{
    ADVICE, Column, FACADE, INSTANCES, MEMBERS, advice, column, shown, shown_total, state,
};
use crate::get::ListQuery;
use crate::message::body_limit;
use crate::post;
use crate::state::App;
use crate::stats::collect;

/// The answer to a POST of one message, or its error, is not much larger than this and the message.
const MAX_ANSWER_OVERHEAD: usize = 64 * 1024;

const CONTENT_SECURITY_POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; \
     img-src 'self' data:; connect-src 'self'; form-action 'self'; base-uri 'none'; \
     frame-ancestors 'none'";

#[derive(Template)]
#[template(path = "console.html")]
struct Page {
    /// As `/stats` answers; `Null` when it cannot be had.
    stats: Value,
    tables: [Table; 2],
    problems: Vec<String>,
    newest: Result<Vec<Message>, String>,
    notice: Option<Notice>,
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

/// The outcome of the form.
enum Notice {
    Stored(Uuid),
    /// Why; it may be stored all the same.
    NotAcknowledged(String),
}

/// The form of a search, as it was filled in, and what was found.
struct Search {
    text: String,
    order: Order,
    found: Option<Result<Found, String>>,
    /// The query that searches on; empty when there is nothing more to search.
    rest: Vec<(&'static str, String)>,
}

#[derive(Debug, Default, Deserialize)]
pub(crate) struct PageQuery {
    /// The message that the form stored. Any other text shows no notice.
    posted: Option<String>,
}

/// The page and its files, which are no part of the API.
pub(crate) fn routes() -> Router<Arc<App>> {
    Router::new()
        .route("/console", get(show).post(post))
        .route("/console/console.css", get(style))
        .route("/console/console.js", get(script))
}

/// `GET /console`.
async fn show(State(app): State<Arc<App>>, client: Client, uri: Uri) -> Response {
    answer(&app, client, &uri).await
}

/// The page, also for a browser that asked for `/`. Its query may be that of a search.
pub(crate) async fn answer(app: &App, client: Client, uri: &Uri) -> Response {
    let query = Query::<PageQuery>::try_from_uri(uri).ok();
    let posted = query.and_then(|Query(query)| query.posted);
    let posted = posted.and_then(|uuid| Uuid::try_parse(&uuid).ok());
    let query = ListQuery::parse(uri);
    let status = match query {
        Ok(_) => StatusCode::OK,
        Err(_) => StatusCode::BAD_REQUEST,
    };
    page(app, client, status, posted.map(Notice::Stored), query).await
}

/// `POST /console`: the page's form without JavaScript. Posts as `POST /` does, then leads back to the page.
async fn post(State(app): State<Arc<App>>, request: Request) -> Response {
    #[derive(Deserialize)]
    struct Stored {
        uuid: Uuid,
    }
    let client = Client::of(request.extensions());
    let limit = body_limit(app.max_message) + MAX_ANSWER_OVERHEAD;
    let answer = match post::create(State(app.clone()), request).await {
        Ok(answer) => answer,
        Err(problem) => {
            let notice = Notice::NotAcknowledged(problem.detail().to_owned());
            let status = problem.into_response().status();
            return page(&app, client, status, Some(notice), Ok(ListQuery::default())).await;
        }
    };
    let body = to_bytes(answer.into_body(), limit).await.ok();
    let stored = body.and_then(|body| serde_json::from_slice(&body).ok());
    let target = match stored {
        Some(Stored { uuid }) => format!("/console?posted={uuid}"),
        None => "/console".to_owned(),
    };
    Redirect::to(&target).into_response()
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
    notice: Option<Notice>,
    query: Result<ListQuery, Problem>,
) -> Response {
    let (stats, newest, search) = tokio::join!(
        collect(app),
        newest(app, client),
        search(app, client, query)
    );
    let (stats, problems) = match stats {
        Ok(stats) => {
            let stats = serde_json::to_value(stats).expect("statistics are plain values");
            let problems = rows(&stats, "/problems");
            let problems = problems.iter().filter_map(Value::as_str);
            let problems = problems.map(str::to_owned).collect();
            (stats, problems)
        }
        Err(problem) => (
            Value::Null,
            vec![format!("this page has no numbers: {}", problem.detail())],
        ),
    };
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
        notice,
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
