//! Ordered reads over all partitions: a merge of their sorted sets.
//!
//! The cursor keeps a few members of each partition. When one partition has none left, all
//! partitions that have few are refilled together.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use common::bounds::{Bounds, Order};
use uuid::Uuid;

use super::cluster::Cluster;
use super::partition::{self, Member, PARTITIONS};
use super::query::{FIRST_RANK, Part, rank, read_messages, read_parts};
use super::timeouts::in_time;
use crate::map::contract::{Cursor, MapError, Piece, PieceLimit, READ_AHEAD};

/// The minimum number of members of a partition in memory after a refill.
const MIN_WINDOW: usize = 2;

#[derive(Debug)]
pub(super) struct RedisCursor {
    cluster: Arc<Cluster>,
    timeout: Duration,
    order: Order,
    /// The rank of the first UUID beyond the bounds.
    end: u128,
    sources: Vec<Source>,
    /// Whether a partition that is not exhausted has no members in memory.
    is_dry: bool,
    /// The partitions that have members in memory, by the rank of their first member.
    queue: BinaryHeap<Reverse<(u128, u16)>>,
    /// Average memory of a member in the last refill, in bytes.
    member_bytes: usize,
}

/// A partition in the merge.
#[derive(Debug)]
struct Source {
    members: VecDeque<Member>,
    /// The rank of the first member that was not read yet.
    from: u128,
    is_exhausted: bool,
}

impl RedisCursor {
    pub(super) fn new(cluster: Arc<Cluster>, timeout: Duration, bounds: Bounds) -> Self {
        let order = bounds.order;
        let far = match order {
            Order::Asc => bounds.before,
            Order::Desc => bounds.after,
        };
        let from = bounds
            .near()
            .map_or(FIRST_RANK, |near| rank(order, near).saturating_add(1));
        let end = far.map_or(u128::MAX, |far| rank(order, far));
        let sources = partition::all().map(|_| Source {
            members: VecDeque::new(),
            from,
            is_exhausted: from >= end,
        });
        Self {
            cluster,
            timeout,
            order,
            end,
            sources: sources.collect(),
            is_dry: from < end,
            queue: BinaryHeap::new(),
            member_bytes: partition::INLINE_BYTES,
        }
    }

    /// Takes the next members until the piece is full or the read ends.
    async fn pick(&mut self, limit: PieceLimit) -> Result<Vec<Member>, MapError> {
        let mut picked = Vec::new();
        let mut bytes = 0;
        while (picked.len() as u64) < limit.entries {
            if self.is_dry {
                if bytes > limit.bytes / 2 {
                    break;
                }
                self.refill(limit.bytes.saturating_mul(READ_AHEAD)).await?;
            }
            let Some(Reverse((_, partition))) = self.queue.peek().copied() else {
                break;
            };
            let source = &mut self.sources[usize::from(partition)];
            let size = source.members.front().map_or(0, Member::message_bytes);
            bytes += size + partition::LINE_BYTES;
            let is_large = size > limit.message;
            if (bytes > limit.bytes || is_large) && !picked.is_empty() {
                break;
            }
            picked.extend(source.members.pop_front());
            self.cluster.count_get(partition);
            self.queue.pop();
            self.enqueue(partition);
            if is_large {
                break;
            }
        }
        Ok(picked)
    }

    fn enqueue(&mut self, partition: u16) {
        let source = &self.sources[usize::from(partition)];
        match source.members.front().and_then(Member::uuid) {
            Some(uuid) => self
                .queue
                .push(Reverse((rank(self.order, uuid), partition))),
            None => self.is_dry |= !source.is_exhausted,
        }
    }

    /// Refills the partitions that have few members, to about `bytes` of all partitions' members.
    async fn refill(&mut self, bytes: usize) -> Result<(), MapError> {
        let window = bytes / self.member_bytes / usize::from(PARTITIONS);
        let window = window.max(MIN_WINDOW);
        let sources = self.sources.iter().zip(partition::all());
        let few = sources
            .filter(|(source, _)| !source.is_exhausted && source.members.len() <= window / 4);
        let parts = few.map(|(source, partition)| Part {
            partition,
            from: source.from,
            count: window - source.members.len(),
        });
        let parts: Vec<Part> = parts.collect();
        let found = read_parts(&self.cluster, self.order, &parts).await?;
        self.is_dry = false;
        let (mut count, mut bytes) = (0, 0);
        for (part, found) in parts.iter().zip(found) {
            count += found.len();
            bytes += found.iter().map(Member::memory_bytes).sum::<usize>();
            let was_empty = self.sources[usize::from(part.partition)].members.is_empty();
            self.add(part, found)?;
            if was_empty {
                self.enqueue(part.partition);
            }
        }
        self.member_bytes = (bytes / count.max(1)).max(1);
        Ok(())
    }

    fn add(&mut self, part: &Part, found: Vec<Member>) -> Result<(), MapError> {
        let is_whole = found.len() == part.count;
        let source = &mut self.sources[usize::from(part.partition)];
        for member in found {
            let uuid = match &member {
                Member::Small(uuid, _) | Member::Large(uuid, _) => *uuid,
                Member::Mark(map) => {
                    source.is_exhausted = true;
                    return self.cluster.require_mark(map);
                }
            };
            let rank = rank(self.order, uuid);
            if rank >= self.end {
                source.is_exhausted = true;
                return Ok(());
            }
            source.from = rank.saturating_add(1);
            source.members.push_back(member);
        }
        if is_whole {
            return Ok(());
        }
        let partition = part.partition;
        let detail = format!(
            "partition {partition} ends without its mark: it is moving, or its primary lost entries"
        );
        Err(MapError::Unavailable(detail))
    }
}

#[async_trait]
impl Cursor for RedisCursor {
    async fn next(&mut self, limit: PieceLimit) -> Result<Piece, MapError> {
        in_time(self.timeout, async {
            let picked = self.pick(limit).await?;
            if let [Member::Large(uuid, bytes)] = picked[..]
                && bytes > limit.message
            {
                return Ok(Piece::large(uuid, bytes));
            }
            let large = picked.iter().filter_map(|member| match member {
                Member::Large(uuid, _) => Some(*uuid),
                Member::Small(..) | Member::Mark(_) => None,
            });
            let large: Vec<Uuid> = large.collect();
            let messages = read_messages(&self.cluster, &large).await?;
            let mut messages = messages.into_iter();
            let mut piece = Piece::default();
            for member in picked {
                let (uuid, message) = match member {
                    Member::Small(uuid, message) => (uuid, Some(message)),
                    Member::Large(uuid, _) => (uuid, messages.next()),
                    Member::Mark(_) => continue,
                };
                let message = message.as_deref().unwrap_or_default();
                let message = std::str::from_utf8(message);
                piece.push(uuid, message.map_err(|_| MapError::Damaged(uuid))?);
            }
            Ok(piece)
        })
        .await
    }
}
