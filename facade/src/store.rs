//! Storing one message: on which instance, how often, under which UUID, and until when.

use std::sync::Arc;
use std::time::Duration;

use common::entry::{Outcome, PutEntry, Staleness};
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::time::{Instant, sleep, timeout_at};
use tower::retry::budget::Budget;
use uuid::Uuid;

use crate::batcher::{BatchFailure, Held};
use crate::pool::{Instance, Pool};

/// Pause after every instance has failed once, doubled each time up to [`MAX_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(20);
const MAX_PAUSE: Duration = Duration::from_millis(500);

/// How long a try may be silent before a second instance is asked: far more than storing takes, far
/// less than the try timeout, so that several instances that hang do not use up the deadline.
const HEDGE_AFTER: Duration = Duration::from_millis(200);

const CLOCKS_DIFFER: &str = "does not accept the time: the clocks of this facade and of the map \
                             differ by more than the map tolerates; set them";

/// So often a message is tried whose own UUID's time the map does not accept: the clocks of a cluster's
/// primaries may differ, but when several of them refuse it, the facade's clock is wrong.
const MAX_CLOCK_TRIES: u32 = 3;

/// So often a message goes to another partition before it has to pause: with a third of them down,
/// one of 19,683 does.
const MAX_MOVES_AT_ONCE: u32 = 8;

/// Whose UUID a message gets: only one of ours may ever be replaced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Key {
    /// The facade makes one.
    Own,
    /// The caller's; repeats of it are the same entry.
    Caller(Uuid),
}

/// A message to be stored.
#[derive(Debug)]
pub struct Post {
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

/// Why a message was not stored.
#[derive(Debug)]
pub enum NotStored {
    /// The caller's UUID is another message's.
    Conflict,
    /// The caller's UUID is too old, and not in the map.
    Stale,
    /// The caller's UUID is of a time to come.
    Early,
    /// Every try failed until the deadline.
    GaveUp {
        /// To repeat the message with.
        uuid: Uuid,
        /// Whether one of the tries may have stored it after all.
        certainty: Certainty,
        /// What the last try said.
        detail: String,
    },
}

impl NotStored {
    /// What the caller is told to do.
    pub fn detail(&self) -> String {
        match self {
            Self::Conflict => {
                "this key is another message's; make a new one for each message".to_owned()
            }
            Self::Stale => "this key's time has passed, and it never was stored and never will \
                            be: post again with a new key"
                .to_owned(),
            Self::Early => "this key's time is still to come, and nothing was stored: make keys \
                            from the current time, and post again with a new key"
                .to_owned(),
            Self::GaveUp {
                certainty: Certainty::No,
                detail,
                ..
            } => format!("the message was not stored, post it again: {detail}"),
            Self::GaveUp {
                certainty: Certainty::Unknown,
                detail,
                ..
            } => format!(
                "the message may be stored; repeat it under this uuid, as idempotency-key or in its \
                 line of an upload, then it is stored once: {detail}"
            ),
        }
    }
}

/// What is known about a message after tries that failed, from less doubt to more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Certainty {
    /// Every try was certainly not executed.
    No,
    /// At least one try may have been executed.
    Unknown,
}

impl Certainty {
    /// The word for it in answers.
    pub fn word(self) -> &'static str {
        match self {
            Self::No => "no",
            Self::Unknown => "unknown",
        }
    }
}

/// Stores one message: tries random instances, each once before any is tried again, until one has
/// stored it or `patience` is over.
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
pub async fn store(pool: &Pool, post: Post, patience: Duration) -> Result<Stored, NotStored> {
    let deadline = Instant::now() + patience;
    let mut delivery = Delivery::new(pool, post, deadline);
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
    certainty: Certainty,
    /// The instances whose tries have not ended.
    pending: Vec<Arc<Instance>>,
    /// The instances that were tried in this round.
    tried: Vec<Arc<Instance>>,
    /// What the last try on each instance said, for the caller.
    reasons: Vec<(String, String)>,
    /// Before the next round.
    pause: Duration,
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
    fn new(pool: &'pool Pool, post: Post, deadline: Instant) -> Self {
        let entry = PutEntry {
            uuid: match post.key {
                Key::Own => pool.identifiers.next(),
                Key::Caller(uuid) => uuid,
            },
            msg: post.msg,
            request_id: post.request_id,
        };
        Self {
            pool,
            deadline,
            entry,
            key: post.key,
            held: post.held,
            overload: post.overload,
            certainty: Certainty::No,
            pending: Vec::new(),
            tried: Vec::new(),
            reasons: Vec::new(),
            pause: FIRST_PAUSE,
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
                certainty: self.certainty,
                others_pending: !self.pending.is_empty(),
            };
            let judged = judge(answer, doubt);
            self.certainty = judged.certainty;
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
                    certainty: Certainty::No,
                    detail: "more messages come than the logging instances store".to_owned(),
                });
            }
            self.wait().await;
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
            if Instant::now() + self.pause >= self.deadline {
                // A try that the deadline cuts off would only make its fate unknown.
                return Err(self.give_up());
            }
            self.wait().await;
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

    async fn wait(&mut self) {
        sleep(self.pause).await;
        self.pause = (self.pause * 2).min(MAX_PAUSE);
    }

    /// Whether the entry may get another UUID.
    fn may_renew(&self) -> bool {
        self.key == Key::Own && self.certainty == Certainty::No && self.pending.is_empty()
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
        let certainty = match pending.is_empty() {
            true => self.certainty,
            false => Certainty::Unknown,
        };
        for instance in pending {
            self.note(&instance.name, "did not answer before the deadline");
        }
        let reasons = self.reasons.iter();
        let reasons = reasons.map(|(instance, reason)| format!("{instance} {reason}"));
        let reasons: Vec<String> = reasons.collect();
        NotStored::GaveUp {
            uuid: self.entry.uuid,
            certainty,
            detail: match self.pool.is_any_up() {
                true => reasons.join("; "),
                false => self.pool.down_reasons(),
            },
        }
    }
}

