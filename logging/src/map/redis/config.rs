//! The configuration in `--map redis://…`: the addresses of Redis servers, the login and TLS.

use std::fmt;
use std::str::FromStr;

use percent_encoding::percent_decode_str;
use redis::io::tcp::TcpSettings;
use redis::{Client, ConnectionAddr, IntoConnectionInfo, RedisConnectionInfo};

const DEFAULT_PORT: u16 = 6379;

const WRITE_INSTEAD: &str = "write redis://[USER:PASSWORD@]HOST:PORT[,HOST:PORT…]";

/// One Redis server, or some members of a Redis Cluster; discovery finds the others.
#[derive(Clone, PartialEq, Eq)]
pub struct RedisConfig {
    pub(super) seeds: Vec<Address>,
    pub(super) is_tls: bool,
    user: Option<String>,
    password: Option<String>,
}

impl RedisConfig {
    /// A client for a server, which does not connect yet.
    pub(super) fn client(&self, address: &Address) -> Client {
        let Address { host, port } = address.clone();
        let address = if self.is_tls {
            ConnectionAddr::TcpTls {
                host,
                port,
                insecure: false,
                tls_params: None,
            }
        } else {
            ConnectionAddr::Tcp(host, port)
        };
        let mut settings = RedisConnectionInfo::default().set_skip_set_lib_name();
        if let Some(user) = &self.user {
            settings = settings.set_username(user);
        }
        if let Some(password) = &self.password {
            settings = settings.set_password(password);
        }
        let info = address.into_connection_info().map(|info| {
            info.set_redis_settings(settings)
                .set_tcp_settings(TcpSettings::default().set_nodelay(true))
        });
        let client = info.and_then(Client::open);
        client.expect("a parsed address always makes a client")
    }
}

impl FromStr for RedisConfig {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (scheme, rest) = text.split_once("://").ok_or(WRITE_INSTEAD)?;
        let (login, hosts) = match rest.rsplit_once('@') {
            Some((login, hosts)) => (Some(login), hosts),
            None => (None, rest),
        };
        let hosts = hosts.strip_suffix('/').unwrap_or(hosts);
        if hosts.contains('/') {
            return Err(format!("{WRITE_INSTEAD}; the map is always in database 0"));
        }
        let (user, password) = match login {
            None => (None, None),
            Some(login) => {
                let (user, password) = login.split_once(':').ok_or(WRITE_INSTEAD)?;
                let user = (!user.is_empty()).then(|| decoded(user)).transpose()?;
                (user, Some(decoded(password)?))
            }
        };
        let seeds: Result<_, _> = hosts.split(',').map(Address::from_str).collect();
        Ok(Self {
            seeds: seeds?,
            is_tls: scheme == "rediss",
            user,
            password,
        })
    }
}

fn decoded(text: &str) -> Result<String, String> {
    let decoded = percent_decode_str(text).decode_utf8();
    let decoded = decoded.map_err(|_| "the user and password must be UTF-8, percent-encoded")?;
    Ok(decoded.into_owned())
}

/// Omits the password, as this is logged.
impl fmt::Debug for RedisConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.is_tls { "rediss://" } else { "redis://" })?;
        if self.password.is_some() {
            write!(f, "{}:…@", self.user.as_deref().unwrap_or_default())?;
        }
        let seeds: Vec<String> = self.seeds.iter().map(Address::to_string).collect();
        f.write_str(&seeds.join(","))
    }
}

/// The address of a server.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Address {
    pub(super) host: String,
    pub(super) port: u16,
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let is_bare_ipv6 = text.starts_with('[') && text.ends_with(']');
        let (host, port) = match text.rsplit_once(':') {
            Some((host, port)) if !is_bare_ipv6 => (host, port.parse().map_err(|_| WRITE_INSTEAD)?),
            _ => (text, DEFAULT_PORT),
        };
        let in_brackets = host
            .strip_prefix('[')
            .and_then(|host| host.strip_suffix(']'));
        let host = in_brackets.unwrap_or(host);
        if host.is_empty() || (in_brackets.is_none() && host.contains(':')) {
            return Err(WRITE_INSTEAD.to_owned());
        }
        Ok(Self {
            host: host.to_owned(),
            port,
        })
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { host, port } = self;
        if host.contains(':') {
            write!(f, "[{host}]:{port}")
        } else {
            write!(f, "{host}:{port}")
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn one_server_and_its_defaults() {
        let servers: RedisConfig = "redis://cache".parse().unwrap();
        assert_eq!(format!("{servers:?}"), "redis://cache:6379");
        assert!(!servers.is_tls);
    }

    #[test]
    fn members_with_a_login_that_is_never_shown() {
        let text = "rediss://log%3Aer:p%40ss%2Fword@10.0.0.1:7001,[::1]:7002,[fe80::2]/";
        let servers: RedisConfig = text.parse().unwrap();
        assert!(servers.is_tls);
        assert_eq!(servers.user.as_deref(), Some("log:er"));
        assert_eq!(servers.password.as_deref(), Some("p@ss/word"));
        assert_eq!(
            format!("{servers:?}"),
            "rediss://log:er:…@10.0.0.1:7001,[::1]:7002,[fe80::2]:6379"
        );
    }

    #[test]
    fn password_alone_is_the_default_users() {
        let servers: RedisConfig = "redis://:secret@host:1".parse().unwrap();
        assert_eq!(servers.user, None);
        assert_eq!(servers.password.as_deref(), Some("secret"));
    }

    #[test]
    fn other_forms_are_refused() {
        for text in [
            "redis:host",
            "redis://",
            "redis://host:port",
            "redis://::1",
            "redis://user@host",
            "redis://host/1",
            "redis://host,,host",
        ] {
            assert!(text.parse::<RedisConfig>().is_err(), "{text}");
        }
    }
}
