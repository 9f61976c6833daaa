//! `GET /console`, the page for operators: `/stats` as tables, forms to post and to search, the newest messages.
//!
//! The page is complete without JavaScript. `console.js` keeps it up to date from `/stats` and `/`, and adds
//! what needs more than one answer: charts and the timeline.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use askama::Template;
use axum::Router;
use axum::body::to_bytes;
use axum::extract::{Query, Request, State};
use axum::http::{HeaderName, StatusCode, Uri, header};
use axum::response::{IntoResponse, Redirect, Response};
use axum::routing::get;
use bytesize::ByteSize;
use common::api::{ReadQuery, timestamp};
use common::bounds::{Bounds, Order};
use common::client::Client;
use common::entry::Entry;
use common::escape::needs_escape;
use common::permits::Exhausted;
use common::problem::Problem;
use serde::Deserialize;
use serde_json::Value;
use tokio::time::timeout;
use uuid::Uuid;

use crate::entry_stream::{EntryStream, Part};
use crate::error::{too_many, unreadable};
use crate::get::ListQuery;
use crate::message::body_limit;
use crate::pool::Instance;
use crate::post;
use crate::read::Cursor;
use crate::search::{self, MAX_SCANNED, Text};
use crate::state::App;
use crate::stats::collect;
use crate::upstream::UpstreamError;

/// The newest messages that the page shows.
const NEWEST: u64 = 10;

/// The most matches of a search that the page shows; `console.js` asks for as many.
const MATCHES: u64 = 20;

/// The page shows the beginning of a longer message, in characters.
const MAX_SHOWN: usize = 300;

/// How long the newest messages may take; after it the page comes without them.
const NEWEST_TIMEOUT: Duration = Duration::from_secs(1);

/// The answer to a POST of one message, or its error, is not much larger than this and the message.
const MAX_ANSWER_OVERHEAD: usize = 64 * 1024;

const CONTENT_SECURITY_POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; \
     img-src 'self' data:; connect-src 'self'; form-action 'self'; base-uri 'none'; \
     frame-ancestors 'none'";

/// A column of a table: its rows are objects of `/stats`.
struct Column {
    /// Where the value is in the object, as a JSON pointer.
    key: &'static str,
    label: &'static str,
    /// How the value is shown: see [`shown`].
    kind: &'static str,
}

const fn column(key: &'static str, label: &'static str, kind: &'static str) -> Column {
    Column { key, label, kind }
}

const MEMBERS: [Column; 11] = [
    column("/member", "Member", "name"),
    column("/role", "Role", "text"),
    column("/up", "State", "state"),
    column("/partitions", "Partitions", "number"),
    column("/entries", "Entries", "number"),
    column("/gets", "Gets", "number"),
    column("/puts", "Puts", "number"),
    column("/entry_memory_bytes", "Entry memory", "bytes"),
    column("/backups", "Backups", "number"),
    column("/backup_memory_bytes", "Backup memory", "bytes"),
    column("/used_memory_bytes", "Used memory", "bytes"),
];

const INSTANCES: [Column; 13] = [
    column("/instance", "Instance", "name"),
    column("/up", "State", "state"),
    column("/received", "Received", "number"),
    column("/share", "Share", "share"),
    column("/outcomes/stored", "Stored", "number"),
    column("/outcomes/duplicate", "Duplicate", "number"),
    column("/outcomes/conflict", "Conflict", "number"),
    column("/outcomes/stale", "Stale", "number"),
    column("/outcomes/refused", "Refused", "number"),
    column("/outcomes/unknown", "Unknown", "number"),
    column("/in_flight", "In flight", "number"),
    column("/put_p50_ms", "Median ms", "ms"),
    column("/put_p99_ms", "p99 ms", "ms"),
];

/// The facade's own numbers; their keys begin at the root of `/stats`.
const FACADE: [Column; 6] = [
    column("/map/total/entries", "Entries", "number"),
    column("/facade/posts", "POSTs", "number"),
    column("/facade/gets", "GETs", "number"),
    column("/facade/posted_bytes", "Stored", "bytes"),
    column("/facade/read_bytes", "Read", "bytes"),
    column("/facade/errors", "Errors by status", "counts"),
];

