//! Logging instances that die, hang and return, as real processes under real signals.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use common::entry::Outcome;
use futures_util::{StreamExt, stream};
use reqwest::{Body, Client};
use serde_json::Value;
use testing::engine::Engine;
use testing::process::{LOOK_AGAIN, PATIENCE, Process, free_address};
use testing::requirements::unshare;
use uuid::Uuid;

use crate::load::Load;
use crate::processes::{Processes, binary, start_logging};
use crate::system::{System, engine_under_test, logging_stub, nobody, problem};

/// Ten rounds under load, each of which kills two of three instances and restarts them: no request fails,
/// no entry is lost or doubled, and the order is kept.
#[tokio::test(flavor = "multi_thread")]
async fn no_post_fails_while_one_instance_lives() {
    const ROUNDS: usize = 10;
    const POSTS: u64 = 20_000;
    let mut system = Processes::start();
    let load = Load::start(&system.http, &system.facade.url());
    for round in 0..ROUNDS {
        load.wait_for_more(POSTS / ROUNDS as u64 / 2).await;
        let survivor = round % 3;
        let victims = (0..3).filter(|index| *index != survivor);
        victims
            .clone()
            .for_each(|victim| system.logging[victim].kill());
        load.wait_for_more(POSTS / ROUNDS as u64 / 2).await;
        victims.for_each(|victim| system.restart_logging(victim));
    }
    let (record, reads) = load.finish().await;
    assert!(record.failed.is_empty(), "{:?}", record.failed);
    let (posts, reads) = (record.acknowledged.len(), reads.count);
    println!("{posts} POSTs and {reads} GETs, none failed");
    assert!(posts as u64 >= POSTS);
    record.assert_kept(&system.read_all().await);
}

/// Fifty GETs of a million entries (six on the engines that are not the default one), in both orders in
/// turn, lose two of the three instances at a random byte each: every body is complete, in order, with the
/// right count.
#[tokio::test(flavor = "multi_thread")]
async fn get_continues_when_instances_die_in_the_middle() {
    const ENTRIES: usize = 1_000_000;
    let kills: usize = match engine_under_test() {
        Engine::Lmdb => 50,
        Engine::RedisServer | Engine::RedisCluster => 6,
    };
    let mut system = Processes::start();
    load(&system, ENTRIES).await;
    let whole: usize = read_body(&system, "asc", |_, _| {}).await.1;
    let mut silences = Vec::new();
    for kill in 0..kills {
        let order = if kill % 2 == 0 { "asc" } else { "desc" };
        let at = Uuid::new_v4().as_u128() as usize % whole;
        let survivor = kill % 3;
        let mut killed_at = None;
        let mut silence = Duration::ZERO;
        let logging = &mut system.logging;
        let facade = system.facade.address;
        let (uuids, _) = read_body_of(facade, &system.http, order, |read, waited| {
            if killed_at.is_none() && read >= at {
                let victims = (0..3).filter(|index| *index != survivor);
                victims.for_each(|victim| logging[victim].kill());
                killed_at = Some(Instant::now());
            } else if killed_at.is_some() {
                silence = silence.max(waited);
            }
        })
        .await;
        assert_eq!(uuids.len(), ENTRIES);
        let is_ordered = match order {
            "asc" => uuids.is_sorted_by(|left, right| left < right),
            _ => uuids.is_sorted_by(|left, right| left > right),
        };
        assert!(is_ordered, "kill {kill} at byte {at}");
        silences.push(silence);
        for victim in (0..3).filter(|index| *index != survivor) {
            system.restart_logging(victim);
        }
    }
    silences.sort();
    let percentile = |percent: usize| silences[(silences.len() * percent / 100).min(kills - 1)];
    println!(
        "longest silence after the kill, {kills} GETs of {ENTRIES}: p50 {:?}, p99 {:?}",
        percentile(50),
        percentile(99)
    );
}

async fn load(system: &Processes, entries: usize) {
    let lines = (0..entries).map(|n| Ok::<_, std::io::Error>(format!("\"message number {n}\"\n")));
    let upload = system.http.post(system.facade.url());
    let upload = upload.header("content-type", "application/x-ndjson");
    let upload = upload.body(Body::wrap_stream(
        stream::iter(lines)
            .ready_chunks(1000)
            .map(|lines| lines.into_iter().collect::<Result<String, _>>()),
    ));
    let summary: Value = upload.send().await.unwrap().json().await.unwrap();
    assert_eq!(summary["stored"], entries, "{summary}");
}

