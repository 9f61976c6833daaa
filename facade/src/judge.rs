//! What one try of a message means for it: a pure function of the answer and of what is known from the
//! other tries. When and where the next try begins is the subject of `delivery`.

use common::entry::Outcome;
use uuid::Uuid;

use crate::batcher::BatchFailure;
use crate::upstream::MaybeStored;

/// Whose UUID a message gets: only one of ours may ever be replaced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Key {
    /// The facade makes one.
    Generated,
    /// The caller's; repeats of it are the same entry.
    Caller(Uuid),
}

/// Why a message was not stored.
#[derive(Debug)]
pub enum NotStored {
    /// The caller's UUID was already used for another message.
    Conflict,
    /// The caller's UUID is too old, and not in the map.
    Stale,
    /// The caller's UUID is in the future.
    Early,
    /// Every try failed until the deadline.
    GaveUp {
        /// To repeat the message with.
        uuid: Uuid,
        /// Whether one of the tries may have stored it after all.
        maybe_stored: MaybeStored,
        /// What the last try said.
        detail: String,
    },
}

impl NotStored {
    /// What the caller is told to do.
    pub fn detail(&self) -> String {
        match self {
            Self::Conflict => {
                "this key was already used for another message; make a new one for each message"
                    .to_owned()
            }
            Self::Stale => "this key's time has passed, and it never was stored and never will \
                            be: post again with a new key"
                .to_owned(),
            Self::Early => "this key's time is in the future, and nothing was stored: make keys \
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
                "the message may be stored; repeat it under this uuid, as idempotency-key or in its \
                 line of an upload, then it is stored once: {detail}"
            ),
        }
    }
}

/// What is known of a message when one of its tries ends.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Doubt {
    pub(crate) key: Key,
    /// From the tries that ended before.
    pub(crate) maybe_stored: MaybeStored,
    /// Whether other tries of it may still be executed.
    pub(crate) others_pending: bool,
}

impl Doubt {
    fn may_be_stored(self) -> bool {
        self.maybe_stored == MaybeStored::Unknown || self.others_pending
    }

    /// Why a message under the caller's key is not stored, when an earlier try may still store it.
    fn gave_up(self, uuid: Uuid, detail: &str) -> NotStored {
        NotStored::GaveUp {
            uuid,
            maybe_stored: match self.may_be_stored() {
                true => MaybeStored::Unknown,
                false => MaybeStored::No,
            },
            detail: detail.to_owned(),
        }
    }
}

/// What a try means for the message, and what is known of it from then on.
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
    /// It is not stored yet, as far as this try knows; with the reason for the caller.
    Again(Trouble, String),
}

/// Why a message has to be tried again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Trouble {
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
pub(crate) fn judge(answer: Result<Outcome, BatchFailure>, doubt: Doubt) -> Judged {
    let before = doubt.maybe_stored;
    let outcome = match answer {
        Ok(outcome) => outcome,
        Err(BatchFailure {
            detail,
            maybe_stored,
            is_down,
        }) => {
            let trouble = match is_down {
                true => Trouble::InstanceDown,
                false => Trouble::Refused,
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
            // A try of ours that may have been executed explains the entry: the caller may never
            // have repeated it.
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
            let detail = "this key is leaving the settle window, take a new one";
            (Verdict::Final(doubt.gave_up(uuid, detail)), before)
        }
        (Outcome::Early, Key::Caller(uuid)) if doubt.may_be_stored() => {
            let detail = "this key's time is in the future";
            (Verdict::Final(doubt.gave_up(uuid, detail)), before)
        }
        (Outcome::Early, Key::Caller(_)) => (Verdict::Final(NotStored::Early), before),
        // No earlier try of it will ever be stored either.
        (Outcome::Stale, Key::Generated) => (clocks_differ(), MaybeStored::No),
        (Outcome::Leaving | Outcome::Early, Key::Generated) => (clocks_differ(), before),
        (Outcome::Refused { detail }, _) => (Verdict::Again(Trouble::Refused, detail), before),
        (Outcome::PartitionDown { detail }, _) => {
            (Verdict::Again(Trouble::PartitionDown, detail), before)
        }
        (Outcome::Unknown { detail }, _) => (
            Verdict::Again(Trouble::NotTaken, detail),
            MaybeStored::Unknown,
        ),
    };
    Judged {
        verdict,
        maybe_stored,
    }
}

fn clocks_differ() -> Verdict {
    let detail = "does not accept the time: the clocks of this facade and of the map differ by more \
                  than the map tolerates; set them";
    Verdict::Again(Trouble::ClocksDiffer, detail.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: Key = Key::Caller(Uuid::nil());

    /// What a try is judged to mean, in a word, and what is certain from then on.
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

    /// A try that is still pending may be executed, as one of unknown fate may have been.
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
