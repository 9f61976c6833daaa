//! What the handlers share.

use std::sync::Arc;
use std::time::Duration;

use common::serve::Timeouts;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use crate::map::DistributedMap;

/// Memory for batches on their way to the map, in bytes of bodies; what comes on top gets a 503.
const MAX_POSTED_BYTES: usize = 64 * 1024 * 1024;

/// Reads at once; what comes on top gets a 429. A facade has at most one for each of its own.
pub(crate) const MAX_READS: usize = 512;

/// What the handlers share.
#[derive(Clone, Debug)]
pub struct App {
    pub(crate) map: Arc<dyn DistributedMap>,
    /// Memory for batches, in bytes.
    pub(crate) posts: Arc<Semaphore>,
    /// Permits for reads.
    pub(crate) reads: Arc<Semaphore>,
    pub(crate) body_timeout: Duration,
    pub(crate) stop: CancellationToken,
}

impl App {
    /// Everything the handlers need; `stop` is cancelled when the process was told to stop.
    pub fn new(map: Arc<dyn DistributedMap>, timeouts: Timeouts, stop: CancellationToken) -> Self {
        Self {
            map,
            posts: Arc::new(Semaphore::new(MAX_POSTED_BYTES)),
            reads: Arc::new(Semaphore::new(MAX_READS)),
            body_timeout: timeouts.body,
            stop,
        }
    }
}
