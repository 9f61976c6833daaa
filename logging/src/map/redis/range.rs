//! A part of the log between two UUIDs, in the form in which Redis's commands take it.

use common::page::{Bounds, Order};
use uuid::Uuid;

/// UUIDs from `low`, which is one of them, to `high`, which is not; all greater ones if there is
/// none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) low: Uuid,
    pub(super) high: Option<Uuid>,
}

impl Range {
    /// What lies within the bounds, or `None` if nothing can.
    pub(super) fn of(bounds: Bounds) -> Option<Self> {
        let low = match bounds.after {
            Some(after) => successor(after)?,
            None => Uuid::nil(),
        };
        Self {
            low,
            high: bounds.before,
        }
        .not_empty()
    }

    /// What is left when `window`, which begins where this does, has been read.
    pub(super) fn behind(self, window: Self, order: Order) -> Option<Self> {
        let rest = match order {
            Order::Asc => Self {
                low: window.high?,
                ..self
            },
            Order::Desc => Self {
                high: Some(window.low),
                ..self
            },
        };
        (self != window).then_some(rest)?.not_empty()
    }

    /// The part from its beginning to `uuid`, which is in it.
    pub(super) fn through(self, uuid: Uuid, order: Order) -> Self {
        match order {
            Order::Asc => Self {
                high: successor(uuid).or(self.high),
                ..self
            },
            Order::Desc => Self { low: uuid, ..self },
        }
    }

    /// The part that begins with `uuid`.
    pub(super) fn from(self, uuid: Uuid, order: Order) -> Self {
        match order {
            Order::Asc => Self { low: uuid, ..self },
            Order::Desc => Self {
                high: successor(uuid),
                ..self
            },
        }
    }

    fn not_empty(self) -> Option<Self> {
        self.high.is_none_or(|high| self.low < high).then_some(self)
    }

    /// Both ends as Redis's commands take them: a member is its UUID and more, so it comes after
    /// the UUID alone.
    pub(super) fn ends(self, order: Order) -> (Vec<u8>, Vec<u8>) {
        let low = [b"[", &self.low.as_bytes()[..]].concat();
        let high = match self.high {
            Some(high) => [b"(", &high.as_bytes()[..]].concat(),
            None => b"+".to_vec(),
        };
        match order {
            Order::Asc => (low, high),
            Order::Desc => (high, low),
        }
    }
}

/// The next greater UUID.
pub(super) fn successor(uuid: Uuid) -> Option<Uuid> {
    uuid.as_u128().checked_add(1).map(Uuid::from_u128)
}

#[cfg(test)]
mod tests {
    use super::*;

    const WHOLE: Range = Range {
        low: Uuid::nil(),
        high: None,
    };

    fn bounds(after: Option<Uuid>, before: Option<Uuid>) -> Bounds {
        Bounds {
            after,
            before,
            ..Bounds::default()
        }
    }

    #[test]
    fn bounds_are_exclusive_and_may_leave_nothing() {
        let (one, two) = (Uuid::from_u128(1), Uuid::from_u128(2));
        assert_eq!(Range::of(bounds(None, None)), Some(WHOLE));
        assert_eq!(Range::of(bounds(Some(one), Some(two))), None);
        assert_eq!(Range::of(bounds(Some(two), Some(one))), None);
        assert_eq!(Range::of(bounds(Some(Uuid::max()), None)), None);
        assert_eq!(Range::of(bounds(None, Some(Uuid::nil()))), None);
    }

    #[test]
    fn part_and_the_rest_behind_it_are_the_whole() {
        let (middle, next) = (Uuid::from_u128(7), Uuid::from_u128(8));
        let part = WHOLE.through(middle, Order::Asc);
        assert_eq!(part.high, Some(next));
        let rest = WHOLE.behind(part, Order::Asc);
        assert_eq!(rest, Some(WHOLE.from(next, Order::Asc)));
        let part = WHOLE.through(middle, Order::Desc);
        assert_eq!(part.low, middle);
        let rest = WHOLE.behind(part, Order::Desc);
        assert_eq!(rest, Some(WHOLE.from(Uuid::from_u128(6), Order::Desc)));
        assert_eq!(WHOLE.behind(WHOLE, Order::Asc), None);
        assert_eq!(WHOLE.through(Uuid::max(), Order::Asc), WHOLE);
    }
}
