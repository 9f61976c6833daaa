//! The open connections of a service: how many there may be, and which one makes room for a new one.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap};
use std::io::{self, ErrorKind};
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Context;
use std::time::{Duration, Instant};

use futures_util::task::AtomicWaker;
use ipnet::IpNet;
use metrics::counter;
use parking_lot::{Mutex, MutexGuard};
use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio::time::sleep;

use crate::client::{Client, is_trusted};
use crate::metrics::CONNECTIONS_CUT;

/// The pause between two log lines that say that the door is full.
const TELL_AGAIN: Duration = Duration::from_secs(10);

/// A client that has closed its half of the connection may still read, but has left when there is nothing to
/// send to it for this time. Otherwise only a write could tell: the next byte makes its kernel reset the connection.
const LEFT_AFTER: Duration = Duration::from_secs(1);

/// What a connection's socket and its requests tell each other.
#[derive(Debug)]
pub(crate) struct Connection {
    pub(crate) stream: TcpStream,
    pub(crate) peer: IpAddr,
    /// Since when no request is being served; a part of a head is no request yet.
    idle_since: Mutex<Option<Instant>>,
    /// Whether the last request was read to its end.
    is_request_read: AtomicBool,
    /// Whether nobody reads the rest of it.
    is_request_dropped: AtomicBool,
    /// Whether the end of the connection is all that tells the end of the response.
    is_unframed: AtomicBool,
    is_evicted: AtomicBool,
    reader: AtomicWaker,
}

impl Connection {
    pub(crate) fn new(stream: TcpStream, peer: IpAddr) -> Self {
        Self {
            stream,
            peer,
            idle_since: Mutex::new(Some(Instant::now())),
            is_request_read: AtomicBool::new(false),
            is_request_dropped: AtomicBool::new(false),
            is_unframed: AtomicBool::new(false),
            is_evicted: AtomicBool::new(false),
            reader: AtomicWaker::new(),
        }
    }

    pub(crate) fn begin_request(&self) {
        *self.idle() = None;
        self.is_request_read.store(false, Ordering::Relaxed);
        self.is_request_dropped.store(false, Ordering::Relaxed);
    }

    pub(crate) fn note_request_read(&self) {
        self.is_request_read.store(true, Ordering::Relaxed);
    }

    pub(crate) fn is_request_read(&self) -> bool {
        self.is_request_read.load(Ordering::Relaxed)
    }

    pub(crate) fn note_request_dropped(&self) {
        self.is_request_dropped.store(true, Ordering::Relaxed);
    }

    pub(crate) fn is_request_dropped(&self) -> bool {
        self.is_request_dropped.load(Ordering::Relaxed)
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

    /// Since when no request is being served.
    pub(crate) fn idle_since(&self) -> Option<Instant> {
        *self.idle()
    }

    /// Waits until the client has closed its half of the connection and [`LEFT_AFTER`] has passed. The caller
    /// begins anew with each thing that it can send meanwhile.
    pub(crate) async fn client_gone(&self) -> io::Error {
        // Only the end of the connection satisfies this interest, and not what the client has sent before,
        // such as its next request, or the end of TLS.
        if let Err(error) = self.stream.ready(Interest::PRIORITY).await {
            return error;
        }
        sleep(LEFT_AFTER).await;
        ErrorKind::ConnectionAborted.into()
    }

    /// Whether the connection has to make room for another one. If not, the task of `context` is woken when
    /// it has to.
    pub(crate) fn must_end(&self, context: &Context<'_>) -> bool {
        self.reader.register(context.waker());
        self.is_evicted.load(Ordering::Acquire) && self.idle_since().is_some()
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
        self.idle_since.lock()
    }
}

/// All connections of a service.
#[derive(Debug)]
pub(crate) struct Connections {
    max: usize,
    trusted_proxies: Arc<[IpNet]>,
    open: Mutex<Open>,
}

#[derive(Debug, Default)]
struct Open {
    /// By a number that increases.
    connections: BTreeMap<u64, Arc<Connection>>,
    /// How many each client has.
    by_client: HashMap<IpAddr, usize>,
    next: u64,
    told: Option<Instant>,
}

impl Connections {
    pub(crate) fn new(max: usize, trusted_proxies: Arc<[IpNet]>) -> Self {
        Self {
            max,
            trusted_proxies,
            open: Mutex::default(),
        }
    }

