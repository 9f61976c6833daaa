//! One batcher per logging instance. The next batch gathers while one is in flight, so batches grow
//! with the load and no entry waits for a timer.
//!
//! A failed batch fails its entries here; `delivery` retries them.

use std::any::Any;
use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use common::api::{Batch, EncodedEntry, PutEntry, PutResult};
use common::entry::Outcome;
use futures_util::FutureExt;
use metrics::histogram;
use parking_lot::{Mutex, MutexGuard};
use tokio::sync::{Notify, oneshot};
use tokio::task::yield_now;
use tokio::time::Instant;
use uuid::Uuid;

use crate::client::LoggingApi;
use crate::health::Health;
use crate::metrics::{BATCH_DURATION, BATCH_ENTRIES};
use crate::upstream::{MaybeStored, UpstreamError};

/// A batch takes no further entry once it has this many bytes, which an instance stores in one
/// group commit well within its store timeout.
pub(crate) const TARGET_BATCH_BYTES: usize = 1024 * 1024;

/// The first limit of a batch, in bytes. As in TCP's slow start, it doubles while full batches take
/// less than half of [`LONG_BATCH`]: an instance that stores a few hundred entries a second must be
/// able to answer a batch within the try timeout.
const FIRST_BATCH: usize = 16 * 1024;

/// A batch that takes longer halves the limit.
const LONG_BATCH: Duration = Duration::from_millis(500);

/// The lowest limit, in bytes: a few entries still share the cost of a batch.
const SMALLEST_BATCH: usize = 1024;

/// A queue takes no new messages while its first entry has waited longer than this and it fills
/// more than [`MAX_WAITING_BATCHES`], so neither a burst nor a slow disk alone refuses messages.
const LONG_WAIT: Duration = Duration::from_millis(500);
const MAX_WAITING_BATCHES: usize = 4;

/// The permits or memory of a request, held until none of its entries is queued.
pub type Held = Arc<dyn Any + Send + Sync>;

/// The queue to one instance. Its bytes are bounded by the reservation that each entry holds, its
/// waiting time by [`Batcher::has_room`].
#[derive(Debug)]
pub struct Batcher {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    queue: Mutex<Queue>,
    /// Wakes the sending task.
    changed: Notify,
}

#[derive(Debug)]
struct Queue {
    entries: VecDeque<Queued>,
    /// The encoded length of all entries.
    bytes: usize,
    /// The limit of the next batch, in bytes; the entry that reaches it is still sent.
    batch_limit: usize,
    is_closed: bool,
}

#[derive(Debug)]
struct Queued {
    uuid: Uuid,
    entry: EncodedEntry,
    reply: Reply,
    since: Instant,
    _held: Held,
}

type Reply = oneshot::Sender<Result<Outcome, BatchFailure>>;

/// Why an entry has no outcome: its batch failed as a whole or was never sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BatchFailure {
    /// For the caller.
    pub detail: String,
    /// Whether the batch may have been executed.
    pub maybe_stored: MaybeStored,
    /// Whether the instance is down; otherwise it refused the batch.
    pub is_down: bool,
}

impl Batcher {
    /// Starts the sending task, which ends when the batcher is dropped and its queue is answered.
    pub fn start(client: Arc<dyn LoggingApi>, health: Arc<Health>) -> Self {
        let shared = Arc::new(Shared {
            queue: Mutex::new(Queue {
                entries: VecDeque::new(),
                bytes: 0,
                batch_limit: FIRST_BATCH,
                is_closed: false,
            }),
            changed: Notify::new(),
        });
        tokio::spawn(send_batches(client, health, shared.clone()));
        Self { shared }
    }

    /// Queues one entry and returns a future of its outcome. If the future is dropped, the entry
    /// may or may not be stored.
    pub fn put(&self, put: &PutEntry, held: Held) -> Answer {
        let entry = put.encode();
        let (reply, outcome) = oneshot::channel();
        let mut queue = self.shared.lock();
        queue.bytes += entry.len();
        queue.entries.push_back(Queued {
            uuid: put.uuid,
            entry,
            reply,
            since: Instant::now(),
            _held: held,
        });
        drop(queue);
        self.shared.changed.notify_one();
        Answer(outcome)
    }

    /// The encoded length of all entries that wait for a batch.
    pub(crate) fn queued_bytes(&self) -> usize {
        self.shared.lock().bytes
    }

    /// Whether the instance keeps up with its queue and may get new messages.
    pub fn has_room(&self) -> bool {
        let queue = self.shared.lock();
        let waited = queue.entries.front().map(|first| first.since.elapsed());
        let is_behind = waited.is_some_and(|waited| waited > LONG_WAIT);
        !is_behind || queue.bytes <= MAX_WAITING_BATCHES * queue.batch_limit
    }
}

/// The future outcome of an entry.
#[derive(Debug)]
pub struct Answer(oneshot::Receiver<Result<Outcome, BatchFailure>>);

