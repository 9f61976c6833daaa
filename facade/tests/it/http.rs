//! What holds for every request: paths, methods, request ids, health.

use reqwest::header::{HOST, ORIGIN};
use serde_json::Value;
use testing::process::{Process, free_address};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::processes::Processes;
use crate::system::{System, nobody, problem};

#[tokio::test]
async fn wrong_paths_and_methods_are_problems() {
    let system = System::start().await;
    for (method, path) in [
        ("GET", "/a/b"),
        ("GET", "/hello"),
        ("GET", "/livez/"),
        ("GET", "/index.html"),
        ("POST", "/hello"),
        ("PATCH", "/x"),
    ] {
        let url = format!("{}{path}", system.url);
        let request = system.http.request(method.parse().unwrap(), url);
        let answer = problem(request.send().await.unwrap(), 404).await;
        let detail = answer["detail"].as_str().unwrap();
        assert!(detail.contains("/UUID"), "{method} {path}: {detail}");
    }
    let message = format!("/{}", uuid::Uuid::now_v7());
    for (method, path) in [
        ("PUT", "/"),
        ("DELETE", "/"),
        ("PATCH", &message),
        ("POST", "/livez"),
    ] {
        let url = format!("{}{path}", system.url);
        let request = system.http.request(method.parse().unwrap(), url);
        let response = request.send().await.unwrap();
        assert!(response.headers().contains_key("allow"));
        problem(response, 405).await;
    }
}

#[tokio::test]
async fn request_id_is_kept_or_generated() {
    let system = System::start().await;
    let send = async |id: Option<&str>| {
        let request = system.http.get(format!("{}/livez", system.url));
        let request = match id {
            Some(id) => request.header("x-request-id", id),
            None => request,
        };
        let response = request.send().await.unwrap();
        response.headers()["x-request-id"]
            .to_str()
            .unwrap()
            .to_owned()
    };
    assert_eq!(send(Some("my-id-1")).await, "my-id-1");
    assert_eq!(send(None).await.len(), 36);
    for unusable in ["with space", &"x".repeat(129), ""] {
        assert_eq!(send(Some(unusable)).await.len(), 36);
    }
}

#[tokio::test]
async fn readiness_says_what_is_missing() {
    let system = System::start().await;
    assert_eq!(system.get("/livez").await.text().await.unwrap(), "alive\n");
    let ready: Value = system.get("/readyz").await.json().await.unwrap();
    assert_eq!(ready["status"], "ready");
    let ready: Value = system.get("/readyz?verbose").await.json().await.unwrap();
    let checks = ready["checks"].as_array().unwrap();
    for name in ["logging-1", "logging-2", "logging-3", "map", "messages"] {
        let mut of_name = checks.iter().filter(|check| check["name"] == name);
        assert_eq!(of_name.next().unwrap()["ok"], true, "{name}");
        assert_eq!(of_name.next(), None);
    }
    system.stop.cancel();
    let stopping = problem(system.get("/readyz").await, 503).await;
    assert!(stopping["detail"].as_str().unwrap().contains("stopping"));
    assert_eq!(system.get("/livez").await.status(), 200);
}

#[tokio::test]
async fn facade_alone_is_alive_but_not_ready() {
    let system = System::with_stubs(vec![nobody()], nobody(), &[]);
    assert_eq!(system.get("/livez").await.status(), 200);
    let missing = problem(system.get("/readyz?verbose").await, 503).await;
    assert!(
        missing["detail"]
            .as_str()
            .unwrap()
            .contains("no logging instance")
    );
    let checks = missing["checks"].as_array().unwrap();
    assert!(
        checks.iter().all(|check| check["ok"] == false),
        "{checks:?}"
    );
}

/// After any request a terminal shows its prompt on a new line.
#[tokio::test]
async fn every_answer_ends_with_a_newline() {
    let system = System::start().await;
    let uuid = system.store("hello").await;
    let alone = System::with_stubs(vec![nobody()], nobody(), &[]);
    let upload = system.post().header("content-type", "application/x-ndjson");
    let answers = [
        system.post().body("hello").send().await.unwrap(),
        system.post().body("").send().await.unwrap(),
        upload.body("\"a\"\n\"\"").send().await.unwrap(),
        system.get("/").await,
        system.get("/?limit=0").await,
        system.get("/?limit=x").await,
        system.get(&format!("/{uuid}")).await,
        system.get("/hello").await,
        system.get("/a/b").await,
        system.get("/livez").await,
        system.get("/readyz").await,
        system.get("/readyz?verbose").await,
        alone.get("/readyz?verbose").await,
        alone.get("/").await,
    ];
    for answer in answers {
        let url = answer.url().clone();
        let text = answer.text().await.unwrap();
        assert!(
            text.ends_with('\n') && !text.ends_with("\n\n"),
            "{url}: {text:?}"
        );
    }
}

