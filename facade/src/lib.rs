//! The facade: the only public door. It gives each message a UUID, hands it to a random logging
//! instance, and merges what they hold with the messages service's reply.
//!
//! It keeps nothing: any number of facades may stand side by side.

pub mod batcher;
mod bulk;
pub mod client;
mod discovery;
pub mod entry_stream;
pub mod get;
pub mod health;
pub mod identifiers;
mod judge;
mod merge;
mod moment;
pub mod pool;
pub mod post;
mod readiness;
pub mod served_map;
pub mod store;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use axum::Router;
use axum::routing::get;
use bytesize::ByteSize;
use clap::Parser;
use common::config::{self, ServiceConfig};
use common::entry::{MAX_BATCH_BYTES, MAX_JSON_EXPANSION};
use common::healthcheck::Task;
use common::problem::Problem;
use common::server::{self, Limits, RequestLog};
use rand::rngs::StdRng;
use reqwest::Url;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use crate::batcher::MAX_BATCH;
use crate::client::{MessagesClient, http_client};
use crate::identifiers::Identifiers;
use crate::pool::Pool;
use crate::readiness::Readiness;

/// Memory for single messages on their way into the log, in bytes of their bodies; more are turned
/// away with a 503. Each is in memory up to three times: as body, as message, and encoded.
const MAX_POSTED_BYTES: usize = 64 * 1024 * 1024;

/// Uploads of many messages at once; each has a window of its own.
const MAX_UPLOADS: usize = 16;

/// Memory for reads of single messages, in bytes of their answers; more are turned away with a 503.
const MAX_LOOKUP_BYTES: usize = 64 * 1024 * 1024;

/// The largest `--max-message`: escaped in JSON it still fits into a batch.
const MAX_MAX_MESSAGE: u64 = 1024 * 1024;
const _: () = assert!(
    MAX_BATCH + MAX_MAX_MESSAGE as usize * MAX_JSON_EXPANSION + ENTRY_OVERHEAD < MAX_BATCH_BYTES,
    "an instance must accept a batch just below its limit and the largest entry behind it"
);

/// What an entry has in JSON besides its message, at most: its UUID, its request id, and the names.
const ENTRY_OVERHEAD: usize = 1024;

/// The public door: takes messages, hands each to a random logging instance, and reads them back
#[derive(Clone, Debug, Parser)]
#[command(name = "facade", version)]
pub struct Config {
    /// Address to serve on; loopback unless you say otherwise
    #[arg(long, global = true, default_value = "127.0.0.1:8086", value_parser = config::address)]
    pub listen: SocketAddr,

    /// Logging instances, separated by commas
    #[arg(
        long,
        value_delimiter = ',',
        value_parser = service_url,
        default_value = "http://127.0.0.1:8082,http://127.0.0.1:8083,http://127.0.0.1:8084"
    )]
    pub logging: Vec<Url>,

    /// The messages service
    #[arg(long, value_parser = service_url, default_value = "http://127.0.0.1:8081")]
    pub messages: Url,

    /// How long one logging instance may take for one request before another one is asked
    #[arg(long, default_value = "1s", value_parser = config::timeout)]
    pub try_timeout: Duration,

    /// How long a POST may take, all tries together
    #[arg(long, default_value = "5s", value_parser = config::timeout)]
    pub deadline: Duration,

    /// The longest silence of a GET while it looks for an instance that can go on
    #[arg(long, default_value = "15s", value_parser = config::timeout)]
    pub read_deadline: Duration,

    /// How long the messages service may take
    #[arg(long, default_value = "1s", value_parser = config::timeout)]
    pub messages_timeout: Duration,

    /// The largest message, up to 1MiB
    #[arg(long, default_value = "64KiB", value_parser = message_size)]
    pub max_message: ByteSize,

    /// How many GETs of the log are served at once
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u16).range(1..))]
    pub max_reads: u16,

    #[command(flatten)]
    pub service: ServiceConfig,

    /// What to do instead of serving.
    #[command(subcommand)]
    pub task: Option<Task>,
}

