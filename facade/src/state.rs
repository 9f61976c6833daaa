//! The state that the handlers share.

use std::sync::Arc;
use std::time::Duration;

use common::door::Door;
use common::latest::Latest;
use common::permits::Permits;
use common::serve::Timeouts;
use rand::rngs::StdRng;
use tokio_util::sync::CancellationToken;

use crate::client::{Clients, MessagesClient};
use crate::collection::{Collection, keep_collecting};
use crate::config::Config;
use crate::counters::Counters;
use crate::discovery;
use crate::follow::Followers;
use crate::pool::Pool;
use crate::served_map::ServedMap;

/// Budget for POSTs of one message, in bytes of their bodies; excess ones get a 503. Each message
/// is in memory up to three times: as body, as message, and encoded.
const MAX_POSTED_BYTES: usize = 64 * 1024 * 1024;

/// Uploads of many messages at once, each with its own window; excess ones get a 503.
const MAX_UPLOADS: usize = 16;

/// Budget for GETs of one message, in bytes of their answers; excess ones get a 503.
const MAX_LOOKUP_BYTES: usize = 64 * 1024 * 1024;

#[derive(Debug)]
pub struct App {
    pub pool: Arc<Pool>,
    pub(crate) messages: MessagesClient,
    pub(crate) body_timeout: Duration,
    pub(crate) deadline: Duration,
    pub(crate) read_deadline: Duration,
    pub(crate) max_message: usize,
    /// Budget for POSTs of one message, in bytes.
    pub(crate) posts: Arc<Permits>,
    /// Permits for uploads of many messages.
    pub(crate) uploads: Arc<Permits>,
    /// Permits for GETs of the log.
    pub(crate) reads: Arc<Permits>,
    pub(crate) followers: Followers,
    /// Budget for GETs of one message, in bytes.
    pub(crate) lookups: Arc<Permits>,
    pub(crate) collected: Arc<Latest<Collection>>,
    pub(crate) counters: Counters,
    pub(crate) door: Door,
    pub(crate) stop: CancellationToken,
}

impl App {
    /// `random` chooses the instances; the caller cancels `stop` when the process is to stop. Must
    /// be called within a runtime, where the batchers run.
    ///
    /// # Errors
    /// A line for the operator, when a file cannot be read or is wrong, or the HTTP client cannot be built.
    pub fn new(
        config: &Config,
        timeouts: Timeouts,
        random: StdRng,
        stop: CancellationToken,
    ) -> Result<Arc<Self>, String> {
        let pool = Pool::new(random, ServedMap::default());
        Self::discovering(config, timeouts, Arc::new(pool), stop)
    }

    /// As [`Self::new`], with a pool that discovery fills from the configured addresses.
    ///
    /// # Errors
    /// As [`Self::new`], and when a look-up thread cannot be started.
    pub fn discovering(
        config: &Config,
        timeouts: Timeouts,
        pool: Arc<Pool>,
        stop: CancellationToken,
    ) -> Result<Arc<Self>, String> {
        let clients = Clients::new(
            config.try_timeout / 2,
            config.logging_token_file.clone(),
            config.logging_ca.clone(),
        )?;
        discovery::start(&pool, &clients, &config.logging, config.try_timeout)?;
        let app = Self::with_pool(config, timeouts, pool, stop)?;
        tokio::spawn(keep_collecting(
            Arc::downgrade(&app.pool),
            app.messages.clone(),
            app.collected.clone(),
        ));
        Ok(app)
    }

    /// As [`Self::new`], with a pool that the caller fills, whose state is not collected.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn with_pool(
        config: &Config,
        timeouts: Timeouts,
        pool: Arc<Pool>,
        stop: CancellationToken,
    ) -> Result<Arc<Self>, String> {
        let clients = Clients::new(config.try_timeout / 2, None, None)?;
        Ok(Arc::new(Self {
            pool,
            messages: MessagesClient::new(
                clients,
                config.messages.clone(),
                config.messages_timeout,
            ),
            body_timeout: timeouts.body,
            deadline: config.deadline,
            read_deadline: config.read_deadline,
            max_message: config.max_message.as_u64() as usize,
            posts: Permits::new(MAX_POSTED_BYTES),
            uploads: Permits::new(MAX_UPLOADS),
            reads: Permits::new(config.max_reads.into()),
            followers: Followers::new(config.max_followers.into()),
            lookups: Permits::new(MAX_LOOKUP_BYTES),
            collected: Arc::default(),
            counters: Counters::default(),
            door: Door::new(&config.door, config.listen, &config.host)?.with_rate(config.rate),
            stop,
        }))
    }
}
