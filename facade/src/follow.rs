//! A GET that follows the log: history first, then new messages as they are stored.
//!
//! History is an ordinary read up to the settled position; what is above comes from the window that
//! all followers share. So an entry is sent once on a connection, and the position that is sent as
//! the event's id, up to which everything was sent before, is one that a follower can resume from
//! without missing anything.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use common::api::{LINE_BEGIN_BYTES, LINE_END, ReadQuery, whole_characters};
use common::body::holding;
use common::bounds::{Bounds, Order};
use common::client::Client;
use common::permits::{Exhausted, Permit, Permits};
use common::problem::Problem;
use futures_util::future::BoxFuture;
use futures_util::{FutureExt, StreamExt, stream};
use metrics::counter;
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_util::task::AbortOnDropHandle;
use uuid::Uuid;

use crate::entry_stream::{Fragment, Part};
use crate::error::{too_many, unreadable};
use crate::format::Format;
use crate::metrics::FOLLOWERS_CUT;
use crate::read::Cursor;
use crate::state::App;
use crate::upstream::UpstreamError;
use crate::window::{Arrival, Freshness, Newest, Next, SharedWindow, State, Window};

/// Followers that read history at once; more wait. It bounds the reads of an instance.
const MAX_CATCHING_UP: usize = 64;

/// A follower that has not taken a piece of history for so long lets another one read.
const HOLDS_A_TURN: Duration = Duration::from_secs(1);

/// When an event source that was cut, or turned away, comes back.
const RETRY: &str = "retry: 2000\n";
const RETRY_LATER: &str = "retry: 5000\n\n";

/// The pause between two tries, and between two comments, while no instance can be read.
const OUTAGE_PAUSE: Duration = Duration::from_secs(1);

/// The interval of lines that say nothing, which keep a connection from being taken for dead.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// The bytes after which a piece of new messages is sent. A follower has one piece in memory.
const PIECE: usize = 16 * 1024;

/// What the followers of this facade share.
#[derive(Debug)]
pub(crate) struct Followers {
    max: usize,
    permits: Arc<Permits>,
    catching_up: Arc<Permits>,
    window: SharedWindow,
}

