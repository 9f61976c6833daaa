//! Storing one message: on which instance, how often, under which UUID, and until when.

use std::sync::Arc;
use std::time::Duration;

use common::entry::{Outcome, PutEntry, Staleness};
use tokio::time::{Instant, sleep, timeout_at};
use tower::retry::budget::Budget;
use uuid::Uuid;

use crate::batcher::Reservation;
use crate::pool::{Instance, Pool};

/// Pause after every instance has failed once, doubled each time up to [`MAX_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(20);
const MAX_PAUSE: Duration = Duration::from_millis(500);

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
    pub reserved: Reservation,
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

/// What is known about a message after tries that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
/// A repeat after an unknown outcome keeps its UUID, so the map sees that it is the same entry. A
/// UUID of ours is made anew only while every try with it was certainly not executed.
///
/// Repeats take from the pool's retry budget. When it is used up and an instance that is up refuses,
/// that is overload: see [`WhenOverloaded`]. Everything else waits for the budget.
///
/// A message that is refused only because its partition has nobody who takes it goes to another
/// partition, under another UUID; where that is not possible it waits. Neither is for want of
/// capacity, so it costs nothing of the budget.
pub async fn store(pool: &Pool, post: Post, patience: Duration) -> Result<Stored, NotStored> {
    let Post {
        msg,
        key,
        request_id,
        reserved,
        overload,
    } = post;
    let deadline = Instant::now() + patience;
    let mut certainty = Certainty::No;
    let mut detail = "no logging instance is known".to_owned();
    let mut tried = Vec::new();
    let mut pause = FIRST_PAUSE;
    let mut entry = PutEntry {
        uuid: match key {
            Key::Own => Uuid::now_v7(),
            Key::Caller(uuid) => uuid,
        },
        msg,
        request_id,
    };
    pool.retries.deposit();
    let mut may_try = true;
    let mut must_pause = false;
    let mut moves = 0;
    loop {
        let next = if may_try && !must_pause {
            next_instance(pool, &tried)
        } else {
            None
        };
        let Some(instance) = next else {
            if Instant::now() + pause >= deadline {
                return Err(NotStored::GaveUp {
                    uuid: entry.uuid,
                    certainty,
                    detail,
                });
            }
            sleep(pause).await;
            pause = (pause * 2).min(MAX_PAUSE);
            tried.clear();
            may_try = may_try || pool.retries.withdraw();
            must_pause = false;
            continue;
        };
        let outcome = timeout_at(deadline, instance.batcher.put(&entry, reserved.clone()))
            .await
            .unwrap_or_else(|_| Outcome::unknown("no answer came before the deadline"));
        let is_refused = matches!(outcome, Outcome::Refused { .. });
        let is_partition_down = matches!(
            outcome,
            Outcome::Refused {
                is_partition_down: true,
                ..
            }
        );
        detail = match (outcome, key) {
            (Outcome::Stored, _) | (Outcome::Duplicate, Key::Own) => {
                return Ok(stored(entry.uuid, &instance, false));
            }
            (Outcome::Duplicate, Key::Caller(_)) => {
                return Ok(stored(entry.uuid, &instance, true));
            }
            (Outcome::Conflict, Key::Caller(_)) => return Err(NotStored::Conflict),
            (Outcome::Stale { when }, Key::Caller(uuid)) => {
                return Err(match when {
                    Staleness::Ahead => NotStored::Early,
                    Staleness::Past => NotStored::Stale,
                    Staleness::Leaving => NotStored::GaveUp {
                        uuid,
                        certainty,
                        detail: "this key is leaving the settle window: post again with a new key"
                            .to_owned(),
                    },
                });
            }
            (Outcome::Conflict, Key::Own) => {
                certainty = Certainty::No;
                "the UUID is another message's".to_owned()
            }
            (Outcome::Stale { when }, Key::Own) => {
                // An entry whose time has passed never will be stored, also by an earlier try.
                if when == Staleness::Past {
                    certainty = Certainty::No;
                }
                "the clocks of facade and map differ too much".to_owned()
            }
            (Outcome::Refused { detail, .. }, _) => detail,
            (Outcome::Unknown { detail }, _) => {
                certainty = Certainty::Unknown;
                detail
            }
        };
        may_try = is_partition_down || pool.retries.withdraw();
        let is_overloaded = !may_try && is_refused && instance.health.is_up();
        let gives_up = is_overloaded && overload == WhenOverloaded::GiveUp;
        if gives_up || Instant::now() >= deadline {
            return Err(NotStored::GaveUp {
                uuid: entry.uuid,
                certainty,
                detail,
            });
        }
        let may_move = key == Key::Own && certainty == Certainty::No;
        if may_move {
            entry.uuid = Uuid::now_v7();
        }
        if is_partition_down {
            moves += 1;
            must_pause = !may_move || moves > MAX_MOVES_AT_ONCE;
        } else {
            tried.push(instance);
        }
    }
}

/// A random instance that was not tried in this round. One that is down may hang, so it is worth a
/// try only when no other is up.
fn next_instance(pool: &Pool, tried: &[Arc<Instance>]) -> Option<Arc<Instance>> {
    let is_any_up = tried.iter().any(|instance| instance.health.is_up());
    pool.choose(tried)
        .filter(|instance| instance.health.is_up() || !is_any_up)
}

fn stored(uuid: Uuid, instance: &Instance, is_duplicate: bool) -> Stored {
    Stored {
        uuid,
        instance: instance.name.clone(),
        is_duplicate,
    }
}
