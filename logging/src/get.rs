//! `GET`: single entries, and the log as a stream of lines.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::rejection::{PathRejection, QueryRejection};
use axum::extract::{Path, Query, State};
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use common::api::{
    LINE_END, Poll, READ_END, READ_SETTLED, ReadQuery, StreamEnd, begin_line, write_part,
};
use common::body::holding;
use common::bounds::Order;
use common::client::Client;
use common::entry::{Entry, first_uuid_at};
use common::json::{self, JsonLine};
use common::middleware::answer_not_found;
use common::permits::{Exhausted, Permits};
use common::problem::Problem;
use common::traces::TRACES;
use futures_util::{StreamExt, stream};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, Span, debug_span};
use uuid::Uuid;

use crate::error::{busy, no_entry, unreadable};
use crate::map::{Cursor, DistributedMap, MAX_AHEAD, MAX_SKEW, MapError, PieceLimit, READ_AHEAD};
use crate::state::{App, MAX_READS};

/// Budget for the pieces of all reads, in bytes: the more reads, the smaller their pieces.
const READ_MEMORY: usize = 24 * 1024 * 1024;

/// Pieces of one read that are in memory at once: those in the cursor, one being made, one waiting
/// and one being sent.
const PIECES_OF_A_READ: usize = READ_AHEAD + 3;

/// Pieces begin small, so that a short read takes little from the map, and double in size.
const FIRST_PIECE: usize = 4 * 1024;
const MAX_PIECE: usize = 256 * 1024;

/// `GET /{uuid}`: one entry.
pub(crate) async fn show(
    State(app): State<Arc<App>>,
    path: Result<Path<Uuid>, PathRejection>,
    client: Client,
) -> Result<Response, Problem> {
    let Ok(Path(uuid)) = path else {
        return Err(answer_not_found().await);
    };
    let permit = app.reads.take(client, 1);
    let permit = permit.map_err(|Exhausted| busy())?;
    let msg = app.map.get(uuid).instrument(map_span()).await;
    let msg = msg.map_err(unreadable)?.ok_or_else(|| no_entry(uuid))?;
    let answer = JsonLine(Entry { uuid, msg }).into_response();
    Ok(holding(answer, permit))
}

/// `GET /`: the entries within the bounds as a stream; see [`common::api::StreamEnd`].
pub(crate) async fn list(
    State(app): State<Arc<App>>,
    query: Result<Query<ReadQuery>, QueryRejection>,
    client: Client,
) -> Result<Response, Problem> {
    let Query(query) = query?;
    let ReadQuery {
        mut bounds, limit, ..
    } = query;
    let permit = app.reads.take(client, 1);
    let permit = permit.map_err(|Exhausted| busy())?;
    let clock = app.clock();
    let mut settled = None;
    if let Some(poll) = query.poll {
        if poll == Poll::Settle {
            settled = match (app.map.settle(clock).await, bounds.after) {
                (Ok(settled), _) => Some(first_uuid_at(settled)),
                // A process that hangs holds the map's write lock, for example: it is readable all the same.
                (Err(error), Some(_)) => {
                    tracing::warn!(%error, "the map does not tell what is settled");
                    None
                }
                (Err(error), None) => return Err(unreadable(error)),
            };
            bounds.after = bounds.after.or(settled);
        }
        // No entry can have a later time while a poll begins. So polls end, without a look at the
        // newest entry, which costs as much as a poll.
        let end = first_uuid_at(clock + MAX_AHEAD + MAX_SKEW);
        bounds = bounds.ending_before(end.max(settled.unwrap_or_default()));
    } else if bounds.needs_end(clock) {
        // Entries that are stored from now on are left out, or a slow reader would never finish.
        let last = app.map.last().await.map_err(unreadable)?;
        let end = last.map_or(0, |last| last.as_u128().saturating_add(1));
        bounds = bounds.ending_before(Uuid::from_u128(end));
    }
    let mut stream = EntryStream {
        cursor: app.map.read(bounds),
        map: app.map.clone(),
        large: None,
        left: limit.unwrap_or(u64::MAX),
        count: 0,
        // A read that another instance lost behind its last entry continues here with a limit of 0.
        last: bounds.near(),
        is_finished: false,
        piece_bytes: FIRST_PIECE,
        reads: app.reads.clone(),
        stop: app.stop.clone(),
    };
    let span = map_span();
    let first = stream.next_lines().instrument(span.clone()).await;
    let first = first.map_err(unreadable)?;
    let body = if stream.is_finished {
        Body::from(first)
    } else {
        let (pieces, mut received) = mpsc::channel(1);
        tokio::spawn(stream.read_ahead(pieces).instrument(span));
        let rest = stream::poll_fn(move |context| received.poll_recv(context));
        let pieces = stream::iter([Ok(first)]).chain(rest);
        Body::from_stream(pieces.map(|lines| lines.map(Bytes::from)))
    };
    let content_type = [(header::CONTENT_TYPE, "application/x-ndjson")];
    let mut response = (content_type, body).into_response();
    let end = bounds.before.filter(|_| bounds.order == Order::Asc);
    for (name, uuid) in [(READ_END, end), (READ_SETTLED, settled)] {
        if let Some(uuid) = uuid {
            let value = HeaderValue::try_from(uuid.to_string()).expect("a UUID is plain ASCII");
            response.headers_mut().insert(name, value);
        }
    }
    Ok(holding(response, permit))
}

