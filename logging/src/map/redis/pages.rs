//! Ordered reads over all partitions: a merge of 271 sorted sets, a page at a time.
//!
//! Nothing is kept between pages, so any instance can give any page. Three steps keep what is read
//! close to what is needed: a few partitions are asked where the page will probably end; all are
//! asked for what lies before that; and those that turn out to hold more are asked again.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::sync::Arc;

use common::entry::Entry;
use common::page::{Bounds, Order};
use futures_util::future::try_join_all;
use redis::{Pipeline, ServerError, Value};
use uuid::Uuid;

use super::link::Link;
use super::members::{Members, Shard, Topology};
use super::partition::{self, PARTITIONS, UUID_BYTES, entries_key, strange};
use super::range::{Range, successor};
use super::servers::Address;
use crate::map::job::ENTRY_OVERHEAD;
use crate::map::{MapError, Page, PageLimit};

const READ_SCRIPT: &str = include_str!("read.lua");

/// Every 17th partition, from a random one on, is asked where a page will end: 16 or 15 of 271.
const SAMPLE_STEP: usize = 17;

/// At least so many members of each are looked at.
const SAMPLE_MEMBERS: usize = 16;

/// When one window was not enough for a page, the next sample is larger by this factor: entries may
/// crowd in few partitions.
const SAMPLE_GROWTH: usize = 4;

/// The sample's guess is aimed this much beyond the page's end, as it is off by about this much.
const SAMPLE_MARGIN: f64 = 1.25;

/// A partition may give this many times its share of a page before it is asked again.
const SHARE_MARGIN: usize = 4;

/// No page is planned larger than this, whatever its limit, in bytes.
const MAX_PLANNED: usize = 1024 * 1024;

/// The most members that are asked of one partition at once.
const MAX_MEMBERS: usize = 1024;

/// Bytes in a member's head: UUID and size, see `read.lua`.
const HEAD_BYTES: usize = UUID_BYTES + 4;

/// The message under `uuid`.
pub(super) async fn get(members: &Members, uuid: Uuid) -> Result<Option<String>, MapError> {
    let reader = Reader::new(members, Order::Asc);
    let part = Part {
        partition: partition::of(uuid),
        range: Range {
            low: uuid,
            high: successor(uuid),
        },
        count: 1,
        bytes: usize::MAX,
    };
    let found = reader.read(vec![part]).await?.remove(0);
    Ok(found.entries.into_iter().next().map(|entry| entry.msg))
}

/// The greatest UUID in the map.
pub(super) async fn last(members: &Members) -> Result<Option<Uuid>, MapError> {
    let reader = Reader::new(members, Order::Desc);
    let range = Range {
        low: Uuid::nil(),
        high: None,
    };
    let parts = partition::all().map(|partition| Part {
        partition,
        range,
        count: 1,
        bytes: 0,
    });
    let found = reader.read(parts.collect()).await?;
    Ok(found
        .iter()
        .flat_map(|found| &found.heads)
        .map(|head| head.uuid)
        .max())
}

/// The first entries within the bounds.
pub(super) async fn page(
    members: &Members,
    bounds: Bounds,
    limit: PageLimit,
) -> Result<Page, MapError> {
    let mut page = Filling::new(limit);
    let reader = Reader::new(members, bounds.order);
    let mut unread = Range::of(bounds);
    let mut sample = SAMPLE_MEMBERS;
    while let Some(range) = unread {
        let window = reader.window(range, &page, sample).await?;
        sample = (sample * SAMPLE_GROWTH).min(MAX_MEMBERS);
        reader.fill(&mut page, window).await?;
        if page.page.more {
            break;
        }
        unread = range.behind(window, bounds.order);
    }
    Ok(page.page)
}

/// A page that is being filled.
struct Filling {
    page: Page,
    entries_left: u64,
    bytes_left: usize,
}

impl Filling {
    fn new(limit: PageLimit) -> Self {
        Self {
            page: Page::default(),
            entries_left: limit.entries,
            bytes_left: limit.bytes,
        }
    }

