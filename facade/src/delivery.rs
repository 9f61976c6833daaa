//! Delivers one message: decides on which instances, how often, under which UUID and until when it
//! is tried. `judge` decides what an outcome means.

use std::future::poll_fn;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use common::api::PutEntry;
use common::entry::Outcome;
use common::traces::{TRACES, traceparent};
use futures_util::FutureExt;
use metrics::counter;
use smallvec::SmallVec;
use tokio::time::{Instant, timeout_at};
use tower::retry::budget::Budget;
use tracing::{Span, debug_span};
use uuid::Uuid;

use crate::backoff::Backoff;
use crate::batcher::{Answer, BatchFailure, Held};
use crate::error::without_addresses;
use crate::judge::{Doubt, Key, NotStored, Trouble, Verdict, judge};
use crate::metrics::{HEDGE, REPEATS};
use crate::pool::{Instance, Pool};
use crate::upstream::{MaybeStored, say_once};

/// Pause after every instance has failed once; it doubles up to [`MAX_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(20);
const MAX_PAUSE: Duration = Duration::from_millis(500);

/// After this time without an answer a second instance is asked. It is far longer than storing
/// takes, and so short that several hung instances do not use up the deadline.
const HEDGE_AFTER: Duration = Duration::from_millis(200);

/// After this many rejections of a generated UUID's time, give up. Each answer tells the map's clock, so
/// only instances that tell different clocks reject a second one.
const MAX_CLOCK_TRIES: u32 = 3;

/// After this many moves to other partitions, back off. With a third of the partitions down, one
/// message of 19,683 does.
const MAX_MOVES_AT_ONCE: u32 = 8;

#[derive(Debug)]
pub struct Message {
    pub msg: String,
    pub key: Key,
    pub request_id: Option<String>,
    /// The permits or memory that the request reserved.
    pub held: Held,
    pub overload: WhenOverloaded,
}

/// What to do when an instance refused a message and the retry budget is used up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WhenOverloaded {
    /// Fail at once; the caller may retry.
    GiveUp,
    /// Wait for the budget until the deadline, which slows an upload down.
    Wait,
}

#[derive(Debug)]
pub struct Stored {
    pub uuid: Uuid,
    pub msg: String,
    /// The instance that reported the entry stored.
    pub instance: Arc<Instance>,
    /// Whether the entry was in the map before this request.
    pub is_duplicate: bool,
}

/// Stores one message: tries random instances, each once before any is tried again, until one has
/// stored it or `timeout` is over.
///
/// - A retry after a try that may have been executed keeps its UUID, so the map recognizes the
///   entry. A generated UUID is replaced only while no try with it can have been executed.
/// - A try without an answer after 200 ms gets a hedge: a second try on another instance with the
///   same UUID.
/// - An instance that fails a whole batch is down, and its entries go to other instances at once.
///   These retries take nothing from the retry budget: each failure removes one of few instances.
/// - Every other retry and every hedge takes from the retry budget. An instance that refuses while
///   the budget is used up means overload: see [`WhenOverloaded`].
/// - A message whose partition no primary accepts goes to another partition under another UUID, or
///   waits if its UUID must stay. The cause is not a lack of capacity, so this takes no budget.
pub async fn deliver(
    pool: &Pool,
    message: Message,
    timeout: Duration,
) -> Result<Stored, NotStored> {
    Delivery::new(pool, message, timeout).run().await
}

struct Delivery<'pool> {
    pool: &'pool Pool,
    began: Instant,
    deadline: Instant,
    entry: PutEntry,
    key: Key,
    held: Held,
    overload: WhenOverloaded,
    /// Whether an ended try may have stored the message.
    maybe_stored: MaybeStored,
    /// The tries that have not ended.
    pending: SmallVec<[Try; 2]>,
    /// The instances tried in this round.
    tried: SmallVec<[Arc<Instance>; 2]>,
    /// The reason of the last failed try on each instance, for the caller.
    reasons: Vec<(String, String)>,
    backoff: Backoff,
    /// Moves to other partitions.
    moves: u32,
    /// Tries whose UUID had a time that the map rejects.
    clock_tries: u32,
}

/// A message that an instance has in its queue or in a batch.
struct Try {
    instance: Arc<Instance>,
    answer: Answer,
    /// The try's part of the request's trace.
    _span: Span,
}

/// When the next try begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pace {
    Now,
    AfterPause,
    /// After pauses until the retry budget allows it.
    OnBudget,
}

