//! The bounds of an ordered read.

use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::entry;

/// Which part of the log is read, and from which end. Read from a query string.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
pub struct Bounds {
    /// Only entries with a greater UUID.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub after: Option<Uuid>,
    /// Only entries with a smaller UUID.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub before: Option<Uuid>,
    /// The order of the answer.
    #[serde(default)]
    pub order: Order,
}

impl Bounds {
    /// The same bounds for a reader that has had everything up to `last`, in this order.
    #[must_use]
    pub fn resumed_from(self, last: Uuid) -> Self {
        match self.order {
            Order::Asc => Self {
                after: Some(last),
                ..self
            },
            Order::Desc => Self {
                before: Some(last),
                ..self
            },
        }
    }

    /// The bound at which a read in this order begins.
    pub fn near(&self) -> Option<Uuid> {
        match self.order {
            Order::Asc => self.after,
            Order::Desc => self.before,
        }
    }

    /// The same bounds for a reader that wants only what has a smaller UUID than `end` as well.
    #[must_use]
    pub fn ending_before(self, end: Uuid) -> Self {
        let before = self.before.map_or(end, |before| before.min(end));
        Self {
            before: Some(before),
            ..self
        }
    }

    /// Whether new entries could be added within the bounds for as long as they are read: an
    /// ascending read then needs an end. A bound whose time has passed is one.
    pub fn needs_end(&self, now: SystemTime) -> bool {
        let time = |uuid| SystemTime::UNIX_EPOCH + Duration::from_millis(entry::unix_millis(uuid));
        self.order == Order::Asc && self.before.is_none_or(|before| time(before) >= now)
    }

    /// Whether `uuid` lies within the bounds.
    pub fn contains(&self, uuid: Uuid) -> bool {
        self.after.is_none_or(|after| uuid > after)
            && self.before.is_none_or(|before| uuid < before)
    }

    /// Whether no UUID lies within the bounds.
    pub fn is_empty(&self) -> bool {
        let first = self
            .after
            .map_or(0, |after| after.as_u128().saturating_add(1));
        self.after == Some(Uuid::max())
            || self.before.is_some_and(|before| before.as_u128() <= first)
    }
}

/// The order of entries in an answer: by UUID, hence by time.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Order {
    /// Oldest first.
    #[default]
    Asc,
    /// Newest first.
    Desc,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_are_exclusive_and_may_leave_nothing() {
        let (one, two, three) = (Uuid::from_u128(1), Uuid::from_u128(2), Uuid::from_u128(3));
        let bounds = |after, before| Bounds {
            after,
            before,
            ..Bounds::default()
        };
        for (after, before, is_empty) in [
            (None, None, false),
            (Some(one), Some(three), false),
            (Some(one), Some(two), true),
            (Some(two), Some(one), true),
            (Some(Uuid::max()), None, true),
            (None, Some(Uuid::nil()), true),
            (None, Some(one), false),
        ] {
            assert_eq!(
                bounds(after, before).is_empty(),
                is_empty,
                "{after:?} {before:?}"
            );
        }
    }
}
