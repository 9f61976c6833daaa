//! Tests of serving: the timeouts of connections, requests and responses, panics, and shutdown. They send
//! bytes, because an HTTP client would not misbehave in these ways.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::net::{SocketAddr, TcpListener};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::http::Extensions;
use axum::routing::{get, post};
use common::body::read_body;
use common::client::Client;
use common::door::Door;
use common::middleware::{RequestLog, with_middleware};
use common::permits::Permits;
use common::problem::Problem;
use common::serve::{Limits, Timeouts, serve};
use futures_util::stream;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// The wire with anything on it.
mod fuzz;
/// Clients that send or read slowly, partly, too much, or too often.
mod hostile;

/// A timeout that a test waits for.
const SHORT: Duration = Duration::from_millis(200);
/// A timeout that a test must not wait for: the test would hang.
const NEVER: Duration = Duration::from_secs(3600);

const PATIENT: Timeouts = Timeouts {
    head: NEVER,
    idle: NEVER,
    body: NEVER,
    read: NEVER,
};

struct Server {
    address: SocketAddr,
    stop: CancellationToken,
    serving: JoinHandle<std::io::Result<()>>,
}

impl Server {
    fn start(routes: Router, limits: impl Into<Limits>, grace: Duration) -> Self {
        let limits = limits.into();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let stop = CancellationToken::new();
        let router = with_middleware(routes, RequestLog::On, Door::default(), None);
        let serving = tokio::spawn(serve(listener, None, router, limits, stop.clone(), grace));
        Self {
            address,
            stop,
            serving,
        }
    }

    async fn send(&self, request: &str) -> TcpStream {
        let mut connection = TcpStream::connect(self.address).await.unwrap();
        connection.write_all(request.as_bytes()).await.unwrap();
        connection
    }
}

/// Everything that the server sends until it closes the connection.
async fn rest(mut connection: TcpStream) -> String {
    let mut text = Vec::new();
    let _cut_or_closed = connection.read_to_end(&mut text).await;
    String::from_utf8_lossy(&text).into_owned()
}

#[tokio::test]
async fn panic_is_a_problem_and_the_server_keeps_serving() {
    async fn panics() -> &'static str {
        panic!("on purpose")
    }
    let routes = Router::new()
        .route("/", get(panics))
        .route("/ok", get("ok"));
    let server = Server::start(routes, PATIENT, NEVER);
    let request = "GET / HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n";
    let answer = rest(server.send(request).await).await;
    assert!(answer.starts_with("HTTP/1.1 500 "), "{answer}");
    assert!(answer.contains("application/problem+json"), "{answer}");
    assert!(answer.contains("x-request-id: "), "{answer}");
    assert!(!answer.contains("on purpose"), "{answer}");
    let request = "GET /ok HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n";
    assert!(rest(server.send(request).await).await.ends_with("ok"));
}

#[tokio::test]
async fn slow_head_and_idle_connection_are_cut() {
    let timeouts = Timeouts {
        head: SHORT,
        ..PATIENT
    };
    let server = Server::start(Router::new().route("/", get("ok")), timeouts, NEVER);
    let unfinished = server.send("GET / HTTP/1.1\r\nhost:").await;
    rest(unfinished).await;
    rest(server.send("").await).await;
    let mut kept = server.send("GET / HTTP/1.1\r\nhost: h\r\n\r\n").await;
    read_until(&mut kept, "ok").await;
    kept.write_all(b"GET / HTTP/1.1\r\nhost:").await.unwrap();
    rest(kept).await;

    let timeouts = Timeouts {
        idle: Duration::from_secs(2),
        ..PATIENT
    };
    let server = Server::start(Router::new().route("/", get("ok")), timeouts, NEVER);
    let idle = server.send("GET / HTTP/1.1\r\nhost: h\r\n\r\n").await;
    let answer = rest(idle).await;
    assert!(answer.contains("keep-alive: timeout=2\r\n"), "{answer}");
    assert!(
        answer.ends_with("ok"),
        "the connection must be answered, and then closed when idle"
    );
}

