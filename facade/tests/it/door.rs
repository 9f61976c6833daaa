//! Who may come in.

/// Certificates.
mod tls;

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Instant;

use reqwest::header::{AUTHORIZATION, HOST, HeaderValue, WWW_AUTHENTICATE};
use reqwest::{Method, Response};
use serde_json::Value;
use tempfile::TempDir;
use testing::process::{LOOK_AGAIN, PATIENCE, Process, free_address};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::processes::{Processes, facade, start_logging};
use crate::system::{System, engine_under_test, problem};

const POSTER: &str = "poster-0123456789";
const READER: &str = "reader-0123456789";
const OTHER: &str = "other-00123456789";

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
    let readiness = system.facade.readiness();
    assert!(
        readiness.contains("does not take this facade's token"),
        "{readiness}"
    );
    assert!(readiness.contains("\"degraded\""), "{readiness}");
    let direct = system.http.get(system.logging[0].url()).send().await;
    problem(direct.unwrap(), 401).await;

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
    assert_eq!(system.post("last").await.status(), 200);
    assert_eq!(system.read_all().await.len(), 31);
    for process in system.logging.iter().chain([&system.facade]) {
        for line in process.log() {
            assert!(!line.contains(POSTER) && !line.contains(OTHER), "{line}");
        }
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

/// A page whose name was pointed at this machine (DNS rebinding) gets nothing.
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
        for path in ["/", "/stats", "/console", "/livez", "/nothing"] {
            let url = format!("{}{path}", system.url);
            let response = system
                .http
                .get(url)
                .header(HOST, host)
                .send()
                .await
                .unwrap();
            match status {
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
            "GET http://evil.example/livez HTTP/1.1\r\nhost: localhost\r\n",
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
        let url = format!("http://127.0.0.1:{}/livez", process.address.port());
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
