//! Three instances that share a map, and the network in front of them, which loses and delays what
//! it carries as random numbers say.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use common::entry::{Entry, Outcome, PutEntry, PutResult};
use common::page::{Bounds, Order, PageEnd};
use facade::client::{Logging, Page, UpstreamError};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tokio::time::{Instant, sleep};
use uuid::Uuid;

/// What the facade gives one try, by its own clients' configuration.
const TRY_TIMEOUT: Duration = Duration::from_secs(1);

/// What all instances share.
pub(super) struct Network {
    pub(super) random: StdRng,
    pub(super) map: BTreeMap<Uuid, String>,
    down_until: [Instant; 3],
    pub(super) faults: u64,
}

impl Network {
    pub(super) fn new(seed: u64) -> Self {
        Self {
            random: StdRng::seed_from_u64(seed),
            map: BTreeMap::new(),
            down_until: [Instant::now(); 3],
            faults: 0,
        }
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
            None => Outcome::Stored,
        };
        if outcome == Outcome::Stored {
            self.map.insert(entry.uuid, entry.msg.clone());
        }
        if roll < 7 {
            return Outcome::unknown("executed, but who knows");
        }
        outcome
    }

    fn page(&mut self, bounds: Bounds, limit: Option<u64>) -> Page {
        let size = self
            .random
            .random_range(1..5)
            .min(limit.unwrap_or(u64::MAX)) as usize;
        let within = self.map.iter().filter(|(uuid, _)| bounds.contains(**uuid));
        let mut entries: Vec<Entry> = within
            .map(|(uuid, msg)| Entry {
                uuid: *uuid,
                msg: msg.clone(),
            })
            .collect();
        if bounds.order == Order::Desc {
            entries.reverse();
        }
        let is_cut = entries.len() > size;
        entries.truncate(size);
        let next = entries.last().filter(|_| is_cut).map(|entry| entry.uuid);
        let last = self
            .map
            .last_key_value()
            .map(|(uuid, _)| uuid.as_u128() + 1);
        let end = last
            .map(Uuid::from_u128)
            .filter(|_| bounds.order == Order::Asc);
        let end = PageEnd {
            count: entries.len() as u64,
            next,
            before: next.and(end),
        };
        Page { entries, end }
    }
}

/// An instance with a network in front of it that does what the network's random numbers say.
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
    /// The process dies and refuses connections for some time.
    Crash {
        is_executed: bool,
    },
    /// The request never arrives, as when the network is cut one way.
    LostRequest,
    /// The request arrives after the facade has given up.
    LateRequest,
    /// The answer never arrives.
    LostAnswer,
}

impl Simulated {
    /// One call: the request travels, is executed, and the answer travels.
    async fn call<T: Send + 'static>(
        &self,
        execute: impl FnOnce(&mut Network) -> T + Send + 'static,
    ) -> Result<T, UpstreamError> {
        let (fault, delay) = {
            let mut network = self.network.lock().unwrap();
            if Instant::now() < network.down_until[self.index] {
                return Err(UpstreamError::Unreachable("connection refused".into()));
            }
            (
                self.fault(&mut network),
                network.random.random_range(0..150),
            )
        };
        sleep(Duration::from_millis(delay)).await;
        let network = self.network.clone();
        let execute = move || execute(&mut network.lock().unwrap());
        match fault {
            Fault::None => {
                let answer = execute();
                sleep(Duration::from_millis(delay)).await;
                Ok(answer)
            }
            Fault::Crash { is_executed } => {
                if is_executed {
                    execute();
                }
                Err(UpstreamError::Lost("connection reset".into()))
            }
            Fault::LostRequest => {
                sleep(TRY_TIMEOUT).await;
                Err(UpstreamError::TimedOut)
            }
            Fault::LateRequest => {
                tokio::spawn(async move {
                    sleep(3 * TRY_TIMEOUT).await;
                    execute();
                });
                sleep(TRY_TIMEOUT).await;
                Err(UpstreamError::TimedOut)
            }
            Fault::LostAnswer => {
                execute();
                sleep(TRY_TIMEOUT).await;
                Err(UpstreamError::TimedOut)
            }
        }
    }

    fn fault(&self, network: &mut Network) -> Fault {
        if self.is_reliable {
            return Fault::None;
        }
        let fault = match network.random.random_range(0..100) {
            0..8 => {
                let down = Duration::from_millis(network.random.random_range(0..8000));
                network.down_until[self.index] = Instant::now() + down;
                let is_executed = network.random.random();
                Fault::Crash { is_executed }
            }
            8..14 => Fault::LostRequest,
            14..20 => Fault::LateRequest,
            20..26 => Fault::LostAnswer,
            _ => return Fault::None,
        };
        network.faults += 1;
        fault
    }
}

#[async_trait]
impl Logging for Simulated {
    async fn put(&self, batch: Vec<u8>) -> Result<Vec<PutResult>, UpstreamError> {
        let entries: Vec<PutEntry> = serde_json::from_slice(&batch).unwrap();
        self.call(move |network| network.put(&entries)).await
    }

    async fn page(
        &self,
        bounds: Bounds,
        limit: Option<u64>,
        _request_id: Option<&str>,
    ) -> Result<Page, UpstreamError> {
        self.call(move |network| network.page(bounds, limit)).await
    }

    async fn get(&self, uuid: Uuid) -> Result<Option<Entry>, UpstreamError> {
        self.call(move |network| {
            let msg = network.map.get(&uuid).cloned();
            msg.map(|msg| Entry { uuid, msg })
        })
        .await
    }

    async fn ready(&self) -> Result<(), UpstreamError> {
        self.call(|_| ()).await
    }
}
