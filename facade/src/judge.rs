//! Judges one try of a message: a pure function of its answer and of the state of the other tries.
//! `delivery` decides when and where the next try begins.

use common::entry::Outcome;
use uuid::Uuid;

use crate::batcher::BatchFailure;
use crate::upstream::MaybeStored;

/// The origin of a message's UUID. Only a generated one may be replaced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Key {
    Generated,
    /// Chosen by the caller; retries with it store one entry.
    Caller(Uuid),
}

impl Key {
    pub(crate) fn caller(self) -> Option<Uuid> {
        match self {
            Self::Caller(uuid) => Some(uuid),
            Self::Generated => None,
        }
    }
}

/// Why a message was not stored.
#[derive(Debug)]
pub enum NotStored {
    /// The caller already used the UUID for another message.
    Conflict,
    /// The caller's UUID is too old, and the map has no entry under it.
    Stale,
    /// The caller's UUID is in the future.
    Early,
    /// Every try failed until the deadline.
    GaveUp {
        /// To retry the message with; `None` if it has none yet, as no instance has told the map's clock.
        uuid: Option<Uuid>,
        maybe_stored: MaybeStored,
        /// The reason, for the caller.
        detail: String,
    },
}

impl NotStored {
    /// The reason and the next step, for the caller.
    pub fn detail(&self) -> String {
        match self {
            Self::Conflict => {
                "this key was already used for another message; make a new one for each message"
                    .to_owned()
            }
            Self::Stale => "this key is too old: no POST stored its message and none will; post \
                            again with a new key"
                .to_owned(),
            Self::Early => "this key's time is in the future and nothing was stored: make keys \
                            from the current time, and post again with a new key"
                .to_owned(),
            Self::GaveUp {
                maybe_stored: MaybeStored::No,
                detail,
                ..
            } => format!("the message was not stored, post it again: {detail}"),
            Self::GaveUp {
                maybe_stored: MaybeStored::Unknown,
                detail,
                ..
            } => format!(
                "the message may be stored; to store it once, retry with this uuid as \
                 idempotency-key or in the upload's line: {detail}"
            ),
        }
    }
}

/// The state of a message's other tries when one of them ends.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Doubt {
    pub(crate) key: Key,
    /// By the tries that ended before.
    pub(crate) maybe_stored: MaybeStored,
    /// Whether other tries may still be executed.
    pub(crate) others_pending: bool,
}

impl Doubt {
    fn may_be_stored(self) -> bool {
        self.maybe_stored == MaybeStored::Unknown || self.others_pending
    }

    /// The failure of a message under the caller's key, which another try may still store.
    fn gave_up(self, uuid: Uuid, detail: &str) -> NotStored {
        NotStored::GaveUp {
            uuid: Some(uuid),
            maybe_stored: if self.may_be_stored() {
                MaybeStored::Unknown
            } else {
                MaybeStored::No
            },
            detail: detail.to_owned(),
        }
    }
}

#[derive(Debug)]
pub(crate) struct Judged {
    pub(crate) verdict: Verdict,
    pub(crate) maybe_stored: MaybeStored,
}

#[derive(Debug)]
pub(crate) enum Verdict {
    Stored {
        is_duplicate: bool,
    },
    Final(NotStored),
    /// This try did not store it; with the reason for the caller.
    Again(Trouble, String),
}

/// Why a message has to be tried again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Trouble {
    /// The whole batch failed: the instance is down.
    InstanceDown,
    /// No primary accepts the entry's partition now.
    PartitionDown,
    /// The instance certainly did not execute the try.
    Refused,
    /// The map rejects the time of the generated UUID.
    ClocksDiffer,
    /// The outcome is unknown, or the generated UUID belongs to another message.
    NotTaken,
}

impl Trouble {
    pub(crate) const ALL: [Self; 5] = [
        Self::InstanceDown,
        Self::PartitionDown,
        Self::Refused,
        Self::ClocksDiffer,
        Self::NotTaken,
    ];

    /// The value of `reason` in metrics.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::InstanceDown => "instance_down",
            Self::PartitionDown => "partition_down",
            Self::Refused => "refused",
            Self::ClocksDiffer => "clocks_differ",
            Self::NotTaken => "not_taken",
        }
    }
}

