//! A logging instance: a client of the shared distributed map with an HTTP door for the facade.
//!
//! It keeps no entries of its own and knows no other instance; what it stored is in its log, one
//! line an entry.

pub mod map;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use axum::Router;
use axum::body::Body;
use axum::extract::rejection::{PathRejection, QueryRejection};
use axum::extract::{Path, Query, RawQuery, Request, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::map_response_with_state;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use bytes::Bytes;
use clap::Parser;
use common::api::{MARK, Mark};
use common::body::{BodyError, NoMemory, Reservation, holding, read_body};
use common::config::{self, ServiceConfig};
use common::entry::{self, Entry, MAX_BATCH_BYTES, Outcome, PutEntry, PutResult};
use common::json::{self, JsonLine};
use common::page::{Bounds, Order, PageEnd};
use common::problem::Problem;
use common::server::{self, Check, Limits, RequestLog};
use futures_util::{StreamExt, stream};
use serde::Deserialize;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::map::{DistributedMap, Location, MapError, Page, PageLimit};

/// Memory for batches on their way to the map, in bytes of bodies; what comes on top gets a 503.
const MAX_POSTED_BYTES: usize = 64 * 1024 * 1024;

/// Reads at once; what comes on top gets a 503. A facade has at most one for each of its own.
const MAX_READS: usize = 512;

/// Bytes of entries that a read takes from the map at once.
const PAGE_BYTES: usize = 128 * 1024;

/// One of several instances that keep all entries in one shared distributed map
#[derive(Clone, Debug, Parser)]
#[command(name = "logging", version)]
pub struct Config {
    /// Address to serve on; an inner door, so keep it away from the public
    #[arg(long, global = true, default_value = "127.0.0.1:8082", value_parser = config::address)]
    pub listen: SocketAddr,

    /// The shared map, the same for all instances: lmdb:FOLDER, a folder of this machine;
    /// redis://HOST:PORT, a Redis server (7.0 or later); or redis://HOST:PORT,HOST:PORT…, some
    /// members of a Redis Cluster. USER:PASSWORD@ goes before the hosts; rediss:// is for TLS
    #[arg(long, default_value = "lmdb:data/map", hide_env_values = true)]
    pub map: Location,

    /// Replicas that must hold an entry before it is acknowledged; an lmdb map has none
    /// [default: 1 on a Redis Cluster, otherwise 0]
    #[arg(long)]
    pub backups: Option<u16>,

    /// How long storing a batch may take before its entries are answered as refused or unknown
    #[arg(long, default_value = "800ms", value_parser = config::timeout)]
    pub store_timeout: Duration,

    /// How old the time in a new entry's UUID may be; what is older never changes
    #[arg(long, default_value = "10s", value_parser = config::duration)]
    pub settle: Duration,

    #[command(flatten)]
    pub service: ServiceConfig,
}

impl Config {
    /// What the map needs to know.
    ///
    /// # Errors
    /// A line for the person who started the service when flags do not go together.
    pub fn map_options(&self) -> Result<map::Options, String> {
        if matches!(self.map, Location::Lmdb(_)) && self.backups.is_some_and(|count| count > 0) {
            return Err("an lmdb map keeps no replicas; write --backups 0".to_owned());
        }
        Ok(map::Options {
            store_timeout: self.store_timeout,
            settle: self.settle,
            backups: self.backups,
        })
    }
}

/// What the handlers share.
#[derive(Clone, Debug)]
pub struct App {
    map: Arc<dyn DistributedMap>,
    posts: Arc<Semaphore>,
    reads: Arc<Semaphore>,
    body_patience: Duration,
    stop: CancellationToken,
}

impl App {
    /// Everything the handlers need; `stop` is cancelled when the process was told to stop.
    pub fn new(map: Arc<dyn DistributedMap>, limits: Limits, stop: CancellationToken) -> Self {
        Self {
            map,
            posts: Arc::new(Semaphore::new(MAX_POSTED_BYTES)),
            reads: Arc::new(Semaphore::new(MAX_READS)),
            body_patience: limits.body,
            stop,
        }
    }
}

/// All routes of the service.
pub fn router(app: App) -> Router {
    let routes = Router::new()
        .route("/", get(list).post(put))
        .route("/{uuid}", get(show))
        .route("/livez", get(server::livez))
        .route("/readyz", get(readyz))
        .with_state(app.clone());
    server::with_middleware(routes, RequestLog::Off).layer(map_response_with_state(app, mark))
}

/// Marks an answer as one of a logging instance.
async fn mark(State(app): State<App>, mut response: Response) -> Response {
    let mark = Mark { map: app.map.id() }.to_string();
    let value = HeaderValue::try_from(mark).expect("a mark is plain ASCII");
    response.headers_mut().insert(MARK, value);
    response
}

async fn put(State(app): State<App>, request: Request) -> Result<Response, Problem> {
    let mut reserved = Reservation::new(&app.posts, 0).map_err(|NoMemory| busy())?;
    let body = request.into_body();
    let body = read_body(body, MAX_BATCH_BYTES, app.body_patience, &mut reserved).await;
    let body = body.map_err(|error| match error {
        BodyError::NoMemory => busy(),
        BodyError::TooLarge(_) | BodyError::TooSlow | BodyError::Broken => error.into(),
    })?;
    let batch = Batch::parse(&body)?;
    drop(body);
    let outcomes = app.map.put(batch.entries.clone()).await;
    log_acknowledged(&batch, &outcomes);
    let results = batch.entries.iter().zip(outcomes).map(|(entry, outcome)| {
        let uuid = entry.uuid;
        PutResult { uuid, outcome }
    });
    let mut results: Vec<PutResult> = results.collect();
    let answer = match batch.shape {
        Shape::Many => JsonLine(results).into_response(),
        Shape::One => JsonLine(results.remove(0)).into_response(),
    };
    Ok(holding(answer, reserved))
}

/// The entries of a POST, and whether it was one or an array: the answer has the same shape.
struct Batch {
    entries: Arc<[Entry]>,
    request_ids: Vec<Option<String>>,
    shape: Shape,
}

enum Shape {
    One,
    Many,
}

impl Batch {
    fn parse(body: &[u8]) -> Result<Self, Problem> {
        let is_array = body.trim_ascii_start().starts_with(b"[");
        let (posted, shape) = if is_array {
            (serde_json::from_slice(body), Shape::Many)
        } else {
            let one = serde_json::from_slice(body).map(|entry: PutEntry| vec![entry]);
            (one, Shape::One)
        };
        let posted: Vec<PutEntry> = posted.map_err(|error| {
            Problem::bad_request(format!(
                "this is a logging instance; post messages to the facade, by default \
                 http://localhost:8086. What a facade sends here is an entry \
                 {{\"uuid\":…,\"msg\":…}} or an array of them: {error}"
            ))
        })?;
        let mut entries = Vec::with_capacity(posted.len());
        let mut request_ids = Vec::with_capacity(posted.len());
        for PutEntry {
            uuid,
            msg,
            request_id,
        } in posted
        {
            entry::require_entry_uuid(uuid).map_err(Problem::bad_request)?;
            if msg.is_empty() {
                return Err(Problem::bad_request(format!(
                    "the message of {uuid} is empty"
                )));
            }
            entries.push(Entry { uuid, msg });
            request_ids.push(request_id);
        }
        Ok(Self {
            entries: entries.into(),
            request_ids,
            shape,
        })
    }
}

/// The exercise's proof of which instance took which message: one line for each entry that is
/// answered as stored. String fields are written quoted and escaped, so no message forges a line.
fn log_acknowledged(batch: &Batch, outcomes: &[Outcome]) {
    let with_ids = batch.entries.iter().zip(&batch.request_ids);
    for ((entry, request_id), outcome) in with_ids.zip(outcomes) {
        let outcome = match outcome {
            Outcome::Stored => "stored",
            Outcome::Duplicate => "duplicate",
            Outcome::Conflict
            | Outcome::Stale { .. }
            | Outcome::Refused { .. }
            | Outcome::Unknown { .. } => continue,
        };
        tracing::info!(
            msg = entry.msg.as_str(),
            uuid = %entry.uuid,
            outcome,
            request_id,
            "entry acknowledged"
        );
    }
}

async fn show(
    State(app): State<App>,
    path: Result<Path<Uuid>, PathRejection>,
) -> Result<Response, Problem> {
    let Ok(Path(uuid)) = path else {
        return Err(server::answer_not_found().await);
    };
    let place = app.reads.clone().try_acquire_owned();
    let place = place.map_err(|_| busy())?;
    match app.map.get(uuid).await.map_err(answer_map_error)? {
        Some(msg) => Ok(holding(
            JsonLine(Entry { uuid, msg }).into_response(),
            place,
        )),
        None => Err(Problem::new(
            StatusCode::NOT_FOUND,
            format!("there is no entry {uuid}"),
        )),
    }
}

/// The query of a read.
#[derive(Clone, Copy, Debug, Deserialize)]
struct ListQuery {
    after: Option<Uuid>,
    before: Option<Uuid>,
    #[serde(default)]
    order: Order,
    /// At most this many entries.
    limit: Option<u64>,
    /// Stop after one page of about this many bytes: how the facade reads.
    page_bytes: Option<usize>,
}

/// Streams the entries within the bounds, page by page, then the line that counts them.
async fn list(
    State(app): State<App>,
    query: Result<Query<ListQuery>, QueryRejection>,
) -> Result<Response, Problem> {
    let Query(query) = query.map_err(|error| Problem::bad_request(error.body_text()))?;
    let place = app.reads.clone().try_acquire_owned();
    let place = place.map_err(|_| busy())?;
    let mut listing = Listing::begin(app.map, query)
        .await
        .map_err(answer_map_error)?;
    let first = listing.next_chunk().await.map_err(answer_map_error)?;
    let rest = stream::try_unfold(listing, |mut listing| async move {
        if listing.is_finished {
            return Ok(None);
        }
        let chunk = listing.next_chunk().await.inspect_err(|error| {
            tracing::error!(%error, "a read is cut off because the map cannot be read");
        })?;
        Ok::<_, MapError>(Some((chunk, listing)))
    });
    let body = Body::from_stream(stream::iter([Ok(first)]).chain(rest));
    let content_type = [(header::CONTENT_TYPE, "application/x-ndjson")];
    Ok(holding((content_type, body).into_response(), place))
}

/// A read under way.
struct Listing {
    map: Arc<dyn DistributedMap>,
    bounds: Bounds,
    entries_left: u64,
    /// Of one page; with `is_one_page`, the answer ends after it.
    page_bytes: usize,
    is_one_page: bool,
    /// The first page, until it is taken.
    first: Option<Page>,
    count: u64,
    is_finished: bool,
}

impl Listing {
    /// Reads the first page. What an ascending read needs to know besides, where it is to end, is
    /// asked at the same time, so that both together take no longer than one.
    async fn begin(map: Arc<dyn DistributedMap>, query: ListQuery) -> Result<Self, MapError> {
        let mut listing = Self {
            map,
            bounds: Bounds {
                after: query.after,
                before: query.before,
                order: query.order,
            },
            entries_left: query.limit.unwrap_or(u64::MAX),
            page_bytes: query.page_bytes.unwrap_or(PAGE_BYTES).min(PAGE_BYTES),
            is_one_page: query.page_bytes.is_some(),
            first: None,
            count: 0,
            is_finished: false,
        };
        // A bound whose time has passed is an end already.
        let has_end = query.before.is_some_and(has_passed);
        if has_end || query.order == Order::Desc {
            listing.first = Some(listing.page().await?);
            return Ok(listing);
        }
        let (first, last) = tokio::try_join!(listing.page(), listing.map.last())?;
        // What comes from now on is left out, or a slow reader would never reach the end.
        let read = first.entries.last().map(|entry| entry.uuid);
        let end = last.max(read).map_or(Uuid::nil(), |last| {
            Uuid::from_u128(last.as_u128().saturating_add(1))
        });
        let before = &mut listing.bounds.before;
        *before = Some(before.map_or(end, |before| before.min(end)));
        listing.first = Some(first);
        Ok(listing)
    }

    async fn page(&self) -> Result<Page, MapError> {
        let limit = PageLimit {
            entries: self.entries_left,
            bytes: self.page_bytes,
        };
        self.map.page(self.bounds, limit).await
    }

    /// The next page as lines; after the last page, also the line that counts.
    async fn next_chunk(&mut self) -> Result<Bytes, MapError> {
        let page = match self.first.take() {
            Some(first) => first,
            None => self.page().await?,
        };
        let mut lines = Vec::with_capacity(PAGE_BYTES + PAGE_BYTES / 4);
        for entry in &page.entries {
            entry.write_line(&mut lines);
        }
        self.count += page.entries.len() as u64;
        self.entries_left -= page.entries.len() as u64;
        let last = page.entries.last().map(|entry| entry.uuid);
        if let Some(last) = last {
            self.bounds = self.bounds.resumed_from(last);
        }
        let is_last = self.entries_left == 0 || self.is_one_page || !page.more;
        if is_last {
            self.is_finished = true;
            let next = last.filter(|_| page.more);
            let end = PageEnd {
                count: self.count,
                next,
                before: match self.bounds.order {
                    Order::Asc => next.and(self.bounds.before),
                    Order::Desc => None,
                },
            };
            json::write_line(&mut lines, &end);
        }
        Ok(lines.into())
    }
}

fn has_passed(uuid: Uuid) -> bool {
    let time = SystemTime::UNIX_EPOCH + Duration::from_millis(entry::unix_millis(uuid));
    time < SystemTime::now()
}

async fn readyz(State(app): State<App>, RawQuery(query): RawQuery) -> Response {
    let health = app.map.health().await;
    let mut checks = vec![Check {
        name: "map".to_owned(),
        ok: health.missing.is_none(),
        detail: health
            .missing
            .clone()
            .unwrap_or_else(|| "answers".to_owned()),
    }];
    checks.extend(health.checks);
    let map = health.missing.map_or(Ok(()), Err);
    let ready = server::not_stopping(&app.stop).and(map);
    match server::is_verbose(query.as_deref()) {
        true => server::readiness(ready, &checks),
        false => server::readiness(ready, &[]),
    }
}

/// Not a 503, with which the facade waits for a map that cannot be read.
fn busy() -> Problem {
    let detail = "this instance is busy, and nothing was done; ask again in a moment";
    Problem::new(StatusCode::TOO_MANY_REQUESTS, detail)
}

fn answer_map_error(error: MapError) -> Problem {
    match error {
        MapError::Unavailable(detail) => {
            tracing::debug!(detail, "the map cannot be read");
            Problem::unavailable(detail, Duration::from_secs(1))
        }
        MapError::Damaged(uuid) => {
            tracing::error!(%uuid, "an entry of the map is not what was put there; its disk may be failing");
            Problem::new(
                StatusCode::INTERNAL_SERVER_ERROR,
                format!("entry {uuid} is damaged; restore the map from a copy"),
            )
        }
    }
}
