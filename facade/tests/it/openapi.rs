//! The description of the API, held to the running system: its routes, its examples, and its page.

use std::collections::{BTreeMap, BTreeSet};

use axum::http::{HeaderMap, StatusCode};
use futures_util::{StreamExt, stream};
use reqwest::{Body, Method, RequestBuilder, Url};
use serde_json::{Map, Value};
use uuid::Uuid;

use crate::description::{assert_has_members, resolved};
use crate::system::{System, instances, nobody, problem};

const FORM: &str = "application/x-www-form-urlencoded";
const JSON: &str = "application/json";
const MULTIPART: &str = "multipart/form-data";
const NDJSON: &str = "application/x-ndjson";
const TEXT: &str = "text/plain";

async fn description(system: &System) -> Value {
    let response = system.get("/openapi.json").await;
    assert_eq!(response.status(), 200);
    assert_eq!(response.headers()["content-type"], JSON);
    let text = response.text().await.unwrap();
    for name in ["{VERSION", "{MAX"] {
        assert!(!text.contains(name), "{name}");
    }
    resolved(&text)
}

fn object(value: &Value) -> &Map<String, Value> {
    value.as_object().unwrap_or_else(|| panic!("{value}"))
}

/// The path of a request for a described path.
fn filled_in(path: &str) -> String {
    let path = path.replace("{uuid}", &Uuid::now_v7().to_string());
    path.replace("{file}", "start.js")
}

#[tokio::test]
async fn each_route_is_described_and_each_described_one_is_served() {
    let source = include_str!("../../src/router.rs");
    let routes = source.matches(".route(").count();
    assert_eq!(routes, 1, "a route beside the table");
    let system = System::start().await;
    let description = description(&system).await;
    assert!(description["openapi"].as_str().unwrap().starts_with("3.1."));
    let schemes = object(&description["components"]["securitySchemes"]);
    assert_eq!(schemes["bearer"]["scheme"], "bearer");
    assert_eq!(schemes["basic"]["scheme"], "basic");
    let paths = object(&description["paths"]);
    let described: BTreeSet<&str> = paths.keys().map(String::as_str).collect();
    let served = facade::routes().map(|(path, _)| path);
    assert_eq!(described, BTreeSet::from(served));
    for (path, operations) in paths {
        let url = format!("{}{}", system.url, filled_in(path));
        let refused = system
            .http
            .request(Method::PATCH, &url)
            .send()
            .await
            .unwrap();
        let allowed = refused.headers()["allow"].to_str().unwrap().to_owned();
        problem(refused, 405).await;
        let allowed: BTreeSet<String> = allowed.split(',').map(str::to_lowercase).collect();
        let mut methods: BTreeSet<String> = object(operations).keys().cloned().collect();
        methods.insert("head".to_owned());
        assert_eq!(allowed, methods, "{path}");
        for operation in object(operations).values() {
            for refusal in ["401", "421", "429"] {
                assert!(operation["responses"][refusal].is_object(), "{path}");
            }
        }

        let response = system.http.get(&url).send().await.unwrap();
        let responses = &operations["get"]["responses"];
        let described = &responses[response.status().as_str()];
        assert!(described.is_object(), "{path}: {}", response.status());
        let content = &described["content"][media_type(response.headers())];
        assert!(content.is_object(), "{path}");
        if media_type(response.headers()).ends_with("json") && path != "/openapi.json" {
            let body = response.json().await.unwrap();
            assert_has_members(&body, &[&content["schema"]]);
        }
    }
}

fn media_type(headers: &HeaderMap) -> &str {
    let content_type = headers["content-type"].to_str().unwrap();
    content_type.split(';').next().unwrap()
}

#[tokio::test]
async fn each_example_of_a_body_is_stored() {
    let system = System::start().await;
    let description = description(&system).await;
    let content = &description["paths"]["/"]["post"]["requestBody"]["content"];
    for (media_type, media) in object(content) {
        for (name, example) in object(&media["examples"]) {
            let value = &example["value"];
            let response = post_example(&system, media_type, value)
                .send()
                .await
                .unwrap();
            // One line of the example of an upload is wrong.
            let status = if media_type == NDJSON { 207 } else { 200 };
            assert_eq!(response.status(), status, "{media_type} {name}");
            let answer: Value = response.json().await.unwrap();
            if media_type == NDJSON {
                assert_eq!(answer["stored"], 2, "{answer}");
                continue;
            }
            assert_eq!(&answer["msg"], value.get("msg").unwrap_or(value));
        }
    }
}