    /// Whether an entry of this size still goes in; if not, the page is finished.
    fn has_room(&mut self, bytes: usize) -> bool {
        let fits = bytes <= self.bytes_left || self.page.entries.is_empty();
        self.page.more = self.entries_left == 0 || !fits;
        !self.page.more
    }

    fn push(&mut self, entry: Entry) {
        self.entries_left -= 1;
        self.bytes_left = self.bytes_left.saturating_sub(size(&entry));
        self.page.entries.push(entry);
    }

    fn planned_bytes(&self) -> usize {
        self.bytes_left.min(MAX_PLANNED)
    }

    /// At most this many entries are missing.
    fn planned_entries(&self) -> usize {
        let by_bytes = self.planned_bytes() / ENTRY_OVERHEAD;
        by_bytes.min(usize::try_from(self.entries_left).unwrap_or(usize::MAX))
    }
}

fn size(entry: &Entry) -> usize {
    entry.msg.len() + ENTRY_OVERHEAD
}

/// What is asked of one partition.
struct Part {
    partition: u16,
    range: Range,
    /// At most this many members.
    count: usize,
    /// Whole members up to this many bytes, of the others only the heads.
    bytes: usize,
}

/// What a partition gave.
struct Found {
    entries: Vec<Entry>,
    /// Of members behind these, in order.
    heads: Vec<Head>,
    /// Whether there may be more than those.
    has_more: bool,
}

/// An entry whose message was not read.
#[derive(Clone, Copy, Debug)]
struct Head {
    uuid: Uuid,
    /// As [`size`] counts.
    bytes: usize,
}

/// A partition in the merge.
struct Source {
    partition: u16,
    entries: VecDeque<Entry>,
    rest: Rest,
}

/// What a partition has behind the entries that were read.
#[derive(Clone, Copy)]
enum Rest {
    Nothing,
    /// This entry, and perhaps more.
    Known(Head),
    /// Perhaps something, from this UUID on.
    From(Uuid),
}

impl Rest {
    /// What comes next, as far as it is known.
    fn head(self) -> Option<Head> {
        match self {
            Self::Nothing => None,
            Self::Known(head) => Some(head),
            Self::From(uuid) => Some(Head {
                uuid,
                bytes: ENTRY_OVERHEAD,
            }),
        }
    }
}

impl Source {
    /// Where its next entry is, or may be.
    fn position(&self) -> Option<Uuid> {
        match self.entries.front() {
            Some(entry) => Some(entry.uuid),
            None => Some(self.rest.head()?.uuid),
        }
    }

    fn add(&mut self, found: Found, order: Order) {
        let last = found.entries.last().map(|entry| entry.uuid);
        self.entries.extend(found.entries);
        self.rest = match (found.heads.first(), last) {
            (Some(head), _) => Rest::Known(*head),
            (None, Some(last)) if found.has_more => {
                let next = match order {
                    Order::Asc => last.as_u128().checked_add(1),
                    Order::Desc => last.as_u128().checked_sub(1),
                };
                next.map_or(Rest::Nothing, |next| Rest::From(Uuid::from_u128(next)))
            }
            (None, _) => Rest::Nothing,
        };
    }
}

/// Reads in one order.
struct Reader<'a> {
    members: &'a Members,
    topology: Arc<Topology>,
    order: Order,
}

impl<'a> Reader<'a> {
    fn new(members: &'a Members, order: Order) -> Self {
        Self {
            members,
            topology: members.topology(),
            order,
        }
    }