impl<'pool> Delivery<'pool> {
    fn new(pool: &'pool Pool, message: Message, timeout: Duration) -> Self {
        let began = Instant::now();
        let entry = PutEntry {
            uuid: match message.key {
                // Until the map's clock is known.
                Key::Generated => Uuid::nil(),
                Key::Caller(uuid) => uuid,
            },
            msg: message.msg,
            request_id: message.request_id,
            traceparent: None,
        };
        Self {
            pool,
            began,
            deadline: began + timeout,
            entry,
            key: message.key,
            held: message.held,
            overload: message.overload,
            maybe_stored: MaybeStored::No,
            pending: SmallVec::new(),
            tried: SmallVec::new(),
            reasons: Vec::new(),
            backoff: Backoff::new(FIRST_PAUSE, MAX_PAUSE),
            moves: 0,
            clock_tries: 0,
        }
    }

    async fn run(&mut self) -> Result<Stored, NotStored> {
        let first = timeout_at(self.deadline, self.first_instance()).await;
        let first = first.unwrap_or_else(|_| Err(self.give_up()))?;
        self.pool.retry_budget.deposit();
        self.begin_try(first);
        loop {
            let until = self.deadline.min(Instant::now() + HEDGE_AFTER);
            let Ok((instance, answer)) = timeout_at(until, self.next_answer()).await else {
                if Instant::now() >= self.deadline {
                    return Err(self.give_up());
                }
                if let Some(second) = self.hedge() {
                    counter!(REPEATS, "reason" => HEDGE).increment(1);
                    self.begin_try(second);
                }
                continue;
            };
            let doubt = Doubt {
                key: self.key,
                maybe_stored: self.maybe_stored,
                others_pending: !self.pending.is_empty(),
            };
            let judged = judge(answer, doubt);
            self.maybe_stored = judged.maybe_stored;
            let (trouble, detail) = match judged.verdict {
                Verdict::Stored { is_duplicate } => {
                    self.log_continued(&instance.name);
                    return Ok(Stored {
                        uuid: self.entry.uuid,
                        msg: std::mem::take(&mut self.entry.msg),
                        instance,
                        is_duplicate,
                    });
                }
                Verdict::Final(error) => return Err(error),
                Verdict::Again(trouble, detail) => (trouble, detail),
            };
            self.note(&instance.name, detail);
            let next = timeout_at(self.deadline, self.next_instance(trouble)).await;
            if let Some(next) = next.unwrap_or_else(|_| Err(self.give_up()))? {
                if Instant::now() >= self.deadline {
                    return Err(self.give_up());
                }
                counter!(REPEATS, "reason" => trouble.word()).increment(1);
                self.begin_try(next);
            }
        }
    }

    /// Waits for the first answer to a pending try; for ever when there is none.
    fn next_answer(
        &mut self,
    ) -> impl Future<Output = (Arc<Instance>, Result<Outcome, BatchFailure>)> {
        poll_fn(|context| {
            for index in 0..self.pending.len() {
                let answer = self.pending[index].answer.poll_unpin(context);
                if let Poll::Ready(answer) = answer {
                    return Poll::Ready((self.pending.remove(index).instance, answer));
                }
            }
            Poll::Pending
        })
    }

    /// Waits for an instance that is up and not overloaded.
    async fn first_instance(&mut self) -> Result<Arc<Instance>, NotStored> {
        self.pool.served_map.all_asked().await;
        self.pool.served_map.clock.told().await;
        loop {
            if let Some(instance) = self.pool.choose_with_room() {
                return Ok(instance);
            }
            if !self.pool.is_any_up() {
                self.pool.any_up().await;
                continue;
            }
            if self.overload == WhenOverloaded::GiveUp {
                return Err(NotStored::GaveUp {
                    uuid: self.told_uuid(),
                    maybe_stored: MaybeStored::No,
                    detail: "messages arrive faster than instances store them".to_owned(),
                });
            }
            self.backoff.pause().await;
        }
    }

    /// Another instance to try while the first has not answered, if the retry budget allows it.
    fn hedge(&self) -> Option<Arc<Instance>> {
        let second = self.pool.choose_up(&self.tried)?;
        self.pool.retry_budget.withdraw().then_some(second)
    }

    /// Waits until the next try may begin and returns its instance; `None` if a pending try may
    /// still store the message.
    async fn next_instance(
        &mut self,
        trouble: Trouble,
    ) -> Result<Option<Arc<Instance>>, NotStored> {
        if !self.pending.is_empty() {
            let is_down = trouble == Trouble::InstanceDown;
            return Ok(self.pool.choose_up(&self.tried).filter(|_| is_down));
        }
        let mut pace = self.pace(trouble)?;
        loop {
            if pace == Pace::Now
                && let Some(instance) = self.pool.choose_up(&self.tried)
            {
                return Ok(Some(instance));
            }
            self.pool.any_up().await;
            if Instant::now() + self.backoff.next() >= self.deadline {
                // The deadline would cut the try off, which makes its outcome unknown.
                return Err(self.give_up());
            }
            self.backoff.pause().await;
            self.tried.clear();
            if pace != Pace::OnBudget || self.pool.retry_budget.withdraw() {
                pace = Pace::Now;
            }
        }
    }