/// No cache keeps an answer or gives one format for another, and no browser guesses what an answer is.
#[tokio::test]
async fn answers_are_neither_stored_nor_guessed() {
    let system = System::start().await;
    let uuid = system.store("hello").await;
    let get = |path: &str| system.http.get(format!("{}{path}", system.url));
    let log = [
        get("/"),
        get("/").header("accept", "text/plain"),
        get("/").header("accept", "text/html"),
        get("/").header("accept", "text/event-stream"),
        get("/").header("accept", "image/png"),
        get("/?limit=0"),
    ];
    let others = [
        get(&format!("/{uuid}")),
        get("/stats"),
        get("/console"),
        get("/console/console.js"),
        get("/docs/swagger-ui.css"),
        get("/nothing"),
        get("/livez"),
        get("/livez").header(HOST, "evil.example"),
        system.post().body("hello"),
        system.post().body(""),
    ];
    let varies = log.len();
    for (index, request) in log.into_iter().chain(others).enumerate() {
        let response = request.send().await.unwrap();
        let (url, headers) = (response.url(), response.headers());
        assert_eq!(headers["x-content-type-options"], "nosniff", "{url}");
        assert_eq!(headers["cache-control"], "no-store", "{url}");
        if index < varies {
            assert_eq!(headers["vary"], "accept, sec-fetch-mode", "{url}");
        }
    }
}

/// A CONNECT has no path. It gets an answer like every other request.
#[tokio::test(flavor = "multi_thread")]
async fn request_without_a_path_is_a_problem() {
    let system = System::start().await;
    let address = system.url.trim_start_matches("http://");
    let mut connection = tokio::net::TcpStream::connect(address).await.unwrap();
    let request = "CONNECT localhost:1 HTTP/1.1\r\nhost: localhost:1\r\nconnection: close\r\n\r\n";
    connection.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    connection.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 404 "), "{answer}");
    assert!(answer.contains("application/problem+json"), "{answer}");
}

/// The line of a request names its client, and a caller cannot fill the log with one.
#[tokio::test(flavor = "multi_thread")]
async fn line_of_a_request_names_the_client_and_is_short() {
    let proxied = Processes::start_with(&["--trusted-proxy", "10.0.0.1,127.0.0.0/30"]);
    let long = "x".repeat(5000);
    let path = format!("{}/{long}", proxied.facade.url());
    let method = "Y".repeat(5000).parse().unwrap();
    for request in [proxied.http.get(&path), proxied.http.request(method, &path)] {
        let request = request.header("x-forwarded-for", "192.0.2.1");
        assert_eq!(request.send().await.unwrap().status(), 404);
    }
    let direct = Process::start(proxied.another_facade(&[]), free_address());
    let read = proxied.http.get(direct.url()).send().await.unwrap();
    assert_eq!(read.status(), 200);
    let lines = |log: &[String], client: &str| {
        let is_of = |line: &&String| line.contains(client) && line.contains("status=");
        log.iter()
            .filter(is_of)
            .map(String::len)
            .collect::<Vec<_>>()
    };
    proxied.facade.wait_for_log(|log| {
        let lengths = lines(log, "client=192.0.2.1");
        assert!(lengths.iter().all(|length| *length < 1000), "{lengths:?}");
        lengths.len() == 2
    });
    direct.wait_for_log(|log| lines(log, "client=127.0.0.1").len() == 1);
}

/// A page of another site cannot make a browser post.
#[tokio::test]
async fn posts_of_other_origins_are_refused() {
    let system = System::start().await;
    let host = system.url.strip_prefix("http://").unwrap();
    let own = system.url.clone();
    let cases = [
        ("sec-fetch-site", "cross-site", 403),
        ("sec-fetch-site", "same-site", 403),
        ("sec-fetch-site", "same-origin", 200),
        ("sec-fetch-site", "none", 200),
        // As behind a proxy with TLS.
        (ORIGIN.as_str(), &own.replace("http:", "https:"), 200),
        (ORIGIN.as_str(), "https://example.org", 403),
        (ORIGIN.as_str(), "http://127.0.0.1:1", 403),
        (ORIGIN.as_str(), "null", 403),
        (ORIGIN.as_str(), own.as_str(), 200),
    ];
    let mut stored = 0;
    for (header, value, status) in cases {
        let post = system.post().header(header, value);
        let response = post.header(HOST, host).body("x").send().await.unwrap();
        assert_eq!(response.status(), status, "{header}: {value}");
        stored += usize::from(status == 200);
    }
    assert_eq!(system.messages().await.len(), stored);
    let read = system
        .http
        .get(&system.url)
        .header(ORIGIN, "https://example.org");
    assert_eq!(read.send().await.unwrap().status(), 200);
}
