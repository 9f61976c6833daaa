//! The timeouts of calls to Redis, derived from the store timeout.

use std::time::Duration;

use tokio::time::timeout;

use crate::map::contract::{MapError, Options};

/// The timeout of one call to a server. It is shorter than the store timeout, so that batches
/// queued behind a failing call are answered with its reason and not with their own timeout.
pub(super) fn answer_timeout(options: &Options) -> Duration {
    options.store_timeout * 3 / 4
}

/// The timeout of `WAIT`. It is shorter than the call's, so that `WAIT` returns the number of
/// replicas when they are too few.
pub(super) fn wait_timeout(answer_timeout: Duration) -> Duration {
    answer_timeout * 2 / 3
}

/// Limits a read to the store timeout, as the facade gives up on an instance that hangs.
pub(super) async fn in_time<T>(
    limit: Duration,
    read: impl Future<Output = Result<T, MapError>>,
) -> Result<T, MapError> {
    let result = timeout(limit, read).await;
    result.unwrap_or_else(|_| {
        let detail = "redis did not return the entries within the store timeout";
        Err(MapError::Unavailable(detail.to_owned()))
    })
}