fn service_url(text: &str) -> Result<Url, String> {
    const WRITE_INSTEAD: &str = "write http://HOST:PORT";
    if !text.contains("://") && !text.is_empty() && !text.contains('@') {
        return Err(format!(
            "the http:// is missing; {WRITE_INSTEAD}, here http://{text}"
        ));
    }
    let url = Url::parse(text).map_err(|error| format!("{error}; {WRITE_INSTEAD}"))?;
    let has_login = !url.username().is_empty() || url.password().is_some();
    let fault = match url.scheme() {
        "http" if has_login => "a login is not supported",
        "http" if url.path() != "/" || url.query().is_some() => "it has a path",
        "http" => return Ok(url),
        _ => "only http is supported",
    };
    Err(format!("{fault}; {WRITE_INSTEAD}"))
}

fn message_size(text: &str) -> Result<ByteSize, String> {
    let size: Option<ByteSize> = text.parse().ok();
    size.filter(|size| (1..=MAX_MAX_MESSAGE).contains(&size.as_u64()))
        .ok_or_else(|| "write a size from 1B to 1MiB, for example 64KiB".to_owned())
}

/// What the handlers share.
#[derive(Clone, Debug)]
pub struct App {
    pub pool: Arc<Pool>,
    messages: MessagesClient,
    body_patience: Duration,
    deadline: Duration,
    read_deadline: Duration,
    max_message: usize,
    /// Memory for posts, in bytes.
    posts: Arc<Semaphore>,
    /// Places for uploads of many messages.
    uploads: Arc<Semaphore>,
    /// Places for GETs of the log.
    reads: Arc<Semaphore>,
    /// Memory for GETs of single messages, in bytes.
    lookups: Arc<Semaphore>,
    readiness: Arc<Readiness>,
    stop: CancellationToken,
}

impl App {
    /// Everything the handlers need; `random` chooses the instances, `stop` is cancelled when the
    /// process was told to stop. Must be called within a runtime, where the batchers run.
    ///
    /// # Errors
    /// When the HTTP client cannot be built.
    pub fn new(
        config: &Config,
        limits: Limits,
        random: StdRng,
        stop: CancellationToken,
    ) -> io::Result<Self> {
        let pool = Pool::new(random, Identifiers::new(SystemTime::now));
        Self::discovering(config, limits, Arc::new(pool), stop)
    }

    /// The same, with a pool that is filled with the instances at the configured addresses.
    ///
    /// # Errors
    /// When the HTTP client cannot be built, or a thread for look-ups not be started.
    pub fn discovering(
        config: &Config,
        limits: Limits,
        pool: Arc<Pool>,
        stop: CancellationToken,
    ) -> io::Result<Self> {
        let http = http_client(config.try_timeout / 2).map_err(io::Error::other)?;
        discovery::start(&pool, &http, &config.logging, config.try_timeout)?;
        Self::with_pool(config, limits, pool, stop).map_err(io::Error::other)
    }

    /// The same, with a pool that the caller fills.
    ///
    /// # Errors
    /// When the HTTP client cannot be built.
    pub fn with_pool(
        config: &Config,
        limits: Limits,
        pool: Arc<Pool>,
        stop: CancellationToken,
    ) -> reqwest::Result<Self> {
        let http = http_client(config.try_timeout / 2)?;
        Ok(Self {
            pool,
            messages: MessagesClient::new(http, config.messages.clone(), config.messages_timeout),
            body_patience: limits.body,
            deadline: config.deadline,
            read_deadline: config.read_deadline,
            max_message: config.max_message.as_u64() as usize,
            posts: Arc::new(Semaphore::new(MAX_POSTED_BYTES)),
            uploads: Arc::new(Semaphore::new(MAX_UPLOADS)),
            reads: Arc::new(Semaphore::new(config.max_reads.into())),
            lookups: Arc::new(Semaphore::new(MAX_LOOKUP_BYTES)),
            readiness: Arc::default(),
            stop,
        })
    }
}

/// The answer to what would exceed a bound.
fn too_many(what: &str) -> Problem {
    let detail = format!("too many {what} at once, nothing was done; come back in a moment");
    Problem::unavailable(detail, post::RETRY_AFTER)
}

/// All routes of the service.
pub fn router(app: App) -> Router {
    let routes = Router::new()
        .route("/", get(get::list).post(post::create))
        .route("/{uuid}", get(get::show).fallback(get::refuse_method))
        .route("/livez", get(server::livez))
        .route("/readyz", get(readiness::readyz))
        .with_state(app);
    server::with_middleware(routes, RequestLog::On)
}