/// A POST of an example: a value that is sent in the way of its media type.
fn post_example(system: &System, media_type: &str, value: &Value) -> RequestBuilder {
    let text = value.get("msg").unwrap_or(value).as_str().unwrap();
    let (content_type, body) = match media_type {
        FORM => {
            let url = Url::parse_with_params("http://h/", [("msg", text)]).unwrap();
            (FORM.to_owned(), url.query().unwrap().to_owned())
        }
        MULTIPART => {
            let field = "content-disposition: form-data; name=\"msg\"";
            let body = format!("--x\r\n{field}\r\n\r\n{text}\r\n--x--\r\n");
            (format!("{MULTIPART}; boundary=x"), body)
        }
        JSON => (JSON.to_owned(), value.to_string()),
        _ => (media_type.to_owned(), text.to_owned()),
    };
    system
        .post()
        .header("content-type", content_type)
        .body(body)
}

/// Asks for each example of an answer; one that nobody asks for is an error.
#[tokio::test]
async fn each_example_of_an_answer_is_one() {
    let system = System::start().await;
    let description = description(&system).await;
    let mut described = examples(&description);
    for Answer {
        key,
        status,
        headers,
        text,
    } in answers().await
    {
        let media = described.remove(&key);
        let (example, schema) = media.unwrap_or_else(|| panic!("{key} is not described"));
        let content_type = media_type(&headers);
        let answered = format!(" {} {content_type} ", status.as_str());
        assert!(key.contains(&answered), "{key}: {answered}");
        assert!(headers.contains_key("x-request-id"), "{key}");
        let is_unavailable = status == StatusCode::SERVICE_UNAVAILABLE;
        assert_eq!(headers.contains_key("retry-after"), is_unavailable, "{key}");
        let answer = match content_type {
            NDJSON | TEXT => Value::String(text),
            _ => serde_json::from_str(&text).unwrap(),
        };
        assert_eq!(comparable(&answer), comparable(&example), "{key}");
        assert_has_members(&answer, &[&schema]);
    }
    assert!(
        described.is_empty(),
        "never asked for: {:?}",
        described.keys()
    );
}

/// The examples of answers with their schemas, by `OPERATION STATUS MEDIA_TYPE NAME`.
fn examples(description: &Value) -> BTreeMap<String, (Value, Value)> {
    let mut examples = BTreeMap::new();
    for operations in object(&description["paths"]).values() {
        for operation in object(operations).values() {
            let id = operation["operationId"].as_str().unwrap();
            for (status, response) in object(&operation["responses"]) {
                let Some(content) = response["content"].as_object() else {
                    continue;
                };
                for (media_type, media) in content {
                    let Some(named) = media["examples"].as_object() else {
                        continue;
                    };
                    for (name, example) in named {
                        let key = format!("{id} {status} {media_type} {name}");
                        let with_schema = (example["value"].clone(), media["schema"].clone());
                        examples.insert(key, with_schema);
                    }
                }
            }
        }
    }
    examples
}

/// Without what differs from run to run: UUIDs and ports.
fn comparable(value: &Value) -> String {
    let text = value.to_string();
    let mut out = String::new();
    let mut rest = text.as_str();
    while let Some(first) = rest.chars().next() {
        if rest
            .get(..36)
            .is_some_and(|word| Uuid::try_parse(word).is_ok())
        {
            out.push_str("UUID");
            rest = &rest[36..];
        } else if let Some(port) = rest.strip_prefix("127.0.0.1:") {
            out.push_str("ADDRESS");
            rest = port.trim_start_matches(|character: char| character.is_ascii_digit());
        } else {
            out.push(first);
            rest = &rest[first.len_utf8()..];
        }
    }
    out
}

/// What a system answers that was asked for an example.
struct Answer {
    /// `OPERATION STATUS MEDIA_TYPE NAME` of the example.
    key: String,
    status: StatusCode,
    headers: HeaderMap,
    text: String,
}

