//! How long calls to Redis may take, derived from the store timeout.

use std::time::Duration;

use tokio::time::timeout;

use crate::map::contract::{MapError, Options};

/// How long one call to a server may take: less than its caller waits, so that what waits behind one
/// that fails hears the reason, and not only that its time was up.
pub(super) fn answer_timeout(options: &Options) -> Duration {
    options.store_timeout * 3 / 4
}

/// How long `WAIT` waits: shorter than the whole call may take, so that too few replicas come back as
/// a number.
pub(super) fn wait_timeout(answer_timeout: Duration) -> Duration {
    answer_timeout * 2 / 3
}

/// Reads must be answered as fast as puts: the facade gives up on an instance that hangs.
pub(super) async fn in_time<T>(
    limit: Duration,
    read: impl Future<Output = Result<T, MapError>>,
) -> Result<T, MapError> {
    let result = timeout(limit, read).await;
    result.unwrap_or_else(|_| {
        let detail = "redis did not give the entries in time";
        Err(MapError::Unavailable(detail.to_owned()))
    })
}
