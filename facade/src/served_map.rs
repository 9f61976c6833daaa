//! The facade serves one map: that of the first answer it used.
//!
//! Each answer of an instance has the id of its map. Answers of an instance on another map, for
//! example after its folder was deleted, would make messages appear and disappear. While the facade
//! has served nothing and its instances have different maps, it serves none of them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::OnceLock;
use std::time::{Duration, SystemTime};

use common::clock::MapClock;
use parking_lot::{Mutex, MutexGuard};
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
    /// Set with the first answer that the facade uses.
    served: OnceLock<Uuid>,
    beginning: Mutex<Beginning>,
    /// Wakes requests that wait in [`Self::all_asked`].
    asked: Notify,
}

/// What the facade asks an instance for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// To use the answer for a caller.
    Caller,
    /// To learn the instance's state.
    State,
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

    /// Checks the map id in an answer of the instance. The first answer for a caller fixes the served map.
    ///
    /// # Errors
    /// Why the answer must not be used, as a text to follow the instance's name.
    pub(crate) fn check(
        &self,
        instance: &str,
        map: Option<Uuid>,
        purpose: Purpose,
    ) -> Result<(), String> {
        let Some(map) = map else {
            return Ok(());
        };
        // From here to the end in one step: two answers at the same moment may have different maps.
        let mut beginning = self.beginning();
        if let Some(served) = self.served.get() {
            if *served == map {
                return Ok(());
            }
            return Err(format!(
                "serves the map {map}, but this facade serves the map {served}: start the instance \
                 on the facade's map, or restart the facade if the instance's map is the right one"
            ));
        }
        beginning.last_maps.insert(instance.to_owned(), map);
        if beginning.maps().len() > 1 {
            return Err(format!(
                "serves the map {map}, but other instances serve another map: this facade serves \
                 none until they all serve the same map"
            ));
        }
        if purpose == Purpose::Caller {
            self.served.get_or_init(|| map);
        }
        Ok(())
    }

    /// Forgets the map of an instance that failed or left the pool.
    pub(crate) fn forget(&self, instance: &str) {
        self.beginning().last_maps.remove(instance);
    }

    fn beginning(&self) -> MutexGuard<'_, Beginning> {
        self.beginning.lock()
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

    fn check(served: &ServedMap, instance: &str, map: Uuid, purpose: Purpose) -> bool {
        served.check(instance, Some(map), purpose).is_ok()
    }

    #[test]
    fn map_that_was_served_stays() {
        let served = ServedMap::default();
        assert!(check(&served, "a", FIRST, Purpose::Caller));
        assert!(!check(&served, "b", SECOND, Purpose::State));
        served.forget("a");
        assert!(!check(&served, "b", SECOND, Purpose::Caller));
        assert!(check(&served, "a", FIRST, Purpose::Caller));
    }

    /// Issue 29: the answer of `a` was checked, that of `b` came, and then `a` failed.
    #[test]
    fn answers_of_two_maps_are_never_both_used() {
        for purpose in [Purpose::Caller, Purpose::State] {
            let served = ServedMap::default();
            let used = check(&served, "a", FIRST, Purpose::Caller);
            assert!(!check(&served, "b", SECOND, purpose));
            served.forget("a");
            let used_too = check(&served, "b", SECOND, Purpose::Caller);
            assert!(used && !used_too);
        }
    }

    #[test]
    fn neither_of_two_maps_is_served_until_one_is_left() {
        let served = ServedMap::default();
        assert!(check(&served, "a", FIRST, Purpose::State));
        assert!(!check(&served, "b", SECOND, Purpose::Caller));
        assert_eq!(served.named(), None);
        assert!(!check(&served, "a", FIRST, Purpose::Caller));
        served.forget("b");
        assert!(check(&served, "a", FIRST, Purpose::Caller));
    }

    #[test]
    fn instance_that_does_not_know_its_map_yet_decides_nothing() {
        let served = ServedMap::default();
        assert!(served.check("a", None, Purpose::Caller).is_ok());
        assert_eq!(served.named(), None);
        assert!(check(&served, "b", SECOND, Purpose::State));
        assert_eq!(served.named(), Some(SECOND));
    }
}