impl Followers {
    pub(crate) fn new(max: usize) -> Self {
        Self {
            max,
            permits: Permits::new(max),
            catching_up: Permits::new(MAX_CATCHING_UP),
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

/// Begins the answer once the instances can be polled, an event stream after [`OUTAGE_PAUSE`] in any case, as its
/// client never comes back after another status than 200.
///
/// # Errors
/// For lines, when there are too many followers, or no instance answers within the read deadline.
pub(crate) async fn answer(
    app: Arc<App>,
    follow: Follow,
    client: Client,
) -> Result<Response, Problem> {
    let format = follow.format;
    let headers = [
        (header::CONTENT_TYPE.as_str(), format.content_type()),
        // Proxies such as nginx would otherwise hold messages back.
        ("x-accel-buffering", "no"),
    ];
    let permit = match app.followers.permits.take(client, 1) {
        Ok(permit) => permit,
        Err(Exhausted) if format == Format::EventStream => {
            return Ok((headers, RETRY_LATER).into_response());
        }
        Err(Exhausted) => return Err(too_many("followers")),
    };
    let stop = app.stop.clone();
    let following = if format == Format::EventStream {
        let mut beginning = begin_after_outage(app, follow, client).boxed();
        // What is stored after the head is new for a follower, so the head waits for its beginning.
        match timeout(OUTAGE_PAUSE, &mut beginning).await {
            Ok(Some(follower)) => Following::Follows(follower, RETRY),
            Ok(None) => return Ok((headers, RETRY_LATER).into_response()),
            Err(_) => Following::Begins(beginning, RETRY),
        }
    } else {
        Following::Follows(begin(&app, &follow, client).await?, "")
    };
    let pieces = stream::try_unfold(following, |following| async move {
        following.next_piece().await.inspect_err(|error| {
            counter!(FOLLOWERS_CUT, "reason" => error.word()).increment(1);
            tracing::info!(%error, "a follower is cut");
        })
    });
    let body = Body::from_stream(pieces.take_until(stop.cancelled_owned()).boxed());
    Ok(holding((headers, body).into_response(), permit))
}

/// Begins to follow once the instances can be polled.
async fn begin(app: &Arc<App>, follow: &Follow, client: Client) -> Result<Follower, Problem> {
    let window = app.followers.window.join(&app.pool, app.read_deadline);
    let freshness = match follow.tail {
        Some(_) => Freshness::FromNowOn,
        None => Freshness::Any,
    };
    let polled = timeout(app.read_deadline, window.polled(freshness)).await;
    let polled = polled.unwrap_or_else(|_| Err(Arc::new(UpstreamError::TimedOut)));
    polled.map_err(|error| unreadable(&app.pool, &error))?;
    let mut follower = Follower {
        phase: Phase::Between(window.subscribe()),
        window,
        format: follow.format,
        position: follow.after,
        request_id: follow.request_id.clone(),
        client,
        app: app.clone(),
    };
    if let Some(count) = follow.tail {
        let turn = turn_to_read_history(app, client).await;
        let turn = turn.ok_or_else(|| too_many("followers that read history"))?;
        let begun = follower.begin_with_newest(count, turn).await;
        begun.map_err(|error| unreadable(&app.pool, &error))?;
    }
    Ok(follower)
}

/// As [`begin`], again and again until the read deadline.
async fn begin_after_outage(app: Arc<App>, follow: Follow, client: Client) -> Option<Follower> {
    let begun = async {
        loop {
            match begin(&app, &follow, client).await {
                Ok(follower) => return follower,
                Err(_) => sleep(OUTAGE_PAUSE).await,
            }
        }
    };
    timeout(app.read_deadline, begun).await.ok()
}

/// The body of an answer, with what is to be sent before its next piece.
enum Following {
    /// Waits for an instance; its end without one ends the body.
    Begins(BoxFuture<'static, Option<Follower>>, &'static str),
    Follows(Follower, &'static str),
}

impl Following {
    async fn next_piece(self) -> Result<Option<(Bytes, Self)>, Cut> {
        let (mut follower, head) = match self {
            Self::Follows(follower, head) => (follower, head),
            Self::Begins(mut beginning, head) => {
                let pause = if head.is_empty() {
                    OUTAGE_PAUSE
                } else {
                    Duration::ZERO
                };
                match timeout(pause, &mut beginning).await {
                    Ok(Some(follower)) => (follower, head),
                    Ok(None) => return Ok(None),
                    Err(_) => {
                        let comment = format!("{head}: waits for a logging instance\n\n");
                        return Ok(Some((comment.into(), Self::Begins(beginning, ""))));
                    }
                }
            }
        };
        let piece = follower.next_piece().await?;
        let whole = if head.is_empty() {
            piece
        } else {
            [head.as_bytes(), &piece].concat().into()
        };
        Ok(Some((whole, Self::Follows(follower, ""))))
    }
}

/// Why a follower's body ends: the caller sees that it was cut, and resumes.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Cut {
    #[error("it takes messages more slowly than they are stored")]
    TooSlow,
    #[error("too many followers read history at once")]
    NoTurn,
    #[error("no instance continues: {0}")]
    Upstream(Arc<UpstreamError>),
}

impl Cut {
    /// The reasons as the metrics name them.
    pub(crate) const WORDS: [&str; 3] = ["too_slow", "no_turn", "no_instance"];

    fn word(&self) -> &'static str {
        match self {
            Self::TooSlow => Self::WORDS[0],
            Self::NoTurn => Self::WORDS[1],
            Self::Upstream(_) => Self::WORDS[2],
        }
    }
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
    client: Client,
}

enum Phase {
    /// Neither: decides what is next.
    Between(watch::Receiver<State>),
    /// Reads the newest entries below the settled position, to find where they begin.
    Newest {
        cursor: Box<Cursor>,
        /// How many are still to be found.
        left: u64,
        _turn: Permit,
    },
    History {
        reading: Arc<Mutex<Option<Reading>>>,
        until: Uuid,
        /// Pauses the reading while the follower does not take the last piece.
        _pause: Option<AbortOnDropHandle<()>>,
    },
    New(NewMessages),
}

/// A read of history, and the turn for it while an instance reads.
struct Reading {
    cursor: Cursor,
    turn: Option<Permit>,
}

impl Follower {
    /// Begins to find where the newest `count` entries begin.
    async fn begin_with_newest(&mut self, count: u64, turn: Permit) -> Result<(), UpstreamError> {
        let changes = self.window.subscribe();
        let (newest, settled, next) = {
            let state = changes.borrow();
            let newest = state.newest(count, self.position);
            (newest, state.settled(), state.first())
        };
        let (count, settled) = match newest {
            Newest::Arrivals { from, end } => {
                // What is settled is not wanted.
                self.position = self.position.max(settled);
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
        let mut cursor = Box::new(self.cursor(bounds, Some(count)));
        cursor.begin().await?;
        self.phase = Phase::Newest {
            cursor,
            left: count,
            _turn: turn,
        };
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
                        Next::History(until) => self.begin_history(until),
                        Next::Wait => wait_for_change(changes).await,
                    }
                }
                Phase::Newest { cursor, left, .. } => match cursor.next().await? {
                    Part::Entries(_, found) => *left -= found,
                    Part::Fragment(fragment) => *left -= u64::from(fragment.is_last),
                    Part::End(_) => {
                        if *left == 0
                            && let Some(oldest) = cursor.bounds().before
                        {
                            let below = Uuid::from_u128(oldest.as_u128().saturating_sub(1));
                            self.position = self.position.max(below);
                        }
                        self.phase = Phase::Between(self.window.subscribe());
                    }
                },
                Phase::History { reading, until, .. } => {
                    let (reading, until) = (reading.clone(), *until);
                    if let Some(piece) = self.read_history(reading, until).await? {
                        return Ok(piece);
                    }
                    self.position = until;
                    self.phase = Phase::Between(self.window.subscribe());
                }
                Phase::New(messages) => return messages.next_piece().await,
            }
        }
    }

