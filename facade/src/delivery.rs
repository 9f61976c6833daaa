//! The delivery of one message: on which instance, how often, under which UUID, and until when. What an
//! outcome means is decided in `judge`.

use std::sync::Arc;
use std::time::Duration;

use common::api::PutEntry;
use common::entry::Outcome;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::time::{Instant, sleep, timeout_at};
use tower::retry::budget::Budget;
use uuid::Uuid;

use crate::backoff::Backoff;
use crate::batcher::{BatchFailure, Held};
use crate::judge::{Doubt, Key, NotStored, Trouble, Verdict, judge};
use crate::pool::{Instance, Pool};
use crate::upstream::MaybeStored;

/// Pause after every instance has failed once, doubled each time up to [`MAX_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(20);
const MAX_PAUSE: Duration = Duration::from_millis(500);

/// How long a try may be silent before a second instance is asked: far more than storing takes, far
/// less than the try timeout, so that several instances that hang do not use up the deadline.
const HEDGE_AFTER: Duration = Duration::from_millis(200);

/// So often a message is tried whose own UUID's time the map does not accept: the clocks of a cluster's
/// primaries may differ, but when several of them refuse it, the facade's clock is wrong.
const MAX_CLOCK_TRIES: u32 = 3;

/// So often a message goes to another partition before it has to pause: with a third of them down,
/// one of 19,683 does.
const MAX_MOVES_AT_ONCE: u32 = 8;

/// A message to be stored.
#[derive(Debug)]
pub struct Message {
    pub msg: String,
    pub key: Key,
    /// For the logs.
    pub request_id: Option<String>,
    /// What the request has reserved.
    pub held: Held,
    pub overload: WhenOverloaded,
}

/// What becomes of a message that an instance refused while the retry budget is used up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WhenOverloaded {
    /// Its caller is told at once, and may come back.
    GiveUp,
    /// It waits for the budget until its deadline, which slows an upload down.
    Wait,
}

/// A message that is in the map.
#[derive(Debug)]
pub struct Stored {
    pub uuid: Uuid,
    /// `HOST:PORT` of the instance whose answer counted.
    pub instance: String,
    /// Whether the map had held the caller's entry before.
    pub is_duplicate: bool,
}

/// Stores one message: tries random instances, each once before any is tried again, until one has
/// stored it or `timeout` is over.
///
/// - A repeat after a try that may have been executed keeps its UUID, so the map sees that it is the
///   same entry. A UUID of ours is made anew only while every try with it was certainly not executed.
/// - A try that is not answered after 200 ms gets a second one beside it (a hedge), on
///   another instance and under the same UUID.
/// - An instance that fails with its whole batch is down; what it held goes to others at once, and
///   its death costs nothing of the pool's budget for repeats. It costs an instance, and there are few.
/// - Every other repeat and every hedge takes from that budget. When it is used up and an instance
///   refuses, that is overload: see [`WhenOverloaded`].
/// - A message that is refused only because no primary takes its partition goes to another
///   partition, under another UUID; where that is not possible it waits. Neither is for want of
///   capacity, so it costs nothing of the budget.
pub async fn deliver(
    pool: &Pool,
    message: Message,
    timeout: Duration,
) -> Result<Stored, NotStored> {
    let deadline = Instant::now() + timeout;
    let mut delivery = Delivery::new(pool, message, deadline);
    let delivered = timeout_at(deadline, delivery.run()).await;
    delivered.unwrap_or_else(|_| Err(delivery.give_up()))
}

/// A message on its way into the map.
struct Delivery<'pool> {
    pool: &'pool Pool,
    deadline: Instant,
    entry: PutEntry,
    key: Key,
    held: Held,
    overload: WhenOverloaded,
    /// What is known from the tries that have ended.
    maybe_stored: MaybeStored,
    /// The instances whose tries have not ended.
    pending: Vec<Arc<Instance>>,
    /// The instances that were tried in this round.
    tried: Vec<Arc<Instance>>,
    /// What the last try on each instance said, for the caller.
    reasons: Vec<(String, String)>,
    /// Between two rounds.
    backoff: Backoff,
    /// To another partition.
    moves: u32,
    /// Tries for which the map's clock and the facade's differed.
    clock_tries: u32,
}

/// When the next try begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pace {
    Now,
    AfterPause,
    /// After a pause in which the budget has recovered.
    OnBudget,
}

impl<'pool> Delivery<'pool> {
    fn new(pool: &'pool Pool, message: Message, deadline: Instant) -> Self {
        let entry = PutEntry {
            uuid: match message.key {
                Key::Generated => pool.identifiers.next(),
                Key::Caller(uuid) => uuid,
            },
            msg: message.msg,
            request_id: message.request_id,
        };
        Self {
            pool,
            deadline,
            entry,
            key: message.key,
            held: message.held,
            overload: message.overload,
            maybe_stored: MaybeStored::No,
            pending: Vec::new(),
            tried: Vec::new(),
            reasons: Vec::new(),
            backoff: Backoff::new(FIRST_PAUSE, MAX_PAUSE),
            moves: 0,
            clock_tries: 0,
        }
    }

