//! One batcher for each logging instance. While a batch is in flight the next one gathers, so
//! batches grow with the load and nobody waits for a timer.
//!
//! What a failed batch means for its entries is decided here; where they go next is not.

use std::sync::Arc;

use common::entry::{Outcome, PutEntry, PutResult};
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};

use crate::client::{Logging, UpstreamError};
use crate::pool::Health;

/// A batch takes no further entry once it has this many bytes: one group commit's worth, which an
/// instance stores well within its store timeout.
const MAX_BATCH: usize = 1024 * 1024;

/// Memory that a request has reserved, for as long as anything of it is queued.
pub type Reservation = Arc<OwnedSemaphorePermit>;

/// The queue to one instance.
///
/// It has no bound of its own: each entry in it holds the reservation of its request.
#[derive(Debug)]
pub struct Batcher {
    queue: mpsc::UnboundedSender<Queued>,
}

#[derive(Debug)]
struct Queued {
    json: Vec<u8>,
    reply: oneshot::Sender<Outcome>,
    _reserved: Reservation,
}

impl Batcher {
    /// Starts the task that sends the batches. It ends when the batcher is dropped.
    pub fn start(client: Arc<dyn Logging>, health: Arc<Health>) -> Self {
        let (queue, queued) = mpsc::unbounded_channel();
        tokio::spawn(send_batches(client, health, queued));
        Self { queue }
    }

    /// Puts one entry with the next batch. The caller may stop waiting at any time: the entry may
    /// then be stored or not.
    pub async fn put(&self, entry: &PutEntry, reserved: Reservation) -> Outcome {
        let json = serde_json::to_vec(entry).expect("an entry is plain JSON");
        let (reply, outcome) = oneshot::channel();
        let queued = Queued {
            json,
            reply,
            _reserved: reserved,
        };
        if self.queue.send(queued).is_err() {
            return Outcome::refused("the facade is stopping");
        }
        match outcome.await {
            Ok(outcome) => outcome,
            Err(_) => Outcome::unknown("the facade is stopping"),
        }
    }
}

async fn send_batches(
    client: Arc<dyn Logging>,
    health: Arc<Health>,
    mut queue: mpsc::UnboundedReceiver<Queued>,
) {
    while let Some(first) = queue.recv().await {
        let (batch, replies) = gather(first, &mut queue);
        if replies.is_empty() {
            continue;
        }
        match client.put(batch).await {
            Ok(results) => answer_each(replies, results),
            Err(error) => {
                health.note_failure(&error);
                let outcome = outcome_of(&error);
                for reply in replies {
                    let _ = reply.send(outcome.clone());
                }
                if !health.is_up() {
                    refuse_queued(&mut queue, &error);
                }
            }
        }
    }
}

/// Takes what is queued, up to [`MAX_BATCH`], as a JSON array; entries whose caller has given up
/// are left out.
fn gather(
    first: Queued,
    queue: &mut mpsc::UnboundedReceiver<Queued>,
) -> (Vec<u8>, Vec<oneshot::Sender<Outcome>>) {
    let mut batch = vec![b'['];
    let mut replies = Vec::new();
    let mut next = Some(first);
    while let Some(queued) = next {
        if !queued.reply.is_closed() {
            if !replies.is_empty() {
                batch.push(b',');
            }
            batch.extend_from_slice(&queued.json);
            replies.push(queued.reply);
        }
        next = if batch.len() < MAX_BATCH {
            queue.try_recv().ok()
        } else {
            None
        };
    }
    batch.push(b']');
    (batch, replies)
}

fn answer_each(replies: Vec<oneshot::Sender<Outcome>>, results: Vec<PutResult>) {
    let is_complete = results.len() == replies.len();
    if !is_complete {
        tracing::error!("a logging instance answered for another number of entries than it got");
    }
    let mut results = results.into_iter();
    for reply in replies {
        let outcome = match results.next() {
            Some(result) if is_complete => result.outcome,
            _ => Outcome::unknown("the logging instance's answer was incomplete"),
        };
        let _ = reply.send(outcome);
    }
}

/// What waits behind a batch that found the instance dead or hanging was never sent: it can go
/// elsewhere at once.
fn refuse_queued(queue: &mut mpsc::UnboundedReceiver<Queued>, error: &UpstreamError) {
    while let Ok(queued) = queue.try_recv() {
        let detail = format!("the logging instance {error}");
        let _ = queued.reply.send(Outcome::refused(detail));
    }
}

fn outcome_of(error: &UpstreamError) -> Outcome {
    let detail = format!("the logging instance {error}");
    match error {
        UpstreamError::Unreachable(_) => Outcome::refused(detail),
        UpstreamError::Status(status, _) if status.is_client_error() || status.as_u16() == 503 => {
            Outcome::refused(detail)
        }
        UpstreamError::Status(..)
        | UpstreamError::TimedOut
        | UpstreamError::Lost(_)
        | UpstreamError::Garbled(_) => Outcome::unknown(detail),
    }
}
