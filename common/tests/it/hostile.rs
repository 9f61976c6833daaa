//! Clients that send or read slowly, partly, too much, or too often.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::task::Poll;
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::http::StatusCode;
use axum::routing::{get, post};
use common::serve::Limits;
use futures_util::{StreamExt, stream};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc;

use crate::{NEVER, PATIENT, SHORT, Server, Tell, Timeouts, in_halves, read_until, rest};

const GET: &str = "GET / HTTP/1.1\r\nhost: h\r\n\r\n";

/// A response that never ends, and a message when the server has dropped it.
fn endless() -> (Router, mpsc::UnboundedReceiver<()>) {
    let (ended, has_ended) = mpsc::unbounded_channel();
    let body = async move || {
        let tell = Tell(ended.clone());
        let chunk = Bytes::from(vec![b'x'; 64 * 1024]);
        Body::from_stream(stream::repeat_with(move || {
            let _held_by_the_body = &tell;
            Ok::<_, std::io::Error>(chunk.clone())
        }))
    };
    (Router::new().route("/", get(body)), has_ended)
}

/// Reading a byte now and then keeps no response alive, and the connection is reset: what the kernel still
/// holds for the client is dropped.
#[tokio::test]
async fn client_that_reads_crumbs_is_cut() {
    let (routes, mut has_ended) = endless();
    let timeouts = Timeouts {
        read: SHORT,
        ..PATIENT
    };
    let server = Server::start(routes, timeouts, NEVER);
    let mut connection = server.send(GET).await;
    let crumbs = async {
        loop {
            let read = connection.read_u8().await;
            if read.is_err() {
                return;
            }
            tokio::time::sleep(SHORT / 10).await;
        }
    };
    tokio::select! {
        () = crumbs => panic!("the response ended before the client was cut"),
        ended = has_ended.recv() => assert_eq!(ended, Some(())),
    }
    let mut left = Vec::new();
    let end = connection.read_to_end(&mut left).await.unwrap_err();
    assert_eq!(end.kind(), ErrorKind::ConnectionReset);
}

/// With nothing but the end of the connection to end a body, a body that is cut ends with a reset.
#[tokio::test]
async fn cut_body_without_chunks_ends_with_a_reset() {
    let broken = async || {
        let pieces = [Ok(Bytes::from("first half")), Err("broken")];
        // The first half is on its way when the body breaks.
        Body::from_stream(stream::iter(pieces).then(async |piece| {
            if piece.is_err() {
                tokio::task::yield_now().await;
            }
            piece
        }))
    };
    let server = Server::start(Router::new().route("/", get(broken)), PATIENT, NEVER);
    let mut connection = server.send("GET / HTTP/1.0\r\nhost: h\r\n\r\n").await;
    read_until(&mut connection, "first half").await;
    let end = connection.read_to_end(&mut Vec::new()).await.unwrap_err();
    assert_eq!(end.kind(), ErrorKind::ConnectionReset);
}

