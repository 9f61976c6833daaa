//! POST of one message.

use std::collections::HashSet;
use std::sync::Arc;

use axum::Router;
use common::entry::Entry;
use facade::message::{BodyFormat, message};
use futures_util::stream;
use proptest::prelude::*;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::system::{System, nobody, problem, serve};

const FORM: &str = "application/x-www-form-urlencoded";
const JSON: &str = "application/json";
const TEXT: &str = "text/plain";

#[tokio::test]
async fn every_accepted_shape_is_stored_as_posted() {
    let system = System::start().await;
    let cases: [(Option<&str>, &[u8], &str); 39] = [
        (Some(FORM), b"msg=hello", "hello"),
        (Some(FORM), b"Hello", "Hello"),
        (Some(FORM), b"Hello+World %26", "Hello+World %26"),
        (Some(FORM), b"a&b", "a&b"),
        (Some(FORM), b"msg=a+b%26c%3Dd", "a b&c=d"),
        (Some(FORM), b"msg=a=b", "a=b"),
        (Some(FORM), b"msg=100%", "100%"),
        (Some(FORM), b"%6Dsg=encoded+name", "encoded name"),
        (Some(FORM), "msg=%F0%9F%A6%80é".as_bytes(), "🦀é"),
        (
            Some("APPLICATION/X-WWW-FORM-URLENCODED; charset=UTF-8"),
            b"msg=x",
            "x",
        ),
        (Some(JSON), br#"{"msg":"hello"}"#, "hello"),
        (Some(JSON), b" {\n\"msg\" : \"hello\" } ", "hello"),
        (Some(JSON), br#""hello""#, "hello"),
        (Some(JSON), br#""\u0000\ud83e\udd80\n""#, "\0🦀\n"),
        (Some("application/json; charset=utf-8"), br#""x""#, "x"),
        (Some(TEXT), b"msg=hello", "msg=hello"),
        (
            Some(TEXT),
            b" a: b\r\n\"c\"\0&+=% ",
            " a: b\r\n\"c\"\0&+=% ",
        ),
        (Some("text/plain; charset=\"utf-8\""), b"x", "x"),
        (Some("text/plain;charset=us-ascii"), b"x", "x"),
        (Some("text/plain; charset=UTF8"), b"x", "x"),
        (None, b"no content type", "no content type"),
        (None, b"msg=msg1", "msg1"),
        (None, b"msg=a+b%26c", "a b&c"),
        (None, br#"{"msg":"x"}"#, "x"),
        (None, b"\r\n{\r\n  \"msg\":  \"x=1\"\r\n}\r\n", "x=1"),
        (None, b"a=b&msg=c", "a=b&msg=c"),
        (None, br#"{"text":"x"}"#, r#"{"text":"x"}"#),
        (None, b"{msgs: 1}", "{msgs: 1}"),
        (None, br#""a string""#, r#""a string""#),
        (Some(""), b"msg=go", "go"),
        (Some(""), b"go", "go"),
        (Some(FORM), br#"{"msg":"x"}"#, "x"),
        (Some(FORM), b"{\r\n    \"msg\":  \"a=b\"\r\n}", "a=b"),
        (Some(FORM), b"msg=a\r\nb", "a\r\nb"),
        (Some(FORM), b"{text}", "{text}"),
        (Some(TEXT), br#"{"msg":"x"}"#, r#"{"msg":"x"}"#),
        (Some(TEXT), b"msg=a&b=c", "msg=a&b=c"),
        (Some("text/plain;charset=UTF-8"), b"msg=a", "msg=a"),
        (None, "\u{feff}bom".as_bytes(), "\u{feff}bom"),
    ];
    for (content_type, body, expected) in cases {
        let request = system.post().body(body.to_vec());
        let request = match content_type {
            Some(content_type) => request.header("content-type", content_type),
            None => request,
        };
        let response = request.send().await.unwrap();
        assert_eq!(response.status(), 200, "{content_type:?} {expected:?}");
        let instance = response.headers()["x-logging-instance"].to_str().unwrap();
        assert!(
            system.logging.iter().any(|name| name == instance),
            "{instance}"
        );
        let answer: Value = response.json().await.unwrap();
        let uuid = answer["uuid"].as_str().unwrap();
        assert_eq!(answer, json!({"uuid": uuid, "msg": expected}));
        assert_eq!(Uuid::try_parse(uuid).unwrap().get_version_num(), 7);
        let stored: Entry = system.get(&format!("/{uuid}")).await.json().await.unwrap();
        assert_eq!(stored.msg, expected);
    }
    assert_eq!(system.messages().await, cases.map(|(_, _, msg)| msg));
}

#[tokio::test]
async fn malformed_posts_are_refused_and_change_nothing() {
    let system = System::start().await;
    let cases: [(&str, &[u8], u16); 43] = [
        (FORM, b"", 400),
        (FORM, b"msg=", 400),
        (FORM, b"msg=a&b=c", 400),
        (FORM, b"msg=a&msg=b", 400),
        (FORM, b"msg=a&", 400),
        (FORM, b"&msg=a", 400),
        (FORM, b"message=a", 400),
        (FORM, b"MSG=a", 400),
        (FORM, b"=a", 400),
        (FORM, b"msg=%FF", 400),
        (FORM, b"\xff", 400),
        (JSON, b"", 400),
        (JSON, b"hello", 400),
        (JSON, b"{}", 400),
        (JSON, br#"{"msg":""}"#, 400),
        (JSON, br#"{"msg":"a","uuid":"b"}"#, 400),
        (JSON, br#"{"msg":"a","msg":"b"}"#, 400),
        (JSON, br#"{"msg":1}"#, 400),
        (JSON, br#"{"msg":null}"#, 400),
        (JSON, br#"["a"]"#, 400),
        (JSON, b"1", 400),
        (JSON, br#""a" "b""#, 400),
        (JSON, br#""\ud83e""#, 400),
        (JSON, b"\"\xff\"", 400),
        (TEXT, b"", 400),
        (TEXT, b"\xf0\x9f", 400),
        ("text/plain; charset=latin1", b"a", 415),
        ("text/html", b"a", 415),
        ("multipart/form-data; boundary=x", b"--x--", 400),
        ("multipart/form-data", b"--x--", 415),
        ("application/octet-stream", b"a", 415),
        ("application/xml", b"<a/>", 415),
        ("nonsense", b"a", 415),
        ("", b"msg=a&b=c", 400),
        ("", br#"{"msg":"a","msg":"b"}"#, 400),
        ("", br#"{"level":"info","msg":"a"}"#, 400),
        ("", b"{\"msg\":\"a\"", 400),
        ("", b" { \"msg\" : 1 }", 400),
        ("", "\u{feff}{\"msg\":\"a\"}".as_bytes(), 400),
        ("", b"{msg:a}", 400),
        ("", b"'{msg:a}'", 400),
        (FORM, br#"{"msg":"a","b":1}"#, 400),
        (FORM, br#"{"text":"a=b"}"#, 400),
    ];
    for (content_type, body, status) in cases {
        let request = system.post().header("content-type", content_type);
        let response = request.body(body.to_vec()).send().await.unwrap();
        let what = format!("{content_type} {:?}", String::from_utf8_lossy(body));
        assert_eq!(response.status(), status, "{what}");
        problem(response, status).await;
    }
    let twice = system
        .post()
        .header("content-type", FORM)
        .header("content-type", TEXT);
    problem(twice.body("a").send().await.unwrap(), 415).await;
    let packed = system.post().header("content-encoding", "gzip").body("a");
    problem(packed.send().await.unwrap(), 415).await;
    assert_eq!(system.read("").await.count, 0);
}

/// A part of a multipart body: header lines and content.
fn multipart(parts: &[(&str, &[u8])]) -> Vec<u8> {
    let mut body = Vec::new();
    for (headers, content) in parts {
        body.extend_from_slice(format!("--x\r\n{headers}\r\n\r\n").as_bytes());
        body.extend_from_slice(content);
        body.extend_from_slice(b"\r\n");
    }
    body.extend_from_slice(b"--x--\r\n");
    body
}

/// The form of `curl -F msg=…`: one field, no file.
#[tokio::test]
async fn multipart_form_with_only_msg_is_stored_and_any_other_refused() {
    const MSG: &str = "content-disposition: form-data; name=\"msg\"";
    let system = System::start().await;
    let post = |body: Vec<u8>| {
        let request = system.post();
        request
            .header("content-type", "multipart/form-data; boundary=x")
            .body(body)
            .send()
    };
    let utf8 = format!("{MSG}\r\ncontent-type: text/plain; charset=utf-8");
    let binary = format!("{MSG}\r\nContent-Transfer-Encoding: BINARY\r\nContent-Length: 1");
    let unquoted = "Content-Disposition: form-data; name=msg";
    let messages = ["hello", "a=b&c\r\n--y+%20\n", "🦀", &"x".repeat(64 << 10)];
    for msg in messages {
        for headers in [MSG, &utf8, &binary, unquoted] {
            let response = post(multipart(&[(headers, msg.as_bytes())])).await.unwrap();
            assert_eq!(response.status(), 200, "{msg}");
            assert_eq!(response.json::<Entry>().await.unwrap().msg, msg);
        }
    }
    assert_eq!(system.messages().await.len(), 4 * messages.len());

    let other = MSG.replace("msg", "text");
    let file = format!("{MSG}; filename=\"a.txt\"");
    let latin1 = format!("{MSG}\r\ncontent-type: text/plain; charset=latin1");
    let html = format!("{MSG}\r\ncontent-type: text/html");
    let whole = multipart(&[(MSG, b"a")]);
    let too_large = "x".repeat((64 << 10) + 1);
    let encoded = |encoding| format!("{MSG}\r\ncontent-transfer-encoding: {encoding}");
    let gzip = format!("{MSG}\r\ncontent-encoding: gzip");
    let extended = format!("{MSG}; filename*=UTF-8''a.txt");
    let followed = |end: &[u8]| [&whole, end].concat();
    let refused: [(Vec<u8>, u16); 20] = [
        (followed(b"more"), 400),
        (followed(b"\r\n--x--\r\n"), 400),
        (followed(&whole), 400),
        ([b"text\r\n", &whole[..]].concat(), 400),
        (multipart(&[(&extended, b"a")]), 400),
        (multipart(&[(&encoded("base64"), b"aGVsbG8=")]), 415),
        (multipart(&[(&encoded("Quoted-Printable"), b"a=3Db")]), 415),
        (multipart(&[(&gzip, b"a")]), 400),
        (multipart(&[]), 400),
        (multipart(&[(MSG, b"")]), 400),
        (multipart(&[(MSG, b"a"), (MSG, b"b")]), 400),
        (multipart(&[(MSG, b"a"), (&other, b"b")]), 400),
        (multipart(&[(&other, b"a")]), 400),
        (multipart(&[(&file, b"a")]), 400),
        (multipart(&[(MSG, b"\xff")]), 400),
        (multipart(&[(&latin1, b"a")]), 415),
        (multipart(&[(&html, b"a")]), 415),
        (multipart(&[(MSG, too_large.as_bytes())]), 413),
        (whole[..whole.len() - 6].to_vec(), 400),
        (b"msg=a".to_vec(), 400),
    ];
    for (body, status) in refused {
        let what = String::from_utf8_lossy(&body[..body.len().min(200)]).into_owned();
        let response = post(body).await.unwrap();
        assert_eq!(response.status(), status, "{what}");
        problem(response, status).await;
    }
    assert_eq!(system.messages().await.len(), 4 * messages.len());
}

/// The answer to a malformed form or JSON shows the commands that work.
#[tokio::test]
async fn refused_form_is_answered_with_the_command_that_works() {
    let system = System::start().await;
    for (content_type, body) in [
        (FORM, "1+1=2"),
        (FORM, "msg=a&b=c"),
        (JSON, "{msg: a}"),
        ("", "{msg: a}"),
    ] {
        let request = system.post().header("content-type", content_type);
        let answer = problem(request.body(body).send().await.unwrap(), 400).await;
        let detail = answer["detail"].as_str().unwrap();
        for command in ["--data-urlencode 'msg=", "--json '{\"msg\":", "text/plain"] {
            assert!(detail.contains(command), "{body}: {detail}");
        }
    }
}

#[tokio::test]
async fn largest_message_is_stored_and_one_byte_more_is_413() {
    for flags in [&[][..], &["--max-message", "1MiB"]] {
        let system = System::start_with(flags).await;
        let size = if flags.is_empty() { 64 << 10 } else { 1 << 20 };
        let largest = "\u{1}".repeat(size);
        let larger = "\u{1}".repeat(size + 1);
        let encode = |msg: &str| {
            [
                (TEXT, msg.to_owned()),
                (FORM, format!("msg={}", msg.replace('\u{1}', "%01"))),
                (JSON, serde_json::to_string(msg).unwrap()),
            ]
        };
        for (content_type, body) in encode(&largest) {
            let request = system.post().header("content-type", content_type);
            let response = request.body(body).send().await.unwrap();
            assert_eq!(response.status(), 200, "{content_type}");
        }
        for (content_type, body) in encode(&larger) {
            let request = system.post().header("content-type", content_type);
            let announced = request.try_clone().unwrap().body(body.clone()).send();
            problem(announced.await.unwrap(), 413).await;
            let chunks = stream::iter([Ok::<_, String>(body)]);
            let chunked = request.body(reqwest::Body::wrap_stream(chunks)).send();
            problem(chunked.await.unwrap(), 413).await;
        }
        let stored = system.messages().await;
        assert_eq!(stored.len(), 3);
        assert!(stored.iter().all(|msg| *msg == largest));
    }
}

#[tokio::test]
async fn idempotency_key_becomes_the_uuid_and_retries_are_duplicates() {
    let system = System::start().await;
    let key = Uuid::now_v7();
    let post = |key: String, msg: &'static str| {
        system
            .post()
            .header("idempotency-key", key)
            .body(msg)
            .send()
    };
    let first: Value = post(key.to_string(), "a")
        .await
        .unwrap()
        .json()
        .await
        .unwrap();
    assert_eq!(first, json!({"uuid": key, "msg": "a"}));
    for repeated in [key.to_string(), format!("\"{key}\"")] {
        let repeat: Value = post(repeated, "a").await.unwrap().json().await.unwrap();
        assert_eq!(repeat, json!({"uuid": key, "msg": "a", "duplicate": true}));
    }
    problem(post(key.to_string(), "b").await.unwrap(), 422).await;
    for bad in [
        "",
        "x",
        "\"",
        &Uuid::nil().to_string(),
        "d9428888-122b-4fee-8123-123456789abc",
    ] {
        problem(post(bad.to_owned(), "c").await.unwrap(), 400).await;
    }
    let two = system
        .post()
        .header("idempotency-key", Uuid::now_v7().to_string());
    let two = two.header("idempotency-key", Uuid::now_v7().to_string());
    problem(two.body("c").send().await.unwrap(), 400).await;
    let old = "01890000-0000-7000-8000-000000000000";
    let answer = problem(post(old.to_owned(), "c").await.unwrap(), 409).await;
    assert!(
        answer["detail"]
            .as_str()
            .unwrap()
            .contains("post again with a new key")
    );
    assert_eq!(system.messages().await, ["a"]);
}

#[tokio::test]
async fn uuids_of_one_facade_increase_with_each_answer() {
    let system = System::start().await;
    let mut last = Uuid::nil();
    for n in 0..500 {
        let uuid = system.store(&n.to_string()).await;
        assert!(uuid > last, "{uuid} after {last}");
        last = uuid;
    }
    let expected: Vec<String> = (0..500).map(|n| n.to_string()).collect();
    assert_eq!(system.messages().await, expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn acknowledged_message_is_in_every_get_that_begins_afterwards() {
    let system = Arc::new(System::start().await);
    let writers = (0..16).map(|writer| {
        let system = system.clone();
        tokio::spawn(async move {
            for n in 0..20 {
                let uuid = system.store(&format!("{writer}/{n}")).await;
                let before = Uuid::from_u128(uuid.as_u128() + 1);
                let read = system
                    .read(&format!("?before={before}&order=desc&limit=1"))
                    .await;
                assert_eq!(read.logging_service[0].uuid, uuid);
            }
        })
    });
    for writer in writers.collect::<Vec<_>>() {
        writer.await.unwrap();
    }
    let entries = system.read("").await.logging_service;
    let unique: HashSet<&str> = entries.iter().map(|entry| entry.msg.as_str()).collect();
    assert_eq!((entries.len(), unique.len()), (320, 320));
}

#[tokio::test]
async fn too_many_messages_at_once_get_a_503_quickly() {
    let hanging = serve(Router::new().route("/", axum::routing::post(std::future::pending::<()>)));
    let flags = [
        "--max-message",
        "1MiB",
        "--try-timeout",
        "30s",
        "--deadline",
        "30s",
    ];
    let system = Arc::new(System::with_stubs(vec![hanging], nobody(), &flags));
    let body = "x".repeat(1 << 20);
    let mut posts = tokio::task::JoinSet::new();
    for _ in 0..80 {
        let request = system.post().body(body.clone());
        posts.spawn(async move { request.send().await.unwrap() });
    }
    for _ in 0..80 - 64 {
        let response = posts.join_next().await.unwrap().unwrap();
        assert!(response.headers().contains_key("retry-after"));
        assert_eq!(problem(response, 503).await["stored"], "no");
    }
}

#[tokio::test]
async fn stalled_body_is_408_and_changes_nothing() {
    let system = System::start().await;
    for content_type in [TEXT, "application/x-ndjson"] {
        let (parts, body) = tokio::sync::mpsc::channel::<Result<&str, std::io::Error>>(1);
        parts.send(Ok("\"half")).await.unwrap();
        let body = stream::unfold(body, async |mut body| Some((body.recv().await?, body)));
        let request = system.post().header("content-type", content_type);
        let response = request.body(reqwest::Body::wrap_stream(body)).send();
        problem(response.await.unwrap(), 408).await;
        drop(parts);
    }
    assert_eq!(system.read("").await.count, 0);
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_body_makes_the_parser_panic(body: Vec<u8>, format in any_format()) {
        let _ = message(format, body.into(), 1000);
    }

    #[test]
    fn text_is_stored_unchanged(msg in "(?s).{1,200}") {
        let taken = message(BodyFormat::Text, msg.clone().into(), 1000).unwrap();
        prop_assert_eq!(taken, msg);
    }

    #[test]
    fn form_field_is_decoded_to_what_was_encoded(msg in "(?s).{1,200}") {
        let encoded: String = msg.bytes().map(|byte| format!("%{byte:02X}")).collect();
        let body = format!("msg={encoded}");
        prop_assert_eq!(message(BodyFormat::Form, body.into(), 1000).unwrap(), msg.clone());
        let encoded = url_encoded(&msg);
        let taken = message(BodyFormat::Form, format!("msg={encoded}").into(), 1000).unwrap();
        prop_assert_eq!(taken, msg);
    }

    #[test]
    fn json_is_decoded_to_what_was_encoded(msg in "(?s).{1,200}") {
        for body in [json!(msg), json!({"msg": msg})] {
            let taken = message(BodyFormat::Json, body.to_string().into(), 1000).unwrap();
            prop_assert_eq!(&taken, &msg);
        }
    }

    #[test]
    fn accepted_message_was_in_the_body(body in "(?s)[a-z&=+%0-9{}\":\\\\]{0,30}") {
        if let Ok(taken) = message(BodyFormat::Form, body.clone().into(), 1000) {
            let is_plain = !body.contains('=') && taken == body;
            let is_json = body.contains('{');
            prop_assert!(is_plain || is_json || !body.contains('&'), "{} became {}", body, taken);
        }
    }
}

fn any_format() -> impl Strategy<Value = BodyFormat> {
    prop_oneof![
        Just(BodyFormat::Untyped),
        Just(BodyFormat::Form),
        Just(BodyFormat::Json),
        Just(BodyFormat::Text)
    ]
}

fn url_encoded(msg: &str) -> String {
    reqwest::Url::parse_with_params("http://h/", [("msg", msg)])
        .unwrap()
        .query()
        .unwrap()
        .strip_prefix("msg=")
        .unwrap()
        .to_owned()
}

/// A GET returns each message byte for byte, for every format of the POST.
#[test]
fn posted_messages_come_back_byte_for_byte() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let system = runtime.block_on(System::start());
    let config = ProptestConfig {
        cases: 100,
        failure_persistence: None,
        ..ProptestConfig::default()
    };
    let mut runner = proptest::test_runner::TestRunner::new(config);
    runner
        .run(&"(?s).{1,200}", |msg| {
            runtime.block_on(async {
                let bodies = [
                    (TEXT, msg.clone()),
                    (FORM, format!("msg={}", url_encoded(&msg))),
                    (JSON, json!(msg).to_string()),
                    (JSON, json!({"msg": msg}).to_string()),
                ];
                for (content_type, body) in bodies {
                    let request = system.post().header("content-type", content_type);
                    let response = request.body(body).send().await.unwrap();
                    assert_eq!(response.status(), 200);
                    let stored: Entry = response.json().await.unwrap();
                    assert_eq!(stored.msg, msg);
                    let read = system.read("?order=desc&limit=1").await.logging_service;
                    assert_eq!(read, [stored]);
                }
            });
            Ok(())
        })
        .unwrap();
}