/// What to do about a problem, by the beginning of its text; the first that fits counts.
const ADVICE: [(&str, &str); 5] = [
    (
        "logging ",
        "Start this instance again if its process ended; else its /readyz?verbose says what it lacks. \
         The other instances take its messages meanwhile.",
    ),
    (
        "member ",
        "Start this server again, or replace it: docs/redis.md. Its backups serve what it held.",
    ),
    (
        "this facade's clock ",
        "Correct the clock of the facade's machine; keep it slewed, not stepped.",
    ),
    (
        "this page ",
        "The page asks again by itself; without JavaScript, reload it.",
    ),
    (
        "",
        "/readyz?verbose of the facade and of the logging instances says what is missing.",
    ),
];

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

struct Found {
    matches: Vec<Message>,
    scanned: u64,
    /// Where to search on.
    next: Option<Uuid>,
}

impl Found {
    /// As `summary` in console.js.
    fn summary(&self) -> String {
        let (matches, scanned) = (self.matches.len() as u64, grouped(self.scanned));
        let rest = match self.next {
            Some(_) => "There are more to search.",
            None => "That is all.",
        };
        format!("Matches: {matches}. Messages scanned: {scanned}. {rest}")
    }
}

struct Message {
    uuid: Uuid,
    time: String,
    pieces: Vec<Piece>,
    /// The length of a message that is cut, in bytes.
    whole: Option<usize>,
}

/// A part of a message.
enum Piece {
    Plain(String),
    /// A character that would act on the page's text, as an escape.
    Escaped(String),
}

#[derive(Debug, Default, Deserialize)]
pub(crate) struct PageQuery {
    /// The message that the form stored. Any other text shows no notice.
    posted: Option<String>,
}

/// The page and its files, which are no part of the API.
pub(crate) fn routes() -> Router<App> {
    Router::new()
        .route("/console", get(show).post(post))
        .route("/console/console.css", get(style))
        .route("/console/console.js", get(script))
}