    /// How far the page will probably reach, by what a sample of the partitions holds.
    async fn window(&self, range: Range, page: &Filling, least: usize) -> Result<Range, MapError> {
        let share = page.planned_entries() / usize::from(PARTITIONS);
        let count = (2 * share).clamp(least, MAX_MEMBERS);
        let sampled = partition::all().skip(rand::random_range(0..SAMPLE_STEP));
        let parts = sampled.step_by(SAMPLE_STEP).map(|partition| Part {
            partition,
            range,
            count,
            bytes: 0,
        });
        let sample = self.read(parts.collect()).await?;
        let weight = f64::from(PARTITIONS) / sample.len() as f64;
        // Behind the last head of a partition that has more, nothing is known of it.
        let known_to = sample.iter().filter(|found| found.has_more);
        let known_to = known_to.filter_map(|found| found.heads.last());
        let known_to = known_to
            .map(|head| head.uuid)
            .min_by_key(|uuid| self.rank(*uuid));
        let mut heads: Vec<Head> = sample.into_iter().flat_map(|found| found.heads).collect();
        heads.sort_by_key(|head| self.rank(head.uuid));
        let (mut entries, mut bytes) = (0.0, 0.0);
        for head in heads {
            entries += weight;
            bytes += weight * head.bytes as f64;
            let is_enough = bytes > SAMPLE_MARGIN * page.planned_bytes() as f64
                || entries > SAMPLE_MARGIN * page.entries_left as f64 + weight;
            if is_enough || known_to == Some(head.uuid) {
                return Ok(range.through(head.uuid, self.order));
            }
        }
        Ok(range)
    }

    /// Adds the window's entries to the page, in order, until it is full.
    async fn fill(&self, page: &mut Filling, window: Range) -> Result<(), MapError> {
        let share = |whole: usize| SHARE_MARGIN * whole / usize::from(PARTITIONS);
        let parts = partition::all().map(|partition| Part {
            partition,
            range: window,
            count: share(page.planned_entries()) + SAMPLE_MEMBERS,
            bytes: share(page.planned_bytes()),
        });
        let found = self.read(parts.collect()).await?;
        let sources = partition::all().zip(found).map(|(partition, found)| {
            let mut source = Source {
                partition,
                entries: VecDeque::new(),
                rest: Rest::Nothing,
            };
            source.add(found, self.order);
            source
        });
        let mut sources: Vec<Source> = sources.collect();
        let mut queue = self.queue(&sources);
        while let Some(Reverse((_, place))) = queue.pop() {
            let source = &mut sources[place];
            match source.entries.pop_front() {
                Some(entry) => {
                    if !page.has_room(size(&entry)) {
                        return Ok(());
                    }
                    page.push(entry);
                    queue.extend(self.ranked(source, place));
                }
                None => {
                    if let Rest::Known(head) = source.rest
                        && !page.has_room(head.bytes)
                    {
                        return Ok(());
                    }
                    self.refill(page, window, &mut sources).await?;
                    queue = self.queue(&sources);
                }
            }
        }
        Ok(())
    }

    /// Reads on in the partitions of which no entry is left, as far as the page has room for them:
    /// at least in the one that comes first.
    async fn refill(
        &self,
        page: &Filling,
        window: Range,
        sources: &mut [Source],
    ) -> Result<(), MapError> {
        let empty = sources.iter().enumerate();
        let empty = empty.filter(|(_, source)| source.entries.is_empty());
        let empty = empty.filter_map(|(place, source)| Some((place, source.rest.head()?)));
        let mut empty: Vec<(usize, Head)> = empty.collect();
        empty.sort_by_key(|(_, head)| self.rank(head.uuid));
        let mut bytes_left = page.planned_bytes();
        let mut count = 0;
        for (_, head) in &empty {
            if count > 0 && head.bytes > bytes_left {
                break;
            }
            bytes_left = bytes_left.saturating_sub(head.bytes);
            count += 1;
        }
        empty.truncate(count);
        let share = page.planned_bytes() / empty.len().max(1);
        let parts = empty.iter().map(|(place, head)| Part {
            partition: sources[*place].partition,
            range: window.from(head.uuid, self.order),
            count: MAX_MEMBERS,
            bytes: share.max(head.bytes),
        });
        let found = self.read(parts.collect()).await?;
        for ((place, _), found) in empty.into_iter().zip(found) {
            sources[place].add(found, self.order);
        }
        Ok(())
    }

