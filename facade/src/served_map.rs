//! Which map the facade serves: the one that it began with.
//!
//! Instances tell the id of their map in each answer. If one of them is started on another map, for
//! example because the folder was deleted under it, its answers would make messages appear and
//! disappear. While the facade has served nothing yet and its instances disagree, nobody can tell
//! which map is meant, and it serves neither.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use tokio::sync::Notify;
use uuid::Uuid;

/// The map that a facade serves, shared by the clients of all its instances.
#[derive(Debug, Default)]
pub struct ServedMap {
    /// Set once, when the facade has served something.
    served: OnceLock<Uuid>,
    beginning: Mutex<Beginning>,
    /// Wakes requests that came before all instances were asked.
    asked: Notify,
}

/// What is known until the facade has served something.
#[derive(Debug, Default)]
struct Beginning {
    /// Instances that were not asked yet.
    unasked: usize,
    /// The map's id that each instance told last.
    told: BTreeMap<String, Uuid>,
}

impl ServedMap {
    /// Counts an instance that is going to be asked for the first time.
    pub(crate) fn expect_instance(&self) {
        self.beginning().unasked += 1;
    }

    /// Notes that an instance was asked for the first time, and that it answered or failed.
    pub(crate) fn note_asked(&self) {
        self.beginning().unasked -= 1;
        self.asked.notify_waiters();
    }

    /// Waits until all instances that the facade began with were asked, so that the first one to
    /// answer does not decide alone which map is served.
    pub(crate) async fn all_asked(&self) {
        loop {
            let asked = self.asked.notified();
            if self.served.get().is_some() || self.beginning().unasked == 0 {
                return;
            }
            asked.await;
        }
    }

    /// Checks an answer of the instance, which bears this map's id.
    ///
    /// # Errors
    /// Why the answer must not be used, in words that follow the instance's name.
    pub(crate) fn check(&self, instance: &str, map: Option<Uuid>) -> Result<(), String> {
        let Some(map) = map else {
            return Ok(());
        };
        if let Some(served) = self.served.get() {
            if *served == map {
                return Ok(());
            }
            return Err(format!(
                "serves the map {map}, and this facade began with the map {served}: start the \
                 instance on that map, or restart the facade if the other one is meant"
            ));
        }
        let mut beginning = self.beginning();
        beginning.told.insert(instance.to_owned(), map);
        if beginning.maps().len() == 1 {
            return Ok(());
        }
        Err(format!(
            "serves the map {map}, and other instances serve another one: this facade serves \
             neither until they agree"
        ))
    }

    /// Forgets what an instance told that does not answer any more.
    pub(crate) fn forget(&self, instance: &str) {
        self.beginning().told.remove(instance);
    }

    /// Notes that an answer was used: from now on its map is the one.
    pub(crate) fn note_use(&self) {
        if self.served.get().is_some() {
            return;
        }
        let maps = self.beginning().maps();
        if let (1, Some(map)) = (maps.len(), maps.first()) {
            self.served.get_or_init(|| *map);
        }
    }

    fn beginning(&self) -> MutexGuard<'_, Beginning> {
        self.beginning
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl Beginning {
    fn maps(&self) -> BTreeSet<Uuid> {
        self.told.values().copied().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIRST: Uuid = Uuid::from_u128(1);
    const SECOND: Uuid = Uuid::from_u128(2);

    #[test]
    fn map_that_was_served_stays() {
        let served = ServedMap::default();
        assert!(served.check("a", Some(FIRST)).is_ok());
        served.note_use();
        assert!(served.check("b", Some(SECOND)).is_err());
        assert!(served.check("a", Some(FIRST)).is_ok());
    }

    #[test]
    fn neither_of_two_maps_is_served_until_one_is_left() {
        let served = ServedMap::default();
        assert!(served.check("a", Some(FIRST)).is_ok());
        assert!(served.check("b", Some(SECOND)).is_err());
        served.note_use();
        assert!(served.check("a", Some(FIRST)).is_err());
        served.forget("b");
        assert!(served.check("a", Some(FIRST)).is_ok());
    }

    #[test]
    fn instance_that_does_not_know_its_map_yet_decides_nothing() {
        let served = ServedMap::default();
        assert!(served.check("a", None).is_ok());
        served.note_use();
        assert!(served.check("b", Some(SECOND)).is_ok());
    }
}
