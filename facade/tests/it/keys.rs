//! Callers that use the same keys at the same time, near the edges of the settle window, while instances and Redis
//! primaries are killed: every answer is recorded, and what was told must hold at the end.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use common::entry::{Entry, first_uuid};
use futures_util::future::join_all;
use reqwest::Client;
use serde_json::Value;
use testing::engine::Engine;
use testing::load::{Load, Record};
use testing::redis_servers::RedisCluster;
use uuid::Uuid;

use crate::processes::Processes;
use crate::system::engine_under_test;

/// Keys in use at once.
const KEYS_AT_ONCE: usize = 32;

/// Callers of every other key, and the requests of each, one after the other. The others have one request.
const CALLERS: usize = 4;
const REPEATS: usize = 3;

/// How long before the first request a key was made, in milliseconds: as far ahead as is accepted, now, while a
/// failover lasts, at the edge of the settle window of 10 s, and where a key becomes final a second later.
const AGES: [i64; 15] = [
    -2200, -2020, -1980, 0, 3000, 6000, 9000, 9700, 9900, 9980, 10_020, 10_500, 10_900, 10_980,
    11_020,
];

/// Keys that are stored between two events.
const PHASE: u64 = 200;

/// Each kills another instance, and on a cluster the primary of another shard.
const ROUNDS: usize = 3;

/// What a request was told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Told {
    First,
    Duplicate,
    Never,
    /// The key is in the future: nothing is stored under it yet.
    Early,
    /// Not stored by this request.
    No,
    Unknown,
}

#[derive(Debug)]
struct Answer {
    request_id: String,
    began: Instant,
    ended: Instant,
    told: Told,
}

type History = Arc<Mutex<BTreeMap<Uuid, Vec<Answer>>>>;

#[tokio::test(flavor = "multi_thread")]
async fn what_callers_of_the_same_keys_are_told_holds() {
    let mut cluster = match engine_under_test() {
        Engine::RedisCluster => Some(RedisCluster::start()),
        Engine::Lmdb | Engine::RedisServer => None,
    };
    let mut system = match &cluster {
        Some(cluster) => Processes::on_map(&["--map", &cluster.url()], &[]),
        None => Processes::start(),
    };
    let history = History::default();
    let load = {
        let (http, url) = (system.http.clone(), system.facade.url());
        let history = history.clone();
        Load::start(KEYS_AT_ONCE, move |number| {
            use_key(http.clone(), url.clone(), number, history.clone())
        })
    };
    for round in 0..ROUNDS {
        load.wait_for_more(PHASE).await;
        system.logging[round].kill();
        if let Some(cluster) = &mut cluster {
            cluster.nodes[round].kill();
            // Keys of its partitions wait until the failover is over and the node is back.
            system.read_all().await;
            cluster.nodes[round].restart();
            cluster.wait_until_whole();
        }
        load.wait_for_more(PHASE).await;
        system.restart_logging(round);
    }
    let record = load.finish().await;
    let stored = system.read_all().await;
    assert!(record.lost(&stored).is_empty());
    let history = std::mem::take(&mut *history.lock().unwrap());
    assert_true(&history, &stored, &tried_again(&system));
}

/// Several callers post one message under one key, each several times.
async fn use_key(http: Client, url: String, number: u64, history: History) -> Record {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let made = now.as_millis() as i64 - AGES[number as usize / 2 % AGES.len()];
    let made = first_uuid(made as u64).as_u128();
    let random = Uuid::now_v7().as_u128() & ((1 << 80) - 1);
    let key = Uuid::from_u128(made | random);
    let msg = format!("message {number}");
    let (callers, repeats) = match number % 2 {
        0 => (1, 1),
        _ => (CALLERS, REPEATS),
    };
    let callers = (0..callers).map(async |caller| {
        let mut answers = Vec::new();
        for repeat in 0..repeats {
            let request_id = format!("key-{number}-{caller}-{repeat}.");
            answers.push(post(&http, &url, key, &msg, request_id).await);
        }
        answers
    });
    let answers: Vec<Answer> = join_all(callers).await.into_iter().flatten().collect();
    let mut record = Record::default();
    if answers.iter().any(is_acknowledged) {
        record.acknowledged.insert(key, msg);
    }
    history.lock().unwrap().insert(key, answers);
    record
}

