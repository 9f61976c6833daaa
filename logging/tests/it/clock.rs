//! An instance whose own clock is far from the map's, as on Redis, whose servers check entries by theirs.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use common::api::{MapStats, READ_END, READ_SETTLED, write_entry};
use common::bounds::Bounds;
use common::entry::{Entry, Outcome, first_uuid};
use logging::map::{Cursor, DistributedMap, Health, MapError, Piece, PieceLimit};
use reqwest::Response;
use uuid::Uuid;

use crate::http::Instance;

const HOUR: Duration = Duration::from_secs(3600);

/// A map with entries, and what its clock calls settled.
#[derive(Debug)]
struct FixedMap {
    entries: BTreeMap<Uuid, String>,
    settled: SystemTime,
}

#[async_trait]
impl DistributedMap for FixedMap {
    fn id(&self) -> Option<Uuid> {
        None
    }

    async fn put(&self, _entries: Arc<[Entry]>) -> Vec<Outcome> {
        unreachable!("nobody posts")
    }

    async fn get(&self, uuid: Uuid) -> Result<Option<String>, MapError> {
        Ok(self.entries.get(&uuid).cloned())
    }

    fn read(&self, bounds: Bounds) -> Box<dyn Cursor> {
        let after = bounds.after.map_or(Bound::Unbounded, Bound::Excluded);
        let above = self.entries.range((after, Bound::Unbounded));
        let within = above.take_while(|(uuid, _)| bounds.contains(**uuid));
        let mut piece = Piece::default();
        for (uuid, msg) in within {
            write_entry(&mut piece.lines, *uuid, msg);
            piece.count += 1;
            piece.last = Some(*uuid);
        }
        Box::new(OnePiece(piece))
    }

    async fn last(&self) -> Result<Option<Uuid>, MapError> {
        Ok(self.entries.last_key_value().map(|(uuid, _)| *uuid))
    }

    async fn settled(&self) -> Result<SystemTime, MapError> {
        Ok(self.settled)
    }

    async fn health(&self) -> Health {
        Health {
            not_ready: None,
            checks: Vec::new(),
        }
    }

    async fn stats(&self) -> MapStats {
        unreachable!("nobody asks for statistics")
    }

    fn measure(&self) {}
}

#[derive(Debug)]
struct OnePiece(Piece);

#[async_trait]
impl Cursor for OnePiece {
    async fn next(&mut self, _limit: PieceLimit) -> Result<Piece, MapError> {
        Ok(std::mem::take(&mut self.0))
    }
}

fn uuid_at(time: SystemTime) -> Uuid {
    let since_epoch = time.duration_since(SystemTime::UNIX_EPOCH).unwrap();
    first_uuid(since_epoch.as_millis() as u64)
}

fn header(response: &Response, name: &str) -> Uuid {
    let value = response.headers()[name].to_str().unwrap();
    value.parse().unwrap()
}

/// The facade moves a follower's position to what is settled, so a poll must have read all up to there: also
/// what an instance's own clock takes for the future.
#[tokio::test]
async fn poll_reads_up_to_what_is_settled_whatever_the_own_clock_is() {
    let now = SystemTime::now();
    for settled in [now - HOUR, now, now + HOUR] {
        let second = Duration::from_secs(1);
        let times = [settled - 2 * second, settled - second, settled + second];
        let entries = times.map(|time| (uuid_at(time), "hello".to_owned()));
        let uuids = entries.each_ref().map(|(uuid, _)| *uuid);
        let entries = BTreeMap::from(entries);
        let instance = Instance::on_map(Arc::new(FixedMap { entries, settled }));
        let position = uuid_at(times[0] - second);
        let poll = format!("/?poll=settle&after={position}");
        let response = instance.get(&poll).await;
        assert_eq!(header(&response, READ_SETTLED), uuid_at(settled));
        assert!(header(&response, READ_END) >= uuid_at(settled));
        let text = response.text().await.unwrap();
        for uuid in &uuids[..2] {
            assert!(text.contains(&uuid.to_string()), "{text}");
        }
        // The first poll of all followers begins where the map is settled.
        let first = instance.text("/?poll=settle").await;
        assert!(!first.contains(&uuids[1].to_string()), "{first}");
        // What is not settled is shown as soon as the instance's own clock has come near.
        let is_shown = settled <= now;
        assert_eq!(first.contains(&uuids[2].to_string()), is_shown, "{first}");
        let recent = format!("/?poll=recent&after={position}");
        let recent = instance.text(&recent).await;
        assert_eq!(recent.contains(&uuids[2].to_string()), is_shown, "{recent}");
    }
}
