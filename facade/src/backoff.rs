//! Exponential backoff.

use std::time::Duration;

use tokio::time::sleep;

#[derive(Debug)]
pub(crate) struct Backoff {
    pause: Duration,
    max: Duration,
}

impl Backoff {
    /// The first pause takes `first`, each next one twice as long, up to `max`.
    pub(crate) fn new(first: Duration, max: Duration) -> Self {
        Self { pause: first, max }
    }

    /// The length of the next pause.
    pub(crate) fn next(&self) -> Duration {
        self.pause
    }

    pub(crate) async fn pause(&mut self) {
        sleep(self.pause).await;
        self.pause = (self.pause * 2).min(self.max);
    }
}
