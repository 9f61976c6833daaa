//! Followers of instances whose clocks are hours apart, through a network that breaks polls off in the middle.
//! The map's clock is right, as on Redis; the own clock of an instance only decides where its polls end.
//!
//! Each run checks that a follower gets every entry once, however late it was stored, that a `tail` begins
//! with exactly the newest, and that no position is announced before everything up to it was sent.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::body::Body;
use axum::http::Request;
use common::entry::Entry;
use facade::{App, router};
use rand::RngExt;
use rand::seq::IndexedRandom;
use tokio::time::{sleep, timeout};
use tower::ServiceExt;
use uuid::Uuid;

use super::network::Network;
use super::{SEEDS, facade_on, on_all_seeds};
use crate::follow::follower::Follower;

/// Entries before the followers with a `tail` begin, and again afterwards.
const ENTRIES: usize = 60;

/// Longer than the settle window, after which an entry is delivered at the latest, and some failed polls.
const LONGEST_SILENCE: Duration = Duration::from_secs(25);

const HOUR: Duration = Duration::from_secs(3600);

/// How many milliseconds an instance's clock is ahead.
const AHEAD: [i64; 5] = [-3_600_000, -6_000, 0, 6_000, 3_600_000];

#[test]
fn followers_miss_nothing_while_clocks_are_wrong() {
    let faults: u64 = on_all_seeds(run).sum();
    println!("{SEEDS} seeds: {faults} faults");
    assert!(
        faults > 10 * SEEDS,
        "the network had too few faults to prove anything: {faults}"
    );
}

/// One run, which returns the number of faults.
async fn run(seed: u64) -> u64 {
    let run = Run::new(seed);
    let mut followers = vec![run.follow("").await, run.follow("?tail=0").await];
    let stored = run.store().await;
    for follower in &mut followers {
        follower.receive(&stored, &stored).await;
    }
    for tail in [0, 1, 5, ENTRIES / 2, 2 * ENTRIES] {
        let mut follower = run.follow(&format!("?tail={tail}")).await;
        let newest: BTreeSet<Uuid> = stored.iter().rev().take(tail).copied().collect();
        // An instance whose clock is behind does not show what is newest: too many come then.
        let allowed = if run.has_clock_behind {
            &stored
        } else {
            &newest
        };
        follower.receive(&newest, allowed).await;
        followers.push(follower);
    }
    let new = run.store().await;
    let allowed = if run.has_clock_behind {
        &new | &stored
    } else {
        new.clone()
    };
    for follower in &mut followers {
        follower.receive(&new, &allowed).await;
    }
    let network = run.network.lock().unwrap();
    network.faults
}

struct Run {
    seed: u64,
    app: Arc<App>,
    network: Arc<Mutex<Network>>,
    has_clock_behind: bool,
}

impl Run {
    fn new(seed: u64) -> Self {
        let mut network = Network::new(seed);
        // The clock by which the facade polls is not simulated, so the map's is set apart from it.
        if seed.is_multiple_of(2) {
            network.clock.base -= HOUR;
        } else {
            network.clock.base += HOUR;
        }
        for index in 0..3 {
            network.ahead[index] = *AHEAD.choose(&mut network.random).unwrap();
        }
        let has_clock_behind = network.ahead.iter().any(|ahead| *ahead < 0);
        let network = Arc::new(Mutex::new(network));
        let app = facade_on(&network, seed, true);
        Self {
            seed,
            app,
            network,
            has_clock_behind,
        }
    }

    async fn follow(&self, query: &str) -> Followed {
        let request = Request::get(format!("/{query}"))
            .header("host", "localhost")
            .header("accept", "text/event-stream");
        let request = request.body(Body::empty()).unwrap();
        let response = router(self.app.clone()).oneshot(request).await.unwrap();
        let name = format!("seed {}: {query:?}", self.seed);
        assert_eq!(response.status(), 200, "{name}");
        let mut follower = Follower::reading(response.into_body());
        follower.begin().await;
        Followed {
            name,
            network: self.network.clone(),
            follower,
            received: BTreeSet::new(),
        }
    }

    /// Stores entries; every other one is late.
    async fn store(&self) -> BTreeSet<Uuid> {
        let mut stored = BTreeSet::new();
        while stored.len() < ENTRIES {
            let pause = self.network.lock().unwrap().random.random_range(0..200);
            sleep(Duration::from_millis(pause)).await;
            let mut network = self.network.lock().unwrap();
            let age = network.random.random_range(0..8_000);
            let age = Duration::from_millis(age * (stored.len() as u64 % 2));
            stored.extend(network.store(age));
        }
        stored
    }
}

/// A follower, and what it has received.
struct Followed {
    name: String,
    network: Arc<Mutex<Network>>,
    follower: Follower,
    received: BTreeSet<Uuid>,
}

impl Followed {
    /// Receives all of `expected`, and nothing that is not `allowed`.
    async fn receive(&mut self, expected: &BTreeSet<Uuid>, allowed: &BTreeSet<Uuid>) {
        let mut missing = expected - &self.received;
        while !missing.is_empty() {
            let next = timeout(LONGEST_SILENCE, self.follower.next()).await;
            let Ok(Entry { uuid, .. }) = next else {
                panic!("{}: {} never come", self.name, missing.len());
            };
            assert!(self.received.insert(uuid), "{}: {uuid} twice", self.name);
            assert!(allowed.contains(&uuid), "{}: {uuid} is old", self.name);
            missing.remove(&uuid);
            let position = self.follower.id.expect("an event has an id");
            let skipped = missing.range(..=position).next();
            assert_eq!(skipped, None, "{}: {position} is announced", self.name);
            let settled = self.network.lock().unwrap().settled();
            assert!(position <= settled, "{}: {position} may change", self.name);
        }
    }
}