    /// Takes a new connection in. When there are too many, the one that has been idle for longest makes room,
    /// of the address that has most connections. A client beyond this machine, other than a trusted proxy,
    /// may have half of them, and makes room itself beyond that.
    ///
    /// # Errors
    /// With the stream, when no connection is idle.
    pub(crate) fn admit(
        self: &Arc<Self>,
        stream: TcpStream,
        peer: IpAddr,
    ) -> Result<Admitted, TcpStream> {
        let mut open = self.lock();
        let own = open.by_client.get(&key(peer)).copied().unwrap_or_default();
        let is_shared = Client(peer).sharer().is_some() && !is_trusted(peer, &self.trusted_proxies);
        let victim = if is_shared && own >= (self.max / 2).max(1) {
            Some(open.oldest_idle_of(key(peer)))
        } else if open.connections.len() >= self.max {
            Some(open.oldest_idle_of_the_largest())
        } else {
            None
        };
        if let Some(victim) = victim {
            open.tell_full(self.max, victim.is_some());
            let Some(evicted) = victim.and_then(|number| open.remove(number)) else {
                return Err(stream);
            };
            evicted.evict();
            counter!(CONNECTIONS_CUT, "reason" => "evicted").increment(1);
        }
        *open.by_client.entry(key(peer)).or_default() += 1;
        let number = open.next;
        open.next += 1;
        let connection = Arc::new(Connection::new(stream, peer));
        open.connections.insert(number, connection.clone());
        Ok(Admitted {
            connection,
            number,
            connections: self.clone(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Open> {
        self.open.lock()
    }
}

impl Open {
    /// The idle connections: how many their client has, for how long they are idle, their numbers.
    fn idle(&self) -> impl Iterator<Item = (usize, Duration, u64)> {
        self.connections.iter().filter_map(|(number, connection)| {
            let idle_for = connection.idle_since()?.elapsed();
            let of_client = self.by_client.get(&key(connection.peer));
            Some((of_client.copied().unwrap_or_default(), idle_for, *number))
        })
    }

    fn oldest_idle_of_the_largest(&self) -> Option<u64> {
        self.idle().max().map(|(_, _, number)| number)
    }

    fn oldest_idle_of(&self, client: IpAddr) -> Option<u64> {
        let is_of_client = |number: &u64| key(self.connections[number].peer) == client;
        let own = self.idle().filter(|(_, _, number)| is_of_client(number));
        own.max().map(|(_, _, number)| number)
    }

    fn remove(&mut self, number: u64) -> Option<Arc<Connection>> {
        let connection = self.connections.remove(&number)?;
        if let Entry::Occupied(mut count) = self.by_client.entry(key(connection.peer)) {
            *count.get_mut() -= 1;
            if *count.get() == 0 {
                count.remove();
            }
        }
        Some(connection)
    }

    fn tell_full(&mut self, max: usize, makes_room: bool) {
        if self.told.is_some_and(|told| told.elapsed() < TELL_AGAIN) {
            return;
        }
        self.told = Some(Instant::now());
        if makes_room {
            tracing::warn!(
                max,
                "all connections are in use: idle ones make room for new ones; see --max-connections"
            );
        } else {
            tracing::warn!(
                max,
                "all connections are in use and none is idle: new ones get a 503; see --max-connections"
            );
        }
    }
}

/// What counts as one client.
fn key(peer: IpAddr) -> IpAddr {
    Client(peer).sharer().unwrap_or(peer)
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
        self.connections.lock().remove(self.number);
    }
}

#[cfg(test)]
mod tests {
    use std::task::Waker;

    use super::*;

    /// Connections of a listener, as if they came from other addresses.
    struct Clients {
        listener: std::net::TcpListener,
        connections: Arc<Connections>,
    }

    impl Clients {
        fn new(max: usize, trusted_proxies: &[IpNet]) -> Self {
            Self {
                listener: std::net::TcpListener::bind("127.0.0.1:0").expect("a free port"),
                connections: Arc::new(Connections::new(max, trusted_proxies.into())),
            }
        }

        fn admit(&self, peer: IpAddr) -> Option<Admitted> {
            let address = self.listener.local_addr().expect("it is bound");
            let stream = std::net::TcpStream::connect(address).expect("it listens");
            stream.set_nonblocking(true).expect("a socket can be");
            let stream = TcpStream::from_std(stream).expect("within a runtime");
            self.connections.admit(stream, peer).ok()
        }
    }

    fn is_evicted(admitted: &Admitted) -> bool {
        let context = Context::from_waker(Waker::noop());
        admitted.connection.must_end(&context)
    }

    #[tokio::test]
    async fn oldest_idle_connection_of_the_largest_address_makes_room() {
        let clients = Clients::new(4, &[]);
        let admit = |last| {
            let admitted = clients.admit(IpAddr::from([127, 0, 0, last]));
            admitted.expect("there is room")
        };
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
        assert_eq!(clients.connections.lock().connections.len(), 4);
    }

    #[tokio::test]
    async fn client_elsewhere_has_half_of_the_connections_at_most() {
        let [one, other, proxy] = [1, 2, 3].map(|last| IpAddr::from([192, 0, 2, last]));
        let clients = Clients::new(4, &[proxy.into()]);
        let admit = |peer| clients.admit(peer);
        let (first, second) = (admit(one).expect("1 of 2"), admit(one).expect("2 of 2"));
        first.connection.begin_request();
        let third = admit(one).expect("its idle one makes room");
        assert!(is_evicted(&second));
        third.connection.begin_request();
        assert!(admit(one).is_none());
        let others = [admit(other), admit(proxy), admit(proxy)];
        assert!(others.iter().all(Option::is_some));
        assert!(![&first, &third].into_iter().any(is_evicted));
        drop((first, second, third, others));
        assert!(clients.connections.lock().by_client.is_empty());
    }

    #[tokio::test]
    async fn connection_beyond_busy_ones_is_not_admitted() {
        let clients = Clients::new(1, &[]);
        let (one, other) = ([127, 0, 0, 1].into(), [127, 0, 0, 2].into());
        let busy = clients.admit(one).expect("there is room");
        busy.connection.begin_request();
        assert!(clients.admit(other).is_none());
        busy.connection.end_request();
        assert!(clients.admit(other).is_some());
        assert!(is_evicted(&busy));
    }
}