/// The same when the server ends before the body.
#[tokio::test]
async fn body_without_chunks_that_outlasts_the_grace_period_ends_with_a_reset() {
    let (routes, halves) = in_halves();
    let server = Server::start(routes, PATIENT, SHORT);
    let mut connection = server.send("GET / HTTP/1.0\r\nhost: h\r\n\r\n").await;
    halves.send("first half".into()).await.unwrap();
    read_until(&mut connection, "first half").await;
    server.stop.cancel();
    server.serving.await.unwrap().unwrap();
    let end = connection.read_to_end(&mut Vec::new()).await.unwrap_err();
    assert_eq!(end.kind(), ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn whole_body_without_chunks_ends_without_a_reset() {
    let (routes, halves) = in_halves();
    let server = Server::start(routes, PATIENT, NEVER);
    let mut connection = server.send("GET / HTTP/1.0\r\nhost: h\r\n\r\n").await;
    let large = Bytes::from(vec![b'x'; 8 << 20]);
    halves.send(large.clone()).await.unwrap();
    halves.send("the end".into()).await.unwrap();
    drop(halves);
    let mut answer = Vec::new();
    connection.read_to_end(&mut answer).await.unwrap();
    assert!(answer.len() > large.len() && answer.ends_with(b"the end"));
    let head = server.send("HEAD / HTTP/1.0\r\nhost: h\r\n\r\n").await;
    assert!(rest(head).await.starts_with("HTTP/1.0 "));
}

/// A client that has sent its request and closed its half of the connection gets its answer.
#[tokio::test]
async fn half_closed_client_gets_its_answer() {
    let (routes, halves) = in_halves();
    let server = Server::start(routes, PATIENT, NEVER);
    let mut connection = server.send(GET).await;
    connection.shutdown().await.unwrap();
    halves.send("first half".into()).await.unwrap();
    read_until(&mut connection, "first half").await;
    halves.send("second half".into()).await.unwrap();
    drop(halves);
    assert!(rest(connection).await.ends_with("second half\r\n0\r\n\r\n"));
}

/// A client that has left ends the work for its GET, although nothing is written that would tell. A POST is
/// finished and answered, however long after its client has closed its half.
#[tokio::test]
async fn client_that_has_left_ends_the_work_for_its_get() {
    let (ended, mut has_ended) = mpsc::unbounded_channel();
    let (begun, mut has_begun) = mpsc::unbounded_channel();
    let tell = move || {
        let ended = Tell(ended.clone());
        begun.send(()).unwrap();
        ended
    };
    let tell_in_body = tell.clone();
    let without_answer = async move || {
        let _held_by_the_handler = tell();
        std::future::pending::<()>().await;
    };
    let silent = async move || {
        let tell = tell_in_body();
        let begin = stream::iter([Ok::<_, std::io::Error>("begin")]);
        let silence = stream::poll_fn(move |_| {
            let _held_by_the_body = &tell;
            Poll::Pending
        });
        Body::from_stream(begin.chain(silence))
    };
    let (finish, finished) = mpsc::channel::<()>(1);
    let finished = std::sync::Arc::new(tokio::sync::Mutex::new(finished));
    let long_work = async move || {
        finished.lock().await.recv().await.unwrap();
        "done"
    };
    let routes = Router::new()
        .route("/", post(long_work))
        .route("/unanswered", get(without_answer))
        .route("/silent", get(silent));
    let server = Server::start(routes, PATIENT, NEVER);
    let posting = "POST / HTTP/1.1\r\nhost: h\r\ncontent-length: 1\r\n\r\n1";
    let mut posting = server.send(posting).await;
    posting.shutdown().await.unwrap();
    for path in ["/unanswered", "/silent"] {
        let request = format!("GET {path} HTTP/1.1\r\nhost: h\r\n\r\n");
        let connections = [
            server.send(&request).await,
            server.send(&format!("{request}its next request")).await,
            server.send(&request).await,
        ];
        for _ in &connections {
            has_begun.recv().await.unwrap();
        }
        let [closed, ahead, mut half_closed] = connections;
        drop(closed);
        drop(ahead);
        half_closed.shutdown().await.unwrap();
        for _ in 0..3 {
            has_ended.recv().await.unwrap();
        }
        let answer = rest(half_closed).await;
        assert!(!answer.ends_with("0\r\n\r\n"), "{path}: {answer}");
    }
    finish.send(()).await.unwrap();
    assert!(rest(posting).await.ends_with("done"));
}

/// An answer that comes before the request was sent reaches a client that reads only after it has sent all.
#[tokio::test(flavor = "multi_thread")]
async fn early_answer_reaches_a_client_that_is_still_sending() {
    const BYTES: usize = 2 << 20;
    let refuse = async || StatusCode::PAYLOAD_TOO_LARGE;
    let server = Server::start(Router::new().route("/", post(refuse)), PATIENT, NEVER);
    let address = server.address;
    let client = tokio::task::spawn_blocking(move || {
        let mut connection = std::net::TcpStream::connect(address).unwrap();
        let head = format!("POST / HTTP/1.1\r\nhost: h\r\ncontent-length: {BYTES}\r\n\r\n");
        connection.write_all(head.as_bytes()).unwrap();
        for _ in 0..BYTES / 1024 {
            connection.write_all(&[b'x'; 1024]).unwrap();
        }
        connection.shutdown(Shutdown::Write).unwrap();
        let mut answer = String::new();
        connection.read_to_string(&mut answer).unwrap();
        answer
    });
    let answer = client.await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 413 "), "{answer}");
}

/// A head that is too long or malformed ends the connection, and the answer says so.
#[tokio::test]
async fn head_beyond_16_kib_is_a_431_and_a_malformed_one_a_400() {
    let server = Server::start(Router::new().route("/", get("ok")), PATIENT, NEVER);
    let head = |bytes: usize| {
        format!(
            "GET / HTTP/1.1\r\nhost: h\r\nx: {}\r\n\r\n",
            "x".repeat(bytes)
        )
    };
    let mut kept = server.send(&head(15 << 10)).await;
    let answer = read_until(&mut kept, "ok").await;
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    for (status, head) in [
        (431, head(16 << 10)),
        (400, "GET / HTTP/1.1\r\nhost\r\n\r\n".to_owned()),
        (400, "GET / HTTP/9.1\r\nhost: h\r\n\r\n".to_owned()),
        (400, "G(T / HTTP/1.1\r\nhost: h\r\n\r\n".to_owned()),
        (
            400,
            "POST / HTTP/1.1\r\nhost: h\r\ncontent-length: x\r\n\r\n".to_owned(),
        ),
    ] {
        let answer = rest(server.send(&head).await).await;
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status} ")),
            "{answer}"
        );
        assert!(answer.contains("connection: close\r\n"), "{answer}");
    }
}