    async fn run(&mut self) -> Result<Stored, NotStored> {
        let first = self.first_instance().await?;
        self.pool.repeats.deposit();
        let mut tries = FuturesUnordered::new();
        tries.push(self.try_on(first));
        loop {
            let ended = tokio::select! {
                ended = tries.next() => ended,
                () = sleep(HEDGE_AFTER) => None,
            };
            let Some((instance, answer)) = ended else {
                if let Some(second) = self.hedge() {
                    tries.push(self.try_on(second));
                }
                continue;
            };
            self.pending
                .retain(|pending| !Arc::ptr_eq(pending, &instance));
            let doubt = Doubt {
                key: self.key,
                maybe_stored: self.maybe_stored,
                others_pending: !self.pending.is_empty(),
            };
            let judged = judge(answer, doubt);
            self.maybe_stored = judged.maybe_stored;
            let (trouble, detail) = match judged.verdict {
                Verdict::Stored { is_duplicate } => {
                    return Ok(Stored {
                        uuid: self.entry.uuid,
                        instance: instance.name.clone(),
                        is_duplicate,
                    });
                }
                Verdict::Final(error) => return Err(error),
                Verdict::Again(trouble, detail) => (trouble, detail),
            };
            self.note(&instance.name, detail);
            if let Some(next) = self.next_instance(trouble).await? {
                tries.push(self.try_on(next));
            }
        }
    }

    /// An instance for the first try, as soon as one is up.
    async fn first_instance(&mut self) -> Result<Arc<Instance>, NotStored> {
        self.pool.served_map.all_asked().await;
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
                    uuid: self.entry.uuid,
                    maybe_stored: MaybeStored::No,
                    detail: "more messages come than the logging instances store".to_owned(),
                });
            }
            self.backoff.pause().await;
        }
    }

    /// A second instance to ask while the first one is silent, if there is one and the budget
    /// allows it.
    fn hedge(&self) -> Option<Arc<Instance>> {
        let second = self.pool.choose_up(&self.tried)?;
        self.pool.repeats.withdraw().then_some(second)
    }

    /// The instance for the next try, in its time; `None` while another try is still pending that
    /// may bring the answer.
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
                // A try that the deadline cuts off would only make its fate unknown.
                return Err(self.give_up());
            }
            self.backoff.pause().await;
            self.tried.clear();
            if pace != Pace::OnBudget || self.pool.repeats.withdraw() {
                pace = Pace::Now;
            }
        }
    }

    fn pace(&mut self, trouble: Trouble) -> Result<Pace, NotStored> {
        match trouble {
            Trouble::InstanceDown => Ok(Pace::Now),
            Trouble::PartitionDown => {
                // Any instance may take it in another partition, this one too.
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
            Trouble::NotTaken | Trouble::Refused if self.pool.repeats.withdraw() => Ok(Pace::Now),
            Trouble::Refused if self.overload == WhenOverloaded::GiveUp => Err(self.give_up()),
            Trouble::NotTaken | Trouble::Refused => Ok(Pace::OnBudget),
        }
    }

    /// Whether the entry may get another UUID.
    fn may_renew(&self) -> bool {
        self.key == Key::Generated
            && self.maybe_stored == MaybeStored::No
            && self.pending.is_empty()
    }

    /// Hands the entry to an instance and returns what comes of it.
    fn try_on(
        &mut self,
        instance: Arc<Instance>,
    ) -> impl Future<Output = (Arc<Instance>, Result<Outcome, BatchFailure>)> + use<> {
        let is_repeat = !self.reasons.is_empty();
        if is_repeat && self.may_renew() {
            self.entry.uuid = self.pool.identifiers.next();
        }
        self.pending.push(instance.clone());
        self.tried.push(instance.clone());
        let answer = instance.batcher.put(&self.entry, self.held.clone());
        async { (instance, answer.await) }
    }

    /// Remembers what an instance said last.
    fn note(&mut self, instance: &str, reason: impl Into<String>) {
        self.reasons.retain(|(known, _)| known != instance);
        self.reasons.push((instance.to_owned(), reason.into()));
    }

    fn give_up(&mut self) -> NotStored {
        let pending = std::mem::take(&mut self.pending);
        let maybe_stored = match pending.is_empty() {
            true => self.maybe_stored,
            false => MaybeStored::Unknown,
        };
        for instance in pending {
            self.note(&instance.name, "did not answer before the deadline");
        }
        let reasons = self.reasons.iter();
        let reasons = reasons.map(|(instance, reason)| format!("{instance} {reason}"));
        let reasons: Vec<String> = reasons.collect();
        NotStored::GaveUp {
            uuid: self.entry.uuid,
            maybe_stored,
            detail: match self.pool.is_any_up() {
                true => reasons.join("; "),
                false => self.pool.down_reasons(),
            },
        }
    }
}