/// Also a body that arrives steadily, but a byte at a time.
#[tokio::test]
async fn slow_body_is_408_and_large_body_is_413() {
    async fn read(body: Body) -> Result<Bytes, Problem> {
        let client = Client::of(&Extensions::new());
        let mut reserved = Permits::new(1000).take(client, 0).unwrap();
        Ok(read_body(body, 100, SHORT, &mut reserved).await?)
    }
    let server = Server::start(Router::new().route("/", post(read)), PATIENT, NEVER);
    let request = "POST / HTTP/1.1\r\nhost: h\r\ncontent-length: 90000\r\n\r\n";
    let (mut reader, mut writer) = server.send(request).await.into_split();
    let crumbs = tokio::spawn(async move {
        while writer.write_all(b"x").await.is_ok() {
            tokio::time::sleep(SHORT / 10).await;
        }
    });
    let mut status = [0; 12];
    reader.read_exact(&mut status).await.unwrap();
    assert_eq!(&status, b"HTTP/1.1 408");
    crumbs.abort();
    let request = "POST / HTTP/1.1\r\nhost: h\r\ncontent-length: 101\r\nconnection: close\r\n\r\n";
    let answer = rest(server.send(&(request.to_owned() + &"x".repeat(101))).await).await;
    assert!(answer.starts_with("HTTP/1.1 413 "), "{answer}");
}

/// Sends a message when it is dropped, together with the body that holds it.
struct Tell(mpsc::UnboundedSender<()>);

impl Drop for Tell {
    fn drop(&mut self) {
        let _nobody_may_listen = self.0.send(());
    }
}

#[tokio::test]
async fn client_that_reads_nothing_is_cut() {
    let (ended, mut has_ended) = mpsc::unbounded_channel();
    let endless = async move || {
        let tell = Tell(ended.clone());
        let chunk = Bytes::from(vec![b'x'; 64 * 1024]);
        Body::from_stream(stream::repeat_with(move || {
            let _held_by_the_body = &tell;
            Ok::<_, std::io::Error>(chunk.clone())
        }))
    };
    let timeouts = Timeouts {
        read: SHORT,
        ..PATIENT
    };
    let server = Server::start(Router::new().route("/", get(endless)), timeouts, NEVER);
    let connection = server.send("GET / HTTP/1.1\r\nhost: h\r\n\r\n").await;
    assert_eq!(has_ended.recv().await, Some(()));
    drop(connection);
}

/// A body in two halves, which the test sends.
fn in_halves() -> (Router, mpsc::Sender<Bytes>) {
    let (halves, received) = mpsc::channel::<Bytes>(2);
    let received = std::sync::Arc::new(tokio::sync::Mutex::new(Some(received)));
    let body = async move || {
        let received = received.lock().await.take().unwrap();
        Body::from_stream(stream::unfold(received, async |mut received| {
            Some((Ok::<_, std::io::Error>(received.recv().await?), received))
        }))
    };
    (Router::new().route("/", get(body)), halves)
}

async fn read_until(connection: &mut TcpStream, end: &str) -> String {
    let mut text = Vec::new();
    while !text.ends_with(end.as_bytes()) {
        text.push(connection.read_u8().await.unwrap());
    }
    String::from_utf8(text).unwrap()
}

#[tokio::test]
async fn body_in_flight_finishes_after_the_stop() {
    let (routes, halves) = in_halves();
    let server = Server::start(routes, PATIENT, NEVER);
    let mut connection = server.send("GET / HTTP/1.1\r\nhost: h\r\n\r\n").await;
    halves.send("first half".into()).await.unwrap();
    read_until(&mut connection, "first half").await;
    server.stop.cancel();
    while TcpStream::connect(server.address).await.is_ok() {
        tokio::task::yield_now().await;
    }
    halves.send("second half".into()).await.unwrap();
    drop(halves);
    assert!(rest(connection).await.ends_with("second half\r\n0\r\n\r\n"));
    server.serving.await.unwrap().unwrap();
}

#[tokio::test]
async fn body_that_outlasts_the_grace_period_is_cut() {
    let (routes, halves) = in_halves();
    let server = Server::start(routes, PATIENT, SHORT);
    let mut connection = server.send("GET / HTTP/1.1\r\nhost: h\r\n\r\n").await;
    halves.send("first half".into()).await.unwrap();
    read_until(&mut connection, "first half").await;
    server.stop.cancel();
    server.serving.await.unwrap().unwrap();
    assert!(
        !rest(connection).await.contains("0\r\n\r\n"),
        "the cut body ended properly"
    );
}
