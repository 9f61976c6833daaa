//! The memory that requests and responses may use, and the end of an upload when the facade stops.

use std::net::UdpSocket;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use common::entry::Entry;
use futures_util::{StreamExt, stream};
use reqwest::{Body, Client, RequestBuilder};
use serde_json::{Value, json};
use testing::process::{LOOK_AGAIN, PATIENCE, Process, free_address};
use testing::requirements::{skip, unshare};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::processes::{Processes, binary};
use crate::system::{Server, System, hanging, problem};

/// A body without a length reserves the bytes that have arrived, not the largest possible size.
#[tokio::test(flavor = "multi_thread")]
async fn small_bodies_without_a_length_reserve_little() {
    const POSTS: usize = 256;
    let system = System::start().await;
    let (go, wait) = watch::channel(false);
    let sent = Arc::new(AtomicUsize::new(0));
    let mut posts = JoinSet::new();
    for _ in 0..POSTS {
        let (mut wait, sent) = (wait.clone(), sent.clone());
        let end = async move {
            sent.fetch_add(1, Ordering::Relaxed);
            wait.wait_for(|go| *go).await.unwrap();
            Ok::<_, std::io::Error>("")
        };
        let pieces = stream::iter([Ok("hello")]).chain(stream::once(end));
        let request = system.post().body(Body::wrap_stream(pieces));
        posts.spawn(async { request.send().await.unwrap().status() });
    }
    while sent.load(Ordering::Relaxed) < POSTS {
        tokio::time::sleep(LOOK_AGAIN).await;
        if let Some(early) = posts.try_join_next() {
            panic!("answered before the body ended: {}", early.unwrap());
        }
    }
    go.send(true).unwrap();
    let statuses = posts.join_all().await;
    assert!(statuses.iter().all(|status| *status == 200), "{statuses:?}");
}

/// Short lines between long blank ones wait for an instance that hangs: each keeps only its own bytes in
/// memory, not the buffer that it was read into.
#[tokio::test(flavor = "multi_thread")]
async fn waiting_lines_do_not_keep_their_buffers() {
    const LINES: usize = 500;
    const GROWTH_KIB: u64 = 64 * 1024;
    let hanging = hanging();
    let facade = facade(&hanging, &["--try-timeout", "1h", "--deadline", "1h"]);
    let before = peak_memory_kib(facade.pid());
    let (all_sent, mut wait) = watch::channel(false);
    let blank = " ".repeat(390_000);
    let lines = (0..LINES).map(move |_| Ok::<_, std::io::Error>(format!("\"a\"\n{blank}\n")));
    // The facade polls for a piece when it has read the one before, so `end` is polled when it has read all.
    let end = async move {
        all_sent.send(true).unwrap();
        std::future::pending::<Result<String, std::io::Error>>().await
    };
    let body = Body::wrap_stream(stream::iter(lines).chain(stream::once(end)));
    let upload = tokio::spawn(upload(&facade.url(), body).send());
    wait.wait_for(|sent| *sent).await.unwrap();
    let grown = peak_memory_kib(facade.pid()) - before;
    assert!(grown < GROWTH_KIB, "{grown} KiB");
    upload.abort();
}

/// Callers request a large message and do not read it: their responses stay within the memory budget, and
/// excess callers get a 503.
#[tokio::test(flavor = "multi_thread")]
async fn unread_responses_stay_within_the_memory_budget() {
    const CALLERS: usize = 300;
    const GROWTH_KIB: u64 = 256 * 1024;
    let system = Processes::start_with(&["--max-message", "1MiB"]);
    let message = "\u{1}".repeat(1 << 20);
    let stored: Entry = system.post(&message).await.json().await.unwrap();
    let before = peak_memory_kib(system.facade.pid());
    let url = format!("{}/{}", system.facade.url(), stored.uuid);
    let mut callers = Vec::new();
    let mut turned_away = 0;
    for _ in 0..CALLERS {
        let caller = system.http.get(&url).send().await.unwrap();
        match caller.status().as_u16() {
            200 => {}
            503 => turned_away += 1,
            other => panic!("{other}"),
        }
        callers.push(caller);
    }
    let grown = peak_memory_kib(system.facade.pid()) - before;
    println!("{turned_away} of {CALLERS} turned away, {grown} KiB");
    assert!(grown < GROWTH_KIB, "{grown} KiB");
    assert!(turned_away > 0);
}