async fn answers() -> Vec<Answer> {
    const PROBLEM: &str = "application/problem+json";
    let system = System::start().await;
    let alone = System::with_stubs(vec![nobody()], nobody(), &["--deadline", "200ms"]);
    let (logging, map) = instances(1).await;
    let without_messages = System::with_instances(logging, map, &[]);
    let stopping = System::start().await;
    stopping.stop.cancel();
    let keyed = |key: Uuid, body: &'static str| {
        let request = system.post().header("idempotency-key", key.to_string());
        request.body(body)
    };
    let upload = |request: RequestBuilder| request.header("content-type", NDJSON);
    let lines = "\"hello\"\n{\"msg\":\"still here\"}\nhello\n";
    let half = stream::iter([Ok::<_, std::io::Error>("half")]);
    let stalled = Body::wrap_stream(half.chain(stream::pending()));
    let old: Uuid = "01890000-0000-7000-8000-000000000000".parse().unwrap();
    let hour = 3_600_000 << 80;
    let future = Uuid::from_u128(Uuid::now_v7().as_u128() + hour);
    let large = "x".repeat((64 << 10) + 1);

    let mut answers = Vec::new();
    let mut ask = async |what: &str, request: RequestBuilder| {
        let response = request.send().await.unwrap();
        answers.push(Answer {
            key: what.to_owned(),
            status: response.status(),
            headers: response.headers().clone(),
            text: response.text().await.unwrap(),
        });
    };
    let post = |status: u16, name: &str| format!("post {status} {PROBLEM} {name}");
    ask(&post(400, "empty"), system.post()).await;
    ask(&post(400, "no_key"), keyed(Uuid::nil(), "hello")).await;
    ask(
        &post(400, "key_of_upload"),
        upload(keyed(Uuid::now_v7(), "\"hello\"")),
    )
    .await;
    let as_text = upload(system.post()).header("accept", TEXT);
    ask(&post(406, "text"), as_text.body("\"hello\"")).await;
    ask(&post(408, "stalled"), system.post().body(stalled)).await;
    ask(&post(409, "too_old"), keyed(old, "hello")).await;
    ask(&post(409, "in_the_future"), keyed(future, "hello")).await;
    ask(&post(413, "too_large"), system.post().body(large)).await;
    let html = system.post().header("content-type", "text/html");
    ask(&post(415, "html"), html.body("hello")).await;
    ask(&post(503, "no_instance"), alone.post().body("hello")).await;

    let key = Uuid::now_v7();
    ask("post 200 application/json message", keyed(key, "hello")).await;
    ask("post 200 application/json duplicate", keyed(key, "hello")).await;
    ask(&post(422, "used"), keyed(key, "another")).await;
    let next_key = Uuid::from_u128(key.as_u128() + 1);
    let second = keyed(next_key, "still here").send().await.unwrap();
    assert_eq!(second.status(), 200);
    without_messages.store("hello").await;
    without_messages.store("still here").await;

    let get = |path: &str| system.http.get(format!("{}{path}", system.url));
    let list = |status: u16, name: &str| format!("list {status} {PROBLEM} {name}");
    ask("list 200 application/json all", get("/")).await;
    ask("list 200 application/json limited", get("/?limit=1")).await;
    let still = "/?contains=still";
    ask("list 200 application/json found", get(still)).await;
    ask(
        "list 200 text/plain found",
        get(still).header("accept", TEXT),
    )
    .await;
    ask(&list(400, "contains"), get("/?contains=")).await;
    let url = &without_messages.url;
    ask("list 200 application/json stub_away", system.http.get(url)).await;
    ask(
        "list 200 application/x-ndjson all",
        get("/").header("accept", NDJSON),
    )
    .await;
    ask("list 200 text/plain all", get("/").header("accept", TEXT)).await;
    ask(&list(400, "limit"), get("/?limit=0")).await;
    ask(&list(400, "since"), get("/?since=yesterday")).await;
    ask(&list(406, "image"), get("/").header("accept", "image/png")).await;
    let get_alone = |path: &str| alone.http.get(format!("{}{path}", alone.url));
    ask(&list(503, "no_instance"), get_alone("/")).await;
    ask("show 200 application/json message", get(&format!("/{key}"))).await;
    let nothing = format!("/{}", Uuid::nil());
    ask(&format!("show 404 {PROBLEM} none"), get(&nothing)).await;
    ask(
        &format!("show 503 {PROBLEM} no_instance"),
        get_alone(&nothing),
    )
    .await;
    ask("livez 200 text/plain alive", get("/livez")).await;
    ask("readyz 200 application/json ready", get("/readyz")).await;
    ask(
        "readyz 200 application/json verbose",
        get("/readyz?verbose"),
    )
    .await;
    ask(
        &format!("readyz 400 {PROBLEM} twice"),
        get("/readyz?verbose&verbose"),
    )
    .await;
    let url = format!("{}/readyz", stopping.url);
    ask(
        &format!("readyz 503 {PROBLEM} stopping"),
        stopping.http.get(url),
    )
    .await;

    let upload_to = |accept: &str| upload(system.post()).header("accept", accept).body(lines);
    ask("post 207 application/json upload", upload_to(JSON)).await;
    let whole = upload(system.post()).body("\"hello\"\n\"still here\"\n");
    ask("post 200 application/json upload", whole).await;
    ask("post 200 application/x-ndjson results", upload_to(NDJSON)).await;
    answers
}