async fn read_body(
    system: &Processes,
    order: &str,
    watch: impl FnMut(usize, Duration),
) -> (Vec<Uuid>, usize) {
    read_body_of(system.facade.address, &system.http, order, watch).await
}

/// Reads the whole log and returns its UUIDs and its size in bytes. `watch` gets the bytes so far and the
/// time of each piece.
async fn read_body_of(
    facade: SocketAddr,
    http: &Client,
    order: &str,
    mut watch: impl FnMut(usize, Duration),
) -> (Vec<Uuid>, usize) {
    let request = http.get(format!("http://{facade}/?order={order}"));
    let request = request.header("accept", "application/x-ndjson");
    let mut body = request.send().await.unwrap().bytes_stream();
    let mut uuids = Vec::new();
    let mut rest = Vec::new();
    let mut read = 0;
    loop {
        let began = Instant::now();
        let Some(piece) = body.next().await else {
            break;
        };
        let piece = piece.unwrap();
        read += piece.len();
        watch(read, began.elapsed());
        rest.extend_from_slice(&piece);
        let end = rest
            .iter()
            .rposition(|byte| *byte == b'\n')
            .map_or(0, |at| at + 1);
        for line in rest[..end].split_inclusive(|byte| *byte == b'\n') {
            if line.starts_with(b"{\"uuid\":\"") {
                let uuid = std::str::from_utf8(&line[9..45]).unwrap();
                uuids.push(uuid.parse().unwrap());
            } else {
                let tail: Value = serde_json::from_slice(line).unwrap();
                assert_eq!(tail["count"], uuids.len());
                assert_eq!(tail["messages_service"], "Messages Service not Implemented");
            }
        }
        rest.drain(..end);
    }
    assert!(rest.is_empty());
    (uuids, read)
}

/// A paused process accepts connections and never answers: another instance takes over within the try
/// timeout, the pool skips the paused one, and sends it messages again when it resumes.
#[tokio::test(flavor = "multi_thread")]
async fn hanging_instance_is_skipped_and_comes_back() {
    let system = Processes::start();
    for n in 0..20 {
        assert_eq!(system.post(&n.to_string()).await.status(), 200);
    }
    let hanging = &system.logging[1];
    // Its writer is idle then; paused inside a transaction it would block the others.
    let ready = system.http.get(format!("{}/readyz", hanging.url())).send();
    assert_eq!(ready.await.unwrap().status(), 200);
    hanging.signal("STOP");
    for n in 20..60 {
        let response = system.post(&n.to_string()).await;
        let status = response.status();
        let is_from_hanging = status == 200 && is_from(&response, hanging);
        assert_eq!(status, 200, "{}", response.text().await.unwrap());
        assert!(!is_from_hanging);
    }
    assert_eq!(system.read_all().await.len(), 60);
    let is_down = |line: &str| line.contains("is down") && line.contains("did not answer in time");
    system.facade.wait_for_line(is_down);
    hanging.signal("CONT");
    system
        .facade
        .wait_for_line(|line| line.contains("is up again"));
    let mut count = 60;
    loop {
        count += 1;
        let response = system.post(&count.to_string()).await;
        assert_eq!(response.status(), 200);
        if is_from(&response, hanging) {
            break;
        }
        assert!(count < 200, "the instance that resumed gets no messages");
    }
    assert_eq!(system.read_all().await.len(), count);
}

/// Each failure is a line of the log with names, reasons and times, and so is each error.
#[tokio::test(flavor = "multi_thread")]
async fn failures_can_be_seen_in_the_log() {
    let mut system = Processes::start();
    let (first, second) = ("logging-1", "logging-2");
    post_until_from(&system, 0).await;
    system.logging[0].kill();
    for n in 0..40 {
        assert_eq!(system.post(&n.to_string()).await.status(), 200);
    }
    system.facade.wait_for_line(|line| {
        line.contains("a POST was continued on ") && line.contains(&format!("{first} "))
    });
    let down = format!("{first} is down: it ");
    system.facade.wait_for_line(|line| line.contains(&down));
    system.restart_logging(0);
    let up = format!("{first} is up again");
    system
        .facade
        .wait_for_line(|line| line.contains(&up) && line.contains("away_s="));

    post_until_from(&system, 1).await;
    system.logging[1].kill();
    for _ in 0..40 {
        assert!(system.read_all().await.len() > 40);
    }
    system.facade.wait_for_line(|line| {
        line.contains("a GET was continued on ") && line.contains(&format!("{second} "))
    });

    for index in [0, 2] {
        system.logging[index].kill();
    }
    // What was lost in the middle is only known to refuse connections after the next trial.
    let begin = Instant::now();
    loop {
        let refused = system.get().await;
        assert_eq!(refused.status(), 503);
        let refused = refused.text().await.unwrap();
        if refused.contains("all 3 logging instances refuse connections") {
            break;
        }
        assert!(begin.elapsed() < PATIENCE, "{refused}");
        tokio::time::sleep(LOOK_AGAIN).await;
    }
    assert_only_the_log_names_instances(&system).await;
}