/// `GET /console`.
async fn show(State(app): State<App>, client: Client, uri: Uri) -> Response {
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
async fn post(State(app): State<App>, request: Request) -> Response {
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

/// The newest messages, from any instance.
async fn newest(app: &App, client: Client) -> Result<Vec<Message>, Problem> {
    let permit = app.reads.take(client, 1);
    let _permit = permit.map_err(|Exhausted| too_many("reads"))?;
    let bounds = Bounds {
        order: Order::Desc,
        ..Bounds::default()
    };
    let ask = async |instance: Arc<Instance>| {
        let limit = Some(NEWEST);
        let answer = instance.client.read(
            ReadQuery {
                bounds,
                limit,
                poll: None,
            },
            None,
        );
        let mut stream = EntryStream::new(answer.await?.chunks, bounds, limit);
        let mut newest = Vec::new();
        while let Part::Entries(lines, _) = stream.next().await? {
            newest.extend(messages(&lines));
        }
        Ok(newest)
    };
    let asked = timeout(NEWEST_TIMEOUT, app.pool.ask(ask)).await;
    asked
        .unwrap_or(Err(UpstreamError::TimedOut))
        .map_err(|error| unreadable(&app.pool, &error))
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
    let bounds = query.bounds(SystemTime::now());
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

async fn find(app: &App, client: Client, text: Text, bounds: Bounds) -> Result<Found, Problem> {
    let permit = app.reads.take(client, 1);
    let _permit = permit.map_err(|Exhausted| too_many("reads"))?;
    let query = ReadQuery {
        bounds,
        limit: Some(MAX_SCANNED),
        poll: None,
    };
    let mut cursor = Cursor::new(&app.pool, app.read_deadline, query, None);
    let mut search = search::Search::new(text, Some(MATCHES));
    let mut matches = Vec::new();
    let searching = async {
        cursor.begin().await?;
        loop {
            match search.next(&mut cursor).await? {
                Part::Entries(lines, _) => matches.extend(messages(&lines)),
                Part::End(next) => return Ok(next),
            }
        }
    };
    let next = searching.await;
    let next = next.map_err(|error| unreadable(&app.pool, &error))?;
    Ok(Found {
        matches,
        scanned: search.scanned,
        next,
    })
}

fn messages(lines: &[u8]) -> impl Iterator<Item = Message> {
    let entries = serde_json::Deserializer::from_slice(lines).into_iter::<Entry>();
    entries.flatten().map(Message::new)
}

impl Message {
    fn new(entry: Entry) -> Self {
        let shown: String = entry.msg.chars().take(MAX_SHOWN).collect();
        Self {
            uuid: entry.uuid,
            time: seconds(&posted_at(entry.uuid)),
            whole: (shown.len() < entry.msg.len()).then_some(entry.msg.len()),
            pieces: pieces(&shown),
        }
    }
}

fn posted_at(uuid: Uuid) -> String {
    let (seconds, nanoseconds) = uuid.get_timestamp().map_or((0, 0), |time| time.to_unix());
    timestamp(SystemTime::UNIX_EPOCH + Duration::new(seconds, nanoseconds))
}

fn pieces(text: &str) -> Vec<Piece> {
    let mut pieces = Vec::new();
    let mut plain = String::new();
    for character in text.chars() {
        if needs_escape(character) {
            pieces.push(Piece::Plain(std::mem::take(&mut plain)));
            pieces.push(Piece::Escaped(character.escape_default().to_string()));
        } else {
            plain.push(character);
        }
    }
    pieces.push(Piece::Plain(plain));
    pieces
}

/// The text of a value of `/stats`. `show` in console.js shows the same numbers in the same way.
fn shown(object: &Value, column: &Column) -> String {
    let value = object.pointer(column.key).unwrap_or(&Value::Null);
    if column.kind == "state" {
        return state(object).to_owned();
    }
    let number = value.as_f64().unwrap_or_default();
    match (value, column.kind) {
        (Value::Null, _) => "–".to_owned(),
        (_, "number") => grouped(value.as_u64().unwrap_or_default()),
        (_, "bytes") => ByteSize(value.as_u64().unwrap_or_default())
            .display()
            .iec()
            .to_string(),
        (_, "share") => format!("{:.1} %", 100.0 * number),
        (_, "ms") => format!("{number:.1}"),
        (Value::Object(counts), _) if counts.is_empty() => "none".to_owned(),
        (Value::Object(counts), _) => {
            let counts = counts.iter();
            let counts: Vec<String> = counts
                .map(|(name, count)| format!("{name}: {count}"))
                .collect();
            counts.join(", ")
        }
        (Value::String(time), "time") => seconds(time),
        (Value::String(time), "clock") => seconds(time).split_off(11),
        (Value::String(text), _) => text.clone(),
        (other, _) => other.to_string(),
    }
}

/// The state of a member or an instance. `down`: a member does not answer, an instance gets no messages.
/// `no answer`: an instance did not answer the request for statistics.
fn state(row: &Value) -> &'static str {
    match (&row["up"], row.get("version")) {
        (Value::Bool(false), _) => "down",
        (_, Some(Value::Null)) => "no answer",
        _ => "up",
    }
}

/// The text in the row of the totals, which has no value in some columns.
fn shown_total(total: &Value, column: &Column) -> String {
    match column.kind {
        "name" => "TOTAL".to_owned(),
        "state" if total.get("complete").is_some() => "incomplete".to_owned(),
        "state" => String::new(),
        _ if total.pointer(column.key).is_none() => String::new(),
        _ => shown(total, column),
    }
}

/// `2026-11-24 20:00:00` of an RFC 3339 time.
fn seconds(time: &str) -> String {
    time.chars().take(19).collect::<String>().replace('T', " ")
}

/// Digits in groups of three.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut grouped = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}

fn advice(problem: &str) -> &'static str {
    let mut known = ADVICE.iter();
    known
        .find(|(beginning, _)| problem.starts_with(beginning))
        .map_or("", |(_, advice)| advice)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_grouped() {
        let cases = [
            (0, "0"),
            (999, "999"),
            (1000, "1,000"),
            (1_234_567, "1,234,567"),
        ];
        for (number, text) in cases {
            assert_eq!(grouped(number), text);
        }
    }
}