    fn begin_history(&mut self, until: Uuid) {
        let bounds = Bounds {
            after: Some(self.position),
            before: Some(until),
            order: Order::Asc,
        };
        let cursor = self.cursor(bounds, None);
        let reading = Reading { cursor, turn: None };
        self.phase = Phase::History {
            reading: Arc::new(Mutex::new(Some(reading))),
            until,
            _pause: None,
        };
    }

    /// The next piece of history; `None` at its end.
    async fn read_history(
        &mut self,
        shared: Arc<Mutex<Option<Reading>>>,
        until: Uuid,
    ) -> Result<Option<Bytes>, Cut> {
        let lock = |shared: &Mutex<Option<Reading>>| {
            let mut reading = shared.lock();
            reading.take()
        };
        let mut reading = lock(&shared).expect("one piece is read at a time");
        if reading.turn.is_none() {
            let turn = turn_to_read_history(&self.app, self.client).await;
            reading.turn = Some(turn.ok_or(Cut::NoTurn)?);
        }
        let piece = match reading.cursor.next().await? {
            Part::Entries(lines, _) => self.format.render(lines, false),
            Part::Fragment(fragment) => {
                let mut piece = Vec::with_capacity(2 * fragment.json.len());
                self.format
                    .write_fragment(&mut piece, &fragment, fragment.uuid);
                piece.into()
            }
            Part::End(_) => return Ok(None),
        };
        *shared.lock() = Some(reading);
        let held = shared.clone();
        let pause = tokio::spawn(async move {
            sleep(HOLDS_A_TURN).await;
            let mut reading = held.lock();
            if let Some(Reading { cursor, turn }) = &mut *reading {
                cursor.pause();
                *turn = None;
            }
        });
        self.phase = Phase::History {
            reading: shared,
            until,
            _pause: Some(AbortOnDropHandle::new(pause)),
        };
        Ok(Some(piece))
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
            sent: 0,
            wanted: Wanted::All,
            // The first comment gives a position before there is a message.
            keep_alive: if self.format == Format::EventStream {
                Instant::now()
            } else {
                Instant::now() + KEEP_ALIVE
            },
            sending: Arc::new(Semaphore::new(1)),
        }
    }
}

