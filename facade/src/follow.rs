//! A GET that follows the log: history first, then new messages as they are stored.
//!
//! History is an ordinary read up to the settled position; what is above comes from the window that
//! all followers share. So an entry is sent once on a connection, and the position that is sent as
//! the event's id, up to which everything was sent before, is one that a follower can resume from
//! without missing anything.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use common::api::ReadQuery;
use common::body::holding;
use common::bounds::{Bounds, Order};
use common::client::Client;
use common::permits::{Exhausted, Permits};
use common::problem::Problem;
use common::serve::Endless;
use futures_util::{StreamExt, stream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::{Instant, sleep_until, timeout};
use uuid::Uuid;

use crate::entry_stream::Part;
use crate::error::{too_many, unreadable};
use crate::format::Format;
use crate::read::Cursor;
use crate::state::App;
use crate::upstream::UpstreamError;
use crate::window::{Freshness, Newest, Next, SharedWindow, State, Window};

/// Followers that read history at once; more wait. It bounds the reads of an instance.
const MAX_CATCHING_UP: usize = 64;

/// The interval of lines that say nothing, which keep a connection from being taken for dead.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// The bytes after which a piece of new messages is sent. A follower has one piece in memory.
const PIECE: usize = 16 * 1024;

/// Budget for large messages on their way to followers, in bytes; a follower waits for its turn. Small pieces
/// are bounded by the number of followers.
const MAX_LARGE_BYTES: usize = 64 * 1024 * 1024;

/// What the followers of this facade share.
#[derive(Debug)]
pub(crate) struct Followers {
    max: usize,
    permits: Arc<Permits>,
    catching_up: Arc<Semaphore>,
    large: Arc<Semaphore>,
    window: SharedWindow,
}

impl Followers {
    pub(crate) fn new(max: usize) -> Self {
        Self {
            max,
            permits: Permits::new(max),
            catching_up: Arc::new(Semaphore::new(MAX_CATCHING_UP)),
            large: Arc::new(Semaphore::new(MAX_LARGE_BYTES)),
            window: SharedWindow::default(),
        }
    }

    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        self.max - self.permits.free()
    }
}

#[derive(Debug)]
pub(crate) struct Follow {
    /// Only entries with a greater UUID.
    pub(crate) after: Uuid,
    /// Begin with so many of the newest entries, instead of with all.
    pub(crate) tail: Option<u64>,
    pub(crate) format: Format,
    pub(crate) request_id: Option<String>,
}

/// Begins the answer once the instances can be polled.
///
/// # Errors
/// When there are too many followers, or no instance answers within the read deadline.
pub(crate) async fn answer(
    app: Arc<App>,
    follow: Follow,
    client: Client,
) -> Result<Response, Problem> {
    let permit = app.followers.permits.take(client, 1);
    let permit = permit.map_err(|Exhausted| too_many("followers"))?;
    let window = app.followers.window.join(&app.pool, app.read_deadline);
    let freshness = match follow.tail {
        Some(_) => Freshness::FromNowOn,
        None => Freshness::Any,
    };
    let polled = timeout(app.read_deadline, window.polled(freshness)).await;
    let polled = polled.unwrap_or_else(|_| Err(Arc::new(UpstreamError::TimedOut)));
    polled.map_err(|error| unreadable(&app.pool, &error))?;
    let stop = app.stop.clone();
    let mut follower = Follower {
        phase: Phase::Between(window.subscribe()),
        window,
        format: follow.format,
        position: follow.after,
        request_id: follow.request_id,
        app,
    };
    if let Some(count) = follow.tail {
        let turn = turn_to_read_history(&follower.app).await;
        let _turn = turn.ok_or_else(|| too_many("followers that read history"))?;
        let begun = follower.begin_with_newest(count).await;
        begun.map_err(|error| unreadable(&follower.app.pool, &error))?;
    }
    let pieces = stream::try_unfold(follower, |mut follower| async move {
        let piece = follower.next_piece().await.inspect_err(|error| {
            tracing::info!(%error, "a follower is cut");
        })?;
        Ok::<_, Cut>(Some((piece, follower)))
    });
    let body = Body::from_stream(pieces.take_until(stop.cancelled_owned()).boxed());
    let headers = [
        (header::CONTENT_TYPE.as_str(), follow.format.content_type()),
        // Proxies such as nginx would otherwise hold messages back.
        ("x-accel-buffering", "no"),
    ];
    let mut response = (headers, body).into_response();
    response.extensions_mut().insert(Endless);
    Ok(holding(response, permit))
}

/// Why a follower's body ends: the caller sees that it was cut, and resumes.
#[derive(Debug, thiserror::Error)]
enum Cut {
    #[error("it takes messages more slowly than they are stored")]
    TooSlow,
    #[error("too many followers read history at once")]
    NoTurn,
    #[error("no instance continues: {0}")]
    Upstream(Arc<UpstreamError>),
}

