//! Pauses that double.

use std::time::Duration;

use tokio::time::sleep;

/// The pause before the next try.
#[derive(Debug)]
pub(crate) struct Backoff {
    pause: Duration,
    max: Duration,
}

impl Backoff {
    /// Begins with the pause `first`, which doubles up to `max`.
    pub(crate) fn new(first: Duration, max: Duration) -> Self {
        Self { pause: first, max }
    }

    /// How long the next pause is.
    pub(crate) fn next(&self) -> Duration {
        self.pause
    }

    pub(crate) async fn pause(&mut self) {
        sleep(self.pause).await;
        self.pause = (self.pause * 2).min(self.max);
    }
}
