//! The queue and the writer of a primary. Batches that queue during a commit are the next group.
//!
//! A writer whose primary does not answer, or has too few replicas, is closed: it refuses batches
//! at once and retries every [`PROBE_INTERVAL`] until it can commit the fence.

use std::convert::Infallible;
use std::iter;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::{Duration, Instant};

use common::entry::Outcome;
use tokio::sync::{mpsc, watch};
use tokio::time::sleep;

use super::connection::{PROBE_INTERVAL, ServerConnection};
use super::known_map::KnownMap;
use super::primary::{Primary, Session, Shared};
use crate::map::contract::Options;
use crate::map::queue::{Job, Work, WriteBudget, answer_group, claim_group, measure_commit};

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
        options: &Options,
        known: Arc<KnownMap>,
        backups: u16,
        partitions: Vec<u16>,
    ) -> Self {
        let (jobs, queued) = mpsc::unbounded_channel();
        let shared = Arc::new(Shared {
            closed_reason: watch::Sender::new(Some(format!(
                "redis {} is not connected yet",
                connection.address
            ))),
            partitions: watch::Sender::new(partitions),
            fence: AtomicUsize::new(0),
        });
        let writer = Writer {
            primary: Primary {
                connection,
                known,
                access: options.access,
                backups,
                shared: shared.clone(),
                seen: None,
            },
            jobs: queued,
        };
        tokio::spawn(writer.run());
        Self {
            jobs,
            shared,
            store_timeout: options.store_timeout,
        }
    }

    /// Why the writer is closed, if it is.
    pub(super) fn closed_reason(&self) -> Option<String> {
        self.shared.closed_reason.borrow().clone()
    }

    pub(super) fn partitions(&self) -> Vec<u16> {
        self.shared.partitions.borrow().clone()
    }

    pub(super) fn set_partitions(&self, partitions: Vec<u16>) {
        self.shared.partitions.send_replace(partitions);
    }

    /// Has work done; an error is the outcome of all its entries. Without any, it checks that the
    /// primary and its replicas take entries.
    pub(super) async fn put(
        &self,
        budget: &WriteBudget,
        work: Work,
    ) -> Result<Vec<Outcome>, Outcome> {
        let (job, reply) = budget.admit(work)?;
        // If the writer has panicked, the reply fails.
        let _ = self.jobs.send(job);
        reply.outcomes(self.store_timeout).await
    }
}

struct Writer {
    primary: Primary,
    jobs: mpsc::UnboundedReceiver<Job>,
}

impl Writer {
    /// Ends when the handle is dropped.
    async fn run(mut self) -> Option<Infallible> {
        // Batches that come before the first attempt ends wait for it.
        let mut opened = self.primary.open().await;
        loop {
            let reason = match opened {
                Ok(session) => {
                    let address = &self.primary.connection.address;
                    tracing::info!("redis primary {address} takes entries");
                    self.primary.shared.closed_reason.send_replace(None);
                    // Discovery creates a new map once its primaries take entries.
                    self.primary.connection.wake_discovery.notify_one();
                    self.serve(session).await?
                }
                Err(reason) => reason,
            };
            self.close(&reason);
            opened = self.open_again(&reason).await?;
        }
    }

    fn close(&self, reason: &str) {
        let closed_reason = &self.primary.shared.closed_reason;
        let previous = closed_reason.send_replace(Some(reason.to_owned()));
        if previous.as_deref() != Some(reason) {
            let address = &self.primary.connection.address;
            tracing::warn!(reason, "redis primary {address} takes no entries: retrying");
        }
        self.primary.connection.wake_discovery.notify_one();
    }

    /// Retries after a pause and refuses batches until then; `None` when the handle was dropped.
    async fn open_again(&mut self, reason: &str) -> Option<Result<Session, String>> {
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
    async fn serve(&mut self, mut session: Session) -> Option<String> {
        loop {
            let first = self.jobs.recv().await?;
            let queued = iter::from_fn(|| self.jobs.try_recv().ok());
            let group = claim_group(vec![first], queued, MAX_GROUP_BYTES);
            if let Some(reason) = self.primary.connection.down_reason() {
                answer_group(group, Err(Outcome::partition_down(&reason)));
                return Some(reason);
            }
            let began = Instant::now();
            let committed = self.primary.commit(&group, &mut session).await;
            measure_commit(&group, began);
            match committed {
                Ok(outcomes) => {
                    let is_down =
                        |outcome: &Outcome| matches!(outcome, Outcome::PartitionDown { .. });
                    if outcomes.iter().any(is_down) {
                        // The partition may have moved to another primary.
                        self.primary.connection.wake_discovery.notify_one();
                    }
                    answer_group(group, Ok(outcomes));
                }
                Err(failure) => {
                    answer_group(group, Err(failure.outcome()));
                    return Some(failure.detail);
                }
            }
        }
    }
}