impl From<Arc<UpstreamError>> for Cut {
    fn from(error: Arc<UpstreamError>) -> Self {
        Self::Upstream(error)
    }
}

impl From<UpstreamError> for Cut {
    fn from(error: UpstreamError) -> Self {
        Self::Upstream(error.into())
    }
}

/// A follower from its first piece to its last.
struct Follower {
    app: Arc<App>,
    window: Arc<Window>,
    format: Format,
    /// Everything up to here was sent, or is not wanted.
    position: Uuid,
    phase: Phase,
    request_id: Option<String>,
}

enum Phase {
    /// Neither: decides what is next.
    Between(watch::Receiver<State>),
    History {
        cursor: Box<Cursor>,
        until: Uuid,
        _turn: OwnedSemaphorePermit,
    },
    New(NewMessages),
}

impl Follower {
    /// Finds where the newest `count` entries begin.
    async fn begin_with_newest(&mut self, count: u64) -> Result<(), UpstreamError> {
        let changes = self.window.subscribe();
        let newest = changes.borrow().newest(count, self.position);
        let (count, settled) = match newest {
            Newest::Arrivals { from, end } => {
                let next = changes.borrow().first();
                self.phase = Phase::New(NewMessages {
                    wanted: Wanted::Since { end, from },
                    ..self.new_messages(changes, next)
                });
                return Ok(());
            }
            Newest::History { count, settled } => (count, settled),
        };
        let bounds = Bounds {
            after: Some(self.position),
            before: Some(settled),
            order: Order::Desc,
        };
        let mut cursor = self.cursor(bounds, Some(count));
        let mut found = 0;
        while let Part::Entries(_, entries) = cursor.next().await? {
            found += entries;
        }
        if found == count {
            let oldest = cursor.bounds().before.unwrap_or(settled);
            let below = Uuid::from_u128(oldest.as_u128().saturating_sub(1));
            self.position = self.position.max(below);
        }
        Ok(())
    }

    async fn next_piece(&mut self) -> Result<Bytes, Cut> {
        loop {
            match &mut self.phase {
                Phase::Between(changes) => {
                    let next = {
                        let state = changes.borrow_and_update();
                        state.check()?;
                        state.next_after(self.position)
                    };
                    match next {
                        Next::Arrivals(next) => {
                            let changes = changes.clone();
                            self.phase = Phase::New(self.new_messages(changes, next));
                        }
                        Next::History(until) => self.begin_history(until).await?,
                        Next::Wait => wait_for_change(changes).await,
                    }
                }
                Phase::History { cursor, until, .. } => match cursor.next().await? {
                    Part::Entries(lines, _) => return Ok(self.format.render(lines, false)),
                    Part::End(_) => {
                        self.position = *until;
                        self.phase = Phase::Between(self.window.subscribe());
                    }
                },
                Phase::New(messages) => return messages.next_piece().await,
            }
        }
    }

    async fn begin_history(&mut self, until: Uuid) -> Result<(), Cut> {
        let turn = turn_to_read_history(&self.app).await.ok_or(Cut::NoTurn)?;
        let bounds = Bounds {
            after: Some(self.position),
            before: Some(until),
            order: Order::Asc,
        };
        self.phase = Phase::History {
            cursor: Box::new(self.cursor(bounds, None)),
            until,
            _turn: turn,
        };
        Ok(())
    }

    fn cursor(&self, bounds: Bounds, limit: Option<u64>) -> Cursor {
        let query = ReadQuery {
            bounds,
            limit,
            poll: None,
        };
        let App {
            pool,
            read_deadline,
            ..
        } = &*self.app;
        Cursor::new(pool, *read_deadline, query, self.request_id.clone())
    }

    fn new_messages(&self, changes: watch::Receiver<State>, next: u64) -> NewMessages {
        NewMessages {
            changes,
            format: self.format,
            position: self.position,
            next,
            taken: Bytes::new(),
            wanted: Wanted::All,
            // The first comment gives a position before there is a message.
            keep_alive: match self.format == Format::EventStream {
                true => Instant::now(),
                false => Instant::now() + KEEP_ALIVE,
            },
            sending: Arc::new(Semaphore::new(1)),
            large: self.app.followers.large.clone(),
        }
    }
}

/// `None` when there is none until the read deadline.
async fn turn_to_read_history(app: &App) -> Option<OwnedSemaphorePermit> {
    let turn = app.followers.catching_up.clone().acquire_owned();
    timeout(app.read_deadline, turn).await.ok()?.ok()
}

/// The part of a body that comes from the window.
struct NewMessages {
    changes: watch::Receiver<State>,
    format: Format,
    /// Entries up to here are not wanted.
    position: Uuid,
    /// The number of the next arrival.
    next: u64,
    /// What was taken of the arrivals before it and is not sent yet. A large message is sent in pieces: with a
    /// whole one on its way, hyper would not ask for more, and the follower could not be cut.
    taken: Bytes,
    wanted: Wanted,
    /// When the next line that says nothing is due.
    keep_alive: Instant,
    /// Held by the piece that is being sent.
    sending: Arc<Semaphore>,
    /// The budget that all followers share.
    large: Arc<Semaphore>,
}

