//! The whole contract of the stub.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::net::TcpListener;
use std::time::Duration;

use common::serve::{Timeouts, serve};
use reqwest::{Client, Method};
use tokio_util::sync::CancellationToken;

#[tokio::test]
async fn every_get_gets_the_sentence_and_other_methods_a_405() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let stop = CancellationToken::new();
    let router = messages::router(stop.clone());
    let serving = serve(
        listener,
        None,
        router,
        Timeouts::default().into(),
        stop.clone(),
        Duration::ZERO,
    );
    let serving = tokio::spawn(serving);
    let http = Client::new();
    let get = async |path: &str| http.get(format!("{url}{path}")).send().await.unwrap();
    for path in ["/", "/any/path", "/?msg=HELLO"] {
        let response = get(path).await;
        assert_eq!(response.status(), 200);
        assert_eq!(
            response.headers()["content-type"],
            "text/plain; charset=utf-8"
        );
        assert_eq!(
            response.text().await.unwrap(),
            "Messages Service not Implemented"
        );
    }
    assert_eq!(get("/livez").await.text().await.unwrap(), "alive\n");
    assert_eq!(get("/readyz").await.status(), 200);
    for method in [Method::POST, Method::PUT, Method::DELETE] {
        let response = http.request(method, &url).send().await.unwrap();
        assert_eq!(response.status(), 405);
        assert_eq!(
            response.headers()["content-type"],
            "application/problem+json"
        );
    }
    stop.cancel();
    serving.await.unwrap().unwrap();
}
