//! Configuration that all services share, and the report of wrong configuration: one line on stderr.

use std::error::Error as _;
use std::fmt::Display;
use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::process::ExitCode;
use std::time::Duration;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Args, Command, Parser};
use ipnet::IpNet;

use crate::door::DoorConfig;
use crate::telemetry::LogFormat;

/// The exit code for wrong configuration, the same as that of `clap`.
const EXIT_CONFIGURATION: i32 = 2;

/// Shorter timeouts are rejected: nothing that asks another process or a disk could succeed.
const SHORTEST_TIMEOUT: Duration = Duration::from_millis(10);

/// Longer durations are rejected: added to a point in time they could overflow.
const LONGEST_DURATION: Duration = Duration::from_secs(365 * 24 * 60 * 60);

/// The default of `--idle-timeout`.
pub(crate) const IDLE_TIMEOUT: Duration = Duration::from_secs(75);

/// The default of `--max-connections`.
pub(crate) const MAX_CONNECTIONS: u32 = 1024;

/// Options of every service.
#[derive(Args, Clone, Debug)]
pub struct ServiceConfig {
    /// Time for requests in flight to finish after SIGINT, SIGTERM or SIGHUP; then their connections are cut
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = duration)]
    pub grace: Duration,

    /// After this time without a request a kept connection is closed; longer than the same of a proxy in front
    #[arg(long, default_value = "75s", value_parser = timeout)]
    pub idle_timeout: Duration,

    /// Listen beyond loopback although no token is asked for: something else guards the port
    #[arg(long, value_parser = switch)]
    pub open: bool,

    /// Format of the log on standard output. The variable RUST_LOG filters it: a level, or levels of modules,
    /// as in warn,logging=info (default: info)
    #[arg(long, value_name = "FORMAT", value_enum, default_value = "text")]
    pub log_format: LogFormat,

    /// Connections at once; a further one takes the place of an idle one, or gets a 503
    #[arg(long, value_name = "N", default_value_t = MAX_CONNECTIONS, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_connections: u32,

    /// Address, or network as 172.18.0.0/16, of proxies whose X-Forwarded-For (or Forwarded) header names the
    /// client; may be repeated
    #[arg(long, value_name = "ADDRESS", value_delimiter = ',', value_parser = network)]
    pub trusted_proxy: Vec<IpNet>,
}

/// Parses the command line and the environment. Ends the process with code 0 after `--help` and
/// `--version`, and with one line on stderr and code 2 when the configuration is wrong.
pub fn parse<C: Parser>() -> C {
    let parsed = with_environment(C::command())
        .try_get_matches()
        .and_then(|matches| C::from_arg_matches(&matches));
    parsed.unwrap_or_else(|error| match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => error.exit(),
        _ => fail(&in_one_line(&error, C::command().get_name())),
    })
}

/// Gives each option its matching environment variable: `--map` of `logging` is `LOGGING_MAP`.
fn with_environment(command: Command) -> Command {
    let service = command.get_name().to_owned();
    command.mut_args(|arg| {
        let variable = variable_of(&service, arg.get_id().as_str());
        arg.env(variable)
    })
}

/// The name of an option's environment variable.
fn variable_of(service: &str, option: &str) -> String {
    format!("{service}_{option}")
        .replace('-', "_")
        .to_uppercase()
}

/// Ends the process because of wrong configuration: one line on stderr, code 2.
pub fn fail(message: &str) -> ! {
    eprintln!("error: {message} (see --help)");
    std::process::exit(EXIT_CONFIGURATION)
}

/// Parses an address to listen on.
///
/// # Errors
/// A sentence that says what to write instead.
pub fn address(text: &str) -> Result<SocketAddr, String> {
    let error = "write an address and a port, for example 127.0.0.1:8080";
    text.parse().map_err(|_| error.to_owned())
}

/// Parses a network, or one address.
///
/// # Errors
/// A sentence that says what to write instead.
fn network(text: &str) -> Result<IpNet, String> {
    let address = text.parse().map(|ip: IpAddr| ip.to_canonical().into());
    address.or_else(|_| text.parse()).map_err(|_| {
        "write an address without a port, for example 127.0.0.1, or a network, for example 172.18.0.0/16"
            .to_owned()
    })
}

/// Parses a duration.
///
/// # Errors
/// A sentence that says what to write instead.
pub fn duration(text: &str) -> Result<Duration, String> {
    match humantime::parse_duration(text) {
        Ok(duration) if duration <= LONGEST_DURATION => Ok(duration),
        Ok(_) => Err("write a time of at most 365days".to_owned()),
        Err(_) => Err("write a time, for example 800ms or 10s".to_owned()),
    }
}

/// Parses a duration that is long enough for a timeout.
///
/// # Errors
/// A sentence that says what to write instead.
pub fn timeout(text: &str) -> Result<Duration, String> {
    match duration(text)? {
        timeout if timeout >= SHORTEST_TIMEOUT => Ok(timeout),
        _ => Err("write a time of at least 10ms, for example 800ms or 10s".to_owned()),
    }
}

/// Parses the environment variable of a flag that has no value.
///
/// # Errors
/// A sentence that says what to write instead.
fn switch(text: &str) -> Result<bool, String> {
    match &*text.to_lowercase() {
        "true" | "t" | "yes" | "y" | "on" | "1" => Ok(true),
        "false" | "f" | "no" | "n" | "off" | "0" => Ok(false),
        _ => Err("write true or false".to_owned()),
    }
}

