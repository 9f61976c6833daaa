//! A batch on its way to whoever writes it for an engine: bounded in bytes, answered in time, and
//! told `refused` only when it certainly never will be written.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::entry::{Entry, Outcome};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

/// What an entry costs besides its message: key, bookkeeping of the engine and of the queue.
pub(super) const ENTRY_OVERHEAD: usize = 64;

/// What a job costs besides its entries, so that many small ones are bounded too.
const JOB_OVERHEAD: usize = 512;

/// Entries that may wait to be written, in bytes; more are refused at once.
const MAX_QUEUED_BYTES: usize = 32 * 1024 * 1024;

/// WriteBudget for the batches that wait; what is in it holds its share until it is answered.
#[derive(Clone, Debug)]
pub(super) struct WriteBudget(Arc<Semaphore>);

impl Default for WriteBudget {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(MAX_QUEUED_BYTES)))
    }
}

impl WriteBudget {
    /// Makes a job of a batch, and the reply on which its outcomes come.
    ///
    /// # Errors
    /// The outcome of all its entries when there is no budget.
    pub(super) fn admit(&self, entries: Arc<[Entry]>) -> Result<(Job, PendingReply), Outcome> {
        let sizes = entries.iter().map(|entry| entry.msg.len() + ENTRY_OVERHEAD);
        let bytes = JOB_OVERHEAD + sizes.sum::<usize>();
        let permits = u32::try_from(bytes).unwrap_or(u32::MAX);
        let permit = self.0.clone().try_acquire_many_owned(permits);
        let permit = permit.map_err(|_| Outcome::refused("the write queue is full"))?;
        let (reply, outcomes) = oneshot::channel();
        let claim = Claim::default();
        let job = Job {
            entries,
            bytes,
            claim: claim.clone(),
            reply,
            _permit: permit,
        };
        Ok((job, PendingReply { claim, outcomes }))
    }
}

/// A batch that waits to be written.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) entries: Arc<[Entry]>,
    pub(super) bytes: usize,
    claim: Claim,
    reply: oneshot::Sender<Result<Vec<Outcome>, Outcome>>,
    _permit: OwnedSemaphorePermit,
}

impl Job {
    /// Takes the job for writing. When it says no, the caller was told that nothing happened, and
    /// nothing may happen.
    pub(super) fn claim(&self) -> bool {
        self.claim.take()
    }

    /// Tells the outcome of each entry, or of all. Whoever waited may have given up: then the
    /// claim decided what it was told.
    pub(super) fn answer(self, outcomes: Result<Vec<Outcome>, Outcome>) {
        let _ = self.reply.send(outcomes);
    }
}

/// The caller's side of a [`Job`].
#[derive(Debug)]
pub(super) struct PendingReply {
    claim: Claim,
    outcomes: oneshot::Receiver<Result<Vec<Outcome>, Outcome>>,
}

impl PendingReply {
    /// Waits for the outcomes; an error is the outcome of all entries.
    pub(super) async fn outcomes(self, store_timeout: Duration) -> Result<Vec<Outcome>, Outcome> {
        let answer = tokio::time::timeout(store_timeout, self.outcomes).await;
        match answer {
            Ok(Ok(outcomes)) => outcomes,
            Ok(Err(_)) if self.claim.take() => {
                Err(Outcome::refused("the map's writer has stopped"))
            }
            Ok(Err(_)) => Err(Outcome::unknown("the map's writer stopped meanwhile")),
            Err(_) if self.claim.take() => {
                Err(Outcome::refused("the map's writer was not free in time"))
            }
            Err(_) => Err(Outcome::unknown("the commit was not finished in time")),
        }
    }
}

/// Decides between the writer, who takes a job into a commit, and the caller, whose time is up:
/// only the first one gets it. So a batch whose caller was told `refused` is never written.
#[derive(Clone, Debug, Default)]
struct Claim(Arc<AtomicBool>);

impl Claim {
    fn take(&self) -> bool {
        !self.0.swap(true, Ordering::AcqRel)
    }
}
