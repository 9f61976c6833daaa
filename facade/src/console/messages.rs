//! The messages on the page: the newest, and those that a search finds.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use common::api::{ReadQuery, timestamp};
use common::bounds::{Bounds, Order};
use common::client::Client;
use common::entry::Entry;
use common::escape::needs_escape;
use common::permits::Exhausted;
use common::problem::Problem;
use tokio::time::timeout;
use uuid::Uuid;

use super::values::{grouped, seconds};
use crate::entry_stream::{EntryStream, Part};
use crate::error::{too_many, unreadable};
use crate::pool::Instance;
use crate::read::Cursor;
use crate::search::{MAX_SCANNED, Search, Text};
use crate::state::App;
use crate::upstream::UpstreamError;

/// The newest messages that the page shows.
const NEWEST: u64 = 10;

/// The most matches of a search that the page shows; `console.js` asks for as many.
const MATCHES: u64 = 20;

/// The page shows the beginning of a longer message, in characters.
const MAX_SHOWN: usize = 300;

/// How long the newest messages may take; after it the page comes without them.
const NEWEST_TIMEOUT: Duration = Duration::from_secs(1);

pub(super) struct Message {
    pub(super) uuid: Uuid,
    pub(super) time: String,
    pub(super) pieces: Vec<Piece>,
    /// The length of a message that is cut, in bytes.
    pub(super) whole: Option<usize>,
}

/// A part of a message.
pub(super) enum Piece {
    Plain(String),
    /// A character that would act on the page's text, as an escape.
    Escaped(String),
}

pub(super) struct Found {
    pub(super) matches: Vec<Message>,
    pub(super) scanned: u64,
    /// Where to search on.
    pub(super) next: Option<Uuid>,
}

impl Found {
    /// As `summary` in console.js.
    pub(super) fn summary(&self) -> String {
        let (matches, scanned) = (self.matches.len() as u64, grouped(self.scanned));
        let rest = match self.next {
            Some(_) => "There are more to search.",
            None => "That is all.",
        };
        format!("Matches: {matches}. Messages scanned: {scanned}. {rest}")
    }
}

/// The newest messages, from any instance.
pub(super) async fn newest(app: &App, client: Client) -> Result<Vec<Message>, Problem> {
    let permit = app.reads.take(client, 1);
    let _permit = permit.map_err(|Exhausted| too_many("reads"))?;
    let bounds = Bounds {
        order: Order::Desc,
        ..Bounds::default()
    };
    let ask = async |instance: Arc<Instance>| {
        let limit = Some(NEWEST);
        let answer = instance.client.read(
            ReadQuery {
                bounds,
                limit,
                poll: None,
            },
            None,
        );
        let mut stream = EntryStream::new(answer.await?.chunks, bounds, limit);
        let mut newest = Vec::new();
        while let Part::Entries(lines, _) = stream.next().await? {
            newest.extend(messages(&lines));
        }
        Ok(newest)
    };
    let asked = timeout(NEWEST_TIMEOUT, app.pool.ask(ask)).await;
    asked
        .unwrap_or(Err(UpstreamError::TimedOut))
        .map_err(|error| unreadable(&app.pool, &error))
}

/// The first matches of a text.
pub(super) async fn find(
    app: &App,
    client: Client,
    text: Text,
    bounds: Bounds,
) -> Result<Found, Problem> {
    let permit = app.reads.take(client, 1);
    let _permit = permit.map_err(|Exhausted| too_many("reads"))?;
    let query = ReadQuery {
        bounds,
        limit: Some(MAX_SCANNED),
        poll: None,
    };
    let mut cursor = Cursor::new(&app.pool, app.read_deadline, query, None).with_whole_lines();
    let mut search = Search::new(text, Some(MATCHES));
    let mut matches = Vec::new();
    let searching = async {
        cursor.begin().await?;
        loop {
            match search.next(&mut cursor).await? {
                Part::Entries(lines, _) => matches.extend(messages(&lines)),
                Part::Fragment(_) => unreachable!("lines are whole"),
                Part::End(next) => return Ok(next),
            }
        }
    };
    let next = searching.await;
    let next = next.map_err(|error| unreadable(&app.pool, &error))?;
    Ok(Found {
        matches,
        scanned: search.scanned,
        next,
    })
}

fn messages(lines: &[u8]) -> impl Iterator<Item = Message> {
    let entries = serde_json::Deserializer::from_slice(lines).into_iter::<Entry>();
    entries.flatten().map(Message::new)
}

impl Message {
    fn new(entry: Entry) -> Self {
        let shown: String = entry.msg.chars().take(MAX_SHOWN).collect();
        Self {
            uuid: entry.uuid,
            time: seconds(&posted_at(entry.uuid)),
            whole: (shown.len() < entry.msg.len()).then_some(entry.msg.len()),
            pieces: pieces(&shown),
        }
    }
}

fn posted_at(uuid: Uuid) -> String {
    let (seconds, nanoseconds) = uuid.get_timestamp().map_or((0, 0), |time| time.to_unix());
    timestamp(SystemTime::UNIX_EPOCH + Duration::new(seconds, nanoseconds))
}

fn pieces(text: &str) -> Vec<Piece> {
    let mut pieces = Vec::new();
    let mut plain = String::new();
    for character in text.chars() {
        if needs_escape(character) {
            pieces.push(Piece::Plain(std::mem::take(&mut plain)));
            pieces.push(Piece::Escaped(character.escape_default().to_string()));
        } else {
            plain.push(character);
        }
    }
    pieces.push(Piece::Plain(plain));
    pieces
}
