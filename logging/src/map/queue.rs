//! The queue between the callers of `put` and an engine's writer. It bounds waiting batches in
//! bytes, answers each within the store timeout, and answers `refused` only if it is never written.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::entry::{Entry, Outcome};
use metrics::{gauge, histogram};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use crate::metrics::{COMMIT_DURATION, COMMIT_ENTRIES, FREE_QUEUE};

/// Bytes counted for an entry besides its message, for its key and bookkeeping.
pub(super) const ENTRY_OVERHEAD: usize = 64;

/// Bytes counted for a job besides its entries, so that many small jobs are bounded too.
const JOB_OVERHEAD: usize = 512;

/// Budget for waiting batches, in bytes; a batch beyond it is refused at once.
const MAX_QUEUED_BYTES: usize = 32 * 1024 * 1024;

/// The budget for waiting batches; each one holds its share until it is answered.
#[derive(Clone, Debug)]
pub(super) struct WriteBudget(Arc<Semaphore>);

impl Default for WriteBudget {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(MAX_QUEUED_BYTES)))
    }
}

impl WriteBudget {
    /// Sets the gauge of what is left.
    pub(super) fn measure(&self) {
        gauge!(FREE_QUEUE).set(self.0.available_permits() as f64);
    }

    /// Admits a batch: the job goes to the writer, and its outcomes come on the reply.
    ///
    /// # Errors
    /// The outcome of all entries when the budget is used up.
    pub(super) fn admit(&self, work: Work) -> Result<(Job, PendingReply), Outcome> {
        let sizes = work
            .entries
            .iter()
            .map(|entry| entry.msg.len() + ENTRY_OVERHEAD);
        let bytes = JOB_OVERHEAD + sizes.sum::<usize>();
        let permits = u32::try_from(bytes).unwrap_or(u32::MAX);
        let permit = self.0.clone().try_acquire_many_owned(permits);
        let permit = permit.map_err(|_| Outcome::refused("the write queue is full"))?;
        let (reply, outcomes) = oneshot::channel();
        let claim = Claim::default();
        let job = Job {
            work,
            bytes,
            claim: claim.clone(),
            reply,
            _permit: permit,
        };
        Ok((job, PendingReply { claim, outcomes }))
    }
}

/// What a writer is to do.
#[derive(Debug, Default)]
pub(super) struct Work {
    /// Entries to put; without any, the writer is only checked.
    pub(super) entries: Arc<[Entry]>,
    /// Below it, in milliseconds since the Unix epoch, nothing may be added afterwards; 0 for nothing.
    pub(super) floor: u64,
    /// On Redis, the partitions that get the floor.
    pub(super) partitions: Vec<u16>,
}

impl Work {
    pub(super) fn put(entries: Arc<[Entry]>) -> Self {
        Self {
            entries,
            ..Self::default()
        }
    }

    pub(super) fn settle(floor: u64, partitions: Vec<u16>) -> Self {
        Self {
            floor,
            partitions,
            ..Self::default()
        }
    }
}

/// Records a group commit that began at `began`.
pub(super) fn measure_commit(group: &[Job], began: Instant) {
    let entries: usize = group.iter().map(|job| job.work.entries.len()).sum();
    if entries > 0 {
        histogram!(COMMIT_ENTRIES).record(entries as f64);
        histogram!(COMMIT_DURATION).record(began.elapsed());
    }
}

/// A batch that waits to be written.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) work: Work,
    bytes: usize,
    claim: Claim,
    reply: oneshot::Sender<Result<Vec<Outcome>, Outcome>>,
    _permit: OwnedSemaphorePermit,
}

impl Job {
    /// The number of its outcomes: one for each entry and each partition that gets a floor.
    pub(super) fn outcomes(&self) -> usize {
        self.work.entries.len() + self.work.partitions.len()
    }

    /// Answers with the outcome of each entry, or an error for all of them.
    pub(super) fn answer(self, outcomes: Result<Vec<Outcome>, Outcome>) {
        // A caller whose timeout has passed was answered by its claim.
        let _ = self.reply.send(outcomes);
    }
}

/// Claims the first job, and queued ones until the group has `max_bytes`. Jobs whose callers were
/// answered are left out.
pub(super) fn claim_group(
    first: Vec<Job>,
    queued: impl Iterator<Item = Job>,
    max_bytes: usize,
) -> Vec<Job> {
    let mut group = Vec::new();
    let mut bytes = 0;
    for job in first.into_iter().chain(queued) {
        if job.claim.take() {
            bytes += job.bytes;
            group.push(job);
        }
        if bytes >= max_bytes {
            break;
        }
    }
    group
}

/// Answers a group with the outcomes of all its entries in turn, or an error for all of them.
pub(super) fn answer_group(group: Vec<Job>, outcomes: Result<Vec<Outcome>, Outcome>) {
    let mut outcomes = outcomes.map(Vec::into_iter);
    for job in group {
        let share = match &mut outcomes {
            Ok(outcomes) => Ok(outcomes.take(job.outcomes()).collect()),
            Err(outcome) => Err(outcome.clone()),
        };
        job.answer(share);
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
            Ok(Err(_)) => Err(Outcome::unknown(
                "the map's writer stopped during the commit",
            )),
            Err(_) if self.claim.take() => Err(Outcome::refused(
                "the map's writer was busy until the store timeout",
            )),
            Err(_) => Err(Outcome::unknown("the commit exceeded the store timeout")),
        }
    }
}

/// A job is claimed either by the writer for a commit or by the caller at its timeout, by the first
/// of them only. So a batch that is answered `refused` is never written.
#[derive(Clone, Debug, Default)]
struct Claim(Arc<AtomicBool>);

impl Claim {
    fn take(&self) -> bool {
        !self.0.swap(true, Ordering::AcqRel)
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    fn batch(bytes: usize) -> Arc<[Entry]> {
        Arc::new([Entry {
            uuid: Uuid::now_v7(),
            msg: "a".repeat(bytes),
        }])
    }

    #[test]
    fn batch_beyond_the_budget_is_refused_until_others_are_answered() {
        let budget = WriteBudget::default();
        let half = || budget.admit(Work::put(batch(MAX_QUEUED_BYTES / 2)));
        let (first, _reply) = half().expect("the budget suffices");
        let refused = half().expect_err("two halves and their overhead are too much");
        assert_eq!(refused, Outcome::refused("the write queue is full"));
        first.answer(Ok(vec![Outcome::Stored]));
        half().expect("the budget suffices again");
    }
}
