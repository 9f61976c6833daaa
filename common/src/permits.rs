//! Permits for requests, or bytes, at once. No client beyond this machine gets more than half of them, so a
//! hostile one cannot keep the others out.

use std::collections::HashMap;
use std::net::IpAddr;
use std::pin::pin;
use std::sync::Arc;

use parking_lot::{Mutex, MutexGuard};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};

use crate::client::Client;

/// A number of permits.
#[derive(Debug)]
pub struct Permits {
    free: Arc<Semaphore>,
    /// The most that one client may hold.
    share: usize,
    held: Mutex<HashMap<IpAddr, usize>>,
    /// Wakes clients that wait for permits.
    returned: Notify,
}

/// There are not that many permits for this client now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exhausted;

impl Permits {
    /// So many permits.
    pub fn new(count: usize) -> Arc<Self> {
        Arc::new(Self {
            free: Arc::new(Semaphore::new(count)),
            share: (count / 2).max(1),
            held: Mutex::default(),
            returned: Notify::new(),
        })
    }

    /// How many permits nobody holds.
    pub fn free(&self) -> usize {
        self.free.available_permits()
    }

    /// Takes permits for a client.
    ///
    /// # Errors
    /// When so many are not free, or the client would hold more than its share.
    pub fn take(self: &Arc<Self>, client: Client, count: usize) -> Result<Permit, Exhausted> {
        let sharer = client.sharer();
        Ok(Permit {
            held: self.acquire(sharer, count)?,
            sharer,
            permits: self.clone(),
        })
    }

    /// Takes permits for a client as soon as that is possible.
    pub async fn wait(self: &Arc<Self>, client: Client, count: usize) -> Permit {
        loop {
            let mut returned = pin!(self.returned.notified());
            returned.as_mut().enable();
            if let Ok(permit) = self.take(client, count) {
                return permit;
            }
            returned.await;
        }
    }

    fn acquire(
        &self,
        sharer: Option<IpAddr>,
        count: usize,
    ) -> Result<OwnedSemaphorePermit, Exhausted> {
        let permits = u32::try_from(count).map_err(|_| Exhausted)?;
        let acquire = || self.free.clone().try_acquire_many_owned(permits);
        let Some(sharer) = sharer else {
            return acquire().map_err(|_| Exhausted);
        };
        let mut held = self.lock();
        let already = held.get(&sharer).copied().unwrap_or_default();
        if already + count > self.share {
            return Err(Exhausted);
        }
        let acquired = acquire().map_err(|_| Exhausted)?;
        if count > 0 {
            held.insert(sharer, already + count);
        }
        Ok(acquired)
    }

    fn give_back(&self, sharer: Option<IpAddr>, permits: Option<OwnedSemaphorePermit>) {
        let count = permits
            .as_ref()
            .map_or(0, OwnedSemaphorePermit::num_permits);
        drop(permits);
        if let Some(sharer) = sharer {
            let mut held = self.lock();
            if let Some(left) = held.get_mut(&sharer) {
                *left -= count;
                if *left == 0 {
                    held.remove(&sharer);
                }
            }
        }
        self.returned.notify_waiters();
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<IpAddr, usize>> {
        self.held.lock()
    }
}

/// Permits that a client holds; dropping it returns them.
#[derive(Debug)]
pub struct Permit {
    permits: Arc<Permits>,
    sharer: Option<IpAddr>,
    held: OwnedSemaphorePermit,
}

impl Permit {
    /// Holds so many permits instead.
    ///
    /// # Errors
    /// As [`Permits::take`]; it then holds as many as before.
    pub fn resize(&mut self, count: usize) -> Result<(), Exhausted> {
        let held = self.held.num_permits();
        if count > held {
            let more = self.permits.acquire(self.sharer, count - held)?;
            self.held.merge(more);
        } else {
            let returned = self.held.split(held - count);
            self.permits.give_back(self.sharer, returned);
        }
        Ok(())
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let returned = self.held.split(self.held.num_permits());
        self.permits.give_back(self.sharer, returned);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(address: &str) -> Client {
        Client(address.parse().expect("an address"))
    }

    #[test]
    fn permit_grows_and_shrinks_within_what_is_free() {
        let permits = Permits::new(100);
        let mut permit = permits.take(client("127.0.0.1"), 10).expect("10 of 100");
        assert_eq!(permit.resize(101), Err(Exhausted));
        assert_eq!(permits.free(), 90);
        assert_eq!(permit.resize(100), Ok(()));
        assert_eq!(permit.resize(30), Ok(()));
        assert_eq!(permits.free(), 70);
        drop(permit);
        assert_eq!(permits.free(), 100);
    }

    #[tokio::test]
    async fn client_waits_for_its_share_and_not_for_others() {
        let permits = Permits::new(2);
        let (one, other) = (client("192.0.2.1"), client("192.0.2.2"));
        let first = permits.wait(one, 1).await;
        let waiting = permits.clone();
        let second = tokio::spawn(async move { waiting.wait(one, 1).await });
        tokio::task::yield_now().await;
        assert!(!second.is_finished(), "it has its share");
        permits.wait(other, 1).await;
        drop(first);
        second.await.expect("it gets what was returned");
    }

    #[test]
    fn client_elsewhere_holds_half_of_the_permits_at_most() {
        let permits = Permits::new(10);
        let (one, other) = (client("192.0.2.1"), client("192.0.2.2"));
        let mut first = permits.take(one, 3).expect("3 of 5");
        let second = permits.take(one, 2).expect("5 of 5");
        assert!(permits.take(one, 1).is_err());
        assert_eq!(first.resize(4), Err(Exhausted));
        assert_eq!(first.resize(1), Ok(()));
        drop(second);
        let third = permits.take(one, 4).expect("5 of 5");
        permits.take(other, 5).expect("the other half");
        drop((first, third));
        assert!(permits.lock().is_empty());
        assert_eq!(permits.free(), 10);
    }
}
