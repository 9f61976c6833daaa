//! Three instances that share a map, behind a network that randomly loses and delays requests and answers.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use axum::body::Bytes;
use axum::http::StatusCode;
use common::api::{
    Batch, InstanceStats, Poll, PutEntry, PutResult, ReadQuery, StreamEnd, write_entry,
};
use common::bounds::Order;
use common::entry::{self, Entry, Outcome, first_uuid};
use common::json;
use facade::client::{LoggingApi, ReadAnswer};
use facade::upstream::UpstreamError;
use futures_util::{StreamExt, stream};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};
use tokio::time::{Instant, sleep};
use uuid::{Builder, Uuid};

/// The timeout of a try, as the facade's clients are configured.
const TRY_TIMEOUT: Duration = Duration::from_secs(1);

/// How far ahead of the map's clock an entry's time may be.
const MAX_AHEAD: Duration = Duration::from_secs(2);

/// After this time beyond the settle window, `stale` is final.
const MAX_SKEW: Duration = Duration::from_secs(1);

/// The clock of the map, and of the facade's UUIDs, which follows the paused clock of tokio.
#[derive(Clone, Copy)]
pub(super) struct Clock {
    pub(super) base: SystemTime,
    pub(super) began: Instant,
}

impl Clock {
    fn start() -> Self {
        Self {
            base: SystemTime::now(),
            began: Instant::now(),
        }
    }

    pub(super) fn now(self) -> SystemTime {
        self.base + self.began.elapsed()
    }
}

/// The state that all instances share.
pub(super) struct Network {
    pub(super) random: StdRng,
    pub(super) map: BTreeMap<Uuid, String>,
    pub(super) clock: Clock,
    /// Longer than a POST usually takes, and often shorter than a delayed request or a retry.
    settle: Duration,
    states: [State; 3],
    /// How many milliseconds the own clock of each instance is ahead of the map's.
    pub(super) ahead: [i64; 3],
    pub(super) faults: u64,
}

/// The condition of an instance and its end; then the instance is healthy.
#[derive(Clone, Copy)]
struct State {
    condition: Condition,
    until: Instant,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Condition {
    Well,
    /// The process is dead; connections are refused.
    Dead,
    /// It accepts requests and never answers them.
    Hangs,
    /// It accepts connections and closes them.
    Closes,
    /// Another server at its address answers every request.
    Answers(StatusCode),
}

const SICKNESSES: [Condition; 5] = [
    Condition::Dead,
    Condition::Hangs,
    Condition::Closes,
    Condition::Answers(StatusCode::NOT_FOUND),
    Condition::Answers(StatusCode::INTERNAL_SERVER_ERROR),
];

impl Network {
    pub(super) fn new(seed: u64) -> Self {
        let mut random = StdRng::seed_from_u64(seed);
        Self {
            settle: Duration::from_millis(random.random_range(3000..8000)),
            random,
            map: BTreeMap::new(),
            clock: Clock::start(),
            states: [State {
                condition: Condition::Well,
                until: Instant::now(),
            }; 3],
            ahead: [0; 3],
            faults: 0,
        }
    }

    /// No instance runs for an hour.
    pub(super) fn kill_all(&mut self) {
        self.states = [State {
            condition: Condition::Dead,
            until: Instant::now() + Duration::from_secs(3600),
        }; 3];
    }

    fn put(&mut self, entries: &[PutEntry]) -> Vec<PutResult> {
        let results = entries.iter().map(|entry| PutResult {
            uuid: entry.uuid,
            outcome: self.put_one(entry),
        });
        results.collect()
    }

    fn put_one(&mut self, entry: &PutEntry) -> Outcome {
        let roll = self.random.random_range(0..100);
        if roll < 2 {
            return Outcome::refused("not now");
        }
        if roll < 3 {
            return Outcome::partition_down("not in this partition");
        }
        if roll < 5 {
            return Outcome::unknown("not executed, but who knows");
        }
        let outcome = match self.map.get(&entry.uuid) {
            Some(msg) if *msg == entry.msg => Outcome::Duplicate,
            Some(_) => Outcome::Conflict,
            None => match self.staleness(entry.uuid) {
                Some(outcome) => outcome,
                None => Outcome::Stored,
            },
        };
        if outcome == Outcome::Stored {
            self.map.insert(entry.uuid, entry.msg.clone());
        }
        if roll < 7 {
            return Outcome::unknown("executed, but who knows");
        }
        outcome
    }

    fn staleness(&self, uuid: Uuid) -> Option<Outcome> {
        let time = SystemTime::UNIX_EPOCH + Duration::from_millis(entry::unix_millis(uuid));
        let now = self.clock.now();
        if time > now + MAX_AHEAD {
            Some(Outcome::Early)
        } else if now > time + self.settle + MAX_SKEW {
            Some(Outcome::Stale)
        } else {
            (now > time + self.settle).then_some(Outcome::Leaving)
        }
    }

