//! Logs: text or JSON lines on standard output, filtered by `RUST_LOG`. [`crate::output`] writes them.

use std::io::{self, IsTerminal};

use clap::ValueEnum;
use tracing::Subscriber;
use tracing_subscriber::Layer;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;

use crate::output::{self, LastLines, Lines};
use crate::traces::{Exporter, TRACES};

/// The format of log lines.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum LogFormat {
    /// For people: `time level request{…}: module: sentence field=value`.
    Text,
    /// For machines: one JSON object a line.
    Json,
}

/// What writes the log and sends the traces. Keep it until the end of `main`: dropping it writes and
/// sends what is still queued.
#[derive(Debug)]
pub struct Telemetry {
    // Dropped first, because it logs what it cannot send.
    _traces: Option<Exporter>,
    _log: LastLines,
}

/// Sets up the process's log, and its traces under the name `service`.
///
/// # Errors
/// A line for the person who started the service, when `RUST_LOG` or the collector's address cannot be
/// used.
pub fn init(service: &'static str, format: LogFormat) -> Result<Telemetry, String> {
    let filter = match std::env::var("RUST_LOG") {
        Ok(text) if !text.is_empty() => text
            .parse()
            .map_err(|error| format!("RUST_LOG is malformed: {error}; write for example info"))?,
        Ok(_) | Err(_) => Targets::new().with_default(LevelFilter::INFO),
    };
    let filter = filter.with_target(TRACES, LevelFilter::OFF);
    let traces = Exporter::start(service)?;
    let log = output::start().map_err(|error| format!("the log cannot be written: {error}"))?;
    let registry = tracing_subscriber::registry();
    match &traces {
        // One filter for everything costs less than one for each layer.
        None => registry.with(filter).with(lines(format)).init(),
        Some(traces) => {
            let spans = tracing_opentelemetry::layer().with_tracer(traces.tracer());
            let only_traces = Targets::new().with_target(TRACES, LevelFilter::DEBUG);
            registry
                .with(lines(format).with_filter(filter))
                .with(spans.with_filter(only_traces))
                .init();
        }
    }
    Ok(Telemetry {
        _log: log,
        _traces: traces,
    })
}

fn lines<S>(format: LogFormat) -> Box<dyn Layer<S> + Send + Sync>
where
    S: Subscriber + for<'span> LookupSpan<'span>,
{
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(Lines)
        .with_ansi(io::stdout().is_terminal());
    match format {
        LogFormat::Text => lines.boxed(),
        LogFormat::Json => lines.json().flatten_event(true).boxed(),
    }
}