/// Followers of large messages that do not read them: together they stay within a memory budget.
#[tokio::test(flavor = "multi_thread")]
async fn large_messages_to_followers_stay_within_the_memory_budget() {
    const FOLLOWERS: usize = 400;
    const GROWTH_KIB: u64 = 256 * 1024;
    let system = Processes::start_with(&["--max-message", "1MiB"]);
    let before = peak_memory_kib(system.facade.pid());
    let follow = "GET /?follow=true&tail=0 HTTP/1.1\r\nhost: localhost\r\naccept: application/x-ndjson\r\n\r\n";
    let mut followers = Vec::new();
    for _ in 0..FOLLOWERS {
        let mut follower = TcpStream::connect(system.facade.address).await.unwrap();
        follower.write_all(follow.as_bytes()).await.unwrap();
        let mut status = [0; 12];
        follower.read_exact(&mut status).await.unwrap();
        assert_eq!(&status, b"HTTP/1.1 200");
        followers.push(follower);
    }
    for _ in 0..3 {
        let posted = system.post(&"x".repeat(1 << 20)).await;
        assert_eq!(posted.status(), 200);
    }
    // One that begins now gets only the next message; the others have been told of theirs before.
    let url = format!("{}/?follow=true&tail=0", system.facade.url());
    let reader = system
        .http
        .get(url)
        .header("accept", "application/x-ndjson");
    let mut reader = reader.send().await.unwrap().bytes_stream();
    assert_eq!(system.post("the end").await.status(), 200);
    let mut tail = Vec::new();
    while !tail.windows(7).any(|text| text == b"the end") {
        tail.drain(..tail.len().saturating_sub(7));
        tail.extend_from_slice(&reader.next().await.unwrap().unwrap());
    }
    let grown = peak_memory_kib(system.facade.pid()) - before;
    println!("{grown} KiB for {FOLLOWERS} followers");
    assert!(grown < GROWTH_KIB, "{grown} KiB");
}

