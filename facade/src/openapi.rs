//! The description of the API in OpenAPI 3.1, which `GET /openapi.json` serves and `docs` shows.
//!
//! `router` adds each route together with its description, by [`at`]. The examples are answers of a
//! running system: `tests/it/openapi.rs` asks for each of them. `messages` has the operations on messages, `parts` what all
//! operations share.

mod messages;
mod parts;

use std::sync::{Arc, OnceLock};

use axum::Extension;
use axum::http::header;
use axum::response::IntoResponse;
use axum::routing::MethodRouter;
use bytes::Bytes;
use common::json;
use serde_json::json;
use utoipa::openapi::path::{PathItem, PathsBuilder};
use utoipa::openapi::schema::ObjectBuilder;
use utoipa::openapi::{Content, InfoBuilder, LicenseBuilder, OpenApi, OpenApiBuilder, Ref};
use utoipa_axum::router::UtoipaMethodRouter;

pub(crate) use self::messages::{message, messages};

use crate::docs;
use crate::openapi::parts::{
    FAULT, Problems, answer, components, content, example, get_only, header_of, in_path, operation,
    query, securities, string, unavailable,
};
use crate::state::App;

const JSON: &str = "application/json";
const NDJSON: &str = "application/x-ndjson";
const TEXT: &str = "text/plain";

/// UUIDs of the examples.
const FIRST: &str = "01a203b3-3bb1-7319-90b9-a08e864b5eeb";
const SECOND: &str = "01a203b3-3bd3-7041-bd9b-405a081b6b3b";

const ABOUT: &str = "A log of messages: posted one by one or many at once, stored through one of several \
logging instances, and read in the order of their UUIDs.

Errors are `application/problem+json` (RFC 9457) with a `detail` that says what to do. A path that is \
not listed here is a 404, a method that a path does not take is a 405 with the header `allow`. GET \
includes HEAD. A request that is not valid HTTP is a 400 without a body.

With `--token-file` all paths need a token except `/livez` and `/readyz` without a query.";

/// The description without its paths.
pub(crate) fn head() -> OpenApi {
    let info = InfoBuilder::new()
        .title("Message log")
        .version(env!("CARGO_PKG_VERSION"))
        .description(Some(ABOUT))
        .license(Some(
            LicenseBuilder::new()
                .name("MIT")
                .identifier(Some("MIT"))
                .build(),
        ));
    OpenApiBuilder::new()
        .info(info.build())
        .components(Some(components()))
        .security(Some(securities()))
        .build()
}

/// A route and its description.
pub(crate) fn at(
    path: &str,
    description: PathItem,
    methods: MethodRouter<Arc<App>>,
) -> UtoipaMethodRouter<Arc<App>> {
    let paths = PathsBuilder::new().path(path, description).build();
    (Vec::new(), paths, methods)
}

/// The description as it is served. It is complete only after all routes were added, of which the one
/// that serves it is one.
#[derive(Clone, Debug, Default)]
pub(crate) struct Served(Arc<OnceLock<Bytes>>);

impl Served {
    pub(crate) fn set(&self, description: &OpenApi) {
        let mut line = Vec::new();
        json::write_line(&mut line, description);
        self.0.get_or_init(|| line.into());
    }
}

/// `GET /openapi.json`
pub(crate) async fn show(Extension(served): Extension<Served>) -> impl IntoResponse {
    let description = served.0.get().cloned().unwrap_or_default();
    ([(header::CONTENT_TYPE, JSON)], description)
}

/// `/stats`
pub(crate) fn stats() -> PathItem {
    let get = operation(
        "stats",
        "Statistics",
        "A row for each member of the map with a total, one for each logging instance, and what this \
         facade did. More fields may be added.",
    );
    let stats =
        answer("The statistics.").content(JSON, Content::new(Some(Ref::from_schema_name("Stats"))));
    get_only(get.response("200", stats).problem(500, FAULT, []))
}

/// `/metrics`
pub(crate) fn metrics() -> PathItem {
    let numbers = answer("The metrics.")
        .content(TEXT, content(string(), []))
        .content("application/openmetrics-text", content(string(), []));
    let get = operation(
        "metrics",
        "Numbers for Prometheus",
        "In its text format or, for a request that accepts it, as OpenMetrics.",
    );
    get_only(get.response("200", numbers))
}

/// `/livez`
pub(crate) fn livez() -> PathItem {
    let alive = answer("It runs.").content(TEXT, content(string(), [("alive", json!("alive\n"))]));
    let get = operation(
        "livez",
        "Whether this facade runs",
        "It looks at nothing else.",
    );
    get_only(get.response("200", alive))
}

/// `/readyz`
pub(crate) fn readyz() -> PathItem {
    let get = operation(
        "readyz",
        "Whether this facade can serve",
        "Ready while at least one logging instance can read and store.",
    );
    let check = |name: &str, detail: &str| json!({"name": name, "ok": true, "detail": detail});
    let ready = answer("It can serve.").content(
        JSON,
        content(
            Ref::from_schema_name("Ready"),
            [
                ("ready", json!({"status": "ready"})),
                (
                    "verbose",
                    json!({"status": "ready", "checks": [
                        check("logging-1", "127.0.0.1:8082 is ready"),
                        check("logging-2", "127.0.0.1:8083 is ready"),
                        check("logging-3", "127.0.0.1:8084 is ready"),
                        check("map", "answers"),
                        check("messages", "answers"),
                    ]}),
                ),
            ],
        ),
    );
    let stopping = example(503, "this process is stopping; use another one");
    get_only(
        get.parameter(query(
            "verbose",
            "With any value: lists the checks of each instance and the messages service.",
            string(),
        ))
        .response("200", ready)
        .problem(
            400,
            "A query parameter is given twice.",
            [(
                "twice",
                "Failed to deserialize query string: duplicate field `verbose`",
            )],
        )
        .problem(500, FAULT, [])
        .response(
            "503",
            unavailable("It cannot serve, or is stopping.", [("stopping", stopping)]),
        ),
    )
}

/// `/openapi.json`
pub(crate) fn itself() -> PathItem {
    let get = operation("openapi", "This description", "");
    let object = ObjectBuilder::new().property("openapi", string().pattern(Some("^3\\.1\\.")));
    get_only(get.response(
        "200",
        answer("OpenAPI 3.1.").content(JSON, Content::new(Some(object.required("openapi")))),
    ))
}

/// `/docs`
pub(crate) fn docs() -> PathItem {
    let policy = header_of("The page may load from this facade only.", string());
    let page = answer("The page.")
        .header(header::CONTENT_SECURITY_POLICY.as_str(), policy)
        .content("text/html", Content::new(Some(string())));
    let get = operation(
        "docs",
        "This description as a page",
        "It needs no other host.",
    );
    get_only(get.response("200", page))
}

/// `/docs/{file}`
pub(crate) fn docs_file() -> PathItem {
    let get = operation("docs_file", "What the page consists of", "");
    let file = in_path(
        "file",
        "A file that the page names.",
        string().enum_values(Some(docs::FILES)),
    );
    let encoding = header_of(
        "Of Swagger UI's files.",
        string().enum_values(Some(["gzip"])),
    );
    let content = || Content::new(Some(string()));
    let bytes = answer("The file.")
        .header(header::CONTENT_ENCODING.as_str(), encoding)
        .content("text/javascript", content())
        .content("text/css", content())
        .content("image/png", Content::default());
    get_only(
        get.parameter(file)
            .response("200", bytes)
            .problem(404, "There is no such file.", []),
    )
}
