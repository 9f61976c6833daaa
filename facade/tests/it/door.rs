//! Who may come in.

/// Certificates.
mod tls;

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Instant;

use futures_util::{StreamExt, stream};
use reqwest::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HOST, HeaderValue, WWW_AUTHENTICATE};
use reqwest::{Body, Method, Response};
use serde_json::Value;
use tempfile::TempDir;
use testing::process::{LOOK_AGAIN, PATIENCE, Process, free_address};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio::task::JoinHandle;

use crate::processes::{Processes, facade, start_logging};
use crate::system::{System, engine_under_test, nobody, problem};

const POSTER: &str = "poster-0123456789";
const READER: &str = "reader-0123456789";
const OTHER: &str = "other-00123456789";
const THIRD: &str = "third-00123456789";

/// Messages of 60 KB that are more than a GET has on its way to a client that does not read.
const FILLING: usize = 200;

/// A file of tokens, in a folder of its own.
struct TokenFile {
    folder: TempDir,
}

impl TokenFile {
    fn with(text: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let file = Self { folder };
        file.replace(text);
        file
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("tokens")
    }

    fn flag(&self) -> String {
        self.path().display().to_string()
    }

    /// Replaces the file at once, as a careful editor does.
    fn replace(&self, text: &str) {
        let new = self.folder.path().join("new");
        fs::write(&new, text).unwrap();
        fs::rename(new, self.path()).unwrap();
    }
}

