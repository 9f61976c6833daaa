//! The least throughput of a client, or of another service, that is waited for.

use std::time::Duration;

use tokio::time::Instant;

/// What a client must send of an upload, or take of a response, in bytes a second on average, while the
/// service waits for it. TCP reports what a client has read in steps of up to 64 KiB on loopback: at this
/// rate a step takes 16 s, about half of the default slack. A modem is faster.
pub const MIN_THROUGHPUT: u32 = 4 * 1024;

/// How far one client is behind a throughput, usually [`MIN_THROUGHPUT`]. Only the time in which the
/// service waits for the client counts; each byte makes up for the time that it may take. So a client
/// that does nothing is too slow after the whole slack, and one that does less soon after it.
#[derive(Debug)]
pub struct Pace {
    slack: Duration,
    /// In bytes a second.
    throughput: u32,
    /// The time for which the client may still be waited for.
    left: Duration,
    waiting_since: Option<Instant>,
}

impl Pace {
    /// A client that has not been waited for yet.
    pub fn new(slack: Duration) -> Self {
        Self::at(MIN_THROUGHPUT, slack)
    }

    /// The same for another throughput, in bytes a second.
    pub fn at(throughput: u32, slack: Duration) -> Self {
        Self {
            slack,
            throughput,
            left: slack,
            waiting_since: None,
        }
    }

    /// Begins to wait for the client, or goes on; at the returned time the client is too slow.
    pub fn wait(&mut self) -> Instant {
        let since = *self.waiting_since.get_or_insert_with(Instant::now);
        // Timers have whole milliseconds: with a rest of one, crumbs would always come in time.
        since + Duration::from_millis(self.left.as_millis() as u64)
    }

    /// Ends the wait: the client has sent or taken so many bytes.
    pub fn progress(&mut self, bytes: usize) {
        let waited = self.waiting_since.take().map(|since| since.elapsed());
        let left = self.left.saturating_sub(waited.unwrap_or_default());
        if left < self.slack {
            let earned = Duration::from_secs_f64(bytes as f64 / f64::from(self.throughput));
            self.left = left.saturating_add(earned).min(self.slack);
        }
    }

    /// Whether the client is being waited for.
    pub fn is_waiting(&self) -> bool {
        self.waiting_since.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SLACK: Duration = Duration::from_secs(30);

    /// The time until a client that does so many bytes at once every `pause` is too slow; at most an hour.
    async fn cut_after(bytes: usize, pause: Duration) -> Option<Duration> {
        let begin = Instant::now();
        let mut pace = Pace::new(SLACK);
        while begin.elapsed() < Duration::from_secs(3600) {
            let too_slow = pace.wait();
            if too_slow < Instant::now() + pause {
                return Some(too_slow - begin);
            }
            tokio::time::advance(pause).await;
            pace.progress(bytes);
        }
        None
    }

    #[tokio::test(start_paused = true)]
    async fn client_is_too_slow_below_the_minimum_only() {
        let second = Duration::from_secs(1);
        let rate = MIN_THROUGHPUT as usize;
        assert_eq!(cut_after(0, second).await, Some(SLACK));
        let crumbs = cut_after(1, 5 * second).await.expect("it is too slow");
        assert!(crumbs < SLACK + second, "{crumbs:?}");
        let half = cut_after(rate / 2, second).await.expect("it is too slow");
        assert!(half < 3 * SLACK, "{half:?}");
        assert_eq!(cut_after(rate, second).await, None);
        assert_eq!(cut_after(16 * rate, 16 * second).await, None);
    }

    /// A client cannot save up more than the slack.
    #[tokio::test(start_paused = true)]
    async fn fast_client_that_stops_is_too_slow_after_the_slack() {
        let mut pace = Pace::new(SLACK);
        pace.wait();
        pace.progress(1 << 30);
        assert_eq!(pace.wait(), Instant::now() + SLACK);
    }
}
