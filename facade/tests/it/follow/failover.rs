//! Followers while instances and primaries die.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use reqwest::Client;
use testing::engine::Engine;
use testing::process::{LOOK_AGAIN, PATIENCE, Process, free_address};
use testing::redis_servers::RedisCluster;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use uuid::Uuid;

use super::follower::Follower;
use crate::load::Load;
use crate::processes::Processes;
use crate::system::engine_under_test;

/// Messages from two facades while instances are killed one after the other, and on a cluster a
/// primary once: a follower that stays gets each exactly once, one that comes back again and again
/// misses none. `FOLLOWED_MESSAGES` sets how many there are.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_skipped_or_repeated_while_instances_die() {
    let messages = std::env::var("FOLLOWED_MESSAGES");
    let messages: u64 = messages.map_or(6_000, |count| count.parse().unwrap());
    let mut cluster = None;
    let mut system = match engine_under_test() {
        Engine::RedisCluster => {
            let started = cluster.insert(RedisCluster::start());
            Processes::on_map(&["--map", &started.url()], &[])
        }
        _ => Processes::start(),
    };
    let second = Process::start(system.another_facade(&[]), free_address());
    let urls = [system.facade.url(), second.url()];
    let (stayed, returned) = (Received::default(), Received::default());
    let connections = Arc::new(AtomicU64::new(0));
    let staying = stay(system.http.clone(), urls[0].clone(), stayed.clone());
    let returning = come_back(
        system.http.clone(),
        urls[1].clone(),
        returned.clone(),
        connections.clone(),
    );
    let mut following = JoinSet::new();
    following.spawn(staying);
    following.spawn(returning);
    let loads = urls.each_ref().map(|url| Load::start(&system.http, url));
    const ROUNDS: u64 = 6;
    for round in 0..ROUNDS {
        for load in &loads {
            load.wait_for_more(messages / ROUNDS / 4).await;
        }
        let victim = round as usize % 3;
        system.logging[victim].kill();
        if let Some(cluster) = cluster.as_mut().filter(|_| round == 2) {
            cluster.nodes[0].kill();
        }
        for load in &loads {
            load.wait_for_more(messages / ROUNDS / 4).await;
        }
        if let Some(cluster) = cluster.as_mut().filter(|_| round == 2) {
            cluster.nodes[0].restart();
            cluster.wait_until_whole();
        }
        system.restart_logging(victim);
    }
    let mut acknowledged = BTreeMap::new();
    for load in loads {
        acknowledged.extend(load.finish().await.0.acknowledged);
    }
    let connections = connections.load(Ordering::Relaxed);
    println!(
        "{} acknowledged; {connections} connections",
        acknowledged.len()
    );
    assert!(connections > 5, "it came back {connections} times");
    for (received, who) in [(stayed, "staying"), (returned, "returning")] {
        let skipped = || {
            let received = received.lock().unwrap();
            let mut acknowledged = acknowledged.iter();
            let skipped = acknowledged.find(|(uuid, msg)| received.get(uuid) != Some(msg));
            skipped.map(|(uuid, _)| *uuid)
        };
        let waiting = async {
            while skipped().is_some() {
                if let Some(failed) = following.try_join_next() {
                    let log = system.facade.log().into_iter();
                    let cuts: Vec<String> = log.filter(|line| line.contains("cut")).collect();
                    panic!("{failed:?}, {cuts:#?}");
                }
                sleep(LOOK_AGAIN).await;
            }
        };
        let waited = timeout(PATIENCE, waiting).await;
        assert!(
            waited.is_ok(),
            "{:?} was skipped by the {who} follower",
            skipped()
        );
    }
    assert!(following.try_join_next().is_none(), "a follower has failed");
}

type Received = Arc<Mutex<BTreeMap<Uuid, String>>>;

async fn stay(http: Client, url: String, received: Received) {
    let mut follower = Follower::start(&http, &url, None).await;
    loop {
        let entry = follower.next().await;
        let before = received.lock().unwrap().insert(entry.uuid, entry.msg);
        assert_eq!(before, None, "{} came twice", entry.uuid);
    }
}

/// Begins a new connection after some hundred messages.
async fn come_back(http: Client, url: String, received: Received, connections: Arc<AtomicU64>) {
    let mut last_id = None;
    loop {
        connections.fetch_add(1, Ordering::Relaxed);
        let mut follower = Follower::start(&http, &url, last_id).await;
        let mut here = BTreeSet::new();
        let mut news = 0;
        while news < 400 {
            let entry = follower.next().await;
            assert!(here.insert(entry.uuid), "{} came twice", entry.uuid);
            let before = received.lock().unwrap().insert(entry.uuid, entry.msg);
            news += u32::from(before.is_none());
        }
        last_id = follower.id;
    }
}
