//! Whether one logging instance is up: what makes the pool skip it, and how it is readmitted.
//!
//! The evidence is work. An instance is down from the first batch that fails as a whole, and up
//! again after a trial batch that it answers. That it accepts connections, or answers other paths,
//! says nothing: an instance that is sick may still do that.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::sleep;

use crate::client::{Logging, UpstreamError};

/// Pause before the next trial of an instance that is down: the longest time for which one that is
/// well again gets nothing.
const TRIAL_PAUSE: Duration = Duration::from_millis(200);

/// An instance that answers its trials and then fails real batches gets its next trial after twice
/// the pause before, at most this many times doubled: 3.2 s.
const MAX_DOUBLINGS: u32 = 4;

/// A batch without entries: the trial.
const EMPTY_BATCH: &[u8] = b"[]";

/// Whether an instance is believed to be up. It is until a request finds otherwise.
#[derive(Debug)]
pub struct Health {
    name: String,
    client: Arc<dyn Logging>,
    is_up: AtomicBool,
    /// How often it went down since it last answered a batch with entries.
    relapses: AtomicU32,
    /// Why it is down, or was last.
    reason: Mutex<String>,
    /// Wakes the messages that wait for any instance.
    readmitted: Arc<Notify>,
}

impl Health {
    pub(crate) fn new(name: String, client: Arc<dyn Logging>, readmitted: Arc<Notify>) -> Self {
        Self {
            name,
            client,
            is_up: AtomicBool::new(true),
            relapses: AtomicU32::new(0),
            reason: Mutex::default(),
            readmitted,
        }
    }

    pub fn is_up(&self) -> bool {
        self.is_up.load(Ordering::Acquire)
    }

    /// Why the instance is down; `None` when it is up.
    pub fn down_reason(&self) -> Option<String> {
        let reason = self.reason.lock().unwrap_or_else(PoisonError::into_inner);
        (!self.is_up()).then(|| reason.clone())
    }

    /// Notes that the instance answered a batch with entries.
    pub(crate) fn note_success(&self) {
        if self.relapses.load(Ordering::Relaxed) > 0 {
            self.relapses.store(0, Ordering::Relaxed);
        }
    }

    /// Marks the instance down after a request that failed, unless it is already, and gives it
    /// trials until it answers one.
    pub fn note_failure(self: &Arc<Self>, error: &UpstreamError) {
        let mut reason = self.reason.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.is_up.swap(false, Ordering::AcqRel) {
            return;
        }
        *reason = error.to_string();
        drop(reason);
        tracing::warn!(instance = self.name, %error, "a logging instance is down");
        let relapses = self.relapses.fetch_add(1, Ordering::Relaxed);
        let pause = TRIAL_PAUSE * 2_u32.pow(relapses.min(MAX_DOUBLINGS));
        tokio::spawn(try_until_up(Arc::downgrade(self), pause));
    }
}

/// Ends also when the instance is no longer one of the pool's.
async fn try_until_up(health: Weak<Health>, pause: Duration) {
    loop {
        sleep(pause).await;
        let Some(health) = health.upgrade() else {
            return;
        };
        match health.client.put(EMPTY_BATCH.to_vec()).await {
            Ok(_) => {
                health.is_up.store(true, Ordering::Release);
                tracing::info!(instance = health.name, "a logging instance is up again");
                health.readmitted.notify_waiters();
                return;
            }
            Err(error) => {
                let mut reason = health.reason.lock().unwrap_or_else(PoisonError::into_inner);
                *reason = error.to_string();
            }
        }
    }
}
