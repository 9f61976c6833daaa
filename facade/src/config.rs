//! The facade's flags.

use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::time::Duration;

use bytesize::ByteSize;
use clap::Parser;
use common::config::{self, ServiceConfig};
use common::door::{DoorConfig, host_name, rate};
use common::health::Task;
use reqwest::Url;

use crate::message::MESSAGE_SIZE_LIMIT;

/// The public service: stores each message through a random logging instance, and reads them back
#[derive(Clone, Debug, Parser)]
#[command(name = "facade", version)]
pub struct Config {
    /// Address to listen on
    #[arg(long, global = true, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:8086", value_parser = config::address)]
    pub listen: SocketAddr,

    /// URLs of logging instances, separated by commas; a host name counts as one per resolved address. Each
    /// may be named: NAME=http://HOST:PORT
    #[arg(
        long,
        value_name = "[NAME=]URL",
        value_delimiter = ',',
        value_parser = logging_url,
        default_value = "http://127.0.0.1:8082,http://127.0.0.1:8083,http://127.0.0.1:8084"
    )]
    pub logging: Vec<LoggingUrl>,

    /// Certificates, in PEM, of the authorities that vouch for logging instances with https:// URLs
    #[arg(long, value_name = "FILE")]
    pub logging_ca: Option<PathBuf>,

    /// File with the token that the logging instances ask for: the first that may do everything, in the
    /// form of --token-file. Changes count within a second
    #[arg(long, value_name = "FILE")]
    pub logging_token_file: Option<PathBuf>,

    /// URL of the messages service
    #[arg(long, value_name = "URL", value_parser = service_url, default_value = "http://127.0.0.1:8081")]
    pub messages: Url,

    /// Timeout of a request to one logging instance, after which another instance is asked. Longer than
    /// the instances' --store-timeout, and shorter than --deadline
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = config::timeout)]
    pub try_timeout: Duration,

    /// Timeout of a POST over all its tries; longer than a failover of the map takes
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = config::timeout)]
    pub deadline: Duration,

    /// Longest silence of a GET while it looks for an instance that can continue it
    #[arg(long, value_name = "TIME", default_value = "15s", value_parser = config::timeout)]
    pub read_deadline: Duration,

    /// Timeout of a request to the messages service
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = config::timeout)]
    pub messages_timeout: Duration,

    /// Largest message, at most 1MiB
    #[arg(long, value_name = "SIZE", default_value = "64KiB", value_parser = message_size)]
    pub max_message: ByteSize,

    /// GETs of the log served at once; excess ones get a 503
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u16).range(1..))]
    pub max_reads: u16,

    /// GETs that follow the log at once, besides those; excess ones get a 503
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u16).range(1..))]
    pub max_followers: u16,

    /// Host name under which browsers and clients reach this facade, besides those of loopback; may be
    /// repeated. A facade on loopback serves no other names; elsewhere it serves all until one is given
    #[arg(long, value_name = "NAME", value_delimiter = ',', value_parser = host_name)]
    pub host: Vec<String>,

    /// Requests of one client address a second, for example 50/s; excess ones get a 429 [default: no limit]
    #[arg(long, value_name = "N/s", value_parser = rate)]
    pub rate: Option<NonZeroU32>,

    #[command(flatten)]
    pub door: DoorConfig,

    #[command(flatten)]
    pub service: ServiceConfig,

    /// What to do instead of serving.
    #[command(subcommand)]
    pub task: Option<Task>,
}

/// A URL of `--logging`, with the name of its instances if it has one.
#[derive(Clone, Debug)]
pub struct LoggingUrl {
    pub name: Option<String>,
    pub url: Url,
}

fn logging_url(text: &str) -> Result<LoggingUrl, String> {
    let named = text
        .split_once('=')
        .filter(|(name, _)| !name.contains("://"));
    let (name, url) = named.map_or((None, text), |(name, url)| (Some(name.to_owned()), url));
    let is_of_name = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    if name
        .as_ref()
        .is_some_and(|name| name.is_empty() || !name.bytes().all(is_of_name))
    {
        return Err(
            "a name has letters, digits, '-', '_' and '.'; write NAME=http://HOST:PORT".to_owned(),
        );
    }
    let url = instance_url(url)?;
    Ok(LoggingUrl { name, url })
}

fn instance_url(text: &str) -> Result<Url, String> {
    match text.strip_prefix("https://") {
        None => service_url(text),
        Some(rest) => {
            service_url(&format!("http://{rest}"))?;
            Url::parse(text).map_err(|error| error.to_string())
        }
    }
}

fn service_url(text: &str) -> Result<Url, String> {
    const WRITE_INSTEAD: &str = "write http://HOST:PORT";
    if !text.contains("://") && !text.is_empty() && !text.contains('@') {
        return Err(format!(
            "the http:// is missing; {WRITE_INSTEAD}, here http://{text}"
        ));
    }
    let url = Url::parse(text).map_err(|error| format!("{error}; {WRITE_INSTEAD}"))?;
    let has_login = !url.username().is_empty() || url.password().is_some();
    let fault = match url.scheme() {
        "http" if has_login => "a login is not supported",
        "http" if url.path() != "/" || url.query().is_some() => "it has a path",
        "http" => return Ok(url),
        _ => "only http is supported",
    };
    Err(format!("{fault}; {WRITE_INSTEAD}"))
}

fn message_size(text: &str) -> Result<ByteSize, String> {
    let size: Option<ByteSize> = text.parse().ok();
    size.filter(|size| (1..=MESSAGE_SIZE_LIMIT).contains(&size.as_u64()))
        .ok_or_else(|| "write a size from 1B to 1MiB, for example 64KiB".to_owned())
}
