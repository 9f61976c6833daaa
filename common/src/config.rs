//! Configuration that all services share, and how wrong configuration is reported.

use std::fmt::Display;
use std::net::{SocketAddr, TcpListener};
use std::process::ExitCode;
use std::time::Duration;

use clap::error::ErrorKind;
use clap::{Args, Command, Parser};

use crate::healthcheck::Task;
use crate::telemetry::LogFormat;

/// The exit code for wrong configuration, as `clap` itself uses it.
const EXIT_CONFIGURATION: i32 = 2;

/// No span of time may be longer, so that none added to a point in time overflows.
const LONGEST_DURATION: Duration = Duration::from_secs(365 * 24 * 60 * 60);

/// Options of every service.
#[derive(Args, Clone, Debug)]
pub struct ServiceConfig {
    /// How long bodies in flight may take to finish after SIGINT or SIGTERM; what is left is cut
    #[arg(long, default_value = "10s", value_parser = duration)]
    pub grace: Duration,

    /// Format of the log on standard output; RUST_LOG sets what is logged (default: info)
    #[arg(long, value_enum, default_value = "text")]
    pub log_format: LogFormat,

    /// What to do instead of serving.
    #[command(subcommand)]
    pub task: Option<Task>,
}

/// Parses the command line and environment, or ends the process: `--help` and `--version` with
/// code 0, anything wrong with one line on stderr and code 2.
pub fn parse<C: Parser>() -> C {
    let parsed = with_environment(C::command())
        .try_get_matches()
        .and_then(|matches| C::from_arg_matches(&matches));
    parsed.unwrap_or_else(|error| match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => error.exit(),
        _ => fail(&in_one_line(&error.to_string())),
    })
}

/// Gives each option its twin in the environment: `--map` of `logging` is `LOGGING_MAP`.
pub fn with_environment(command: Command) -> Command {
    let service = command.get_name().to_owned();
    command.mut_args(|arg| {
        let variable = format!("{service}_{}", arg.get_id()).to_uppercase();
        arg.env(variable)
    })
}

/// Ends the process because its configuration is wrong: one line on stderr, code 2.
pub fn fail(message: &str) -> ! {
    eprintln!("error: {message} (see --help)");
    std::process::exit(EXIT_CONFIGURATION)
}

/// Reads an address to listen on.
///
/// # Errors
/// What to write instead.
pub fn address(text: &str) -> Result<SocketAddr, String> {
    let error = "write an address and a port, for example 127.0.0.1:8080";
    text.parse().map_err(|_| error.to_owned())
}

/// Reads a span of time.
///
/// # Errors
/// What to write instead.
pub fn duration(text: &str) -> Result<Duration, String> {
    match humantime::parse_duration(text) {
        Ok(duration) if duration <= LONGEST_DURATION => Ok(duration),
        Ok(_) => Err("write a time of at most 365days".to_owned()),
        Err(_) => Err("write a time, for example 800ms or 10s".to_owned()),
    }
}

/// Reads a span of time in which something must be possible.
///
/// # Errors
/// What to write instead.
pub fn timeout(text: &str) -> Result<Duration, String> {
    match duration(text)? {
        Duration::ZERO => Err("write a time above zero, for example 800ms or 10s".to_owned()),
        timeout => Ok(timeout),
    }
}

/// Binds a listening socket, with an error that names the address and what to do.
///
/// # Errors
/// A line for the person who started the service.
pub fn bind(listen: SocketAddr) -> Result<TcpListener, String> {
    TcpListener::bind(listen).map_err(|error| {
        format!(
            "cannot listen on {listen}: {error}; stop what uses it or choose another with --listen"
        )
    })
}

/// Turns what a service's `main` did into its exit code: an error is one line on stderr, code 1.
pub fn report<E: Display>(result: Result<(), E>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The first line of `clap`'s message, and the one that lists what may be written instead.
fn in_one_line(message: &str) -> String {
    let mut lines = message.lines().map(str::trim);
    let first = lines.next().unwrap_or_default();
    let first = without_login(first.strip_prefix("error: ").unwrap_or(first));
    match lines.find(|line| line.starts_with("[possible values")) {
        Some(values) => format!("{first} {values}"),
        None => first,
    }
}

/// A message of `clap` without the login of the URL that it quotes: error lines end up in logs.
fn without_login(message: &str) -> String {
    let end = message.find("' for '").unwrap_or(message.len());
    let (quoted, rest) = message.split_at(end);
    let url = quoted.split_once("://");
    let Some((scheme, (_, host))) =
        url.and_then(|(scheme, url)| Some((scheme, url.rsplit_once('@')?)))
    else {
        return message.to_owned();
    };
    format!("{scheme}://…@{host}{rest}")
}
