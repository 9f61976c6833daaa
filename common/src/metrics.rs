//! Metrics for Prometheus: the recorder of the process, what every service measures, `GET /metrics`.
//!
//! Each service describes its own metrics before it serves; `docs/observing.md` explains all of them.

use std::sync::LazyLock;
use std::time::{Duration, Instant};

use axum::extract::{MatchedPath, Request};
use axum::http::{HeaderMap, Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use metrics::{Histogram, counter, describe_gauge, histogram};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use metrics_process::Collector;
use metrics_util::MetricKindMask;
use parking_lot::RwLock;
use tracing::field::Empty;
use tracing::{Span, debug_span};

use crate::output;
use crate::traces::{TRACE_ID, TRACEPARENT, TRACES, continue_trace, trace_id};

/// The time until the head of an answer, by method, route and status.
const REQUEST_DURATION: &str = "http_request_duration_seconds";

/// Connections that the service has ended early, by the reason.
pub(crate) const CONNECTIONS_CUT: &str = "http_connections_cut_total";

/// Lines of the log that were dropped.
const LINES_DROPPED: &str = "log_lines_dropped_total";

/// Upper bounds of the buckets of times, in seconds. A time that ends at a deadline of 10 or 15 s is a little
/// longer than it, and must not count as 15 s or as endless.
const SECONDS: [f64; 18] = [
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 3.5, 5.5, 7.5, 10.5,
    15.5, 30.0,
];

/// Upper bounds of the buckets of batches and groups, in entries.
const ENTRIES: [f64; 11] = [
    1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 5000.0,
];

/// Each scrape sets every gauge anew; one that was set longer ago is dropped, as what it measured is gone. Not
/// at once, or two scrapes at a time would drop each other's.
const GONE: Duration = Duration::from_secs(2);

/// How often recorded times are sorted into buckets; until then each takes some bytes.
const UPKEEP: Duration = Duration::from_secs(1);

/// The recorder's counters are whole numbers, so the processor's seconds are recorded as a gauge.
const CPU_AS_GAUGE: &str = "# TYPE process_cpu_seconds_total gauge";
const CPU_AS_COUNTER: &str = "# TYPE process_cpu_seconds_total counter";

const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
const PROMETHEUS: &str = "text/plain; version=0.0.4; charset=utf-8";

static RECORDER: LazyLock<PrometheusHandle> = LazyLock::new(|| {
    let with_buckets = PrometheusBuilder::new()
        .idle_timeout(MetricKindMask::GAUGE, Some(GONE))
        .set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), &SECONDS)
        .and_then(|builder| {
            builder.set_buckets_for_metric(Matcher::Suffix("_entries".to_owned()), &ENTRIES)
        });
    let installed = with_buckets.and_then(PrometheusBuilder::install_recorder);
    installed.expect("the buckets are not empty and this is the only recorder")
});

/// Installs the recorder of this process. What is recorded before is lost, also through handles made
/// before. Must be called within a runtime, which keeps the recorder's memory bounded.
pub fn install() {
    LazyLock::force(&RECORDER);
    describe(&[
        (
            REQUEST_DURATION,
            "Time until the head of an answer, by method, route and status.",
        ),
        (
            CONNECTIONS_CUT,
            "Connections that were ended early, by the reason.",
        ),
        (
            LINES_DROPPED,
            "Lines of the log that were dropped because standard output was stuck.",
        ),
    ]);
    for reason in ["evicted", "too_many", "slow_reader"] {
        counter!(CONNECTIONS_CUT, "reason" => reason).increment(0);
    }
    Collector::default().describe();
    tokio::spawn(async {
        let mut ticks = tokio::time::interval(UPKEEP);
        loop {
            ticks.tick().await;
            RECORDER.run_upkeep();
        }
    });
}

/// Gives each metric, by its name, a sentence that a scrape shows. Its unit is in its name.
pub fn describe(metrics: &[(&'static str, &'static str)]) {
    for (name, sentence) in metrics {
        // The recorder keeps one sentence for a name and takes the kind from what is recorded.
        describe_gauge!(*name, *sentence);
    }
}

/// Shows the requests of a route with these statuses before the first one: an alert on an increase does not
/// see the first value of a series.
pub fn expect_requests(method: &'static str, route: &'static str, statuses: &[StatusCode]) {
    for status in statuses {
        let status = status.as_str().to_owned();
        let _ =
            histogram!(REQUEST_DURATION, "method" => method, "route" => route, "status" => status);
    }
}

/// The answer to `GET /metrics`: Prometheus's text format, or OpenMetrics if the request accepts it.
pub fn show(request: &HeaderMap) -> Response {
    Collector::default().collect();
    counter!(LINES_DROPPED).absolute(output::dropped_lines());
    let text = RECORDER.render().replacen(CPU_AS_GAUGE, CPU_AS_COUNTER, 1);
    let accepts = request.get_all(header::ACCEPT).iter();
    let mut accepts = accepts.filter_map(|accept| accept.to_str().ok());
    if accepts.any(|accept| accept.contains("application/openmetrics-text")) {
        ([(header::CONTENT_TYPE, OPEN_METRICS)], open_metrics(&text)).into_response()
    } else {
        ([(header::CONTENT_TYPE, PROMETHEUS)], text).into_response()
    }
}