/// A caller learns what failed, and not where; the log has both, and so have the views of operators.
async fn assert_only_the_log_names_instances(system: &Processes) {
    let begin = Instant::now();
    while system.facade.readiness().starts_with("HTTP/1.1 200") {
        assert!(begin.elapsed() < PATIENCE, "{}", system.facade.readiness());
        tokio::time::sleep(LOOK_AGAIN).await;
    }
    let mut public = Vec::new();
    let upload = system.http.post(system.facade.url()).body("\"hello\"");
    let upload = upload.header("content-type", "application/x-ndjson");
    for response in [
        system.get().await,
        system
            .http
            .get(format!("{}/{}", system.facade.url(), Uuid::now_v7()))
            .send()
            .await
            .unwrap(),
        system
            .http
            .get(format!("{}/readyz", system.facade.url()))
            .send()
            .await
            .unwrap(),
        system.post("hello").await,
        upload.send().await.unwrap(),
    ] {
        public.push(response.text().await.unwrap());
    }
    for instance in &system.logging {
        let name = instance.address.to_string();
        for answer in &public {
            assert!(
                answer.contains("logging") && !answer.contains(&name),
                "{answer}"
            );
        }
        assert!(system.facade.readiness().contains(&name));
        let is_reported = |failed: &str, line: &str| {
            line.contains(failed) && line.contains("all 3 logging instances refuse connections")
        };
        system
            .facade
            .wait_for_line(|line| is_reported("a GET failed", line));
        system
            .facade
            .wait_for_line(|line| is_reported("a POST failed", line));
    }
}

/// Posts until this instance has stored a message: then it is up.
async fn post_until_from(system: &Processes, index: usize) {
    let begin = Instant::now();
    while !is_from(&system.post("x").await, &system.logging[index]) {
        assert!(begin.elapsed() < PATIENCE, "the instance stores nothing");
    }
}

fn is_from(response: &reqwest::Response, instance: &Process) -> bool {
    response.headers()["x-logging-instance"] == instance.address.to_string()
}

/// A stopping instance hands its readers over and ends within the grace period; another instance continues
/// the bodies that it was serving.
#[tokio::test(flavor = "multi_thread")]
async fn stopping_instances_hand_their_readers_over() {
    let mut system = Processes::start();
    load(&system, 200_000).await;
    let mut stopped = false;
    let facade = system.facade.address;
    let logging = &mut system.logging;
    let (uuids, _) = read_body_of(facade, &system.http, "asc", |read, _| {
        if !stopped && read > 1_000_000 {
            logging[..2]
                .iter()
                .for_each(|instance| instance.signal("TERM"));
            stopped = true;
        }
    })
    .await;
    assert_eq!(uuids.len(), 200_000);
    assert!(uuids.is_sorted_by(|left, right| left < right));
    assert!(system.logging[0].wait().success() && system.logging[1].wait().success());
}

/// When no instance can continue a body, it is aborted. A request without any instance gets a 503 in
/// bounded time. Everything works again, without intervention, when an instance returns.
#[tokio::test(flavor = "multi_thread")]
async fn loss_of_all_instances_is_reported_and_recovered_from() {
    let mut system = Processes::start_with(&["--deadline", "2s", "--read-deadline", "500ms"]);
    load(&system, 200_000).await;
    let request = system.http.get(system.facade.url()).send();
    let mut body = request.await.unwrap().bytes_stream();
    body.next().await.unwrap().unwrap();
    system.logging.iter_mut().for_each(Process::kill);
    let mut is_aborted = false;
    while let Some(piece) = body.next().await {
        is_aborted = piece.is_err();
    }
    assert!(is_aborted, "the body ended as if it were complete");
    let refused = system.post("a").await;
    assert!(refused.headers().contains_key("retry-after"));
    assert_eq!(problem(refused, 503).await["stored"], "no");
    problem(system.get().await, 503).await;
    system.restart_logging(2);
    assert_eq!(system.post("b").await.status(), 200);
    assert_eq!(system.read_all().await.len(), 200_001);
}