/// Repeats a request until its answer has this status.
#[track_caller]
fn wait_for_status(status: u16, ask: impl AsyncFn() -> Response) -> impl Future<Output = Response> {
    let caller = std::panic::Location::caller();
    async move {
        let begin = Instant::now();
        loop {
            let response = ask().await;
            if response.status() == status {
                return response;
            }
            let seen = response.status();
            assert!(begin.elapsed() < PATIENCE, "{caller}: {seen}");
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }
}

#[tokio::test]
async fn only_known_tokens_come_in() {
    let file = TokenFile::with(&format!("# ours\n{POSTER}\nread {READER}\n"));
    let system = System::start_with(&["--token-file", &file.flag()]).await;
    let request = |method: &Method, path: &str| {
        let url = format!("{}{path}", system.url);
        system.http.request(method.clone(), url).body("hello")
    };
    let (get, head, post) = (Method::GET, Method::HEAD, Method::POST);
    let paths = [
        "/",
        "/01a203b3-3bb1-7319-90b9-a08e864b5eeb",
        "/stats",
        "/metrics",
        "/openapi.json",
        "/docs",
        "/docs/start.js",
        "/console",
        "/console/console.js",
        "/readyz?verbose",
        "/livez?verbose",
        "/hello",
    ];
    for path in paths {
        let unknown = [
            request(&get, path),
            request(&get, path).bearer_auth("another-0123456789"),
            request(&get, path).bearer_auth(format!("{POSTER}x")),
            request(&get, path).bearer_auth(&POSTER[1..]),
            request(&get, path).bearer_auth(""),
            request(&get, path).basic_auth(POSTER, None::<&str>),
            request(&get, path).header(AUTHORIZATION, POSTER),
            request(&get, path).bearer_auth(POSTER).bearer_auth(READER),
            request(&get, path).header(AUTHORIZATION, "Basic !"),
            request(&post, path),
            request(&Method::PATCH, path),
        ];
        for request in unknown {
            let response = request.send().await.unwrap();
            let schemes = response.headers().get_all(WWW_AUTHENTICATE).iter();
            let schemes: Vec<&HeaderValue> = schemes.collect();
            assert_eq!(schemes.len(), 2, "{path}");
            assert!(schemes[0].to_str().unwrap().starts_with("Bearer "));
            assert!(schemes[1].to_str().unwrap().starts_with("Basic "));
            assert!(response.headers().contains_key("x-request-id"));
            problem(response, 401).await;
        }
        for token in [POSTER, READER] {
            let known = [
                request(&get, path).bearer_auth(token),
                request(&get, path).basic_auth("", Some(token)),
                request(&get, path).basic_auth("anyone", Some(token)),
                request(&get, path).header(AUTHORIZATION, format!("bearer {token}")),
                request(&head, path).bearer_auth(token),
            ];
            for request in known {
                let status = request.send().await.unwrap().status();
                assert!(status == 200 || status == 404, "{path}: {status}");
            }
        }
        let refused = request(&post, path).bearer_auth(READER).send().await;
        problem(refused.unwrap(), 403).await;
    }
    for path in ["/livez", "/readyz"] {
        assert_eq!(system.get(path).await.status(), 200);
    }
    let read = || request(&get, "/").bearer_auth(READER).send();
    let before: Value = read().await.unwrap().json().await.unwrap();
    assert_eq!(before["count"], 0);
    let stored = request(&post, "/").bearer_auth(POSTER).send().await;
    assert_eq!(stored.unwrap().status(), 200);
    let after: Value = read().await.unwrap().json().await.unwrap();
    assert_eq!(after["count"], 1);
}

/// A token is in use, or out of use, without a restart. A broken file changes nothing, and is reported
/// without its tokens.
#[tokio::test(flavor = "multi_thread")]
async fn tokens_follow_their_file() {
    let file = TokenFile::with(POSTER);
    let flags = ["--log-format", "json", "--token-file", &file.flag()];
    let process = facade("http://127.0.0.1:1", "http://127.0.0.1:1", &flags);
    let process = Process::start(process, free_address());
    let http = reqwest::Client::new();
    let ask = async |token: &str| {
        let request = http.get(format!("{}/docs", process.url()));
        request.bearer_auth(token).send().await.unwrap()
    };
    assert_eq!(ask(POSTER).await.status(), 200);
    file.replace(&format!("{POSTER}\n{OTHER}\n"));
    wait_for_status(200, async || ask(OTHER).await).await;
    assert_eq!(ask(POSTER).await.status(), 200);
    file.replace(OTHER);
    wait_for_status(401, async || ask(POSTER).await).await;
    assert_eq!(ask(OTHER).await.status(), 200);

    let stays = |reason: &'static str| {
        move |line: &str| line.contains(reason) && line.contains("stays in use")
    };
    file.replace(&format!("{OTHER}\nsecret"));
    process.wait_for_line(stays("line 2 is wrong"));
    assert_eq!(ask(OTHER).await.status(), 200);
    fs::remove_file(file.path()).unwrap();
    process.wait_for_line(stays("No such file"));
    assert_eq!(ask(OTHER).await.status(), 200);
    file.replace(POSTER);
    wait_for_status(200, async || ask(POSTER).await).await;
    let secrets = [POSTER, OTHER, "secret"];
    for line in process.log() {
        assert!(
            !secrets.iter().any(|secret| line.contains(secret)),
            "{line}"
        );
    }
}

/// An upload that is in progress, with lines that the test sends.
struct Upload {
    lines: UnboundedSender<&'static str>,
    answer: JoinHandle<Response>,
}

impl Upload {
    /// Begins it, and waits until the line `first` is stored.
    async fn begin(system: &Processes, token: &str, accept: &str, first: &'static str) -> Self {
        let (lines, received) = unbounded_channel();
        let received = stream::unfold(received, async |mut received| {
            let line: &str = received.recv().await?;
            Some((Ok::<_, std::io::Error>(line), received))
        });
        let request = system.http.post(system.facade.url()).bearer_auth(token);
        let request = request
            .header(CONTENT_TYPE, "application/x-ndjson")
            .header(ACCEPT, accept)
            .body(Body::wrap_stream(received.boxed()));
        lines.send(first).unwrap();
        let answer = tokio::spawn(async { request.send().await.unwrap() });
        let is_stored = |line: &str| line.contains(&format!("\"msg\":{}", first.trim_end()));
        let logs = || system.logging.iter().flat_map(Process::log);
        let begin = Instant::now();
        while !logs().any(|line| is_stored(&line)) {
            assert!(begin.elapsed() < PATIENCE, "{first} is not stored");
            tokio::time::sleep(LOOK_AGAIN).await;
        }
        Self { lines, answer }
    }
}