/// Turns Prometheus's text into OpenMetrics: the family of a counter is named without `_total`, there
/// are no empty lines, and the end is marked.
fn open_metrics(prometheus: &str) -> String {
    let counters: Vec<&str> = prometheus
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE ")?.strip_suffix("_total counter"))
        .collect();
    let mut text = String::with_capacity(prometheus.len() + 8);
    for line in prometheus.lines().filter(|line| !line.is_empty()) {
        let family = line.strip_prefix("# ").and_then(|comment| {
            let (keyword, comment) = comment.split_once(' ')?;
            let (name, rest) = comment.split_once(' ')?;
            let name = name.strip_suffix("_total")?;
            counters
                .contains(&name)
                .then(|| format!("# {keyword} {name} {rest}"))
        });
        text.push_str(family.as_deref().unwrap_or(line));
        text.push('\n');
    }
    text.push_str("# EOF\n");
    text
}

/// The name of its route under which an answer is measured, as an extension of it: for requests that last much
/// longer than others of the route.
#[derive(Clone, Copy, Debug)]
pub struct RouteName(pub &'static str);

/// The measurement of a request, which is also a span of its trace. Labels are bounded: the route's template,
/// and of the methods and paths that no route has, one name for all.
pub(crate) struct Measurement {
    begin: Instant,
    method: &'static str,
    route: Option<MatchedPath>,
    /// What answers the request is in it.
    pub(crate) span: Span,
}

impl Measurement {
    pub(crate) fn begin(request: &Request) -> Self {
        let route = request.extensions().get::<MatchedPath>().cloned();
        let method = match *request.method() {
            Method::GET => "GET",
            Method::POST => "POST",
            Method::HEAD => "HEAD",
            _ => "other",
        };
        let route_name = name_of(route.as_ref());
        let span = debug_span!(
            target: TRACES,
            "request",
            "otel.kind" = "server",
            "otel.name" = format!("{method} {route_name}"),
            "http.request.method" = method,
            "http.route" = route_name,
            "http.response.status_code" = Empty,
        );
        let traceparent = request.headers().get(TRACEPARENT);
        continue_trace(&span, traceparent.and_then(|parent| parent.to_str().ok()));
        if let Some(id) = trace_id(&span) {
            Span::current().record(TRACE_ID, id);
        }
        Self {
            begin: Instant::now(),
            method,
            route,
            span,
        }
    }

    pub(crate) fn end(self, response: &Response, durations: &Durations) {
        let status = response.status();
        self.span
            .record("http.response.status_code", status.as_u16());
        let named = response.extensions().get::<RouteName>();
        let route = named.map_or_else(|| name_of(self.route.as_ref()), |named| named.0);
        let histogram = durations.histogram(self.method, route, status);
        histogram.record(self.begin.elapsed());
    }
}

/// The histograms of the requests so far, as the recorder makes nine allocations to find one.
#[derive(Default)]
pub(crate) struct Durations(RwLock<Vec<Labelled>>);

struct Labelled {
    method: &'static str,
    route: String,
    status: StatusCode,
    histogram: Histogram,
}

impl Durations {
    fn histogram(&self, method: &'static str, route: &str, status: StatusCode) -> Histogram {
        let is_it = |known: &&Labelled| {
            known.status == status && known.method == method && known.route == route
        };
        let known = self.0.read();
        if let Some(known) = known.iter().find(is_it) {
            return known.histogram.clone();
        }
        drop(known);
        let route = route.to_owned();
        let name = status.as_str().to_owned();
        let histogram = histogram!(
            REQUEST_DURATION, "method" => method, "route" => route.clone(), "status" => name
        );
        let mut known = self.0.write();
        known.push(Labelled {
            method,
            route,
            status,
            histogram: histogram.clone(),
        });
        histogram
    }
}

fn name_of(route: Option<&MatchedPath>) -> &str {
    route.map_or("other", MatchedPath::as_str)
}

#[cfg(test)]
mod tests {
    use super::open_metrics;

    #[test]
    fn open_metrics_names_the_family_of_a_counter_without_total() {
        let prometheus = "# HELP a_total All a.\n# TYPE a_total counter\na_total{b=\"c\"} 1\n\n\
                          # HELP d_total A gauge.\n# TYPE d_total gauge\nd_total 2\n\n";
        assert_eq!(
            open_metrics(prometheus),
            "# HELP a All a.\n# TYPE a counter\na_total{b=\"c\"} 1\n\
             # HELP d_total A gauge.\n# TYPE d_total gauge\nd_total 2\n# EOF\n"
        );
    }
}
