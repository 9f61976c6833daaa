//! The facade serves one map: that of the first answer it used.
//!
//! Each answer of an instance has the id of its map. Answers of an instance on another map, for
//! example after its folder was deleted, would make messages appear and disappear. While the facade
//! has served nothing and its instances have different maps, it serves none of them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, SystemTime};

use common::clock::MapClock;
use tokio::sync::Notify;
use uuid::Uuid;

/// A smaller difference between clocks explains no refused UUID: the message has waited, or the key is its
/// caller's.
const MAX_DIFFERENCE: Duration = Duration::from_secs(1);

/// The map that the facade serves, shared by the clients of all instances.
#[derive(Debug, Default)]
pub struct ServedMap {
    /// The map's clock, as instances tell it.
    pub clock: MapClock,
    /// Set when the facade has used the first answer.
    served: OnceLock<Uuid>,
    beginning: Mutex<Beginning>,
    /// Wakes requests that wait in [`Self::all_asked`].
    asked: Notify,
}

/// The state until the facade has served something.
#[derive(Debug, Default)]
struct Beginning {
    /// The number of instances whose first trial has not ended.
    unasked: usize,
    /// The last map id of each instance.
    last_maps: BTreeMap<String, Uuid>,
}

impl ServedMap {
    /// Of a map whose clock the caller provides.
    pub fn with_clock(clock: MapClock) -> Self {
        Self {
            clock,
            ..Self::default()
        }
    }

    /// By how much the map's clock differs from this machine's, if that matters to a caller's keys.
    pub(crate) fn clock_difference(&self) -> Option<String> {
        let (map, machine) = (self.clock.now()?, SystemTime::now());
        let (difference, direction) = match map.duration_since(machine) {
            Ok(ahead) => (ahead, "ahead of"),
            Err(error) => (error.duration(), "behind"),
        };
        (difference > MAX_DIFFERENCE).then(|| {
            let seconds = difference.as_secs();
            format!("the map's clock is {seconds} s {direction} this machine's")
        })
    }

    /// Takes the clock in an answer that has refused a UUID for its time.
    pub(crate) fn retime(&self, clock: SystemTime) {
        let now = self.clock.now().unwrap_or(SystemTime::UNIX_EPOCH);
        let difference = clock
            .duration_since(now)
            .unwrap_or_else(|error| error.duration());
        // A caller's own key may have any time: it says nothing of this facade's.
        if difference > MAX_DIFFERENCE {
            self.clock.set(clock);
        }
    }

    /// The map that requests to instances name: the served one, or the only one that was seen.
    pub(crate) fn named(&self) -> Option<Uuid> {
        let served = self.served.get().copied();
        served.or_else(|| {
            let maps = self.beginning().maps();
            maps.first().copied().filter(|_| maps.len() == 1)
        })
    }

    /// Counts an instance whose first trial begins.
    pub(crate) fn expect_instance(&self) {
        self.beginning().unasked += 1;
    }

    /// Notes that the first trial of an instance ended, with an answer or an error.
    pub(crate) fn note_asked(&self) {
        self.beginning().unasked -= 1;
        self.asked.notify_waiters();
    }

    /// Waits until the first trials of all instances ended, so that the fastest instance does not
    /// decide alone which map is served.
    pub(crate) async fn all_asked(&self) {
        loop {
            let asked = self.asked.notified();
            if self.served.get().is_some() || self.beginning().unasked == 0 {
                return;
            }
            asked.await;
        }
    }

    /// Checks the map id in an answer of the instance.
    ///
    /// # Errors
    /// Why the answer must not be used, as a text to follow the instance's name.
    pub(crate) fn check(&self, instance: &str, map: Option<Uuid>) -> Result<(), String> {
        let Some(map) = map else {
            return Ok(());
        };
        if let Some(served) = self.served.get() {
            if *served == map {
                return Ok(());
            }
            return Err(format!(
                "serves the map {map}, but this facade serves the map {served}: start the instance \
                 on the facade's map, or restart the facade if the instance's map is the right one"
            ));
        }
        let mut beginning = self.beginning();
        beginning.last_maps.insert(instance.to_owned(), map);
        if beginning.maps().len() == 1 {
            return Ok(());
        }
        Err(format!(
            "serves the map {map}, but other instances serve another map: this facade serves none \
             until they all serve the same map"
        ))
    }

    /// Forgets the map of an instance that failed or left the pool.
    pub(crate) fn forget(&self, instance: &str) {
        self.beginning().last_maps.remove(instance);
    }

    /// Notes that an answer was used, which fixes the served map.
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
        self.last_maps.values().copied().collect()
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
        assert_eq!(served.named(), None);
        assert!(served.check("a", Some(FIRST)).is_err());
        served.forget("b");
        assert!(served.check("a", Some(FIRST)).is_ok());
    }

    #[test]
    fn instance_that_does_not_know_its_map_yet_decides_nothing() {
        let served = ServedMap::default();
        assert!(served.check("a", None).is_ok());
        served.note_use();
        assert_eq!(served.named(), None);
        assert!(served.check("b", Some(SECOND)).is_ok());
        assert_eq!(served.named(), Some(SECOND));
    }
}