/// The span of the map's work on a read.
fn map_span() -> Span {
    debug_span!(target: TRACES, "read the map")
}

struct EntryStream {
    cursor: Box<dyn Cursor>,
    map: Arc<dyn DistributedMap>,
    /// The entry whose line was begun, as its message is longer than a piece.
    large: Option<Large>,
    left: u64,
    count: u64,
    /// The last entry of this stream, or the one behind which it begins.
    last: Option<Uuid>,
    is_finished: bool,
    piece_bytes: usize,
    /// The permits in use are the number of reads, which limits the size of pieces.
    reads: Arc<Permits>,
    stop: CancellationToken,
}

/// An entry whose message is sent in parts, so that the memory of a read does not depend on its messages.
struct Large {
    uuid: Uuid,
    /// How many bytes of the message were sent, and how many it has.
    sent: usize,
    bytes: usize,
}

impl EntryStream {
    /// Reads each piece while the previous one is sent, until the end or a disconnect.
    async fn read_ahead(mut self, pieces: mpsc::Sender<Result<Vec<u8>, MapError>>) {
        while !self.is_finished {
            let Ok(permit) = pieces.reserve().await else {
                return;
            };
            let is_in_a_line = self.large.is_some();
            if self.stop.is_cancelled() && !is_in_a_line {
                permit.send(Ok(self.hand_over("this instance is stopping".to_owned())));
                return;
            }
            let next = self.next_lines().await.or_else(|error| {
                tracing::warn!(%error, "a read of the map failed: the facade continues it elsewhere");
                if is_in_a_line { Err(error) } else { Ok(self.hand_over(error.to_string())) }
            });
            self.is_finished |= next.is_err();
            permit.send(next);
        }
    }

    /// The next piece; the last one includes the end line, see [`StreamEnd`].
    async fn next_lines(&mut self) -> Result<Vec<u8>, MapError> {
        let bytes = self.piece_bytes();
        let mut lines;
        let mut is_at_end = false;
        if let Some(large) = &mut self.large {
            lines = Vec::with_capacity(bytes);
            let part = self.map.part(large.uuid, large.sent, bytes).await?;
            large.sent += write_part(&mut lines, &part, bytes);
            if large.sent < large.bytes {
                return Ok(lines);
            }
            lines.extend_from_slice(LINE_END);
            lines.push(b'\n');
            self.large = None;
        } else {
            let limit = PieceLimit {
                entries: self.left,
                bytes,
                message: bytes,
            };
            let piece = self.cursor.next(limit).await?;
            lines = piece.lines;
            self.left -= piece.count;
            self.count += piece.count;
            self.last = piece.last.or(self.last);
            if let (Some(uuid), Some(bytes)) = (piece.last, piece.large) {
                begin_line(&mut lines, uuid);
                self.large = Some(Large {
                    uuid,
                    sent: 0,
                    bytes,
                });
                return Ok(lines);
            }
            is_at_end = piece.count == 0;
        }
        let mut next = None;
        if self.left == 0 {
            let one = PieceLimit {
                entries: 1,
                bytes: 0,
                message: 0,
            };
            next = self.cursor.next(one).await?.last.and(self.last);
        }
        if self.left == 0 || is_at_end {
            self.end(&mut lines, next, None);
        }
        Ok(lines)
    }

    /// The line that ends an incomplete stream and sends the facade to another instance.
    fn hand_over(&mut self, reason: String) -> Vec<u8> {
        let mut line = Vec::new();
        self.end(&mut line, None, Some(reason));
        line
    }

    fn end(&mut self, lines: &mut Vec<u8>, next: Option<Uuid>, go_on_elsewhere: Option<String>) {
        self.is_finished = true;
        let end = StreamEnd {
            count: self.count,
            next,
            go_on_elsewhere,
        };
        json::write_line(lines, &end);
    }

    fn piece_bytes(&mut self) -> usize {
        let readers = MAX_READS - self.reads.free();
        let share = READ_MEMORY / PIECES_OF_A_READ / readers.max(1);
        let bytes = self.piece_bytes.min(share);
        self.piece_bytes = (bytes * 2).min(MAX_PIECE);
        bytes
    }
}