/// A facade that starts without instances serves as soon as one is there.
#[tokio::test(flavor = "multi_thread")]
async fn facade_may_start_before_its_instances() {
    let mut system = Processes::start();
    system.logging.iter_mut().for_each(Process::kill);
    system.restart_facade(&["--deadline", "30s"]);
    problem(system.get().await, 503).await;
    let waiting = system.http.post(system.facade.url()).body("a").send();
    let waiting = tokio::spawn(waiting);
    system.restart_logging(0);
    assert_eq!(waiting.await.unwrap().unwrap().status(), 200);
    assert_eq!(system.read_all().await.len(), 1);
}

/// A host name counts as one instance per resolved address, and is looked up repeatedly: an instance that
/// is no longer in DNS gets no more messages, and a look-up that fails changes nothing. The facade sees a
/// hosts file of the test, in a mount namespace that ends with it.
#[tokio::test(flavor = "multi_thread")]
async fn host_name_counts_as_one_instance_per_address() {
    let trial = ["mount", "--bind", "/etc/hosts", "/etc/hosts"];
    let Some(mut command) = unshare(&["--mount"], &trial) else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let hosts = folder.path().join("hosts");
    let both = "127.0.0.1 logging.test\n127.0.0.2 logging.test\n";
    std::fs::write(&hosts, both).unwrap();
    let first_address = free_address();
    let second_address = SocketAddr::from(([127, 0, 0, 2], first_address.port()));
    let map = format!("lmdb:{}", folder.path().join("map").display());
    let start = |address| start_logging(&["--map", &map], address);
    let (first, second) = (start(first_address), start(second_address));
    command
        .args(["sh", "-c"])
        .arg("mount --bind \"$0\" /etc/hosts && exec \"$@\"")
        .arg(&hosts)
        .arg(binary("facade"))
        .args([
            "--logging",
            &format!("http://logging.test:{}", first_address.port()),
        ]);
    let facade = Process::start(command, free_address());
    let known = |log: &[String]| {
        log.iter()
            .filter(|line| line.contains("is configured"))
            .count()
    };
    facade.wait_for_log(|log| known(log) == 2);

    let http = Client::new();
    let post = async || {
        let response = http.post(facade.url()).body("a").send().await.unwrap();
        assert_eq!(response.status(), 200);
        response
    };
    let (mut from_first, mut from_second) = (0, 0);
    for _ in 0..100 {
        let response = post().await;
        from_first += u32::from(is_from(&response, &first));
        from_second += u32::from(is_from(&response, &second));
    }
    assert!(
        from_first > 20 && from_second > 20,
        "{from_first} and {from_second} of 100"
    );

    std::fs::write(&hosts, "127.0.0.2 logging.test\n").unwrap();
    facade
        .wait_for_line(|line| line.contains("is no longer in DNS") && line.contains("127.0.0.1:"));
    for _ in 0..50 {
        assert!(is_from(&post().await, &second));
    }
    std::fs::write(&hosts, "").unwrap();
    facade.wait_for_line(|line| line.contains("a look-up failed"));
    assert!(is_from(&post().await, &second));
}

/// When overloaded instances refuse everything, the facade sends at most a tenth more messages than it
/// gets, besides the few free retries, and answers at once.
#[tokio::test]
async fn retries_do_not_multiply_overload() {
    const POSTS: u64 = 5000;
    const FREE: u64 = 100;
    let tries = Arc::new(AtomicU64::new(0));
    let count = tries.clone();
    let logging = (0..3).map(|_| {
        let count = count.clone();
        logging_stub(move |_| {
            count.fetch_add(1, Ordering::Relaxed);
            Outcome::refused("the write queue is full")
        })
    });
    let system = System::with_stubs(logging.collect(), nobody(), &["--deadline", "60s"]);
    let posts = stream::iter(0..POSTS).map(|n| system.post().body(n.to_string()).send());
    let statuses = posts
        .buffer_unordered(64)
        .map(|response| response.unwrap().status());
    let statuses: Vec<_> = statuses.collect().await;
    assert!(statuses.iter().all(|status| *status == 503));
    let tries = tries.load(Ordering::Relaxed);
    println!("{tries} tries for {POSTS} POSTs");
    assert!(
        tries <= POSTS + POSTS / 10 + FREE,
        "{tries} tries for {POSTS} POSTs"
    );
}