/// What is known of a message when one of its tries ends.
#[derive(Clone, Copy, Debug)]
struct Doubt {
    key: Key,
    /// From the tries that ended before.
    certainty: Certainty,
    /// Whether other tries of it may still be executed.
    others_pending: bool,
}

impl Doubt {
    fn may_be_stored(self) -> bool {
        self.certainty == Certainty::Unknown || self.others_pending
    }
}

/// What a try means for the message, and what is known of it from then on.
#[derive(Debug)]
struct Judged {
    verdict: Verdict,
    certainty: Certainty,
}

#[derive(Debug)]
enum Verdict {
    Stored {
        is_duplicate: bool,
    },
    Final(NotStored),
    /// It is not stored yet, as far as this try knows; with the reason for the caller.
    Again(Trouble, String),
}

/// Why a message has to be tried again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trouble {
    /// The instance is down since this try.
    InstanceDown,
    /// No primary takes the entry's partition now.
    PartitionDown,
    /// The instance certainly did not execute it.
    Refused,
    /// The map's clock does not accept the time of a UUID that the facade made.
    ClocksDiffer,
    /// The instance cannot tell, or the UUID is taken.
    NotTaken,
}

/// Judges one try of a message.
fn judge(answer: Result<Outcome, BatchFailure>, doubt: Doubt) -> Judged {
    let before = doubt.certainty;
    let outcome = match answer {
        Ok(outcome) => outcome,
        Err(BatchFailure {
            detail,
            certainty,
            is_down,
        }) => {
            let trouble = match is_down {
                true => Trouble::InstanceDown,
                false => Trouble::Refused,
            };
            return Judged {
                verdict: Verdict::Again(trouble, detail),
                certainty: before.max(certainty),
            };
        }
    };
    let (verdict, certainty) = match (outcome, doubt.key) {
        (Outcome::Stored, _) | (Outcome::Duplicate, Key::Own) => {
            let is_duplicate = false;
            (Verdict::Stored { is_duplicate }, before)
        }
        (Outcome::Duplicate, Key::Caller(_)) => {
            // A try of ours that may have been executed explains the entry: the caller may never
            // have repeated it.
            let is_duplicate = !doubt.may_be_stored();
            (Verdict::Stored { is_duplicate }, before)
        }
        (Outcome::Conflict, Key::Caller(_)) => (Verdict::Final(NotStored::Conflict), before),
        (Outcome::Conflict, Key::Own) => {
            let detail = "holds another message under this UUID".to_owned();
            (Verdict::Again(Trouble::NotTaken, detail), Certainty::No)
        }
        (Outcome::Stale { when }, Key::Caller(uuid)) => {
            (Verdict::Final(stale_key(uuid, when, doubt)), before)
        }
        (Outcome::Stale { when }, Key::Own) => {
            // When its time has passed, no earlier try of it will ever be stored either.
            let certainty = match when {
                Staleness::Past => Certainty::No,
                Staleness::Leaving | Staleness::Ahead => before,
            };
            let detail = CLOCKS_DIFFER.to_owned();
            (Verdict::Again(Trouble::ClocksDiffer, detail), certainty)
        }
        (
            Outcome::Refused {
                detail,
                is_partition_down,
            },
            _,
        ) => {
            let trouble = match is_partition_down {
                true => Trouble::PartitionDown,
                false => Trouble::Refused,
            };
            (Verdict::Again(trouble, detail), before)
        }
        (Outcome::Unknown { detail }, _) => (
            Verdict::Again(Trouble::NotTaken, detail),
            Certainty::Unknown,
        ),
    };
    Judged { verdict, certainty }
}

