//! The queue and the writer of a primary. Batches that queue during a commit are the next group.
//!
//! A writer whose primary does not answer, or has too few replicas, is closed: it refuses batches
//! at once and retries every [`PROBE_INTERVAL`] until it can commit the fence.

use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use common::entry::{Entry, Outcome};
use redis::Client;
use redis::aio::MultiplexedConnection;
use tokio::sync::{Notify, mpsc};
use tokio::time::sleep;

use super::connection::{PROBE_INTERVAL, ServerConnection};
use super::primary::{Primary, Settings, Shared};
use crate::map::queue::{Job, WriteBudget, measure_commit};

/// A group commit takes no further batch beyond this, in bytes: the script blocks the primary.
const MAX_GROUP_BYTES: usize = 512 * 1024;

/// A handle to the writer of a primary.
#[derive(Debug)]
pub(super) struct PrimaryWriter {
    jobs: mpsc::UnboundedSender<Job>,
    shared: Arc<Shared>,
    store_timeout: Duration,
}

impl PrimaryWriter {
    /// Starts the writer. It ends when the handle is dropped and all queued batches are answered.
    pub(super) fn open(
        connection: Arc<ServerConnection>,
        client: Client,
        settings: Settings,
        partitions: Vec<u16>,
        wake_discovery: Arc<Notify>,
    ) -> Self {
        let (jobs, queued) = mpsc::unbounded_channel();
        let shared = Arc::new(Shared {
            closed_reason: Mutex::new(Some(format!(
                "redis {} is not connected yet",
                connection.address
            ))),
            partitions: Mutex::new(partitions),
            fence: AtomicUsize::new(0),
        });
        let store_timeout = settings.store_timeout;
        let writer = Writer {
            primary: Primary {
                connection,
                client,
                settings,
                shared: shared.clone(),
            },
            jobs: queued,
            wake_discovery,
        };
        tokio::spawn(writer.run());
        Self {
            jobs,
            shared,
            store_timeout,
        }
    }

    /// Why the writer is closed, if it is.
    pub(super) fn closed_reason(&self) -> Option<String> {
        self.shared.closed_reason()
    }

    pub(super) fn set_partitions(&self, partitions: Vec<u16>) {
        let current = &self.shared.partitions;
        *current.lock().unwrap_or_else(PoisonError::into_inner) = partitions;
    }

    /// Has a batch written; an error is the outcome of all its entries. An empty batch checks that
    /// the primary and its replicas take entries.
    pub(super) async fn put(
        &self,
        budget: &WriteBudget,
        entries: Arc<[Entry]>,
    ) -> Result<Vec<Outcome>, Outcome> {
        let (job, reply) = budget.admit(entries)?;
        // If the writer has panicked, the reply fails.
        let _ = self.jobs.send(job);
        reply.outcomes(self.store_timeout).await
    }
}

struct Writer {
    primary: Primary,
    jobs: mpsc::UnboundedReceiver<Job>,
    wake_discovery: Arc<Notify>,
}

impl Writer {
    async fn run(mut self) {
        // Batches that come before the first attempt ends wait for it.
        let mut opened = self.primary.open().await;
        loop {
            let reason = match opened {
                Ok(connection) => {
                    let address = &self.primary.connection.address;
                    tracing::info!("redis primary {address} takes entries");
                    self.primary.shared.set_closed_reason(None);
                    // Discovery creates a new map once its primaries take entries.
                    self.wake_discovery.notify_one();
                    match self.serve(connection).await {
                        Some(reason) => reason,
                        None => return,
                    }
                }
                Err(reason) => reason,
            };
            self.close(&reason);
            opened = match self.open_again(&reason).await {
                Some(opened) => opened,
                None => return,
            };
        }
    }

    fn close(&self, reason: &str) {
        let shared = &self.primary.shared;
        let previous = shared.set_closed_reason(Some(reason.to_owned()));
        if previous.as_deref() != Some(reason) {
            let address = &self.primary.connection.address;
            tracing::warn!(reason, "redis primary {address} takes no entries: retrying");
        }
        self.wake_discovery.notify_one();
    }

    /// Retries after a pause and refuses batches until then; `None` when the handle was dropped.
    async fn open_again(&mut self, reason: &str) -> Option<Result<MultiplexedConnection, String>> {
        let attempt = async {
            sleep(PROBE_INTERVAL).await;
            self.primary.open().await
        };
        tokio::pin!(attempt);
        loop {
            tokio::select! {
                opened = &mut attempt => return Some(opened),
                job = self.jobs.recv() => job?.answer(Err(Outcome::partition_down(reason))),
            }
        }
    }

    /// Commits groups until one fails and returns the reason; `None` when the handle was dropped.
    async fn serve(&mut self, mut connection: MultiplexedConnection) -> Option<String> {
        loop {
            let first = self.jobs.recv().await?;
            let group = self.gather(first);
            if let Some(reason) = self.primary.connection.down_reason() {
                for job in group {
                    job.answer(Err(Outcome::partition_down(&reason)));
                }
                return Some(reason);
            }
            let began = Instant::now();
            let committed = self.primary.commit(&group, &mut connection).await;
            measure_commit(&group, began);
            match committed {
                Ok(outcomes) => {
                    let is_refused = |outcome: &Outcome| {
                        matches!(
                            outcome,
                            Outcome::PartitionDown { .. } | Outcome::Refused { .. }
                        )
                    };
                    if outcomes.iter().any(is_refused) {
                        // The partition may have moved to another primary.
                        self.wake_discovery.notify_one();
                    }
                    let mut outcomes = outcomes.into_iter();
                    for job in group {
                        let share = outcomes.by_ref().take(job.entries.len()).collect();
                        job.answer(Ok(share));
                    }
                }
                Err(failure) => {
                    for job in group {
                        job.answer(Err(failure.outcome()));
                    }
                    return Some(failure.detail);
                }
            }
        }
    }

    /// Claims queued jobs, up to [`MAX_GROUP_BYTES`].
    fn gather(&mut self, first: Job) -> Vec<Job> {
        let mut group = Vec::new();
        let mut bytes = 0;
        let mut next = Some(first);
        while let Some(job) = next {
            if job.claim() {
                bytes += job.bytes;
                group.push(job);
            }
            next = if bytes < MAX_GROUP_BYTES {
                self.jobs.try_recv().ok()
            } else {
                None
            };
        }
        group
    }
}