/// A stopping facade reads no further line, finishes the lines that it has read, and returns their number,
/// also to a caller that keeps sending, and also when a terminal that closes stops it.
#[tokio::test(flavor = "multi_thread")]
async fn stopping_facade_answers_an_upload_with_the_number_of_lines() {
    const LINES: usize = 100;
    for (signal, goes_on) in [("TERM", false), ("TERM", true), ("HUP", false)] {
        let mut system = Processes::start();
        let (stopped, wait) = watch::channel(false);
        let first = (0..LINES).map(|n| Ok::<_, std::io::Error>(format!("\"{n}\"\n")));
        let rest = stream::unfold(wait, move |mut wait| async move {
            wait.wait_for(|stopped| *stopped).await.unwrap();
            if !goes_on {
                std::future::pending::<()>().await;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
            Some((Ok("\"late\"\n".to_owned()), wait))
        });
        let body = Body::wrap_stream(stream::iter(first).chain(rest));
        let upload = tokio::spawn(upload(&system.facade.url(), body).send());
        while system.read_all().await.len() < LINES {
            assert!(!upload.is_finished());
        }
        system.facade.signal(signal);
        system
            .facade
            .wait_for_line(|line| line.contains("stopping"));
        // A client that has read `connection: close` does not ask for more lines.
        let _ = stopped.send(true);
        let answer = problem(upload.await.unwrap().unwrap(), 503).await;
        let lines = answer["lines"].as_u64().unwrap() as usize;
        assert!(lines >= LINES, "{answer}");
        assert_eq!(answer["stored"], lines, "{answer}");
        assert_eq!(answer["failed"], 0, "{answer}");
        assert_eq!(answer["errors"], json!([]), "{answer}");
        drop(stopped);
        assert!(system.facade.wait().success());
        system.restart_facade(&[]);
        assert_eq!(system.read_all().await.len(), lines);
    }
}

/// The same with streamed results: the last line has the number, and the body is aborted.
#[tokio::test(flavor = "multi_thread")]
async fn stopping_facade_ends_streamed_results_with_the_number_of_lines() {
    let mut system = Processes::start();
    let lines = stream::iter([Ok::<_, std::io::Error>("\"a\"\n\"b\"\n")]);
    let body = Body::wrap_stream(lines.chain(stream::pending()));
    let upload = upload(&system.facade.url(), body).header("accept", "application/x-ndjson");
    let mut results = upload.send().await.unwrap().bytes_stream();
    let mut read = Vec::new();
    while read.iter().filter(|byte| **byte == b'\n').count() < 2 {
        read.extend_from_slice(&results.next().await.unwrap().unwrap());
    }
    system.facade.signal("TERM");
    let mut is_cut = false;
    while let Some(piece) = results.next().await {
        match piece {
            Ok(piece) => read.extend_from_slice(&piece),
            Err(_) => is_cut = true,
        }
    }
    assert!(is_cut, "the body ended as if the upload were complete");
    let read = String::from_utf8(read).unwrap();
    let last: Value = serde_json::from_str(read.lines().last().unwrap()).unwrap();
    assert_eq!(last["lines"], 2, "{read}");
    assert_eq!(
        (&last["stored"], &last["failed"]),
        (&json!(2), &json!(0)),
        "{read}"
    );
    assert!(system.facade.wait().success());
}

/// A resolver that does not answer does not delay the end of the process beyond the grace period.
#[tokio::test(flavor = "multi_thread")]
async fn hanging_resolver_does_not_delay_the_end() {
    let trial = ["mount", "--bind", "/etc/resolv.conf", "/etc/resolv.conf"];
    let Some(mut command) = unshare(&["--mount"], &trial) else {
        return;
    };
    // A nameserver that receives queries and does not answer.
    let silent = match UdpSocket::bind("127.0.53.53:53") {
        Ok(silent) => silent,
        Err(error) => return skip(&format!("no nameserver's port: {error}"), "REQUIRE_ALL"),
    };
    let nameserver = silent.local_addr().unwrap().ip();
    let folder = tempfile::tempdir().unwrap();
    let resolv_conf = folder.path().join("resolv.conf");
    let text = format!("nameserver {nameserver}\noptions timeout:20 attempts:2\n");
    std::fs::write(&resolv_conf, text).unwrap();
    command
        .args(["sh", "-c"])
        .arg("mount --bind \"$0\" /etc/resolv.conf && exec \"$@\"")
        .arg(&resolv_conf)
        .arg(binary("facade"))
        .args(["--logging", "http://logging.example:8082", "--grace", "2s"]);
    let mut facade = Process::start(command, free_address());
    facade.wait_for_line(|line| line.contains("a look-up takes long"));
    let told = Instant::now();
    facade.signal("TERM");
    assert!(facade.wait().success());
    assert!(told.elapsed() < Duration::from_secs(2) + PATIENCE / 3);
}

fn facade(logging: &Server, flags: &[&str]) -> Process {
    let mut command = Command::new(binary("facade"));
    command.args(["--logging", &logging.url()]).args(flags);
    Process::start(command, free_address())
}

fn upload(url: &str, body: Body) -> RequestBuilder {
    let request = Client::new().post(url).body(body);
    request.header("content-type", "application/x-ndjson")
}

/// The peak memory of a process, in KiB.
pub(crate) fn peak_memory_kib(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:"));
    let size = line.unwrap().split_whitespace().nth(1);
    size.unwrap().parse().unwrap()
}
