//! Clients that want to keep others out: uploads that send next to nothing, and one address that takes all.

use std::time::Duration;

use futures_util::{StreamExt, stream};
use reqwest::{Body, Client, Response};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::interval;

use crate::processes::Processes;
use crate::system::{System, problem};

/// The uploads that a facade serves at once.
const UPLOADS: usize = 16;

/// A request body that the test sends piece by piece.
fn body() -> (mpsc::UnboundedSender<&'static str>, Body) {
    let (pieces, received) = mpsc::unbounded_channel();
    let received = stream::unfold(received, async |mut received| {
        Some((Ok::<_, std::io::Error>(received.recv().await?), received))
    });
    (pieces, Body::wrap_stream(received.boxed()))
}

async fn upload(url: &str, client: &str, body: impl Into<Body>) -> Response {
    let request = Client::new().post(url).body(body);
    let request = request.header("content-type", "application/x-ndjson");
    let request = request.header("x-forwarded-for", client);
    request.send().await.unwrap()
}

/// Uploads that send a byte a second hold their permits no longer than silent ones.
#[tokio::test(flavor = "multi_thread")]
async fn uploads_of_crumbs_are_cut() {
    let system = System::start().await;
    let mut uploads = JoinSet::new();
    let mut bodies = Vec::new();
    for _ in 0..UPLOADS {
        let (pieces, body) = body();
        pieces.send("\"a\"\n").unwrap();
        bodies.push(pieces);
        let url = system.url.clone();
        uploads.spawn(async move { upload(&url, "", body).await });
    }
    let mut crumbs = interval(Duration::from_secs(1));
    let mut cut = Vec::new();
    while cut.len() < UPLOADS {
        tokio::select! {
            _ = crumbs.tick() => bodies.iter().for_each(|body| { let _ = body.send(" "); }),
            answer = uploads.join_next() => cut.push(answer.unwrap().unwrap()),
        }
    }
    for answer in cut {
        let answer = problem(answer, 408).await;
        assert_eq!(answer["stored"], 1, "{answer}");
    }
    assert_eq!(upload(&system.url, "", "\"b\"\n").await.status(), 200);
}

/// Behind a trusted proxy, each of its clients gets half of the permits at most.
#[tokio::test(flavor = "multi_thread")]
async fn one_client_holds_half_of_the_permits_at_most() {
    let system = Processes::start_with(&["--trusted-proxy", "127.0.0.1"]);
    let url = system.facade.url();
    let mut held = Vec::new();
    let mut uploads = JoinSet::new();
    for _ in 0..=UPLOADS / 2 {
        let (pieces, body) = body();
        pieces.send("\"a\"\n").unwrap();
        held.push(pieces);
        let url = url.clone();
        uploads.spawn(async move { upload(&url, "192.0.2.9, 192.0.2.1", body).await });
    }
    let refused = uploads.join_next().await.unwrap().unwrap();
    let refused = problem(refused, 503).await;
    assert_eq!(refused["stored"], "no");
    for other in ["192.0.2.2", "192.0.2.1, 192.0.2.9", "127.0.0.1"] {
        let answer = upload(&url, other, "\"b\"\n").await;
        assert_eq!(answer.status(), 200, "{other}");
    }
    held.clear();
    while let Some(answer) = uploads.join_next().await {
        assert_eq!(answer.unwrap().status(), 200);
    }
    let answer = upload(&url, "192.0.2.1", "\"c\"\n").await;
    assert_eq!(answer.status(), 200);
}