    /// Stores an entry of another facade whose UUID is `age` old, unless the settle window forbids it.
    pub(super) fn store(&mut self, age: Duration) -> Option<Uuid> {
        let millis = unix_millis(self.clock.now() - age);
        let uuid = Builder::from_unix_timestamp_millis(millis, &self.random.random()).into_uuid();
        if self.staleness(uuid).is_some() {
            return None;
        }
        self.map.insert(uuid, uuid.to_string());
        Some(uuid)
    }

    /// Below it no entry will be added any more.
    pub(super) fn settled(&self) -> Uuid {
        first_uuid(unix_millis(self.clock.now() - self.settle - MAX_SKEW))
    }

    /// No entry can have a later time, by the own clock of an instance.
    fn end_of_poll(&self, index: usize) -> Uuid {
        let ahead = Duration::from_millis(self.ahead[index].unsigned_abs());
        let now = if self.ahead[index] >= 0 {
            self.clock.now() + ahead
        } else {
            self.clock.now() - ahead
        };
        first_uuid(unix_millis(now + MAX_AHEAD + MAX_SKEW))
    }

    /// A stream, in pieces that are cut anywhere. One that is not reliable may be handed over, break off
    /// or hang.
    fn read(
        &mut self,
        ReadQuery {
            mut bounds,
            limit,
            poll,
        }: ReadQuery,
        index: usize,
        is_reliable: bool,
    ) -> Streamed {
        let settled = (poll == Some(Poll::Settle)).then(|| self.settled());
        if poll.is_some() {
            bounds.after = bounds.after.or(settled);
            let end = self.end_of_poll(index);
            bounds = bounds.ending_before(end.max(settled.unwrap_or_default()));
        } else if bounds.order == Order::Asc {
            let last = self.map.last_key_value();
            let last = last.map_or(Uuid::nil(), |(uuid, _)| *uuid);
            bounds = bounds.ending_before(Uuid::from_u128(last.as_u128() + 1));
        }
        let within = self.map.iter().filter(|(uuid, _)| bounds.contains(**uuid));
        let mut entries: Vec<(&Uuid, &String)> = within.collect();
        if bounds.order == Order::Desc {
            entries.reverse();
        }
        let limit = usize::try_from(limit.unwrap_or(u64::MAX)).unwrap();
        let mut end = StreamEnd {
            next: match limit {
                _ if entries.len() <= limit => None,
                0 => bounds.near(),
                _ => Some(*entries[limit - 1].0),
            },
            ..StreamEnd::default()
        };
        entries.truncate(limit);
        if !is_reliable && self.random.random_range(0..100) < 10 && !entries.is_empty() {
            entries.truncate(self.random.random_range(0..entries.len()));
            end.next = None;
            end.go_on_elsewhere = Some("stopping".to_owned());
        }
        let mut bytes = Vec::new();
        for (uuid, msg) in &entries {
            write_entry(&mut bytes, **uuid, msg);
        }
        end.count = entries.len() as u64;
        json::write_line(&mut bytes, &end);
        Streamed {
            end: bounds.before,
            settled,
            pieces: self.deliver(bytes, is_reliable),
        }
    }

    /// How a stream arrives: in pieces, until its end, a break or a hang.
    fn deliver(&mut self, bytes: Vec<u8>, is_reliable: bool) -> Vec<Piece> {
        let size = self.random.random_range(1..400);
        let mut pieces: Vec<Piece> = bytes
            .chunks(size)
            .map(|bytes| Piece::Bytes(bytes.to_vec()))
            .collect();
        let fault = match self.random.random_range(0..100) {
            0..15 if !is_reliable => Piece::Break,
            15..20 if !is_reliable => Piece::Hang,
            _ => return pieces,
        };
        self.faults += 1;
        pieces.truncate(self.random.random_range(0..pieces.len()));
        pieces.push(fault);
        pieces
    }
}

fn unix_millis(time: SystemTime) -> u64 {
    let since_epoch = time.duration_since(SystemTime::UNIX_EPOCH).unwrap();
    since_epoch.as_millis() as u64
}

/// The answer to a read: where it ends, what is settled if it asked, and what arrives.
struct Streamed {
    end: Option<Uuid>,
    settled: Option<Uuid>,
    pieces: Vec<Piece>,
}

/// The next event of a stream.
enum Piece {
    Bytes(Vec<u8>),
    Break,
    Hang,
}

impl Piece {
    async fn arrive(self) -> Result<Bytes, UpstreamError> {
        match self {
            Self::Bytes(bytes) => Ok(bytes.into()),
            Self::Break => Err(UpstreamError::Lost("connection reset".into())),
            Self::Hang => time_out().await,
        }
    }
}

/// An instance behind a network whose faults are random.
#[derive(Clone)]
pub(super) struct Simulated {
    pub(super) network: Arc<Mutex<Network>>,
    pub(super) index: usize,
    pub(super) is_reliable: bool,
}

impl std::fmt::Debug for Simulated {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "instance-{}", self.index)
    }
}

