//! The connection to a server for reads and discovery. When a request fails, the server is probed;
//! one that does not answer a probe is down, and requests to it fail at once until it answers.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use redis::aio::{ConnectionLike, MultiplexedConnection};
use redis::{AsyncConnectionConfig, Pipeline, RedisError, RedisResult, Value};
use tokio::sync::{Mutex, Notify, watch};
use tokio::time::sleep;

use super::config::{Address, RedisConfig};

/// The interval between probes of a server that is down.
pub(super) const PROBE_INTERVAL: Duration = Duration::from_millis(200);

/// Sends a pipeline and returns all replies, errors of the server among them.
pub(super) async fn send(
    connection: &mut MultiplexedConnection,
    commands: &Pipeline,
) -> RedisResult<Vec<Value>> {
    connection
        .req_packed_commands(commands, 0, commands.len())
        .await
}

/// The connection to a server for reads.
#[derive(Debug)]
pub(super) struct ServerConnection {
    pub(super) address: Address,
    pub(super) config: RedisConfig,
    /// See [`super::timeouts::answer_timeout`].
    pub(super) timeout: Duration,
    connection: Mutex<Option<MultiplexedConnection>>,
    statistics: Mutex<Option<MultiplexedConnection>>,
    down: watch::Sender<Option<Down>>,
    is_probed: AtomicBool,
    pub(super) wake_discovery: Arc<Notify>,
}

/// The state of a server that is down.
#[derive(Debug)]
struct Down {
    reason: String,
    since: Instant,
}

impl ServerConnection {
    pub(super) fn new(
        address: Address,
        config: RedisConfig,
        timeout: Duration,
        wake_discovery: Arc<Notify>,
    ) -> Self {
        Self {
            address,
            config,
            timeout,
            connection: Mutex::default(),
            statistics: Mutex::default(),
            down: watch::Sender::default(),
            is_probed: AtomicBool::new(false),
            wake_discovery,
        }
    }

    /// The same for another server, which is not probed.
    pub(super) fn sibling(&self, address: Address) -> Self {
        let config = self.config.clone();
        Self::new(address, config, self.timeout, self.wake_discovery.clone())
    }

    /// Makes another connection to the server; its timeout bounds this and each reply.
    pub(super) async fn connect(&self) -> RedisResult<MultiplexedConnection> {
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(self.timeout))
            .set_response_timeout(Some(self.timeout));
        self.config
            .client(&self.address)
            .get_multiplexed_async_connection_with_config(&config)
            .await
    }

    /// Sends a pipeline on the connection for statistics, which is made anew after a failure.
    pub(super) async fn ask_for_statistics(&self, commands: &Pipeline) -> RedisResult<Vec<Value>> {
        let mut kept = self.statistics.lock().await;
        let mut connection = match kept.take() {
            Some(connection) => connection,
            None => self.connect().await?,
        };
        let replies = commands.query_async(&mut connection).await?;
        *kept = Some(connection);
        Ok(replies)
    }

    /// Why the server is down, if it is.
    pub(super) fn down_reason(&self) -> Option<String> {
        self.down.borrow().as_ref().map(|down| down.reason.clone())
    }

    /// Sends a pipeline and returns all replies, errors of the server among them.
    ///
    /// # Errors
    /// The server's address and why it cannot be reached.
    pub(super) async fn ask(self: &Arc<Self>, commands: &Pipeline) -> Result<Vec<Value>, String> {
        if let Some(reason) = self.down_reason() {
            return Err(reason);
        }
        match self.try_ask(commands).await {
            Ok(replies) => Ok(replies),
            Err(error) => {
                self.suspect();
                Err(self.describe(&error))
            }
        }
    }

    pub(super) fn describe(&self, error: &RedisError) -> String {
        format!("redis {} cannot be reached: {error}", self.address)
    }

    async fn try_ask(&self, commands: &Pipeline) -> RedisResult<Vec<Value>> {
        let mut connection = {
            let mut current = self.connection.lock().await;
            match &*current {
                Some(connection) => connection.clone(),
                None => current.insert(self.connect().await?).clone(),
            }
        };
        let sent = send(&mut connection, commands).await;
        if sent.is_err() {
            *self.connection.lock().await = None;
        }
        sent
    }

    /// Starts a probe unless one is running, as a task, because the caller may be cancelled.
    fn suspect(self: &Arc<Self>) {
        self.wake_discovery.notify_one();
        if !self.is_probed.swap(true, Ordering::AcqRel) {
            tokio::spawn(probe(Arc::downgrade(self)));
        }
    }

    /// Sends `PING` on a new connection, as slow commands may block the existing one.
    async fn ping(&self) -> RedisResult<()> {
        let mut connection = self.connect().await?;
        redis::cmd("PING").query_async(&mut connection).await
    }

    fn set_down(&self, error: Option<&RedisError>) {
        self.down.send_modify(|down| {
            let since = down.as_ref().map(|down| down.since);
            match (since, error) {
                (None, Some(error)) => {
                    tracing::warn!(%error, "redis {} is down: probing until it answers", self.address);
                }
                (Some(since), None) => {
                    let away_s = since.elapsed().as_secs_f64();
                    tracing::info!(away_s, "redis {} is up again", self.address);
                }
                (None, None) | (Some(_), Some(_)) => {}
            }
            *down = error.map(|error| Down {
                reason: self.describe(error),
                since: since.unwrap_or_else(Instant::now),
            });
        });
    }
}

/// Marks a server down while it does not answer `PING`, until it answers or is no longer used.
async fn probe(server: Weak<ServerConnection>) {
    while let Some(server) = server.upgrade() {
        let pinged = server.ping().await;
        server.set_down(pinged.as_ref().err());
        // If the server is down, a replica may have taken over.
        server.wake_discovery.notify_one();
        if pinged.is_ok() {
            server.is_probed.store(false, Ordering::Release);
            return;
        }
        drop(server);
        sleep(PROBE_INTERVAL).await;
    }
}