    /// The sources that have something left, by where their next entries are.
    fn queue(&self, sources: &[Source]) -> BinaryHeap<Reverse<(u128, usize)>> {
        let sources = sources.iter().enumerate();
        sources
            .filter_map(|(place, source)| self.ranked(source, place))
            .collect()
    }

    fn ranked(&self, source: &Source, place: usize) -> Option<Reverse<(u128, usize)>> {
        let position = source.position()?;
        Some(Reverse((self.rank(position), place)))
    }

    /// Smaller for what comes first.
    fn rank(&self, uuid: Uuid) -> u128 {
        match self.order {
            Order::Asc => uuid.as_u128(),
            Order::Desc => !uuid.as_u128(),
        }
    }

    /// Reads parts of partitions, with one call for each primary, and gives what was found in the
    /// order of the parts.
    async fn read(&self, parts: Vec<Part>) -> Result<Vec<Found>, MapError> {
        let mut places: Vec<Vec<usize>> = vec![Vec::new(); self.topology.shards.len()];
        for (place, part) in parts.iter().enumerate() {
            let owner = self.topology.owner(part.partition);
            let owner = owner.ok_or_else(|| {
                self.members.refresh_soon();
                MapError::Unavailable(self.members.trouble())
            })?;
            places[owner].push(place);
        }
        let calls = self.topology.shards.iter().zip(&places);
        let calls = calls.filter(|(_, places)| !places.is_empty());
        let calls = calls.map(|(shard, places)| {
            let parts = places.iter().map(|place| &parts[*place]);
            self.read_shard(shard, parts.collect())
        });
        let found = try_join_all(calls).await?;
        let places = places.into_iter().flatten();
        let mut found: Vec<(usize, Found)> = places.zip(found.into_iter().flatten()).collect();
        found.sort_unstable_by_key(|(place, _)| *place);
        Ok(found.into_iter().map(|(_, found)| found).collect())
    }

    async fn read_shard(&self, shard: &Shard, parts: Vec<&Part>) -> Result<Vec<Found>, MapError> {
        let mut commands = redis::pipe();
        self.add_script(&mut commands, &parts, Keys::Undeclared);
        let link = &shard.link;
        let replies = link.ask(&commands).await.map_err(MapError::Unavailable)?;
        match replies.into_iter().next() {
            Some(Value::Array(found)) if found.len() == parts.len() => {
                found.into_iter().map(Found::read).collect()
            }
            Some(Value::ServerError(error)) => {
                self.members.refresh_soon();
                if is_elsewhere(&error) {
                    return self.read_while_moving(link, parts).await;
                }
                Err(refused(link, &error))
            }
            Some(other) => Err(strange(&[other])),
            None => Err(strange(&[])),
        }
    }

    /// Reads each part by itself and declares its key, so that the server tells where a partition is
    /// that has left it while the slot is still open.
    async fn read_while_moving(
        &self,
        link: &Arc<Link>,
        parts: Vec<&Part>,
    ) -> Result<Vec<Found>, MapError> {
        let mut commands = redis::pipe();
        for part in &parts {
            self.add_script(&mut commands, &[*part], Keys::Declared);
        }
        let replies = link.ask(&commands).await.map_err(MapError::Unavailable)?;
        let mut found = Vec::with_capacity(parts.len());
        for (part, reply) in parts.into_iter().zip(replies) {
            found.push(match reply {
                Value::ServerError(error) if error.code() == "ASK" => {
                    self.follow(link, part, &error).await?
                }
                reply => Found::only(link, reply)?,
            });
        }
        Ok(found)
    }