/// Stores more than connections hold.
async fn fill(system: &Processes, token: &str) {
    let message = format!("\"{}\"\n", "x".repeat(60_000));
    let upload = system.http.post(system.facade.url()).bearer_auth(token);
    let upload = upload.header(CONTENT_TYPE, "application/x-ndjson");
    let upload = upload.body(message.repeat(FILLING)).send();
    assert_eq!(upload.await.unwrap().status(), 200);
}

/// Reads a body to its end, or until it is cut.
async fn read_body(mut response: Response) -> (String, reqwest::Result<()>) {
    let mut body = Vec::new();
    let end = loop {
        match response.chunk().await {
            Ok(Some(piece)) => body.extend_from_slice(&piece),
            Ok(None) => break Ok(()),
            Err(error) => break Err(error),
        }
    };
    (String::from_utf8(body).unwrap(), end)
}

/// What a token let in ends when the token is removed, and uploads also when it may only read from then on.
#[tokio::test(flavor = "multi_thread")]
async fn removed_token_ends_what_it_let_in() {
    let file = TokenFile::with(&format!("{POSTER}\n{OTHER}\n{THIRD}"));
    let mut system = Processes::start_with(&["--token-file", &file.flag()]);
    let ndjson = "application/x-ndjson";
    let get = async |query: &str| {
        let url = format!("{}/{query}", system.facade.url());
        let request = system.http.get(url).header(ACCEPT, ndjson);
        request.bearer_auth(OTHER).send().await.unwrap()
    };
    let mut following = get("?follow=true&tail=0").await;
    let json = "application/json";
    let demoted = Upload::begin(&system, OTHER, json, "\"demoted\"\n").await;
    let demoted_stream = Upload::begin(&system, OTHER, ndjson, "\"demoted stream\"\n").await;
    let removed = Upload::begin(&system, THIRD, json, "\"removed\"\n").await;
    let kept = Upload::begin(&system, POSTER, json, "\"kept\"\n").await;

    file.replace(&format!("{POSTER}\nread {OTHER}"));
    for (upload, status) in [(demoted, 403), (removed, 401)] {
        let response = upload.answer.await.unwrap();
        assert_eq!(response.headers()["connection"], "close");
        let challenged = response.headers().contains_key(WWW_AUTHENTICATE);
        assert_eq!(challenged, status == 401);
        assert_eq!(problem(response, status).await["lines"], 1);
    }
    let (results, end) = read_body(demoted_stream.answer.await.unwrap()).await;
    assert!(end.is_err(), "{results}");
    let last: Value = serde_json::from_str(results.lines().last().unwrap()).unwrap();
    assert_eq!(last["lines"], 1, "{results}");
    assert!(last["error"].as_str().unwrap().contains("only read"));
    // A token that may read goes on to.
    kept.lines.send("\"kept on\"\n").unwrap();
    let mut followed = String::new();
    while !followed.contains("kept on") {
        let piece = following.chunk().await.unwrap().unwrap();
        followed.push_str(std::str::from_utf8(&piece).unwrap());
    }

    file.replace(POSTER);
    let (_, end) = read_body(following).await;
    assert!(end.is_err());
    file.replace(&format!("{POSTER}\nread {OTHER}"));
    drop(wait_for_status(200, async || get("docs").await).await);
    fill(&system, POSTER).await;
    let reading = get("").await;
    file.replace(POSTER);
    wait_for_status(401, async || get("docs").await).await;
    let (read, end) = read_body(reading).await;
    assert!(end.is_err() && !read.contains("\"count\""));
    drop(kept.lines);
    let answer: Value = kept.answer.await.unwrap().json().await.unwrap();
    assert_eq!(answer["stored"], 2);
    system.facade.signal("TERM");
    assert!(system.facade.wait().success());
}

