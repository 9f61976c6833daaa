//! A logging instance: a client of the shared distributed map with an HTTP door for the facade.
//!
//! It keeps no entries of its own and knows no other instance; what it stored is in its log, one
//! line an entry.

mod get;
pub mod map;
pub mod transfer;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{RawQuery, Request, State};
use axum::http::{HeaderValue, StatusCode};
use axum::middleware::map_response_with_state;
use axum::response::{IntoResponse, Response};
use axum::routing;
use clap::{Parser, Subcommand};
use common::api::{MARK, Mark};
use common::body::{BodyError, NoMemory, Reservation, holding, read_body};
use common::config::{self, ServiceConfig};
use common::entry::{self, Entry, MAX_BATCH_BYTES, Outcome, PutEntry, PutResult};
use common::healthcheck::Task;
use common::json::JsonLine;
use common::problem::Problem;
use common::server::{self, Check, Limits, RequestLog};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use crate::get::MAX_READS;
use crate::map::{DistributedMap, Location, MapError};
use crate::transfer::Transfer;

/// Memory for batches on their way to the map, in bytes of bodies; what comes on top gets a 503.
const MAX_POSTED_BYTES: usize = 64 * 1024 * 1024;

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
    #[arg(
        long,
        global = true,
        default_value = "lmdb:data/map",
        hide_env_values = true
    )]
    pub map: Location,

    /// Replicas that must hold an entry before it is acknowledged; an lmdb map has none
    /// [default: 1 on a Redis Cluster, otherwise 0]
    #[arg(long, global = true)]
    pub backups: Option<u16>,

    /// How long storing a batch may take before its entries are answered as refused or unknown
    #[arg(long, global = true, default_value = "800ms", value_parser = config::timeout)]
    pub store_timeout: Duration,

    /// How old the time in a new entry's UUID may be; what is older never changes
    #[arg(long, global = true, default_value = "10s", value_parser = config::duration)]
    pub settle: Duration,

    #[command(flatten)]
    pub service: ServiceConfig,

    /// What to do instead of serving.
    #[command(subcommand)]
    pub task: Option<LoggingTask>,
}

/// What the binary does instead of serving.
#[derive(Clone, Debug, Subcommand)]
pub enum LoggingTask {
    #[command(flatten)]
    Service(Task),
    #[command(flatten)]
    Transfer(Transfer),
}

impl Config {
    /// What the map needs to know to be served.
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
            create: true,
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
        .route("/", routing::get(get::list).post(put))
        .route("/{uuid}", routing::get(get::show))
        .route("/livez", routing::get(server::livez))
        .route("/readyz", routing::get(readyz))
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
