//! The connection on which one server is read and asked about itself. When a request fails, the
//! server is probed. One that does not answer to a probe is not asked again until it does, so nobody
//! else waits for it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, Weak};
use std::time::Duration;

use redis::aio::{ConnectionLike, MultiplexedConnection};
use redis::{AsyncConnectionConfig, Client, Pipeline, RedisError, RedisResult, Value};
use tokio::sync::{Mutex, Notify};
use tokio::time::sleep;

use super::config::Address;

/// How often a server that is down is asked whether it is back.
pub(super) const PROBE_INTERVAL: Duration = Duration::from_millis(200);

/// Connects, and gives each answer `timeout`.
pub(super) async fn connect(
    client: &Client,
    timeout: Duration,
) -> RedisResult<MultiplexedConnection> {
    let config = AsyncConnectionConfig::new()
        .set_connection_timeout(Some(timeout))
        .set_response_timeout(Some(timeout));
    client
        .get_multiplexed_async_connection_with_config(&config)
        .await
}

/// Sends a pipeline and gives all replies, errors of the server among them.
pub(super) async fn send(
    connection: &mut MultiplexedConnection,
    commands: &Pipeline,
) -> RedisResult<Vec<Value>> {
    connection
        .req_packed_commands(commands, 0, commands.len())
        .await
}

/// A server's connection for reads.
#[derive(Debug)]
pub(super) struct ServerConnection {
    pub(super) address: Address,
    client: Client,
    timeout: Duration,
    connection: Mutex<Option<MultiplexedConnection>>,
    /// Why the server counts as down.
    down: std::sync::Mutex<Option<String>>,
    is_probed: AtomicBool,
    /// Wakes who finds out which primary has what.
    wake_discovery: Arc<Notify>,
}

impl ServerConnection {
    pub(super) fn new(
        address: Address,
        client: Client,
        timeout: Duration,
        wake_discovery: Arc<Notify>,
    ) -> Self {
        Self {
            address,
            client,
            timeout,
            connection: Mutex::default(),
            down: std::sync::Mutex::default(),
            is_probed: AtomicBool::new(false),
            wake_discovery,
        }
    }

    /// Why the server counts as down, if it does.
    pub(super) fn down_reason(&self) -> Option<String> {
        let down = self.down.lock().unwrap_or_else(PoisonError::into_inner);
        down.clone()
    }

    /// Sends a pipeline and gives all replies, errors of the server among them.
    ///
    /// # Errors
    /// What is wrong with the server, with its address, when it does not answer.
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

    fn describe(&self, error: &RedisError) -> String {
        format!("redis {} cannot be reached: {error}", self.address)
    }

    async fn try_ask(&self, commands: &Pipeline) -> RedisResult<Vec<Value>> {
        let mut connection = {
            let mut current = self.connection.lock().await;
            match &*current {
                Some(connection) => connection.clone(),
                None => {
                    let connected = connect(&self.client, self.timeout).await?;
                    current.insert(connected).clone()
                }
            }
        };
        let sent = send(&mut connection, commands).await;
        if sent.is_err() {
            *self.connection.lock().await = None;
        }
        sent
    }

    /// Has the server probed, unless it is already. Nothing is awaited here: who asked may give up at
    /// any moment, and the probe must be under way then.
    fn suspect(self: &Arc<Self>) {
        self.wake_discovery.notify_one();
        if !self.is_probed.swap(true, Ordering::AcqRel) {
            tokio::spawn(probe(Arc::downgrade(self)));
        }
    }

    /// Asks for nothing but a sign of life, on a connection of its own: what was asked for before may
    /// take its time on the other.
    async fn ping(&self) -> RedisResult<()> {
        let mut connection = connect(&self.client, self.timeout).await?;
        redis::cmd("PING").query_async(&mut connection).await
    }

    fn set_down(&self, error: Option<&RedisError>) {
        let mut down = self.down.lock().unwrap_or_else(PoisonError::into_inner);
        let reason = error.map(|error| self.describe(error));
        match (&*down, error) {
            (None, Some(error)) => {
                tracing::warn!(address = %self.address, %error, "a redis server is down");
            }
            (Some(_), None) => {
                tracing::info!(address = %self.address, "a redis server is up again");
            }
            _ => {}
        }
        *down = reason;
    }
}

/// Marks a server down while it does not answer to `PING`, however slowly it answers anything else.
/// Ends when it answers, or when nobody uses the server any more.
async fn probe(server: Weak<ServerConnection>) {
    while let Some(server) = server.upgrade() {
        let pinged = server.ping().await;
        server.set_down(pinged.as_ref().err());
        // If it is not up, a replica may have taken over meanwhile.
        server.wake_discovery.notify_one();
        if pinged.is_ok() {
            server.is_probed.store(false, Ordering::Release);
            return;
        }
        drop(server);
        sleep(PROBE_INTERVAL).await;
    }
}
