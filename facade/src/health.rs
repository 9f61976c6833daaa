//! The health of one logging instance: the pool skips an instance that is down.
//!
//! An instance is down from a failed batch or read until it answers a trial, a batch without
//! entries. Accepted connections and other answers prove nothing: a broken instance may give them.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use common::api::Batch;
use metrics::counter;
use parking_lot::{Mutex, MutexGuard};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep};

use crate::client::LoggingApi;
use crate::metrics::INSTANCE_FAILURES;
use crate::served_map::ServedMap;
use crate::upstream::UpstreamError;

/// Pause before the next trial of an instance that is down: a recovered instance gets no messages
/// for at most this time.
const TRIAL_PAUSE: Duration = Duration::from_millis(200);

/// The pause doubles, at most this often (to 3.2 s), each time an instance answers a trial and then
/// fails a batch with entries.
const MAX_DOUBLINGS: u32 = 4;

/// An instance is up until a request fails.
#[derive(Debug)]
pub struct Health {
    name: String,
    address: String,
    client: Arc<dyn LoggingApi>,
    is_up: AtomicBool,
    /// When it went down last.
    down_since: Mutex<Instant>,
    /// How often it went down since it last answered a batch with entries.
    relapses: AtomicU32,
    /// Why it is down, or was down last.
    reason: Mutex<String>,
    /// Wakes messages that wait for a healthy instance.
    readmitted: Arc<Notify>,
    served_map: Arc<ServedMap>,
}

impl Health {
    /// Gives a new instance its first trial.
    pub(crate) fn start(
        name: String,
        address: String,
        client: Arc<dyn LoggingApi>,
        readmitted: Arc<Notify>,
        served_map: Arc<ServedMap>,
    ) -> Arc<Self> {
        served_map.expect_instance();
        let health = Arc::new(Self {
            name,
            address,
            client,
            is_up: AtomicBool::new(true),
            down_since: Mutex::new(Instant::now()),
            relapses: AtomicU32::new(0),
            reason: Mutex::default(),
            readmitted,
            served_map,
        });
        tokio::spawn(try_first(health.clone()));
        health
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub fn is_up(&self) -> bool {
        self.is_up.load(Ordering::Acquire)
    }

    /// How long the instance has been down; zero while it is up.
    pub(crate) fn down_for(&self) -> Duration {
        let since = *self.down_since();
        if self.is_up() {
            Duration::ZERO
        } else {
            since.elapsed()
        }
    }

    /// `None` when the instance is up.
    pub fn down_reason(&self) -> Option<String> {
        let reason = self.reason.lock();
        (!self.is_up()).then(|| reason.clone())
    }

    fn down_since(&self) -> MutexGuard<'_, Instant> {
        self.down_since.lock()
    }

    /// Notes that the instance answered a batch with entries.
    pub(crate) fn note_success(&self) {
        if self.relapses.load(Ordering::Relaxed) > 0 {
            self.relapses.store(0, Ordering::Relaxed);
        }
    }

    /// Sends a trial. An instance that refuses it itself is healthy.
    async fn try_once(&self) -> Result<(), UpstreamError> {
        match self.client.put(Batch::default()).await {
            Ok(_) => Ok(()),
            Err(error) if error.is_refusal() => Ok(()),
            Err(error) => {
                if !matches!(error, UpstreamError::OtherMap(_)) {
                    self.served_map.forget(&self.address);
                }
                Err(error)
            }
        }
    }

    /// Marks the instance down, unless it is already, and sends trials until it answers one.
    pub fn note_failure(self: &Arc<Self>, error: &UpstreamError) {
        let mut reason = self.reason.lock();
        if !self.is_up() {
            return;
        }
        *self.down_since() = Instant::now();
        self.is_up.store(false, Ordering::Release);
        *reason = error.to_string();
        drop(reason);
        counter!(INSTANCE_FAILURES, "upstream" => self.name.clone()).increment(1);
        tracing::warn!("{} is down: it {error}", self.name);
        let relapses = self.relapses.fetch_add(1, Ordering::Relaxed);
        let pause = TRIAL_PAUSE * 2_u32.pow(relapses.min(MAX_DOUBLINGS));
        tokio::spawn(try_until_up(Arc::downgrade(self), pause));
    }
}

async fn try_first(health: Arc<Health>) {
    if let Err(error) = health.try_once().await {
        health.note_failure(&error);
    }
    health.served_map.note_asked();
}

/// Ends also when the pool drops the instance.
async fn try_until_up(health: Weak<Health>, pause: Duration) {
    loop {
        sleep(pause).await;
        let Some(health) = health.upgrade() else {
            return;
        };
        match health.try_once().await {
            Ok(()) => {
                health.is_up.store(true, Ordering::Release);
                let away_s = health.down_since().elapsed().as_secs_f64();
                tracing::info!(away_s, "{} is up again", health.name);
                health.readmitted.notify_waiters();
                return;
            }
            Err(error) => {
                let mut reason = health.reason.lock();
                *reason = error.to_string();
            }
        }
    }
}