impl Future for Answer {
    type Output = Result<Outcome, BatchFailure>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let answer = ready!(self.0.poll_unpin(context));
        Poll::Ready(answer.unwrap_or_else(|_| Ok(Outcome::unknown("the facade is stopping"))))
    }
}

impl Drop for Batcher {
    fn drop(&mut self) {
        self.shared.lock().is_closed = true;
        self.shared.changed.notify_one();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock()
    }

    /// `None` when the batcher is dropped and its queue is empty.
    async fn next_batch(&self) -> Option<Vec<Queued>> {
        loop {
            // The tasks that can run now may have entries for the batch.
            yield_now().await;
            {
                let mut queue = self.lock();
                let batch = queue.take_batch();
                if !batch.is_empty() {
                    return Some(batch);
                }
                if queue.is_closed {
                    return None;
                }
            }
            self.changed.notified().await;
        }
    }
}

impl Queue {
    /// Takes entries up to [`Self::batch_limit`] and skips those whose caller has given up.
    fn take_batch(&mut self) -> Vec<Queued> {
        let mut batch = Vec::new();
        let mut bytes = 0;
        while bytes < self.batch_limit
            && let Some(queued) = self.entries.pop_front()
        {
            self.bytes -= queued.entry.len();
            if !queued.reply.is_closed() {
                bytes += queued.entry.len();
                batch.push(queued);
            }
        }
        batch
    }

    fn take_all(&mut self) -> VecDeque<Queued> {
        self.bytes = 0;
        std::mem::take(&mut self.entries)
    }

    fn note_answered(&mut self, bytes: usize, took: Duration) {
        if took > LONG_BATCH {
            self.batch_limit = (self.batch_limit / 2).max(SMALLEST_BATCH);
        } else if took < LONG_BATCH / 2 && bytes >= self.batch_limit {
            self.batch_limit = (self.batch_limit * 2).min(TARGET_BATCH_BYTES);
        }
    }

    fn note_failed(&mut self) {
        self.batch_limit = self.batch_limit.min(FIRST_BATCH);
    }
}

async fn send_batches(client: Arc<dyn LoggingApi>, health: Arc<Health>, shared: Arc<Shared>) {
    let batch_entries = histogram!(BATCH_ENTRIES, "upstream" => health.name().to_owned());
    let batch_duration = histogram!(BATCH_DURATION, "upstream" => health.name().to_owned());
    while let Some(batch) = shared.next_batch().await {
        let body = Batch::of(batch.iter().map(|queued| &queued.entry));
        let bytes = body.len();
        let sent = batch.into_iter().map(|queued| (queued.uuid, queued.reply));
        let (uuids, replies): (Vec<Uuid>, Vec<Reply>) = sent.unzip();
        let began = Instant::now();
        let answer = client.put(body).await;
        let answer = answer.and_then(|results| require_all(results, &uuids));
        batch_entries.record(replies.len() as f64);
        batch_duration.record(began.elapsed());
        match answer {
            Ok(results) => {
                health.note_success();
                shared.lock().note_answered(bytes, began.elapsed());
                for (reply, result) in replies.into_iter().zip(results) {
                    let _ = reply.send(Ok(result.outcome));
                }
            }
            Err(error) => {
                let failure = BatchFailure::of(&error);
                if failure.is_down {
                    health.note_failure(&error);
                    refuse_queued(&shared, &failure);
                }
                for reply in replies {
                    let _ = reply.send(Err(failure.clone()));
                }
            }
        }
    }
}

/// Rejects an answer that does not have the result of each entry at its position.
fn require_all(results: Vec<PutResult>, sent: &[Uuid]) -> Result<Vec<PutResult>, UpstreamError> {
    let (returned, entries) = (results.len(), sent.len());
    if returned != entries {
        return Err(UpstreamError::Garbled(format!(
            "returned {returned} results for {entries} entries"
        )));
    }
    let mut pairs = results.iter().zip(sent);
    match pairs.find(|(result, uuid)| result.uuid != **uuid) {
        None => Ok(results),
        Some((result, uuid)) => Err(UpstreamError::Garbled(format!(
            "returned a result of {} for {uuid}",
            result.uuid
        ))),
    }
}

/// Entries queued behind the batch that failed were never sent: other instances can take them.
fn refuse_queued(shared: &Shared, failure: &BatchFailure) {
    let waiting = {
        let mut queue = shared.lock();
        queue.note_failed();
        queue.take_all()
    };
    let never_sent = BatchFailure {
        maybe_stored: MaybeStored::No,
        ..failure.clone()
    };
    for queued in waiting {
        let _ = queued.reply.send(Err(never_sent.clone()));
    }
}

impl BatchFailure {
    fn of(error: &UpstreamError) -> Self {
        Self {
            detail: error.to_string(),
            maybe_stored: error.maybe_stored(),
            is_down: !error.is_refusal(),
        }
    }
}
