//! Logs: text or JSON lines on standard output, filtered by `RUST_LOG`. [`crate::output`] writes them.

use std::env;
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

/// The modules that `RUST_LOG` can name, on each service, as all may share one environment.
const MODULES: [&str; 4] = ["common", "facade", "logging", "messages"];

const LEVELS: &str = "off, error, warn, info, debug, trace";

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
    let wanted = env::var_os("RUST_LOG").unwrap_or_default();
    let filter = filter(&wanted.to_string_lossy())?.with_target(TRACES, LevelFilter::OFF);
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

/// Parses `RUST_LOG`: the level of all lines and of modules, separated by commas. Nothing in it is ignored.
///
/// # Errors
/// A line for the operator with the wrong word and those that exist.
fn filter(text: &str) -> Result<Targets, String> {
    if text.is_empty() {
        return Ok(Targets::new().with_default(LevelFilter::INFO));
    }
    let mut filter = Targets::new();
    let mut named = Vec::new();
    for word in text.split(',').map(str::trim) {
        let (module, level) = match word.split_once('=') {
            Some((module, level)) => (Some(module), level),
            None => (None, word),
        };
        let is_known = module.is_none_or(|module| MODULES.contains(&module));
        let is_used = is_known && !level.is_empty() && !named.contains(&module);
        let parsed = level.parse().ok().filter(|_| is_used);
        let parsed: LevelFilter = parsed.ok_or_else(|| {
            format!(
                "RUST_LOG has {word:?}: write a level ({LEVELS}), and MODULE=LEVEL for some of {}, each \
                 once; for example warn,logging=info",
                MODULES.join(", ")
            )
        })?;
        filter = match module {
            Some(module) => filter.with_target(module, parsed),
            None => filter.with_default(parsed),
        };
        named.push(module);
    }
    Ok(filter)
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
