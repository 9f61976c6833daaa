//! The bounds of an ordered read.

use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::entry;

/// The part of the log to read, and the end to begin at; parsed from a query string.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
pub struct Bounds {
    /// Only entries with a greater UUID.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub after: Option<Uuid>,
    /// Only entries with a smaller UUID.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub before: Option<Uuid>,
    /// The order of the entries.
    #[serde(default)]
    pub order: Order,
}

impl Bounds {
    /// The bounds of what is left to read after `last`, in this order.
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

    /// The bound that a read in this order begins at.
    pub fn near(&self) -> Option<Uuid> {
        match self.order {
            Order::Asc => self.after,
            Order::Desc => self.before,
        }
    }

    /// The part of the bounds with UUIDs smaller than `end`.
    #[must_use]
    pub fn ending_before(self, end: Uuid) -> Self {
        let before = self.before.map_or(end, |before| before.min(end));
        Self {
            before: Some(before),
            ..self
        }
    }

    /// Whether a read within the bounds might never end, because entries are added as fast as they are
    /// read. A descending read always ends; an ascending one ends at a `before` in the past.
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

/// The order of entries: by UUID, hence by time.
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
    fn bounds_are_exclusive_and_may_be_empty() {
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