/// Over the limit a new connection takes the place of the oldest idle one; it does not matter that a part of
/// a head has come.
#[tokio::test]
async fn idle_connection_makes_room_for_a_new_one() {
    let (routes, halves) = in_halves();
    let limits = Limits {
        max_connections: 3,
        ..PATIENT.into()
    };
    let server = Server::start(routes.route("/ok", get("ok")), limits, NEVER);
    let mut busy = server.send(GET).await;
    halves.send("first half".into()).await.unwrap();
    read_until(&mut busy, "first half").await;
    let partly = server.send("GET / HTTP/1.1\r\nhost:").await;
    let mut used = server.send("GET /ok HTTP/1.1\r\nhost: h\r\n\r\n").await;
    read_until(&mut used, "ok").await;
    let mut newest = server.send("GET /ok HTTP/1.1\r\nhost: h\r\n\r\n").await;
    read_until(&mut newest, "ok").await;
    rest(partly).await;
    used.write_all(b"GET /ok HTTP/1.1\r\nhost: h\r\n\r\n")
        .await
        .unwrap();
    read_until(&mut used, "ok").await;
    halves.send("second half".into()).await.unwrap();
    drop(halves);
    read_until(&mut busy, "second half\r\n0\r\n\r\n").await;
}

#[tokio::test]
async fn connection_beyond_busy_ones_gets_a_503() {
    let (routes, halves) = in_halves();
    let limits = Limits {
        max_connections: 1,
        ..PATIENT.into()
    };
    let server = Server::start(routes, limits, NEVER);
    let mut busy = server.send(GET).await;
    halves.send("first half".into()).await.unwrap();
    read_until(&mut busy, "first half").await;
    let answer = rest(server.send(GET).await).await;
    assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
    assert!(answer.contains("\r\nretry-after: 1\r\n"), "{answer}");
    let (_, body) = answer.split_once("\r\n\r\n").unwrap();
    let problem: serde_json::Value = serde_json::from_str(body).unwrap();
    assert_eq!(problem["status"], 503);
    halves.send("second half".into()).await.unwrap();
    drop(halves);
    read_until(&mut busy, "second half\r\n0\r\n\r\n").await;
    let mut next = server.send("GET /x HTTP/1.1\r\nhost: h\r\n\r\n").await;
    assert!(read_until(&mut next, "\r\n").await.contains(" 404 "));
}

/// Closed connections do not linger: a client that has sent its request whole and keeps the connection open
/// does not delay the end.
#[tokio::test]
async fn idle_connection_does_not_delay_the_end() {
    let server = Server::start(Router::new().route("/", get("ok")), PATIENT, NEVER);
    let mut idle = server.send(GET).await;
    read_until(&mut idle, "ok").await;
    server.stop.cancel();
    let ended = tokio::time::timeout(Duration::from_secs(4), server.serving);
    ended.await.unwrap().unwrap().unwrap();
}