/// Why a message under the caller's key is not stored. Unless its time has passed for good, an
/// earlier try that is still on its way may be stored after all.
fn stale_key(uuid: Uuid, when: Staleness, doubt: Doubt) -> NotStored {
    let gave_up = |detail: &str| NotStored::GaveUp {
        uuid,
        certainty: match doubt.may_be_stored() {
            true => Certainty::Unknown,
            false => Certainty::No,
        },
        detail: detail.to_owned(),
    };
    match when {
        Staleness::Past => NotStored::Stale,
        Staleness::Leaving => gave_up("this key is leaving the settle window, take a new one"),
        Staleness::Ahead if doubt.may_be_stored() => gave_up("this key's time is in the future"),
        Staleness::Ahead => NotStored::Early,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: Key = Key::Caller(Uuid::nil());

    /// What a try is judged to mean, in a word, and what is certain from then on.
    fn verdict(
        answer: Result<Outcome, BatchFailure>,
        key: Key,
        certainty: Certainty,
        others_pending: bool,
    ) -> (&'static str, Certainty) {
        let doubt = Doubt {
            key,
            certainty,
            others_pending,
        };
        let judged = judge(answer, doubt);
        let word = match judged.verdict {
            Verdict::Stored { is_duplicate: true } => "duplicate",
            Verdict::Stored {
                is_duplicate: false,
            } => "stored",
            Verdict::Final(NotStored::Conflict) => "conflict",
            Verdict::Final(NotStored::Stale) => "stale",
            Verdict::Final(NotStored::Early) => "early",
            Verdict::Final(NotStored::GaveUp { certainty, .. }) => match certainty {
                Certainty::No => "not stored",
                Certainty::Unknown => "may be stored",
            },
            Verdict::Again(trouble, _) => match trouble {
                Trouble::InstanceDown => "instance down",
                Trouble::PartitionDown => "partition down",
                Trouble::Refused => "refused",
                Trouble::ClocksDiffer => "clocks differ",
                Trouble::NotTaken => "not taken",
            },
        };
        (word, judged.certainty)
    }

    fn stale(when: Staleness) -> Outcome {
        Outcome::Stale { when }
    }

    #[test]
    fn each_outcome_means_one_thing() {
        use Certainty::{No, Unknown};
        use Staleness::{Ahead, Leaving, Past};
        let table = [
            (Outcome::Stored, Key::Own, No, "stored", No),
            (Outcome::Stored, KEY, Unknown, "stored", Unknown),
            (Outcome::Duplicate, Key::Own, No, "stored", No),
            (Outcome::Duplicate, KEY, No, "duplicate", No),
            (Outcome::Duplicate, KEY, Unknown, "stored", Unknown),
            (Outcome::Conflict, KEY, Unknown, "conflict", Unknown),
            (Outcome::Conflict, Key::Own, Unknown, "not taken", No),
            (stale(Past), KEY, No, "stale", No),
            (stale(Past), KEY, Unknown, "stale", Unknown),
            (stale(Leaving), KEY, No, "not stored", No),
            (stale(Leaving), KEY, Unknown, "may be stored", Unknown),
            (stale(Ahead), KEY, No, "early", No),
            (stale(Ahead), KEY, Unknown, "may be stored", Unknown),
            (stale(Past), Key::Own, Unknown, "clocks differ", No),
            (stale(Leaving), Key::Own, Unknown, "clocks differ", Unknown),
            (stale(Ahead), Key::Own, Unknown, "clocks differ", Unknown),
            (Outcome::refused("full"), KEY, No, "refused", No),
            (Outcome::refused("full"), KEY, Unknown, "refused", Unknown),
            (Outcome::partition_down("x"), KEY, No, "partition down", No),
            (Outcome::unknown("lost"), KEY, No, "not taken", Unknown),
        ];
        for (outcome, key, before, word, after) in table {
            let judged = verdict(Ok(outcome.clone()), key, before, false);
            assert_eq!(judged, (word, after), "{outcome:?} {key:?} {before:?}");
        }
    }

    /// A try that is still pending may be executed, as one of unknown fate may have been.
    #[test]
    fn pending_tries_are_doubts() {
        use Certainty::No;
        let judged = |outcome| verdict(Ok(outcome), KEY, No, true).0;
        assert_eq!(judged(Outcome::Duplicate), "stored");
        assert_eq!(judged(stale(Staleness::Leaving)), "may be stored");
        assert_eq!(judged(stale(Staleness::Ahead)), "may be stored");
        assert_eq!(judged(stale(Staleness::Past)), "stale");
    }

    #[test]
    fn failed_batch_leaves_as_much_doubt_as_it_must() {
        use Certainty::{No, Unknown};
        let failure = |certainty, is_down| {
            let detail = String::new();
            Err(BatchFailure {
                detail,
                certainty,
                is_down,
            })
        };
        for (before, of_batch, after) in
            [(No, No, No), (No, Unknown, Unknown), (Unknown, No, Unknown)]
        {
            let down = verdict(failure(of_batch, true), Key::Own, before, false);
            assert_eq!(down, ("instance down", after));
            let refused = verdict(failure(of_batch, false), Key::Own, before, false);
            assert_eq!(refused, ("refused", after));
        }
    }
}
