//! Ordered reads: the bounds a reader may give, and how a page ends. The facade takes them from
//! its callers and gives them on to the logging instances in the same form.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

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

    /// Whether `uuid` lies within the bounds.
    pub fn contains(&self, uuid: Uuid) -> bool {
        self.after.is_none_or(|after| uuid > after)
            && self.before.is_none_or(|before| uuid < before)
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

/// The last line of a logging instance's answer to a read.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct PageEnd {
    /// How many entries came before this line.
    pub count: u64,
    /// The last entry's UUID, when the answer was cut and more entries lie within the bounds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<Uuid>,
    /// Where an ascending read ends: what the map held when it began has smaller UUIDs. A reader
    /// that goes on gives it as `before`, so that no read runs after the writers for ever.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub before: Option<Uuid>,
}