/// Instances that ask for a token take messages and reads from a facade that has it, also after both files
/// were changed; one that asks for another token is left out, and `/readyz?verbose` says why.
#[tokio::test(flavor = "multi_thread")]
async fn facade_carries_the_token_of_the_instances() {
    let (asked, sent, odd) = (
        TokenFile::with(&format!("read {READER}\n{POSTER}")),
        TokenFile::with(POSTER),
        TokenFile::with(OTHER),
    );
    let map = engine_under_test().empty_map();
    let logging = ["--map", &map.location, "--token-file", &asked.flag()];
    let flags = ["--logging-token-file", &sent.flag()];
    let mut system = Processes::on_map(&logging, &flags);
    let odd_one = ["--map", &map.location, "--token-file", &odd.flag()];
    let address = system.logging[1].address;
    system.logging[1].kill();
    system.logging[1] = start_logging(&odd_one, address);
    for n in 0..30 {
        assert_eq!(system.post(&format!("m{n}")).await.status(), 200);
    }
    assert_eq!(system.read_all().await.len(), 30);
    let refusal = "does not take this facade's token";
    let readiness = system
        .facade
        .wait_for_readiness(|text| text.contains(refusal));
    assert!(readiness.contains("\"degraded\""), "{readiness}");
    let direct = system.http.get(system.logging[0].url()).send().await;
    problem(direct.unwrap(), 401).await;
    fill(&system, "").await;
    let through = system.get().await;
    let direct = system.http.get(system.logging[0].url()).bearer_auth(POSTER);
    let direct = direct.send().await.unwrap();
    assert_eq!(direct.status(), 200);

    asked.replace(&format!("{POSTER}\n{OTHER}"));
    sent.replace(OTHER);
    let is_up = |readiness: String| readiness.contains("\"status\":\"ready\"");
    let begin = Instant::now();
    while !is_up(system.facade.readiness()) {
        assert!(begin.elapsed() < PATIENCE, "{}", system.facade.readiness());
        tokio::time::sleep(LOOK_AGAIN).await;
    }
    asked.replace(OTHER);
    for instance in &system.logging {
        let ask = async || {
            let request = system.http.get(instance.url()).bearer_auth(POSTER);
            request.send().await.unwrap()
        };
        wait_for_status(401, ask).await;
    }
    // The instances end the streams of the token that is gone, and the facade resumes with its new one.
    assert!(read_body(direct).await.1.is_err());
    let (whole, end) = read_body(through).await;
    assert!(end.is_ok() && whole.contains(&format!("\"count\":{}}}", 30 + FILLING)));
    assert_eq!(system.post("last").await.status(), 200);
    assert_eq!(system.read_all().await.len(), 31 + FILLING);
    for process in system.logging.iter().chain([&system.facade]) {
        for line in process.log() {
            assert!(!line.contains(POSTER) && !line.contains(OTHER), "{line}");
        }
    }
}

async fn read_head(connection: &mut TcpStream) -> String {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(connection.read_u8().await.unwrap());
    }
    String::from_utf8(head).unwrap()
}

/// The head of the answer to a request, on a connection of its own, of whose body nothing comes.
async fn early_answer(system: &System, line: &str, headers: &str) -> String {
    let address = system.url.trim_start_matches("http://");
    let mut connection = TcpStream::connect(address).await.unwrap();
    let host = if headers.contains("host: ") {
        ""
    } else {
        "host: localhost\r\n"
    };
    let head = format!("{line} HTTP/1.1\r\n{host}content-length: 90000\r\n{headers}\r\n");
    connection.write_all(head.as_bytes()).await.unwrap();
    read_head(&mut connection).await
}