#[tokio::test]
async fn limits_of_the_facade_are_described() {
    let system = System::start_with(&["--max-message", "1000"]).await;
    let description = description(&system).await;
    assert_eq!(description["info"]["version"], env!("CARGO_PKG_VERSION"));
    let body = &description["paths"]["/"]["post"]["requestBody"];
    let text = &body["content"][TEXT]["schema"];
    assert_eq!(text["maxLength"], 1000);
    let words = body["description"].as_str().unwrap();
    assert!(words.starts_with("A message of 1 to 1000 bytes"), "{words}");
    let parameters = &description["paths"]["/"]["get"]["parameters"];
    let list = parameters.as_array().unwrap();
    let of = |name: &str| list.iter().find(|one| one["name"] == name).unwrap();
    assert_eq!(of("tail")["schema"]["maximum"], 10_000);
    assert_eq!(of("contains")["schema"]["maxLength"], 256);
}

/// Its policy has browsers hold the page to what this test reads: nothing comes from another host.
#[tokio::test]
async fn page_is_served_with_all_its_files_and_names_no_other_host() {
    let system = System::start().await;
    let description = description(&system).await;
    let parameters = &description["paths"]["/docs/{file}"]["get"]["parameters"];
    let file = parameters
        .as_array()
        .unwrap()
        .iter()
        .find(|one| one["name"] == "file");
    let described = &file.unwrap()["schema"]["enum"];
    let page = system.get("/docs").await;
    assert_eq!(media_type(page.headers()), "text/html");
    let policy = page.headers()["content-security-policy"].to_str().unwrap();
    for (directive, sources) in policy.split("; ").map(|one| one.split_once(' ').unwrap()) {
        for source in sources.split(' ') {
            let is_own = ["'none'", "'self'", "data:"].contains(&source)
                || (directive, source) == ("style-src", "'unsafe-inline'");
            assert!(is_own, "{directive} {source}");
        }
    }
    assert!(policy.contains("default-src 'none'"), "{policy}");

    let html = page.text().await.unwrap();
    let mut named = BTreeSet::new();
    for attribute in ["src=\"", "href=\""] {
        named.extend(
            html.split(attribute)
                .skip(1)
                .map(|rest| rest.split('"').next().unwrap()),
        );
    }
    assert!(named.remove("openapi.json"));
    let files: BTreeSet<&str> = named
        .iter()
        .map(|url| url.strip_prefix("docs/").unwrap())
        .collect();
    assert_eq!(serde_json::to_value(&files).unwrap(), *described);
    for file in files {
        let response = system.get(&format!("/docs/{file}")).await;
        assert_eq!(response.status(), 200, "{file}");
        let expected = match file.rsplit('.').next().unwrap() {
            "js" => "text/javascript",
            "css" => "text/css",
            _ => "image/png",
        };
        assert_eq!(media_type(response.headers()), expected);
        assert!(response.content_length().unwrap() > 100, "{file}");
    }
    for (file, word) in [
        ("swagger-ui-bundle.js", "SwaggerUIBundle"),
        ("swagger-ui.css", ".swagger-ui"),
    ] {
        let response = system.get(&format!("/docs/{file}")).await;
        assert_eq!(response.headers()["content-encoding"], "gzip");
        let compressed = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(&compressed, response.bytes().await.unwrap()).unwrap();
        let gzip = std::process::Command::new("gzip")
            .args(["--decompress", "--stdout"])
            .stdin(compressed.reopen().unwrap())
            .output()
            .unwrap();
        assert!(gzip.status.success(), "{file}: {gzip:?}");
        assert!(String::from_utf8(gzip.stdout).unwrap().contains(word));
    }
    let start = system.get("/docs/start.js").await.text().await.unwrap();
    assert!(start.contains("url: \"openapi.json\"") && start.contains("validatorUrl: null"));
    for own in [&html, &start] {
        assert!(!own.contains("://"), "{own}");
    }
    problem(system.get("/docs/index.html").await, 404).await;
}