fn is_acknowledged(answer: &Answer) -> bool {
    matches!(answer.told, Told::First | Told::Duplicate)
}

async fn post(http: &Client, url: &str, key: Uuid, msg: &str, request_id: String) -> Answer {
    let began = Instant::now();
    let request = http
        .post(url)
        .header("idempotency-key", key.to_string())
        .header("x-request-id", &request_id)
        .body(msg.to_owned());
    let response = request.send().await.unwrap();
    let status = response.status().as_u16();
    let answer: Value = response.json().await.unwrap();
    let told = match status {
        200 if answer["duplicate"] == true => Told::Duplicate,
        200 => Told::First,
        409 if answer["detail"].as_str().unwrap().contains("in the future") => Told::Early,
        409 => Told::Never,
        503 if answer["stored"] == "no" => Told::No,
        503 => Told::Unknown,
        _ => panic!("{status}: {answer}"),
    };
    let ended = Instant::now();
    Answer {
        request_id,
        began,
        ended,
        told,
    }
}

/// The requests of which a try had no answer, or none that counted.
fn tried_again(system: &Processes) -> BTreeSet<String> {
    let lines = system.facade.log();
    let continued = lines.iter().filter(|line| line.contains("was continued"));
    let id = |line: &String| {
        let from = line.find("key-")?;
        let to = line[from..].find('.')?;
        Some(line[from..=from + to].to_owned())
    };
    continued.filter_map(id).collect()
}

/// - A key that was called never stored is not stored, and nobody was told that it is.
/// - Nobody was told that nothing is stored under a key yet after another was told that it is.
/// - `duplicate` was told only of what another request stored, or may have stored.
/// - Of the requests that needed one try, at most one was told that it was the first.
fn assert_true(
    history: &BTreeMap<Uuid, Vec<Answer>>,
    stored: &[Entry],
    tried_again: &BTreeSet<String>,
) {
    let stored: BTreeSet<Uuid> = stored.iter().map(|entry| entry.uuid).collect();
    let (mut denied, mut unfounded, mut twice, mut both) = (vec![], vec![], vec![], 0);
    let mut counts = BTreeMap::<String, u64>::new();
    for (key, answers) in history {
        let count = |wanted| answers.iter().filter(|one| one.told == wanted).count();
        for answer in answers {
            *counts.entry(format!("{:?}", answer.told)).or_default() += 1;
        }
        let acknowledged = count(Told::First) + count(Told::Duplicate);
        let acknowledged_before = |early: &Answer| {
            let mut others = answers.iter();
            others.any(|one| is_acknowledged(one) && one.ended < early.began)
        };
        let mut early = answers.iter().filter(|one| one.told == Told::Early);
        if count(Told::Never) > 0 && (acknowledged > 0 || stored.contains(key))
            || early.any(acknowledged_before)
        {
            denied.push(answers);
        }
        let may_have_stored = |one: &Answer| matches!(one.told, Told::First | Told::Unknown);
        if count(Told::Duplicate) > 0 && !answers.iter().any(may_have_stored) {
            unfounded.push(answers);
        }
        both += u64::from(count(Told::First) > 1);
        let is_certain = |answer: &&Answer| {
            answer.told == Told::First && !tried_again.contains(&answer.request_id)
        };
        if answers.iter().filter(is_certain).count() > 1 {
            twice.push(answers);
        }
    }
    println!(
        "{} keys, {counts:?}, {} requests tried again; {} called never stored and stored, {} told \
         duplicate of nothing, {} told twice that they were first; {both} if those tried again count",
        history.len(),
        tried_again.len(),
        denied.len(),
        unfounded.len(),
        twice.len(),
    );
    assert!(counts["Never"] > 0 && counts["Duplicate"] > 0);
    assert!(denied.is_empty(), "never stored, and stored: {denied:?}");
    assert!(unfounded.is_empty(), "duplicate of nothing: {unfounded:?}");
    assert!(twice.is_empty(), "first, and first: {twice:?}");
}