/// An answer that comes before the request's body was read ends the connection and says so. After any other
/// answer the connection takes the next request, and the client is told for how long.
#[tokio::test]
async fn answer_before_the_body_says_that_the_connection_ends() {
    let file = TokenFile::with(&format!("{POSTER}\nread {READER}"));
    let flags = ["--token-file", &file.flag(), "--max-message", "10B"];
    let system = System::with_stubs(vec![nobody()], nobody(), &flags);
    let reader = format!("authorization: Bearer {READER}\r\n");
    let poster = format!("authorization: Bearer {POSTER}\r\n");
    let with = |header: &str| format!("{poster}{header}\r\n");
    for (status, line, headers) in [
        (401, "POST /", String::new()),
        (403, "POST /", reader),
        (403, "POST /", "origin: https://evil.example\r\n".to_owned()),
        (421, "POST /", "host: evil.example\r\n".to_owned()),
        (415, "POST /", with("content-type: image/png")),
        (400, "POST /", with("idempotency-key: x")),
        (413, "POST /", with("expect: 100-continue")),
        (404, "POST /nothing", poster.clone()),
        (405, "PUT /", poster.clone()),
        (200, "GET /livez", String::new()),
    ] {
        let head = early_answer(&system, line, &headers).await;
        assert!(head.starts_with(&format!("HTTP/1.1 {status} ")), "{head}");
        assert!(
            head.contains("connection: close\r\n"),
            "{line} {headers}: {head}"
        );
    }
    let limited = System::with_stubs(vec![nobody()], nobody(), &["--rate", "1/s"]);
    let mut heads = Vec::new();
    for _ in 0..3 {
        heads.push(early_answer(&limited, "PUT /", "").await);
    }
    let refused = heads.iter().find(|head| head.starts_with("HTTP/1.1 429 "));
    assert!(refused.unwrap().contains("connection: close\r\n"));

    let address = system.url.trim_start_matches("http://");
    let mut kept = TcpStream::connect(address).await.unwrap();
    let not_json = with("content-type: application/json\r\ncontent-length: 1");
    for (status, line, headers, body) in [
        (400, "POST /", not_json, "{"),
        (415, "POST /", with("content-type: image/png"), ""),
        (405, "PUT /", poster.clone(), ""),
        (503, "GET /", poster.clone(), ""),
        (200, "GET /livez", String::new(), ""),
    ] {
        let request = format!("{line} HTTP/1.1\r\nhost: localhost\r\n{headers}\r\n{body}");
        kept.write_all(request.as_bytes()).await.unwrap();
        let head = read_head(&mut kept).await;
        assert!(head.starts_with(&format!("HTTP/1.1 {status} ")), "{head}");
        assert!(head.contains("keep-alive: timeout=75\r\n"), "{head}");
        assert!(!head.contains("connection: close"), "{head}");
        let length = head
            .lines()
            .find_map(|line| line.strip_prefix("content-length: "));
        let mut answer = vec![0; length.unwrap().parse().unwrap()];
        kept.read_exact(&mut answer).await.unwrap();
    }
}

/// Over its rate an address gets 429s, which do nothing and say when to come back; health is not counted.
#[tokio::test]
async fn address_over_its_rate_is_refused() {
    let system = System::start_with(&["--rate", "1/s"]).await;
    let begin = Instant::now();
    let mut stored = 0;
    let refused = loop {
        let response = system.post().body("hello").send().await.unwrap();
        if response.status() != 200 {
            break response;
        }
        stored += 1;
        assert!(begin.elapsed() < PATIENCE, "{stored} POSTs passed");
    };
    assert_eq!(refused.headers()["retry-after"], "1");
    problem(refused, 429).await;
    for _ in 0..10 {
        assert_eq!(system.get("/livez").await.status(), 200);
    }
    let read = wait_for_status(200, async || system.get("/").await).await;
    let read: Value = read.json().await.unwrap();
    assert_eq!(read["count"], stored);
}

/// The scripts of the exercise bring the token, and say that one is missing.
#[tokio::test(flavor = "multi_thread")]
async fn scripts_bring_the_token() {
    let file = TokenFile::with(&format!("{POSTER}\nread {READER}"));
    let system = Processes::start_with(&["--token-file", &file.flag()]);
    let run = |script: &str, argument: &str, token: Option<&str>| {
        let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).parent();
        let mut command = Command::new(root.unwrap().join("scripts").join(script));
        command.env("FACADE_URL", system.facade.url()).arg(argument);
        if let Some(token) = token {
            command.env("TOKEN", token);
        }
        let output = command.output().unwrap();
        let printed = String::from_utf8(output.stdout).unwrap();
        (output.status.success(), printed)
    };
    let (is_posted, answer) = run("post.sh", "hello", Some(POSTER));
    assert!(
        is_posted && answer.contains("\"msg\":\"hello\""),
        "{answer}"
    );
    let (is_read, log) = run("get.sh", "limit=1", Some(READER));
    assert!(is_read && log.contains("\"msg\":\"hello\""), "{log}");
    for (script, token, status) in [("post.sh", Some(READER), "403"), ("get.sh", None, "401")] {
        let (is_done, answer) = run(script, "limit=1", token);
        assert!(!is_done && answer.contains(status), "{script}: {answer}");
    }
}