/// `None` when there is none until the read deadline.
async fn turn_to_read_history(app: &App, client: Client) -> Option<Permit> {
    let turn = app.followers.catching_up.wait(client, 1);
    timeout(app.read_deadline, turn).await.ok()
}

/// The part of a body that comes from the window.
struct NewMessages {
    changes: watch::Receiver<State>,
    format: Format,
    /// Entries up to here are not wanted.
    position: Uuid,
    /// The number of the next arrival.
    next: u64,
    /// How many bytes of its message as JSON were taken. A large message is sent in pieces, so that followers need
    /// no memory for it: a follower for which the window cannot keep it is cut.
    sent: usize,
    wanted: Wanted,
    /// When the next line that says nothing is due.
    keep_alive: Instant,
    /// Held by the piece that is being sent.
    sending: Arc<Semaphore>,
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
            let bytes = self.take_arrivals()?;
            if !bytes.is_empty() {
                return Ok(Bytes::from_owner(Piece { bytes, _turn: turn }));
            }
            tokio::select! {
                () = wait_for_change(&mut self.changes) => {}
                () = sleep_until(self.keep_alive) => {}
            }
        }
    }

    /// The next piece of the arrivals, or what keeps the connection alive when it is due.
    fn take_arrivals(&mut self) -> Result<Vec<u8>, Cut> {
        let state = self.changes.borrow_and_update();
        require_kept(&state, self.next)?;
        let mut piece = Vec::new();
        for arrival in state.arrivals_from(self.next) {
            if piece.len() >= PIECE {
                break;
            }
            let is_wanted = match self.wanted {
                Wanted::All => true,
                Wanted::Since { end, from } => self.next >= end || arrival.uuid >= from,
            };
            if is_wanted && arrival.uuid > self.position {
                let position = arrival.settled.max(self.position);
                if arrival.line.len() <= 2 * PIECE {
                    self.format.write_new(&mut piece, &arrival.line, position);
                } else {
                    let fragment = fragment_of(arrival, self.sent);
                    self.format.write_fragment(&mut piece, &fragment, position);
                    self.sent += fragment.json.len();
                    if !fragment.is_last {
                        break;
                    }
                    self.sent = 0;
                }
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
    if next < state.first() {
        Err(Cut::TooSlow)
    } else {
        Ok(())
    }
}

/// The next piece of a large arrival, of whose message as JSON so many bytes were sent.
fn fragment_of(arrival: &Arrival, sent: usize) -> Fragment {
    let rest = &arrival.line[LINE_BEGIN_BYTES + sent..arrival.line.len() - LINE_END.len()];
    let length = match rest.get(..PIECE) {
        None => rest.len(),
        Some(piece) => whole_characters(piece).expect("the line was checked"),
    };
    Fragment {
        uuid: arrival.uuid,
        json: Bytes::copy_from_slice(&rest[..length]),
        is_first: sent == 0,
        is_last: length == rest.len(),
    }
}

/// Bytes that keep a follower's turn until they are sent, so that only one piece of it is in memory.
struct Piece {
    bytes: Vec<u8>,
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