enum Fault {
    None,
    /// The connection breaks before the answer.
    Broken {
        is_executed: bool,
    },
    /// The request never arrives, as when the network is cut one way.
    LostRequest,
    /// The request arrives after the facade has given up.
    LateRequest,
    /// The answer never arrives.
    LostAnswer,
    /// A proxy answers 503 itself, possibly after it forwarded the request.
    Proxy {
        is_executed: bool,
    },
}

impl Simulated {
    /// One call: the request travels, is executed, and the answer travels.
    async fn call<T: Send + 'static>(
        &self,
        execute: impl FnOnce(&mut Network) -> T + Send + 'static,
    ) -> Result<T, UpstreamError> {
        let (condition, fault, delay) = {
            let mut network = self.network.lock().unwrap();
            (
                self.condition(&mut network),
                self.fault(&mut network),
                network.random.random_range(0..150),
            )
        };
        match condition {
            Condition::Well => {}
            Condition::Dead => {
                return Err(UpstreamError::Unreachable("connection refused".into()));
            }
            Condition::Hangs => return time_out().await,
            Condition::Closes => return Err(UpstreamError::Lost("connection closed".into())),
            Condition::Answers(status) => return unmarked(status),
        }
        sleep(Duration::from_millis(delay)).await;
        let network = self.network.clone();
        let execute = move || execute(&mut network.lock().unwrap());
        match fault {
            Fault::None => {
                let answer = execute();
                sleep(Duration::from_millis(delay)).await;
                Ok(answer)
            }
            Fault::Broken { is_executed } => {
                is_executed.then(execute);
                Err(UpstreamError::Lost("connection reset".into()))
            }
            Fault::LostRequest => time_out().await,
            Fault::LateRequest => {
                tokio::spawn(async move {
                    sleep(3 * TRY_TIMEOUT).await;
                    execute();
                });
                time_out().await
            }
            Fault::LostAnswer => {
                execute();
                time_out().await
            }
            Fault::Proxy { is_executed } => {
                is_executed.then(execute);
                unmarked(StatusCode::SERVICE_UNAVAILABLE)
            }
        }
    }

    fn condition(&self, network: &mut Network) -> Condition {
        let now = Instant::now();
        if self.is_reliable || now < network.states[self.index].until {
            return network.states[self.index].condition;
        }
        let falls_sick = network.random.random_range(0..100) < 10;
        if !falls_sick {
            network.states[self.index].condition = Condition::Well;
            return Condition::Well;
        }
        network.faults += 1;
        let sick_for = Duration::from_millis(network.random.random_range(0..8000));
        let condition = *SICKNESSES.choose(&mut network.random).unwrap();
        network.states[self.index] = State {
            condition,
            until: now + sick_for,
        };
        condition
    }

    fn fault(&self, network: &mut Network) -> Fault {
        if self.is_reliable {
            return Fault::None;
        }
        let is_executed = network.random.random();
        let fault = match network.random.random_range(0..100) {
            0..5 => Fault::Broken { is_executed },
            5..10 => Fault::LostRequest,
            10..15 => Fault::LateRequest,
            15..20 => Fault::LostAnswer,
            20..25 => Fault::Proxy { is_executed },
            _ => return Fault::None,
        };
        network.faults += 1;
        fault
    }
}

async fn time_out<T>() -> Result<T, UpstreamError> {
    sleep(TRY_TIMEOUT).await;
    Err(UpstreamError::TimedOut)
}

fn unmarked<T>(status: StatusCode) -> Result<T, UpstreamError> {
    Err(UpstreamError::Unmarked(status, "no mark".to_owned()))
}

#[async_trait]
impl LoggingApi for Simulated {
    async fn put(&self, batch: Batch) -> Result<Vec<PutResult>, UpstreamError> {
        let entries = Batch::decode(&batch.into_body()).unwrap().entries;
        self.call(move |network| network.put(&entries)).await
    }

    async fn read(
        &self,
        query: ReadQuery,
        _request_id: Option<&str>,
    ) -> Result<ReadAnswer, UpstreamError> {
        let (index, is_reliable) = (self.index, self.is_reliable);
        let answer = self.call(move |network| network.read(query, index, is_reliable));
        let streamed = answer.await?;
        Ok(ReadAnswer {
            end: streamed.end,
            settled: streamed.settled,
            chunks: stream::iter(streamed.pieces).then(Piece::arrive).boxed(),
        })
    }

    async fn get(&self, uuid: Uuid) -> Result<Option<Entry>, UpstreamError> {
        self.call(move |network| {
            let msg = network.map.get(&uuid).cloned();
            msg.map(|msg| Entry { uuid, msg })
        })
        .await
    }

    async fn stats(&self) -> Result<InstanceStats, UpstreamError> {
        unreachable!("nobody asks for statistics")
    }
}