    /// Reads a part where `ASK` says that its partition is.
    async fn follow(
        &self,
        link: &Arc<Link>,
        part: &Part,
        ask: &ServerError,
    ) -> Result<Found, MapError> {
        let address = ask.details().and_then(|details| details.split_once(' '));
        let target = address.and_then(|(_, address)| {
            let address: Address = address.parse().ok()?;
            self.topology.links.get(&address)
        });
        let target = target.ok_or_else(|| refused(link, ask))?;
        let mut commands = redis::pipe();
        commands.cmd("ASKING");
        self.add_script(&mut commands, &[part], Keys::Declared);
        let replies = target.ask(&commands).await.map_err(MapError::Unavailable)?;
        let [_, reply] = <[Value; 2]>::try_from(replies).map_err(|replies| strange(&replies))?;
        let found = Found::only(target, reply)?;
        if found.entries.is_empty() && found.heads.is_empty() {
            // It may have gone back meanwhile.
            let mut commands = redis::pipe();
            self.add_script(&mut commands, &[part], Keys::Declared);
            let replies = link.ask(&commands).await.map_err(MapError::Unavailable)?;
            let is_still_there = matches!(
                &replies[..],
                [Value::ServerError(error)] if error.code() == "ASK"
            );
            if !is_still_there {
                return Err(refused(link, ask));
            }
        }
        Ok(found)
    }

    fn add_script(&self, commands: &mut Pipeline, parts: &[&Part], keys: Keys) {
        let read = commands.cmd("EVAL").arg(READ_SCRIPT);
        match keys {
            Keys::Undeclared => read.arg(0),
            Keys::Declared => {
                let declared = parts.iter().map(|part| entries_key(part.partition));
                read.arg(parts.len()).arg(declared.collect::<Vec<_>>())
            }
        };
        read.arg(match self.order {
            Order::Asc => "ZRANGEBYLEX",
            Order::Desc => "ZREVRANGEBYLEX",
        });
        for part in parts {
            let (from, to) = part.range.ends(self.order);
            read.arg(entries_key(part.partition))
                .arg(from)
                .arg(to)
                .arg(part.count)
                .arg(part.bytes.min(u32::MAX as usize));
        }
    }
}

/// Whether the keys of a script are given as such.
#[derive(Clone, Copy)]
enum Keys {
    /// They may be in several slots, as in a lane. A key that is not there fails inside the script.
    Undeclared,
    /// They are in one slot. A key that is not there is answered with where it is.
    Declared,
}

/// Whether a script failed because a key is not on its server. The error has no code of its own.
fn is_elsewhere(error: &ServerError) -> bool {
    let mut details = error.details().into_iter();
    details.any(|details| details.contains("non local key"))
}

fn refused(link: &Link, error: &ServerError) -> MapError {
    let address = &link.address;
    MapError::Unavailable(format!("redis {address} refuses: {error}"))
}

impl Found {
    /// Reads the reply to a script that read one part.
    fn only(link: &Link, reply: Value) -> Result<Self, MapError> {
        match reply {
            Value::Array(mut found) if found.len() == 1 => Self::read(found.remove(0)),
            Value::ServerError(error) => Err(refused(link, &error)),
            other => Err(strange(&[other])),
        }
    }

    /// Reads one part of the reply of `read.lua`.
    fn read(reply: Value) -> Result<Self, MapError> {
        let Value::Array(mut items) = reply else {
            return Err(strange(&[reply]));
        };
        let tail = items.split_off(items.len().saturating_sub(2));
        let [Value::BulkString(heads), Value::Int(has_more)] = &tail[..] else {
            return Err(strange(&tail));
        };
        let heads = heads.chunks_exact(HEAD_BYTES).map(|head| {
            let (uuid, size) = head.split_at(UUID_BYTES);
            let uuid = Uuid::from_slice(uuid).expect("split at 16 bytes");
            let size = u32::from_be_bytes(size.try_into().expect("the other 4 bytes"));
            Head {
                uuid,
                bytes: size as usize + (ENTRY_OVERHEAD - UUID_BYTES),
            }
        });
        Ok(Self {
            heads: heads.collect(),
            has_more: *has_more == 1,
            entries: items
                .into_iter()
                .map(partition::entry)
                .collect::<Result<_, _>>()?,
        })
    }
}
