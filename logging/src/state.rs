//! The state that the handlers share.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use common::door::Door;
use common::latest::Latest;
use common::permits::Permits;
use common::serve::Timeouts;
use tokio_util::sync::CancellationToken;

use crate::counters::Counters;
use crate::map::DistributedMap;
use crate::readiness::{Report, keep_checking};

/// Budget for the bodies of batches in progress, in bytes; a batch beyond it gets a 429.
const MAX_POSTED_BYTES: usize = 64 * 1024 * 1024;

/// Concurrent reads; one more gets a 429. A facade sends at most one for each of its own reads.
pub(crate) const MAX_READS: usize = 512;

/// The state that the handlers share.
#[derive(Debug)]
pub struct App {
    pub(crate) map: Arc<dyn DistributedMap>,
    /// One permit is one byte of a batch's body.
    pub(crate) posts: Arc<Permits>,
    pub(crate) reads: Arc<Permits>,
    pub(crate) report: Latest<Report>,
    pub(crate) counters: Counters,
    pub(crate) body_timeout: Duration,
    pub(crate) store_timeout: Duration,
    pub(crate) door: Door,
    pub(crate) stop: CancellationToken,
}

impl App {
    /// `store_timeout` is the map's; `stop` is cancelled when the process is told to stop. Must be called
    /// within a runtime, where the checks run.
    pub fn new(
        map: Arc<dyn DistributedMap>,
        door: Door,
        timeouts: Timeouts,
        store_timeout: Duration,
        stop: CancellationToken,
    ) -> Arc<Self> {
        let app = Arc::new(Self {
            map,
            posts: Permits::new(MAX_POSTED_BYTES),
            reads: Permits::new(MAX_READS),
            report: Latest::default(),
            counters: Counters::default(),
            body_timeout: timeouts.body,
            store_timeout,
            door,
            stop,
        });
        tokio::spawn(keep_checking(Arc::downgrade(&app)));
        app
    }

    /// The map's clock, or this machine's while that is not known.
    pub(crate) fn clock(&self) -> SystemTime {
        let clocks = self.map.clocks();
        clocks.map_or_else(SystemTime::now, |clocks| clocks.map)
    }
}