pub(crate) fn judge(answer: Result<Outcome, BatchFailure>, doubt: Doubt) -> Judged {
    let before = doubt.maybe_stored;
    let outcome = match answer {
        Ok(outcome) => outcome,
        Err(BatchFailure {
            detail,
            maybe_stored,
            is_down,
        }) => {
            let trouble = if is_down {
                Trouble::InstanceDown
            } else {
                Trouble::Refused
            };
            return Judged {
                verdict: Verdict::Again(trouble, detail),
                maybe_stored: before.max(maybe_stored),
            };
        }
    };
    let (verdict, maybe_stored) = match (outcome, doubt.key) {
        (Outcome::Stored, _) | (Outcome::Duplicate, Key::Generated) => {
            let is_duplicate = false;
            (Verdict::Stored { is_duplicate }, before)
        }
        (Outcome::Duplicate, Key::Caller(_)) => {
            // Not a duplicate if another try of this request may have stored the entry.
            let is_duplicate = !doubt.may_be_stored();
            (Verdict::Stored { is_duplicate }, before)
        }
        (Outcome::Conflict, Key::Caller(_)) => (Verdict::Final(NotStored::Conflict), before),
        (Outcome::Conflict, Key::Generated) => {
            let detail = "holds another message under this UUID".to_owned();
            (Verdict::Again(Trouble::NotTaken, detail), MaybeStored::No)
        }
        (Outcome::Stale, Key::Caller(_)) => (Verdict::Final(NotStored::Stale), before),
        (Outcome::Leaving, Key::Caller(uuid)) => {
            let detail = "this key is leaving the settle window; use a new one";
            (Verdict::Final(doubt.gave_up(uuid, detail)), before)
        }
        (Outcome::Early, Key::Caller(uuid)) if doubt.may_be_stored() => {
            let detail = "this key's time is in the future";
            (Verdict::Final(doubt.gave_up(uuid, detail)), before)
        }
        (Outcome::Early, Key::Caller(_)) => (Verdict::Final(NotStored::Early), before),
        // The map has no entry under a stale UUID and accepts none, from earlier tries either.
        (Outcome::Stale, Key::Generated) => (clocks_differ(), MaybeStored::No),
        (Outcome::Leaving | Outcome::Early, Key::Generated) => (clocks_differ(), before),
        (Outcome::Refused { detail }, _) => (answered(Trouble::Refused, &detail), before),
        (Outcome::PartitionDown { detail }, _) => {
            (answered(Trouble::PartitionDown, &detail), before)
        }
        (Outcome::Unknown { detail }, _) => {
            (answered(Trouble::NotTaken, &detail), MaybeStored::Unknown)
        }
    };
    Judged {
        verdict,
        maybe_stored,
    }
}

/// A reason in the instance's own words.
fn answered(trouble: Trouble, detail: &str) -> Verdict {
    Verdict::Again(trouble, format!("answered: {detail}"))
}

fn clocks_differ() -> Verdict {
    let detail = "rejects the UUID's time by the map's clock, which the instances tell differently: \
                  see `problems` in /stats";
    Verdict::Again(Trouble::ClocksDiffer, detail.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: Key = Key::Caller(Uuid::nil());

    fn verdict(
        answer: Result<Outcome, BatchFailure>,
        key: Key,
        maybe_stored: MaybeStored,
        others_pending: bool,
    ) -> (&'static str, MaybeStored) {
        let doubt = Doubt {
            key,
            maybe_stored,
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
            Verdict::Final(NotStored::GaveUp { maybe_stored, .. }) => match maybe_stored {
                MaybeStored::No => "not stored",
                MaybeStored::Unknown => "may be stored",
            },
            Verdict::Again(trouble, _) => match trouble {
                Trouble::InstanceDown => "instance down",
                Trouble::PartitionDown => "partition down",
                Trouble::Refused => "refused",
                Trouble::ClocksDiffer => "clocks differ",
                Trouble::NotTaken => "not taken",
            },
        };
        (word, judged.maybe_stored)
    }

    #[test]
    fn each_outcome_means_one_thing() {
        use MaybeStored::{No, Unknown};
        let table = [
            (Outcome::Stored, Key::Generated, No, "stored", No),
            (Outcome::Stored, KEY, Unknown, "stored", Unknown),
            (Outcome::Duplicate, Key::Generated, No, "stored", No),
            (Outcome::Duplicate, KEY, No, "duplicate", No),
            (Outcome::Duplicate, KEY, Unknown, "stored", Unknown),
            (Outcome::Conflict, KEY, Unknown, "conflict", Unknown),
            (Outcome::Conflict, Key::Generated, Unknown, "not taken", No),
            (Outcome::Stale, KEY, No, "stale", No),
            (Outcome::Stale, KEY, Unknown, "stale", Unknown),
            (Outcome::Leaving, KEY, No, "not stored", No),
            (Outcome::Leaving, KEY, Unknown, "may be stored", Unknown),
            (Outcome::Early, KEY, No, "early", No),
            (Outcome::Early, KEY, Unknown, "may be stored", Unknown),
            (Outcome::Stale, Key::Generated, Unknown, "clocks differ", No),
            (
                Outcome::Leaving,
                Key::Generated,
                Unknown,
                "clocks differ",
                Unknown,
            ),
            (
                Outcome::Early,
                Key::Generated,
                Unknown,
                "clocks differ",
                Unknown,
            ),
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

    #[test]
    fn pending_tries_are_doubts() {
        use MaybeStored::No;
        let judged = |outcome| verdict(Ok(outcome), KEY, No, true).0;
        assert_eq!(judged(Outcome::Duplicate), "stored");
        assert_eq!(judged(Outcome::Leaving), "may be stored");
        assert_eq!(judged(Outcome::Early), "may be stored");
        assert_eq!(judged(Outcome::Stale), "stale");
    }

    #[test]
    fn failed_batch_leaves_as_much_doubt_as_it_must() {
        use MaybeStored::{No, Unknown};
        let failure = |maybe_stored, is_down| {
            let detail = String::new();
            Err(BatchFailure {
                detail,
                maybe_stored,
                is_down,
            })
        };
        for (before, of_batch, after) in
            [(No, No, No), (No, Unknown, Unknown), (Unknown, No, Unknown)]
        {
            let down = verdict(failure(of_batch, true), Key::Generated, before, false);
            assert_eq!(down, ("instance down", after));
            let refused = verdict(failure(of_batch, false), Key::Generated, before, false);
            assert_eq!(refused, ("refused", after));
        }
    }
}
