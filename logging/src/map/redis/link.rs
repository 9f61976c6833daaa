//! The connection on which one server is read and asked about itself. A server that does not
//! answer is not asked again until a probe finds that it does, so nobody else waits for it.

use std::sync::{Arc, PoisonError, Weak};
use std::time::Duration;

use redis::aio::{ConnectionLike, MultiplexedConnection};
use redis::{AsyncConnectionConfig, Client, Pipeline, RedisResult, Value};
use tokio::sync::{Mutex, Notify};
use tokio::time::sleep;

use super::servers::Address;

/// How often a server that is down is asked whether it is back.
pub(super) const PROBE_INTERVAL: Duration = Duration::from_millis(200);

/// Connects, and gives each answer `patience`.
pub(super) async fn connect(
    client: &Client,
    patience: Duration,
) -> RedisResult<MultiplexedConnection> {
    let config = AsyncConnectionConfig::new()
        .set_connection_timeout(Some(patience))
        .set_response_timeout(Some(patience));
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
pub(super) struct Link {
    pub(super) address: Address,
    client: Client,
    patience: Duration,
    connection: Mutex<Option<MultiplexedConnection>>,
    /// Why the server counts as down.
    down: std::sync::Mutex<Option<String>>,
    /// Wakes who finds out which primary has what.
    refresh: Arc<Notify>,
}

impl Link {
    pub(super) fn new(
        address: Address,
        client: Client,
        patience: Duration,
        refresh: Arc<Notify>,
    ) -> Self {
        Self {
            address,
            client,
            patience,
            connection: Mutex::default(),
            down: std::sync::Mutex::default(),
            refresh,
        }
    }

    /// Why the server counts as down, if it does.
    pub(super) fn trouble(&self) -> Option<String> {
        let down = self.down.lock().unwrap_or_else(PoisonError::into_inner);
        down.clone()
    }

    /// Sends a pipeline and gives all replies, errors of the server among them.
    ///
    /// # Errors
    /// What is wrong with the server, with its address, when it does not answer.
    pub(super) async fn ask(self: &Arc<Self>, commands: &Pipeline) -> Result<Vec<Value>, String> {
        if let Some(reason) = self.trouble() {
            return Err(reason);
        }
        match self.try_ask(commands).await {
            Ok(replies) => Ok(replies),
            Err(error) => Err(self.note_failure(&error.to_string())),
        }
    }

    async fn try_ask(&self, commands: &Pipeline) -> RedisResult<Vec<Value>> {
        let mut connection = {
            let mut current = self.connection.lock().await;
            match &*current {
                Some(connection) => connection.clone(),
                None => {
                    let connected = connect(&self.client, self.patience).await?;
                    current.insert(connected).clone()
                }
            }
        };
        send(&mut connection, commands).await
    }

    /// Marks the server down, and probes it from then on until it answers. Nothing is awaited here:
    /// who asked may give up at any moment, and the probe must be under way then.
    fn note_failure(self: &Arc<Self>, error: &str) -> String {
        let reason = format!("redis {} cannot be reached: {error}", self.address);
        let mut down = self.down.lock().unwrap_or_else(PoisonError::into_inner);
        if down.replace(reason.clone()).is_none() {
            tracing::warn!(address = %self.address, error, "a redis server is down");
            self.refresh.notify_one();
            tokio::spawn(probe_until_up(Arc::downgrade(self)));
        }
        reason
    }
}

/// Ends also when nobody uses the link any more.
async fn probe_until_up(link: Weak<Link>) {
    let mut ping = redis::pipe();
    ping.cmd("PING");
    loop {
        if let Some(link) = link.upgrade() {
            *link.connection.lock().await = None;
        }
        sleep(PROBE_INTERVAL).await;
        let Some(link) = link.upgrade() else {
            return;
        };
        let is_up = link.try_ask(&ping).await.is_ok();
        if is_up {
            tracing::info!(address = %link.address, "a redis server is up again");
            *link.down.lock().unwrap_or_else(PoisonError::into_inner) = None;
        }
        // If it is not up, a replica may have taken over meanwhile.
        link.refresh.notify_one();
        if is_up {
            return;
        }
    }
}
