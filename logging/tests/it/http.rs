//! The internal HTTP API, served in-process on a free port.

use std::net::TcpListener;
use std::sync::Arc;
use std::time::Duration;

use common::api::{Batch, MARK, Mark, READ_END};
use common::door::{Door, DoorConfig};
use common::entry::Entry;
use common::serve::Timeouts;
use logging::map::{Access, DistributedMap, Location, Options, open};
use logging::{App, router};
use reqwest::{Client, Response, StatusCode};
use tempfile::TempDir;
use tokio_util::sync::{CancellationToken, DropGuard};
use uuid::Uuid;

/// Long, as a busy machine is slow.
const STORE_TIMEOUT: Duration = Duration::from_secs(30);

/// A logging instance on an empty map.
pub(crate) struct Instance {
    pub(crate) url: String,
    pub(crate) http: Client,
    stop: CancellationToken,
    _stop_on_drop: DropGuard,
    _folder: Option<TempDir>,
}

impl Instance {
    pub(crate) fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let options = Options {
            store_timeout: STORE_TIMEOUT,
            settle: None,
            backups: None,
            access: Access::Serve,
        };
        let map = open(&Location::Lmdb(folder.path().into()), options).unwrap();
        Self {
            _folder: Some(folder),
            ..Self::on_map(map)
        }
    }

    /// A logging instance on a map of the test.
    pub(crate) fn on_map(map: Arc<dyn DistributedMap>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let url = format!("http://{address}");
        let door = Door::new(&DoorConfig::default(), address, &[]).unwrap();
        let stop = CancellationToken::new();
        let router = router(App::new(
            map,
            door,
            Timeouts::default(),
            STORE_TIMEOUT,
            stop.clone(),
        ));
        let stop_serving = CancellationToken::new();
        tokio::spawn(common::serve::serve(
            listener,
            None,
            router,
            Timeouts::default().into(),
            stop_serving.clone(),
            Duration::ZERO,
        ));
        Self {
            url,
            http: Client::new(),
            stop,
            _stop_on_drop: stop_serving.drop_guard(),
            _folder: None,
        }
    }

    async fn post(&self, body: impl Into<reqwest::Body>) -> Response {
        let request = self.http.post(&self.url).body(body);
        let request = request.header("content-type", Batch::CONTENT_TYPE);
        request.send().await.unwrap()
    }

    pub(crate) async fn get(&self, path: &str) -> Response {
        let url = format!("{}{path}", self.url);
        self.http.get(url).send().await.unwrap()
    }

    pub(crate) async fn text(&self, path: &str) -> String {
        self.get(path).await.text().await.unwrap()
    }
}

