//! Logs: text or JSON lines on standard output, filtered by `RUST_LOG`.
//!
//! A thread writes the lines, so that a slow terminal does not stall requests at once. While its queue is
//! full, requests that log wait: no line is dropped.

use std::io::{self, BufWriter, IsTerminal, Write};

use clap::ValueEnum;
use tracing::Subscriber;
use tracing_appender::non_blocking::{NonBlocking, NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::Layer;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;

use crate::escape::needs_escape;
use crate::traces::{Exporter, TRACES};

/// Lines that may wait for standard output. A line may contain a message, so the bound in bytes is this
/// number times the largest message.
const QUEUED_LINES: usize = 256;

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
    _log: WorkerGuard,
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
    let (writer, guard) = NonBlockingBuilder::default()
        .lossy(false)
        .buffered_lines_limit(QUEUED_LINES)
        .finish(Escaped(BufWriter::new(io::stdout())));
    let registry = tracing_subscriber::registry();
    match &traces {
        // One filter for everything costs less than one for each layer.
        None => registry.with(filter).with(lines(format, writer)).init(),
        Some(traces) => {
            let spans = tracing_opentelemetry::layer().with_tracer(traces.tracer());
            let only_traces = Targets::new().with_target(TRACES, LevelFilter::DEBUG);
            registry
                .with(lines(format, writer).with_filter(filter))
                .with(spans.with_filter(only_traces))
                .init();
        }
    }
    Ok(Telemetry {
        _log: guard,
        _traces: traces,
    })
}

fn lines<S>(format: LogFormat, writer: NonBlocking) -> Box<dyn Layer<S> + Send + Sync>
where
    S: Subscriber + for<'span> LookupSpan<'span>,
{
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(writer)
        .with_ansi(io::stdout().is_terminal());
    match format {
        LogFormat::Text => lines.boxed(),
        LogFormat::Json => lines.json().flatten_event(true).boxed(),
    }
}

/// Writes the control characters that JSON allows, such as U+009B, as JSON escapes; they occur only in
/// strings. Text lines have none left: their strings are escaped when they are formatted.
#[derive(Debug)]
struct Escaped<W>(W);

impl<W: Write> Write for Escaped<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // The other control characters of ASCII are the newline of the line and the colours.
        let is_escaped = |character: char| {
            character == '\u{7f}' || (!character.is_ascii() && needs_escape(character))
        };
        match std::str::from_utf8(bytes) {
            Ok(text) if text.contains(is_escaped) => {
                let mut escaped = String::with_capacity(text.len() + 16);
                for character in text.chars() {
                    if is_escaped(character) {
                        escaped.push_str(&format!("\\u{:04x}", u32::from(character)));
                    } else {
                        escaped.push(character);
                    }
                }
                self.0.write_all(escaped.as_bytes())?;
            }
            Ok(_) | Err(_) => self.0.write_all(bytes)?,
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}
