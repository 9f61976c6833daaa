//! Which requests an instance takes straight, without a facade in between.

use common::api::MARK;
use reqwest::header::{CONTENT_TYPE, HOST, ORIGIN};
use reqwest::{RequestBuilder, StatusCode};
use uuid::Uuid;

use crate::http::{Instance, json};

fn post(instance: &Instance) -> RequestBuilder {
    let request = instance.http.post(&instance.url);
    request.body(json(Uuid::now_v7(), "hello"))
}

/// A page can make a browser send such requests to an instance on the browser's own machine.
#[tokio::test]
async fn requests_of_pages_are_refused() {
    let instance = Instance::start();
    let json = "application/json";
    let own = instance.url.clone();
    for (header, value, status) in [
        ("sec-fetch-site", "cross-site", 403),
        ("sec-fetch-site", "same-site", 403),
        ("sec-fetch-site", "same-origin", 200),
        ("sec-fetch-site", "none", 200),
        (ORIGIN.as_str(), "https://evil.example", 403),
        (ORIGIN.as_str(), "null", 403),
        (ORIGIN.as_str(), own.as_str(), 200),
        (HOST.as_str(), "evil.example", 421),
    ] {
        let host = instance.url.strip_prefix("http://").unwrap();
        let request = post(&instance).header(CONTENT_TYPE, json);
        let request = match header {
            "host" => request.header(HOST, value),
            _ => request.header(HOST, host).header(header, value),
        };
        let response = request.send().await.unwrap();
        assert_eq!(response.status(), status, "{header}: {value}");
        assert!(response.headers().contains_key(MARK));
    }
    let read = instance
        .http
        .get(&instance.url)
        .header(HOST, "evil.example");
    assert_eq!(read.send().await.unwrap().status(), 421);
    assert!(instance.text("/").await.ends_with("{\"count\":3}\n"));
    for path in ["/livez", "/readyz"] {
        let health = instance.http.get(format!("{}{path}", instance.url));
        let health = health.header(HOST, "evil.example").send().await.unwrap();
        assert_eq!(health.status(), 200);
    }
}

/// The types of forms and of plain text are those that a page can send without asking.
#[tokio::test]
async fn only_json_is_taken() {
    let instance = Instance::start();
    let unsupported = StatusCode::UNSUPPORTED_MEDIA_TYPE;
    for content_type in [
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "application/jsonp",
        "",
    ] {
        let request = post(&instance).header(CONTENT_TYPE, content_type);
        let response = request.send().await.unwrap();
        assert_eq!(response.status(), unsupported, "{content_type}");
        assert_eq!(response.headers()[CONTENT_TYPE], "application/problem+json");
    }
    let without = post(&instance).send().await.unwrap();
    assert_eq!(without.status(), unsupported);
    for content_type in ["application/json", "Application/JSON; charset=UTF-8"] {
        let request = post(&instance).header(CONTENT_TYPE, content_type);
        assert_eq!(request.send().await.unwrap().status(), 200);
    }
    assert!(instance.text("/").await.ends_with("{\"count\":2}\n"));
}