pub(crate) fn json(uuid: Uuid, msg: &str) -> String {
    format!(r#"{{"uuid":"{uuid}","msg":"{msg}"}}"#)
}

#[tokio::test]
async fn one_entry_gets_one_result() {
    let instance = Instance::start();
    let uuid = Uuid::now_v7();
    for outcome in ["stored", "duplicate"] {
        let response = instance.post(json(uuid, "hello")).await;
        assert_eq!(response.status(), StatusCode::OK);
        let expected = format!(r#"{{"uuid":"{uuid}","outcome":"{outcome}"}}"#) + "\n";
        assert_eq!(response.text().await.unwrap(), expected);
    }
}

#[tokio::test]
async fn batch_gets_a_result_for_each_entry_in_order() {
    let instance = Instance::start();
    let (first, second) = (Uuid::now_v7(), Uuid::now_v7());
    let old = "01890000-0000-7000-8000-000000000000";
    let batch = [
        json(second, "second"),
        json(first, "first"),
        json(second, "other"),
        json(old.parse().unwrap(), "old"),
    ];
    let response = instance.post(format!("[{}]", batch.join(","))).await;
    let expected = format!(
        r#"[{{"uuid":"{second}","outcome":"stored"}},{{"uuid":"{first}","outcome":"stored"}},{{"uuid":"{second}","outcome":"conflict"}},{{"uuid":"{old}","outcome":"stale"}}]"#
    ) + "\n";
    assert_eq!(response.text().await.unwrap(), expected);
}

/// A facade names the map that it serves. An instance of another map takes nothing from it.
#[tokio::test]
async fn batch_for_another_map_is_not_taken() {
    let instance = Instance::start();
    let livez = instance.get("/livez").await;
    let mark: Mark = livez.headers()[MARK].to_str().unwrap().parse().unwrap();
    assert!(mark.map.is_some() && mark.clock.is_some());
    let named = |map| Mark { map, clock: None }.to_string();
    for (mark, is_taken) in [
        (named(None), true),
        (named(mark.map), true),
        (named(Some(Uuid::now_v7())), false),
        ("1-2 - -".to_owned(), false),
        ("nonsense".to_owned(), false),
    ] {
        let uuid = Uuid::now_v7();
        let request = instance.http.post(&instance.url).body(json(uuid, "a"));
        let request = request.header("content-type", Batch::CONTENT_TYPE);
        let answer = request.header(MARK, &mark).send().await.unwrap();
        let expected = if is_taken {
            StatusCode::OK
        } else {
            StatusCode::INSUFFICIENT_STORAGE
        };
        assert_eq!(answer.status(), expected, "{mark}");
        let found = instance.get(&format!("/{uuid}")).await;
        assert_eq!(found.status().is_success(), is_taken, "{mark}");
    }
}

#[tokio::test]
async fn bad_batches_are_refused_whole() {
    let instance = Instance::start();
    let good = json(Uuid::now_v7(), "good");
    let bodies = [
        String::new(),
        "hello".to_owned(),
        r#"{"msg":"no uuid"}"#.to_owned(),
        json(Uuid::nil(), "not version 7"),
        format!("[{good},{}]", json(Uuid::max(), "not version 7")),
        format!("[{good},{}]", json(Uuid::now_v7(), "")),
        // Escaped, as a read writes it, this is 12 MB.
        format!(
            "[{good},{}]",
            json(Uuid::now_v7(), &"\u{7f}".repeat(2_000_000))
        ),
    ];
    for body in bodies {
        let response = instance.post(body.clone()).await;
        assert_eq!(response.status(), StatusCode::BAD_REQUEST, "{body:.200}");
        assert_eq!(
            response.headers()["content-type"],
            "application/problem+json"
        );
    }
    let too_large = "x".repeat(common::api::MAX_BATCH_BYTES + 1);
    let response = instance.post(too_large).await;
    assert_eq!(response.status(), StatusCode::PAYLOAD_TOO_LARGE);
    assert_eq!(instance.text("/").await, "{\"count\":0}\n");
}

#[tokio::test]
async fn list_streams_lines_and_a_count_within_bounds() {
    let instance = Instance::start();
    let entries: Vec<Entry> = (0..3)
        .map(|n| Entry {
            uuid: Uuid::now_v7(),
            msg: format!("message {n}"),
        })
        .collect();
    instance.post(serde_json::to_vec(&entries).unwrap()).await;
    let [first, second, third] = &entries[..] else {
        panic!("there are three")
    };
    let lines = |entries: &[&Entry], end: &str| {
        let mut text = Vec::new();
        entries
            .iter()
            .for_each(|entry| common::json::write_line(&mut text, entry));
        String::from_utf8(text).unwrap() + end + "\n"
    };
    let whole = lines(&[first, second, third], r#"{"count":3}"#);
    assert_eq!(instance.text("/").await, whole);
    let desc = lines(&[third, second, first], r#"{"count":3}"#);
    assert_eq!(instance.text("/?order=desc").await, desc);
    let within = format!("/?after={}&before={}", first.uuid, third.uuid);
    assert_eq!(
        instance.text(&within).await,
        lines(&[second], r#"{"count":1}"#)
    );
    let cut = format!(r#"{{"count":2,"next":"{}"}}"#, second.uuid);
    assert_eq!(
        instance.text("/?order=desc&limit=2").await,
        lines(&[third, second], &cut)
    );
    let end = Uuid::from_u128(third.uuid.as_u128() + 1).to_string();
    let answer = instance.get("/?limit=1").await;
    assert_eq!(answer.headers()[READ_END], end.as_str());
    let next = format!(r#"{{"count":1,"next":"{}"}}"#, first.uuid);
    assert_eq!(answer.text().await.unwrap(), lines(&[first], &next));
    // The rest of a limited read that lost only its end line.
    for (order, bound, uuid, more) in [
        ("asc", "after", first.uuid, true),
        ("asc", "after", third.uuid, false),
        ("desc", "before", third.uuid, true),
        ("desc", "before", first.uuid, false),
    ] {
        let path = format!("/?limit=0&order={order}&{bound}={uuid}");
        let rest = instance.text(&path).await;
        let next = format!(r#","next":"{uuid}""#);
        let next = if more { next.as_str() } else { "" };
        assert_eq!(rest, format!("{{\"count\":0{next}}}\n"));
    }
    assert_eq!(
        instance.get("/?limit=x").await.status(),
        StatusCode::BAD_REQUEST
    );
}

#[tokio::test]
async fn list_of_many_pieces_is_complete() {
    let instance = Instance::start();
    let msg = "x".repeat(10_000);
    let entries: Vec<Entry> = (0..100)
        .map(|_| Entry {
            uuid: Uuid::now_v7(),
            msg: msg.clone(),
        })
        .collect();
    instance.post(serde_json::to_vec(&entries).unwrap()).await;
    for order in ["asc", "desc"] {
        let text = instance.text(&format!("/?order={order}")).await;
        let mut lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.pop(), Some(r#"{"count":100}"#));
        let mut read: Vec<Entry> = lines
            .iter()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        if order == "desc" {
            read.reverse();
        }
        assert_eq!(read, entries);
    }
}

#[tokio::test]
async fn single_entries_are_found_by_uuid() {
    let instance = Instance::start();
    let uuid = Uuid::now_v7();
    instance.post(json(uuid, "hello")).await;
    assert_eq!(
        instance.text(&format!("/{uuid}")).await,
        json(uuid, "hello") + "\n"
    );
    let unknown = format!("/{}", Uuid::now_v7());
    assert_eq!(instance.get(&unknown).await.status(), StatusCode::NOT_FOUND);
    assert_eq!(instance.get("/hello").await.status(), StatusCode::NOT_FOUND);
}

/// The answer to a message that was posted to a logging instance by hand names the facade.
#[tokio::test]
async fn message_that_was_meant_for_the_facade_is_answered_with_a_hint() {
    let instance = Instance::start();
    for body in ["msg=hello", r#"{"msg":"hello"}"#] {
        let response = instance.post(body).await;
        assert_eq!(response.status(), StatusCode::BAD_REQUEST);
        let hint = response.text().await.unwrap();
        assert!(
            hint.contains("to the facade, by default http://localhost:8086"),
            "{hint}"
        );
    }
}

#[tokio::test]
async fn stopping_instance_is_not_ready() {
    let instance = Instance::start();
    assert_eq!(instance.text("/livez").await, "alive\n");
    assert_eq!(instance.text("/readyz").await, "{\"status\":\"ready\"}\n");
    let checks = r#"{"status":"ready","checks":[{"name":"map","ok":true,"detail":"answers"}]}"#;
    assert_eq!(
        instance.text("/readyz?verbose").await,
        checks.to_owned() + "\n"
    );
    instance.stop.cancel();
    let response = instance.get("/readyz").await;
    assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
    assert!(response.text().await.unwrap().contains("stopping"));
    assert_eq!(instance.text("/livez").await, "alive\n");
}
