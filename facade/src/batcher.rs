//! One batcher for each logging instance. While a batch is in flight the next one gathers, so
//! batches grow with the load and nobody waits for a timer.
//!
//! What a failed batch means for its entries is decided here; where they go next is not.

use std::any::Any;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use common::api::{Batch, EncodedEntry, PutEntry, PutResult};
use common::entry::Outcome;
use tokio::sync::{Notify, oneshot};
use tokio::time::Instant;

use crate::client::LoggingApi;
use crate::health::Health;
use crate::upstream::{MaybeStored, UpstreamError};

/// A batch takes no further entry once it has this many bytes: one group commit's worth, which an
/// instance stores well within its store timeout.
pub(crate) const TARGET_BATCH_BYTES: usize = 1024 * 1024;

/// Batches begin with this limit in bytes, and double it while they are answered in less than half
/// of [`LONG_BATCH`], like TCP's slow start: an instance that stores a few hundred entries a second
/// must not get a batch that it cannot answer within the try timeout.
const FIRST_BATCH: usize = 16 * 1024;

/// A batch that took longer halves the limit.
const LONG_BATCH: Duration = Duration::from_millis(500);

/// The limit is not halved below this, in bytes: a few entries share what a batch costs.
const SMALLEST_BATCH: usize = 1024;

/// A queue has no room for new messages when the first entry has waited for so long and it would
/// take more than [`MAX_WAITING_BATCHES`] to send all of it. Both together, so that neither a burst
/// nor a slow disk alone turns messages away.
const LONG_WAIT: Duration = Duration::from_millis(500);
const MAX_WAITING_BATCHES: usize = 4;

/// What a request has reserved, for as long as anything of it is queued.
pub type Held = Arc<dyn Any + Send + Sync>;

/// The queue to one instance.
///
/// It has no bound of its own in bytes: each entry in it holds the reservation of its request. In
/// time it is bounded by [`Batcher::has_room`].
#[derive(Debug)]
pub struct Batcher {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    queue: Mutex<Queue>,
    /// Wakes the task that sends.
    changed: Notify,
}

#[derive(Debug)]
struct Queue {
    entries: VecDeque<Queued>,
    /// Of all entries, encoded.
    bytes: usize,
    /// How many bytes the next batch may have; one entry may always be sent.
    batch_limit: usize,
    is_closed: bool,
}

#[derive(Debug)]
struct Queued {
    entry: EncodedEntry,
    reply: Reply,
    since: Instant,
    _held: Held,
}

type Reply = oneshot::Sender<Result<Outcome, BatchFailure>>;

/// Why an entry has no outcome of its own: its batch failed as a whole, or was never sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BatchFailure {
    /// For the caller.
    pub detail: String,
    /// Whether the batch may have been executed.
    pub maybe_stored: MaybeStored,
    /// Whether the instance is down because of it; otherwise the instance itself refused the batch.
    pub is_down: bool,
}

impl Batcher {
    /// Starts the task that sends the batches. It ends when the batcher is dropped and what was
    /// queued is answered.
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

    /// Queues one entry for the next batch and returns what will become of it. Whoever drops the
    /// future stops waiting: the entry may then be stored or not.
    pub fn put(
        &self,
        entry: &PutEntry,
        held: Held,
    ) -> impl Future<Output = Result<Outcome, BatchFailure>> + Send + use<> {
        let entry = entry.encode();
        let (reply, outcome) = oneshot::channel();
        let mut queue = self.shared.lock();
        queue.bytes += entry.len();
        queue.entries.push_back(Queued {
            entry,
            reply,
            since: Instant::now(),
            _held: held,
        });
        drop(queue);
        self.shared.changed.notify_one();
        async {
            let stopping = Outcome::unknown("the facade is stopping");
            outcome.await.unwrap_or(Ok(stopping))
        }
    }

    /// Whether the instance keeps up with what it is given, so that it may be given more.
    pub fn has_room(&self) -> bool {
        let queue = self.shared.lock();
        let waited = queue.entries.front().map(|first| first.since.elapsed());
        let is_behind = waited.is_some_and(|waited| waited > LONG_WAIT);
        !is_behind || queue.bytes <= MAX_WAITING_BATCHES * queue.batch_limit
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
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for entries and takes a batch of them; `None` when there will be no more.
    async fn next_batch(&self) -> Option<Vec<Queued>> {
        loop {
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
    /// Takes entries until they have [`Self::batch_limit`] bytes; those whose caller has given up
    /// are left out.
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

    /// Adapts the limit to what the instance stores in time.
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
    while let Some(batch) = shared.next_batch().await {
        let mut body = Batch::default();
        let mut replies = Vec::with_capacity(batch.len());
        for queued in batch {
            body.push(&queued.entry);
            replies.push(queued.reply);
        }
        let (bytes, began) = (body.len(), Instant::now());
        match require_all(client.put(body).await, replies.len()) {
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

/// An answer without a result for each entry is worth nothing: nobody knows whose the results are.
fn require_all(
    answer: Result<Vec<PutResult>, UpstreamError>,
    entries: usize,
) -> Result<Vec<PutResult>, UpstreamError> {
    let results = answer?;
    if results.len() == entries {
        return Ok(results);
    }
    let returned = results.len();
    Err(UpstreamError::Garbled(format!(
        "returned {returned} results for {entries} entries"
    )))
}

/// What waits behind a batch that took the instance down was never sent: it can go elsewhere at
/// once.
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