/// A page whose name was pointed at this machine (DNS rebinding) gets nothing but whether the facade runs and
/// is ready, which kubelets and balancers ask by address.
#[tokio::test]
async fn other_hosts_are_refused_on_loopback() {
    let system = System::start_with(&["--host", "log.example.org,b.example"]).await;
    let port = system.url.rsplit(':').next().unwrap();
    for (host, status) in [
        ("localhost", 200),
        ("127.0.0.1:1", 200),
        ("[::1]", 200),
        ("log.example.org", 200),
        ("B.example:8086", 200),
        ("evil.example", 421),
        (&format!("evil.example:{port}"), 421),
        ("0.0.0.0", 421),
        ("localhost@evil.example", 400),
    ] {
        let paths = [
            "/",
            "/stats",
            "/console",
            "/livez",
            "/readyz",
            "/readyz?verbose",
            "/nothing",
        ];
        for path in paths {
            let url = format!("{}{path}", system.url);
            let response = system
                .http
                .get(url)
                .header(HOST, host)
                .send()
                .await
                .unwrap();
            match status {
                421 if matches!(path, "/livez" | "/readyz") => assert_eq!(response.status(), 200),
                200 => assert!(response.status().is_success() || path == "/nothing"),
                _ => drop(problem(response, status).await),
            }
        }
    }
    let post = system.post().header(HOST, "evil.example").body("hello");
    problem(post.send().await.unwrap(), 421).await;
    assert_eq!(system.messages().await.len(), 0);
}

#[tokio::test]
async fn request_has_one_host() {
    let system = System::start().await;
    let address = system.url.trim_start_matches("http://");
    for (head, status) in [
        ("GET /livez HTTP/1.1\r\n", 400),
        ("GET /livez HTTP/1.0\r\n", 200),
        (
            "GET /livez HTTP/1.1\r\nhost: localhost\r\nhost: localhost\r\n",
            400,
        ),
        (
            "GET /livez HTTP/1.1\r\nhost: localhost\r\nhost: evil\r\n",
            400,
        ),
        (
            "GET http://evil.example/docs HTTP/1.1\r\nhost: localhost\r\n",
            421,
        ),
        ("GET /livez HTTP/1.1\r\nhost: localhost\r\n", 200),
    ] {
        let mut connection = TcpStream::connect(address).await.unwrap();
        let request = format!("{head}connection: close\r\n\r\n");
        connection.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        connection.read_to_string(&mut answer).await.unwrap();
        let first = answer.lines().next().unwrap_or_default();
        assert!(first.contains(&status.to_string()), "{head}: {first}");
    }
}

/// On all addresses every host is served, until one is named.
#[tokio::test(flavor = "multi_thread")]
async fn hosts_are_free_beyond_loopback_until_one_is_named() {
    let everywhere = || std::net::SocketAddr::from(([0, 0, 0, 0], free_address().port()));
    let ask = async |process: &Process, host: &str| {
        let url = format!("http://127.0.0.1:{}/docs", process.address.port());
        let request = reqwest::Client::new().get(url).header(HOST, host);
        request.send().await.unwrap().status().as_u16()
    };
    let start = |flags: &[&str]| -> Process {
        let command: Command = facade("http://127.0.0.1:1", "http://127.0.0.1:1", flags);
        Process::start(command, everywhere())
    };
    let any = start(&["--open"]);
    assert_eq!(ask(&any, "any.example").await, 200);
    let named = start(&["--open", "--host", "a.example", "--host", "b.example"]);
    assert_eq!(ask(&named, "a.example").await, 200);
    assert_eq!(ask(&named, "b.example:80").await, 200);
    assert_eq!(ask(&named, "localhost").await, 200);
    assert_eq!(ask(&named, "any.example").await, 421);
}
