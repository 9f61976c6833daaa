//! Traces: the spans of a request in all services, sent to an OpenTelemetry collector (OTLP, protobuf over
//! HTTP) while `OTEL_EXPORTER_OTLP_ENDPOINT` is set. Without it no span is made.
//!
//! A span is made with `debug_span!(target: TRACES, …)`: only the collector sees this target, so that log
//! lines stay short. Between services the trace travels as W3C's `traceparent`: as a header of requests,
//! and as a field of each entry of a batch, because a batch has entries of many requests.

use std::collections::HashMap;
use std::time::Duration;

use opentelemetry::propagation::TextMapPropagator;
use opentelemetry::trace::{TraceContextExt, TracerProvider};
use opentelemetry_otlp::SpanExporter;
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{SdkTracer, SdkTracerProvider};
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt;

/// The target of all spans of traces.
pub const TRACES: &str = "traces";

/// The header, and the field of an entry, that carries a trace between services.
pub const TRACEPARENT: &str = "traceparent";

/// The field of log lines that has the id of the trace.
pub const TRACE_ID: &str = "trace_id";

/// The address of the collector, as OpenTelemetry names it.
const ENDPOINT: &str = "OTEL_EXPORTER_OTLP_ENDPOINT";

/// How long the last spans may take to be sent when the process ends.
const LAST_EXPORT: Duration = Duration::from_secs(2);

/// What sends the spans. Dropping it sends those that are left.
#[derive(Debug)]
pub(crate) struct Exporter(SdkTracerProvider);

impl Exporter {
    /// Starts to send the spans of `service`; `None` when no collector is set.
    ///
    /// # Errors
    /// When the collector's address cannot be used.
    pub(crate) fn start(service: &'static str) -> Result<Option<Self>, String> {
        if std::env::var_os(ENDPOINT).is_none_or(|endpoint| endpoint.is_empty()) {
            return Ok(None);
        }
        let exporter = SpanExporter::builder().with_http().build();
        let exporter = exporter.map_err(|error| {
            format!("{ENDPOINT} cannot be used: {error}; write for example http://localhost:4318")
        })?;
        let mut resource = Resource::builder();
        if std::env::var_os("OTEL_SERVICE_NAME").is_none() {
            resource = resource.with_service_name(service);
        }
        let provider = SdkTracerProvider::builder()
            .with_batch_exporter(exporter)
            .with_resource(resource.build())
            .build();
        Ok(Some(Self(provider)))
    }

    pub(crate) fn tracer(&self) -> SdkTracer {
        self.0.tracer(env!("CARGO_PKG_NAME"))
    }
}

impl Drop for Exporter {
    fn drop(&mut self) {
        // What cannot be sent is lost; the log has the reason.
        let _ = self.0.shutdown_with_timeout(LAST_EXPORT);
    }
}

/// Continues in `span` the trace that another service began. A value that is not W3C's begins a new one.
pub fn continue_trace(span: &Span, traceparent: Option<&str>) {
    if let Some(traceparent) = traceparent.filter(|_| !span.is_disabled()) {
        let carrier = HashMap::from([(TRACEPARENT.to_owned(), traceparent.to_owned())]);
        // Fails only for a span that has begun.
        let _ = span.set_parent(TraceContextPropagator::new().extract(&carrier));
    }
}

/// The `traceparent` for a request that is made in `span`; `None` when it is part of no trace.
pub fn traceparent(span: &Span) -> Option<String> {
    if span.is_disabled() {
        return None;
    }
    let mut carrier = HashMap::new();
    TraceContextPropagator::new().inject_context(&span.context(), &mut carrier);
    carrier.remove(TRACEPARENT)
}

/// The id of the span's trace, for log lines; `None` when it is part of no trace.
pub fn trace_id(span: &Span) -> Option<String> {
    if span.is_disabled() {
        return None;
    }
    let context = span.context();
    let id = context.span().span_context().trace_id();
    Some(id.to_string())
}
