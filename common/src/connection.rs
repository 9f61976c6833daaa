//! The open connections of a service: how many there may be, and which one makes room for a new one.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Context;
use std::time::{Duration, Instant};

use futures_util::task::AtomicWaker;
use metrics::counter;

use crate::metrics::CONNECTIONS_CUT;

/// The pause between two log lines that say that the door is full.
const TELL_AGAIN: Duration = Duration::from_secs(10);

/// What a connection's socket and its requests tell each other.
#[derive(Debug)]
pub(crate) struct Connection {
    pub(crate) peer: IpAddr,
    /// Since when no request is being served; a part of a head is no request yet.
    idle_since: Mutex<Option<Instant>>,
    /// Whether the last request was read to its end.
    is_request_read: AtomicBool,
    /// Whether the end of the connection is all that tells the end of the response.
    is_unframed: AtomicBool,
    is_evicted: AtomicBool,
    reader: AtomicWaker,
}

impl Connection {
    pub(crate) fn new(peer: IpAddr) -> Self {
        Self {
            peer,
            idle_since: Mutex::new(Some(Instant::now())),
            is_request_read: AtomicBool::new(false),
            is_unframed: AtomicBool::new(false),
            is_evicted: AtomicBool::new(false),
            reader: AtomicWaker::new(),
        }
    }

    pub(crate) fn begin_request(&self) {
        *self.idle() = None;
        self.is_request_read.store(false, Ordering::Relaxed);
    }

    pub(crate) fn note_request_read(&self) {
        self.is_request_read.store(true, Ordering::Relaxed);
    }

    pub(crate) fn is_request_read(&self) -> bool {
        self.is_request_read.load(Ordering::Relaxed)
    }

    /// The response that begins has neither a length nor chunks.
    pub(crate) fn begin_unframed_response(&self) {
        self.is_unframed.store(true, Ordering::Relaxed);
    }

    /// Whether closing the connection now would make an incomplete response look complete.
    pub(crate) fn is_unframed(&self) -> bool {
        self.is_unframed.load(Ordering::Relaxed)
    }

    pub(crate) fn end_complete_response(&self) {
        self.is_unframed.store(false, Ordering::Relaxed);
    }

    pub(crate) fn end_request(&self) {
        *self.idle() = Some(Instant::now());
    }

    /// Whether the connection has to make room for another one. If not, the task of `context` is woken when
    /// it has to.
    pub(crate) fn must_end(&self, context: &Context<'_>) -> bool {
        self.reader.register(context.waker());
        self.is_evicted.load(Ordering::Acquire) && self.idle().is_some()
    }

    /// Wakes the task that reads, if the connection has to make room.
    pub(crate) fn wake_evicted(&self) {
        if self.is_evicted.load(Ordering::Acquire) {
            self.reader.wake();
        }
    }

    fn evict(&self) {
        self.is_evicted.store(true, Ordering::Release);
        self.reader.wake();
    }

    fn idle(&self) -> MutexGuard<'_, Option<Instant>> {
        self.idle_since
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// All connections of a service.
#[derive(Debug)]
pub(crate) struct Connections {
    max: usize,
    open: Mutex<Open>,
}

#[derive(Debug, Default)]
struct Open {
    /// By a number that increases.
    connections: BTreeMap<u64, Arc<Connection>>,
    next: u64,
    told: Option<Instant>,
}

impl Connections {
    pub(crate) fn new(max: usize) -> Self {
        Self {
            max,
            open: Mutex::default(),
        }
    }

    /// Takes a new connection in. When there are too many, the one that has been idle for longest makes room,
    /// of the address that has most connections. `None` when no connection is idle.
    pub(crate) fn admit(self: &Arc<Self>, peer: IpAddr) -> Option<Admitted> {
        let mut open = self.lock();
        if open.connections.len() >= self.max {
            let victim = open.idle_of_the_largest();
            open.tell_full(self.max, victim.is_some());
            let victim = open.connections.remove(&victim?)?;
            victim.evict();
            counter!(CONNECTIONS_CUT, "reason" => "evicted").increment(1);
        }
        let number = open.next;
        open.next += 1;
        let connection = Arc::new(Connection::new(peer));
        open.connections.insert(number, connection.clone());
        Some(Admitted {
            connection,
            number,
            connections: self.clone(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Open {
    fn idle_of_the_largest(&self) -> Option<u64> {
        let mut by_address: HashMap<IpAddr, usize> = HashMap::new();
        for connection in self.connections.values() {
            *by_address.entry(connection.peer).or_default() += 1;
        }
        let idle = self.connections.iter().filter_map(|(number, connection)| {
            let idle_for = connection.idle().as_ref()?.elapsed();
            Some((by_address[&connection.peer], idle_for, *number))
        });
        idle.max().map(|(_, _, number)| number)
    }

    fn tell_full(&mut self, max: usize, makes_room: bool) {
        if self.told.is_some_and(|told| told.elapsed() < TELL_AGAIN) {
            return;
        }
        self.told = Some(Instant::now());
        match makes_room {
            true => tracing::warn!(
                max,
                "all connections are in use: idle ones make room for new ones; see --max-connections"
            ),
            false => tracing::warn!(
                max,
                "all connections are in use and none is idle: new ones get a 503; see --max-connections"
            ),
        }
    }
}

/// A connection that counts until this is dropped.
#[derive(Debug)]
pub(crate) struct Admitted {
    pub(crate) connection: Arc<Connection>,
    number: u64,
    connections: Arc<Connections>,
}

impl Drop for Admitted {
    fn drop(&mut self) {
        self.connections.lock().connections.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use std::task::Waker;

    use super::*;

    fn address(last: u8) -> IpAddr {
        IpAddr::from([10, 0, 0, last])
    }

    fn is_evicted(admitted: &Admitted) -> bool {
        let context = Context::from_waker(Waker::noop());
        admitted.connection.must_end(&context)
    }

    #[test]
    fn oldest_idle_connection_of_the_largest_address_makes_room() {
        let connections = Arc::new(Connections::new(4));
        let admit = |last| connections.admit(address(last)).expect("there is room");
        let (other, busy, first, second) = (admit(1), admit(2), admit(2), admit(2));
        busy.connection.begin_request();
        let newest = admit(1);
        assert!(is_evicted(&first));
        assert!(
            ![&other, &busy, &second, &newest]
                .into_iter()
                .any(is_evicted)
        );
        drop(first);
        assert_eq!(connections.lock().connections.len(), 4);
    }

    #[test]
    fn connection_beyond_busy_ones_is_not_admitted() {
        let connections = Arc::new(Connections::new(1));
        let busy = connections.admit(address(1)).expect("there is room");
        busy.connection.begin_request();
        assert!(connections.admit(address(2)).is_none());
        busy.connection.end_request();
        assert!(connections.admit(address(2)).is_some());
        assert!(is_evicted(&busy));
    }
}
