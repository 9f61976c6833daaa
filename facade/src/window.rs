//! The newest entries, as all followers of this facade share them. While there is a follower, one
//! task polls the logging instances; with none, nothing runs.
//!
//! Entries do not become visible in the order of their UUIDs: until its time has left the map's
//! settle window, an entry may appear below others that were delivered. So the window remembers what
//! has arrived since the *settled position*, below which nothing will be added, and numbers entries
//! by arrival. Two polls find them. The recent one reads the last seconds, often. The settling one
//! reads everything above the settled position, rarely, and then advances that position to where the
//! map was settled before the read began. A late arrival is found by the second at the latest. `arrivals`
//! has the state that both change.

mod arrivals;

use std::sync::{Arc, Weak};
use std::time::Duration;

use common::api::{Poll, ReadQuery};
use common::bounds::Bounds;
use common::entry::first_uuid_at;
use parking_lot::Mutex;
use reqwest::StatusCode;
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep};

use crate::entry_stream::Part;
use crate::pool::Pool;
use crate::read::Cursor;
use crate::upstream::UpstreamError;

pub(crate) use self::arrivals::{Arrival, Newest, Next, State};

/// Pause between two recent polls: half of it is the delay of a message on average.
const RECENT_PAUSE: Duration = Duration::from_millis(50);

/// Pause between two settling polls: the longest delay of an entry that is stored under an older UUID
/// than [`RECENT`].
const SETTLE_PAUSE: Duration = Duration::from_secs(1);

/// The pause after a poll that read a MiB, so that it reads at most 20 MiB a second. Under overload
/// messages come later instead of taking the instances' time from POSTs.
const PAUSE_PER_MIB: Duration = Duration::from_millis(50);

/// How far back a recent poll looks, by the map's clock. Only delays depend on it.
const RECENT: Duration = Duration::from_secs(2);

/// The window while there is one.
#[derive(Debug, Default)]
pub(crate) struct SharedWindow(Mutex<Weak<Window>>);

impl SharedWindow {
    /// The window that all followers share; it is polled until the last of them drops it.
    pub(crate) fn join(&self, pool: &Arc<Pool>, read_deadline: Duration) -> Arc<Window> {
        let mut shared = self.0.lock();
        let current = shared.upgrade();
        if let Some(window) = current.filter(|window| window.state.borrow().failure.is_none()) {
            return window;
        }
        let window = Arc::new(Window::default());
        *shared = Arc::downgrade(&window);
        tokio::spawn(keep_current(shared.clone(), pool.clone(), read_deadline));
        window
    }
}

#[derive(Debug, Default)]
pub(crate) struct Window {
    state: watch::Sender<State>,
    /// Ends the pause before the next settling poll.
    wake: Arc<Notify>,
}

impl Window {
    pub(crate) fn subscribe(&self) -> watch::Receiver<State> {
        self.state.subscribe()
    }

    /// Waits for a settling poll.
    ///
    /// # Errors
    /// When the instances cannot be polled.
    pub(crate) async fn polled(&self, freshness: Freshness) -> Result<(), Arc<UpstreamError>> {
        let mut changes = self.subscribe();
        let number = match freshness {
            Freshness::Any => 1,
            Freshness::FromNowOn => {
                self.wake.notify_one();
                changes.borrow_and_update().begun + 1
            }
        };
        let is_polled = |state: &State| state.completed >= number || state.failure.is_some();
        let polled = changes.wait_for(is_polled).await;
        polled.expect("the window is alive").check()
    }

    /// Reads what is new and returns how many bytes it read. The first poll fails at once when no
    /// instance is worth waiting for.
    async fn poll(
        &self,
        poll: Poll,
        pool: &Arc<Pool>,
        read_deadline: Duration,
    ) -> Result<usize, UpstreamError> {
        let mut after = None;
        let mut number = 0;
        self.state.send_if_modified(|state| {
            after = state.settled;
            if poll == Poll::Settle {
                state.begun += 1;
                number = state.begun;
            }
            false
        });
        if poll == Poll::Recent {
            let from = first_uuid_at(pool.clock() - RECENT);
            after = after.max(Some(from));
        }
        let query = ReadQuery {
            bounds: Bounds {
                after,
                ..Bounds::default()
            },
            limit: None,
            poll: Some(poll),
        };
        let mut cursor = Cursor::new(pool, read_deadline, query, None).with_whole_lines();
        if number == 1 {
            cursor.begin().await?;
        }
        let mut bytes = 0;
        while let Part::Entries(lines, _) = cursor.next().await? {
            bytes += lines.len();
            self.state.send_if_modified(|state| state.add(&lines));
            if self.has_failed() {
                return Ok(bytes);
            }
        }
        if poll == Poll::Settle {
            self.state.send_modify(|state| {
                // No further than it has read: each instance ends a poll by its own clock.
                let end = cursor.bounds().before;
                let settled = cursor.settled();
                state.settle(settled.map(|settled| end.map_or(settled, |end| settled.min(end))));
                if state.settled.is_some() {
                    state.completed = number;
                }
            });
        }
        Ok(bytes)
    }

    fn fail(&self, error: UpstreamError) {
        self.state.send_modify(|state| {
            state.failure.get_or_insert(Arc::new(error));
        });
    }

    fn has_failed(&self) -> bool {
        self.state.borrow().failure.is_some()
    }
}

/// Which poll a follower waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Freshness {
    Any,
    /// One that sees everything that is stored now.
    FromNowOn,
}

/// Polls until nobody follows, or until no instance has answered for `read_deadline`.
async fn keep_current(shared: Weak<Window>, pool: Arc<Pool>, read_deadline: Duration) {
    let Some(window) = shared.upgrade() else {
        return;
    };
    let wake = window.wake.clone();
    if let Err(error) = window.poll(Poll::Settle, &pool, read_deadline).await {
        window.fail(error);
        return;
    }
    if window.state.borrow().settled.is_none() {
        let reason = "the map does not tell what is settled".to_owned();
        window.fail(UpstreamError::Status(
            StatusCode::SERVICE_UNAVAILABLE,
            reason,
        ));
        return;
    }
    drop(window);
    tokio::join!(
        repeat(Poll::Recent, &shared, &wake, &pool, read_deadline),
        repeat(Poll::Settle, &shared, &wake, &pool, read_deadline),
    );
}

async fn repeat(
    poll: Poll,
    shared: &Weak<Window>,
    wake: &Notify,
    pool: &Arc<Pool>,
    read_deadline: Duration,
) {
    let mut rest = RECENT_PAUSE;
    loop {
        match poll {
            Poll::Recent => sleep(rest).await,
            Poll::Settle => {
                sleep(rest).await;
                tokio::select! {
                    () = sleep(SETTLE_PAUSE.saturating_sub(rest)) => {}
                    () = wake.notified() => {}
                }
            }
        }
        let window = shared.upgrade();
        let Some(window) = window.filter(|window| !window.has_failed()) else {
            return;
        };
        let began = Instant::now();
        match window.poll(poll, pool, read_deadline).await {
            Ok(bytes) => {
                let pause = PAUSE_PER_MIB.mul_f64(bytes as f64 / (1024.0 * 1024.0));
                rest = RECENT_PAUSE.max(began.elapsed()).max(pause);
            }
            Err(error) => {
                tracing::warn!(%error, "all followers are cut: no instance can be polled");
                window.fail(error);
                return;
            }
        }
    }
}
