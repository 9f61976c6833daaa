//! Traces: what a collector gets of a POST and a GET, from all services.

use std::process::Command;
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::Bytes;
use axum::routing::post;
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use prost::Message;
use testing::process::{LOOK_AGAIN, PATIENCE, Process, free_address};

use crate::processes::{binary, facade};
use crate::system::engine_under_test;

#[derive(Clone, Debug)]
struct Span {
    service: String,
    name: String,
    trace: String,
    id: String,
    parent: String,
}

/// A collector that keeps what it gets.
struct Collector {
    url: String,
    spans: Arc<Mutex<Vec<Span>>>,
}

impl Collector {
    async fn start() -> Self {
        let spans = Arc::new(Mutex::new(Vec::new()));
        let kept = spans.clone();
        let keep = async move |body: Bytes| kept.lock().unwrap().extend(decode(&body));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let router = Router::new().route("/v1/traces", post(keep));
        tokio::spawn(async move { axum::serve(listener, router).await });
        Self { url, spans }
    }

    /// Waits until the trace has this many spans, and returns them.
    async fn trace(&self, id: &str, spans: usize) -> Vec<Span> {
        let looking = async {
            loop {
                let found: Vec<Span> = {
                    let all = self.spans.lock().unwrap();
                    all.iter()
                        .filter(|span| span.trace == id)
                        .cloned()
                        .collect()
                };
                if found.len() >= spans {
                    return found;
                }
                tokio::time::sleep(LOOK_AGAIN).await;
            }
        };
        let found = tokio::time::timeout(PATIENCE, looking).await;
        found.unwrap_or_else(|_| panic!("{:#?}", self.spans.lock().unwrap()))
    }
}

fn decode(body: &[u8]) -> Vec<Span> {
    let request = ExportTraceServiceRequest::decode(body).unwrap();
    let mut spans = Vec::new();
    for resource in request.resource_spans {
        let attributes = resource.resource.unwrap().attributes;
        let name = attributes.into_iter().find(|one| one.key == "service.name");
        let Some(Value::StringValue(service)) = name.unwrap().value.unwrap().value else {
            panic!("the service's name is no string");
        };
        let found = resource
            .scope_spans
            .into_iter()
            .flat_map(|scope| scope.spans);
        spans.extend(found.map(|span| Span {
            service: service.clone(),
            name: span.name,
            trace: hex(&span.trace_id),
            id: hex(&span.span_id),
            parent: hex(&span.parent_span_id),
        }));
    }
    spans
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

const CALLER: &str = "00f067aa0ba902b7";

/// The value of `traceparent` of a caller, and the id of its trace.
fn caller(trace: u8) -> (String, String) {
    let id = format!("4bf92f3577b34da6a3ce929d0e0e47{trace:02x}");
    (format!("00-{id}-{CALLER}-01"), id)
}

/// Follows the spans from the caller's: each name is that of a child of the one before.
fn assert_chain(trace: &[Span], chain: &[(&str, &str)]) {
    let mut parent = CALLER.to_owned();
    for (service, name) in chain {
        let is_next =
            |span: &&Span| span.parent == parent && span.service == *service && span.name == *name;
        let next = trace.iter().find(is_next);
        let next = next.unwrap_or_else(|| panic!("no {service}: {name} in {trace:#?}"));
        parent.clone_from(&next.id);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn request_is_one_trace_over_all_services() {
    let collector = Collector::start().await;
    let traced = |mut command: Command| {
        command.env("OTEL_EXPORTER_OTLP_ENDPOINT", &collector.url);
        command.env("OTEL_BSP_SCHEDULE_DELAY", "50");
        Process::start(command, free_address())
    };
    let map = engine_under_test().empty_map();
    let messages = traced(Command::new(binary("messages")));
    let mut logging = Command::new(binary("logging"));
    logging.args(["--map", &map.location]);
    let logging = traced(logging);
    logging.wait_until_ready();
    let facade = traced(facade(&logging.url(), &messages.url(), &[]));
    let http = reqwest::Client::new();

    let (traceparent, id) = caller(1);
    let post = http.post(facade.url()).header("traceparent", &traceparent);
    assert_eq!(post.body("hello").send().await.unwrap().status(), 200);
    let trace = collector.trace(&id, 4).await;
    assert_eq!(trace.len(), 4, "{trace:#?}");
    assert_chain(
        &trace,
        &[
            ("facade", "POST /"),
            ("facade", "put on an instance"),
            ("logging", "put"),
            ("logging", "put into the map"),
        ],
    );
    facade.wait_for_line(|line| line.contains("answered") && line.contains(&id));
    logging.wait_for_line(|line| line.contains("entry acknowledged") && line.contains(&id));

    let (traceparent, id) = caller(2);
    let get = http.get(facade.url()).header("traceparent", &traceparent);
    let read = get.send().await.unwrap().text().await.unwrap();
    assert!(read.contains("hello"));
    let trace = collector.trace(&id, 5).await;
    assert_eq!(trace.len(), 5, "{trace:#?}");
    assert_chain(
        &trace,
        &[
            ("facade", "GET /"),
            ("facade", "read from an instance"),
            ("logging", "GET /"),
            ("logging", "read the map"),
        ],
    );
    assert_chain(&trace, &[("facade", "GET /"), ("messages", "GET /")]);
}

#[tokio::test(flavor = "multi_thread")]
async fn collector_that_is_away_harms_nothing() {
    let map = engine_under_test().empty_map();
    let mut logging = Command::new(binary("logging"));
    logging.args(["--map", &map.location]);
    logging.env(
        "OTEL_EXPORTER_OTLP_ENDPOINT",
        format!("http://{}", free_address()),
    );
    let logging = Process::start(logging, free_address());
    logging.wait_until_ready();
}