/// Which arrivals above the position a follower gets.
enum Wanted {
    All,
    /// Those from a number on, and of those before it the ones that are not below a UUID.
    Since {
        end: u64,
        from: Uuid,
    },
}

impl NewMessages {
    /// The next piece, once the previous one was sent.
    async fn next_piece(&mut self) -> Result<Bytes, Cut> {
        let turn = loop {
            tokio::select! {
                biased;
                turn = self.sending.clone().acquire_owned() => break turn,
                () = wait_for_change(&mut self.changes) => {
                    require_kept(&self.changes.borrow(), self.next)?;
                }
            }
        };
        let turn = turn.expect("the semaphore is never closed");
        loop {
            if self.taken.is_empty() {
                let (end, bytes) = self.next_arrivals()?;
                let memory = self.reserve(bytes).await?;
                let text = self.take_arrivals(end)?;
                self.taken = Bytes::from_owner(Taken {
                    text,
                    _memory: memory,
                });
            }
            if !self.taken.is_empty() {
                let bytes = self.taken.split_to(self.taken.len().min(PIECE));
                return Ok(Bytes::from_owner(Piece { bytes, _turn: turn }));
            }
            tokio::select! {
                () = wait_for_change(&mut self.changes) => {}
                () = sleep_until(self.keep_alive) => {}
            }
        }
    }

    /// The arrivals that make a piece: the number before which they end, and their size in bytes.
    fn next_arrivals(&self) -> Result<(u64, usize), Cut> {
        let state = self.changes.borrow();
        require_kept(&state, self.next)?;
        let (mut end, mut bytes) = (self.next, 0);
        for arrival in state.arrivals_from(self.next) {
            if bytes >= PIECE {
                break;
            }
            bytes += arrival.line.len();
            end += 1;
        }
        Ok((end, bytes))
    }

    /// Waits for memory for large arrivals.
    async fn reserve(&mut self, bytes: usize) -> Result<Option<OwnedSemaphorePermit>, Cut> {
        if bytes <= 2 * PIECE {
            return Ok(None);
        }
        let permits = bytes.min(MAX_LARGE_BYTES) as u32;
        let mut memory = pin!(self.large.clone().acquire_many_owned(permits));
        loop {
            tokio::select! {
                biased;
                memory = &mut memory => return Ok(memory.ok()),
                () = wait_for_change(&mut self.changes) => {
                    require_kept(&self.changes.borrow(), self.next)?;
                }
            }
        }
    }

    /// The arrivals before number `end`, or what keeps the connection alive when it is due.
    fn take_arrivals(&mut self, end: u64) -> Result<Vec<u8>, Cut> {
        let state = self.changes.borrow_and_update();
        require_kept(&state, self.next)?;
        let mut piece = Vec::new();
        let count = (end - self.next) as usize;
        for arrival in state.arrivals_from(self.next).take(count) {
            let is_wanted = match self.wanted {
                Wanted::All => true,
                Wanted::Since { end, from } => self.next >= end || arrival.uuid >= from,
            };
            if is_wanted && arrival.uuid > self.position {
                let position = arrival.settled.max(self.position);
                self.format.write_new(&mut piece, &arrival.line, position);
            }
            self.next += 1;
        }
        // With arrivals left, the settled position may be above what was sent.
        let has_all = state.arrivals_from(self.next).next().is_none();
        if has_all && Instant::now() >= self.keep_alive {
            let position = state.settled().max(self.position);
            self.format.write_keep_alive(&mut piece, position);
            self.keep_alive = Instant::now() + KEEP_ALIVE;
        }
        Ok(piece)
    }
}

/// Fails when nothing arrives any more, or when the window has dropped arrivals from `next` on.
fn require_kept(state: &State, next: u64) -> Result<(), Cut> {
    state.check()?;
    match next < state.first() {
        true => Err(Cut::TooSlow),
        false => Ok(()),
    }
}

/// Arrivals as text, and the memory that is reserved for them if they are large.
struct Taken {
    text: Vec<u8>,
    _memory: Option<OwnedSemaphorePermit>,
}

impl AsRef<[u8]> for Taken {
    fn as_ref(&self) -> &[u8] {
        &self.text
    }
}

/// Bytes that keep a follower's turn until they are sent, so that only one piece of it is in memory.
struct Piece {
    bytes: Bytes,
    _turn: OwnedSemaphorePermit,
}

impl AsRef<[u8]> for Piece {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

async fn wait_for_change(changes: &mut watch::Receiver<State>) {
    let changed = changes.changed().await;
    changed.expect("the follower keeps the window alive");
}