/// Checks that a service which others can reach asks for a token, or is to be open. `door` is `None` for a
/// service that knows no tokens.
///
/// # Errors
/// A line for the operator with the ways out.
pub(crate) fn check_exposure(
    listen: SocketAddr,
    service: &ServiceConfig,
    door: Option<&DoorConfig>,
) -> Result<(), String> {
    let has_tokens = door.is_some_and(|door| door.token_file.is_some());
    if listen.ip().to_canonical().is_loopback() || has_tokens || service.open {
        return Ok(());
    }
    let ways_out = match door {
        Some(_) => "--token-file FILE to ask for a token, or --open",
        None => "a loopback address, or --open",
    };
    Err(format!(
        "on {listen} others could use this service without a token: give {ways_out} if something else \
         guards the port"
    ))
}

/// Binds a listening socket.
///
/// # Errors
/// A line for the operator that names the address and the next step.
pub fn bind(listen: SocketAddr) -> Result<TcpListener, String> {
    TcpListener::bind(listen)
        .map_err(|error| format!("cannot listen on {listen}: {}", explain_unbound(&error)))
}

fn explain_unbound(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::AddrInUse => {
            "another process listens there; stop it, or choose another port with --listen"
                .to_owned()
        }
        io::ErrorKind::PermissionDenied => {
            "an ordinary user may not listen on ports below 1024; choose a higher one with --listen"
                .to_owned()
        }
        io::ErrorKind::AddrNotAvailable => {
            "this machine does not have that address; choose another with --listen".to_owned()
        }
        _ => format!("{error}; choose another address with --listen"),
    }
}

/// The exit code for the result of a `main`. An error is printed as one line on stderr, code 1.
pub fn exit_code<E: Display>(result: Result<(), E>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// An error of `clap` as one line that names the option or variable. The login of a URL is left out,
/// because error lines end up in logs.
fn in_one_line(error: &clap::Error, service: &str) -> String {
    let context = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => Some(text.as_str()),
        _ => None,
    };
    let (Some(option), Some(value)) = (
        context(ContextKind::InvalidArg),
        context(ContextKind::InvalidValue),
    ) else {
        let message = error.to_string();
        let first = message.lines().next().unwrap_or_default();
        return quoted_without_login(first.strip_prefix("error: ").unwrap_or(first));
    };
    let option = option.split(' ').next().unwrap_or_default();
    let what = if is_on_command_line(option) {
        option.to_owned()
    } else {
        variable_of(service, option.trim_start_matches('-'))
    };
    if value.is_empty() {
        return format!("{what} needs a value");
    }
    let reason = match (error.source(), error.get(ContextKind::ValidValue)) {
        (Some(reason), _) => reason.to_string(),
        (None, Some(ContextValue::Strings(values))) => {
            format!("write one of {}", values.join(", "))
        }
        (None, _) if error.kind() == ErrorKind::TooManyValues => {
            format!("write {option} without a value")
        }
        (None, _) => "it is malformed".to_owned(),
    };
    let value = without_login(value);
    format!("invalid value {value:?} for {what}: {reason}")
}

/// Whether an option was given as an argument. If not, its value came from the environment.
fn is_on_command_line(option: &str) -> bool {
    std::env::args_os().any(|argument| {
        let argument = argument.to_string_lossy();
        let rest = argument.strip_prefix(option);
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('='))
    })
}

/// Replaces everything between the scheme of a malformed URL and its last `@`.
fn without_login(text: &str) -> String {
    const SCHEMES: [&str; 5] = ["http:", "https:", "lmdb:", "redis:", "rediss:"];
    let Some((login, host)) = text.rsplit_once('@') else {
        return text.to_owned();
    };
    let scheme = SCHEMES.iter().find(|scheme| login.starts_with(**scheme));
    let scheme = scheme.copied().unwrap_or_default();
    let slashes = if login[scheme.len()..].starts_with("//") {
        "//"
    } else {
        ""
    };
    format!("{scheme}{slashes}…@{host}")
}

/// Removes the login from the argument that a message of `clap` quotes.
fn quoted_without_login(message: &str) -> String {
    let quoted = message.find('\'').zip(message.rfind('\''));
    let Some((begin, end)) = quoted.filter(|(begin, end)| begin < end) else {
        return message.to_owned();
    };
    let (before, after) = (&message[..=begin], &message[end..]);
    let argument = &message[begin + 1..end];
    // A misspelt option is quoted with its value: `--mpa=redis:…`.
    let (option, value) = match argument.split_once('=') {
        Some((option, value)) if option.starts_with("--") => (format!("{option}="), value),
        _ => (String::new(), argument),
    };
    format!("{before}{option}{}{after}", without_login(value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn login_is_removed_from_malformed_urls() {
        for (text, shown) in [
            ("redis:user:secret@host", "redis:…@host"),
            ("redis://user:secret@host:port", "redis://…@host:port"),
            ("rediss://:sec@ret@host/1", "rediss://…@host/1"),
            ("redis:/user:secret@host", "redis:…@host"),
            ("redis//user:secret@host", "…@host"),
            ("user:secret@host", "…@host"),
            ("http://user:secret@host/'x", "http://…@host/'x"),
            ("REDIS://user:secret@host", "…@host"),
            ("lmdb:", "lmdb:"),
        ] {
            assert_eq!(without_login(text), shown);
        }
        let message = "unexpected argument '--mpa=redis:user:secret@host' found";
        let shown = "unexpected argument '--mpa=redis:…@host' found";
        assert_eq!(quoted_without_login(message), shown);
    }

    #[test]
    fn each_reason_why_a_port_cannot_be_bound_has_its_own_advice() {
        let explain = |kind: io::ErrorKind| explain_unbound(&kind.into());
        assert!(explain(io::ErrorKind::PermissionDenied).contains("below 1024"));
        assert!(explain(io::ErrorKind::AddrInUse).contains("another process"));
        assert!(explain(io::ErrorKind::AddrNotAvailable).contains("does not have that address"));
    }
}