    fn pace(&mut self, trouble: Trouble) -> Result<Pace, NotStored> {
        match trouble {
            Trouble::InstanceDown => Ok(Pace::Now),
            Trouble::PartitionDown => {
                // With another partition, instances already tried may store the message.
                self.tried.clear();
                self.moves += 1;
                let may_move = self.may_renew() && self.moves <= MAX_MOVES_AT_ONCE;
                Ok(if may_move {
                    Pace::Now
                } else {
                    Pace::AfterPause
                })
            }
            Trouble::ClocksDiffer => {
                self.clock_tries += 1;
                if self.clock_tries == MAX_CLOCK_TRIES {
                    return Err(self.give_up());
                }
                Ok(Pace::Now)
            }
            Trouble::NotTaken | Trouble::Refused if self.pool.retry_budget.withdraw() => {
                Ok(Pace::Now)
            }
            // What may be stored is no new load: its caller would have to repeat it.
            Trouble::Refused
                if self.overload == WhenOverloaded::GiveUp
                    && self.maybe_stored == MaybeStored::No =>
            {
                Err(self.give_up())
            }
            Trouble::NotTaken | Trouble::Refused => Ok(Pace::OnBudget),
        }
    }

    fn may_renew(&self) -> bool {
        self.key == Key::Generated
            && self.maybe_stored == MaybeStored::No
            && self.pending.is_empty()
    }

    /// Queues the entry on an instance, under a new UUID if it may have one.
    fn begin_try(&mut self, instance: Arc<Instance>) {
        if self.may_renew()
            && let Some(uuid) = self.pool.next_uuid()
        {
            self.entry.uuid = uuid;
        }
        self.tried.push(instance.clone());
        let span = debug_span!(
            target: TRACES,
            "put on an instance",
            "otel.kind" = "client",
            "server.address" = instance.address,
        );
        self.entry.traceparent = traceparent(&span);
        let answer = instance.batcher.put(&self.entry, self.held.clone());
        self.pending.push(Try {
            instance,
            answer,
            _span: span,
        });
    }

    /// The UUID to repeat the message with: a new one if it was never tried.
    fn told_uuid(&self) -> Option<Uuid> {
        if self.entry.uuid.is_nil() {
            self.pool.next_uuid()
        } else {
            Some(self.entry.uuid)
        }
    }

    fn note(&mut self, instance: &str, reason: impl Into<String>) {
        self.reasons.retain(|(known, _)| known != instance);
        self.reasons.push((instance.to_owned(), reason.into()));
    }

    fn give_up(&mut self) -> NotStored {
        let maybe_stored = if self.pending.is_empty() {
            self.maybe_stored
        } else {
            MaybeStored::Unknown
        };
        let why = if self.pool.is_any_up() {
            self.failures()
        } else {
            self.pool.down_reasons()
        };
        let detail = without_addresses(&why);
        let uuid = self.told_uuid();
        match self.overload {
            WhenOverloaded::GiveUp => {
                tracing::warn!(?uuid, why, "a POST failed: no logging instance stored it");
            }
            WhenOverloaded::Wait => {
                tracing::debug!(?uuid, why, "a line failed: no logging instance stored it");
            }
        }
        NotStored::GaveUp {
            uuid,
            maybe_stored,
            detail,
        }
    }

    /// The tries that failed or have no answer, with their instances.
    fn failures(&self) -> String {
        let failed = self.reasons.iter();
        let failed = failed.map(|(instance, reason)| (instance.as_str(), reason.clone()));
        let pending = self.pending.iter();
        let pending =
            pending.map(|pending| (pending.instance.name.as_str(), "did not answer".to_owned()));
        say_once(failed.chain(pending), self.pool.instances().len()).join("; ")
    }

    /// Logs a message that the first instance did not store. Lines of uploads are at level debug,
    /// because thousands of them may wait for one instance.
    fn log_continued(&self, instance: &str) {
        if self.reasons.is_empty() && self.pending.is_empty() {
            return;
        }
        let after_ms = self.began.elapsed().as_millis();
        let why = self.failures();
        match self.overload {
            WhenOverloaded::GiveUp => {
                tracing::info!(after_ms, why, "a POST was continued on {instance}");
            }
            WhenOverloaded::Wait => {
                tracing::debug!(after_ms, why, "a line was continued on {instance}");
            }
        }
    }
}
