//! The configuration in `--map redis://…`: the addresses of Redis servers, the login and TLS.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use common::files::Followed;
use redis::io::tcp::TcpSettings;
use redis::{Client, ConnectionAddr, ConnectionInfo, IntoConnectionInfo, RedisConnectionInfo};

const WRITE_INSTEAD: &str = "write redis://[USER[:PASSWORD]@]HOST:PORT[,HOST:PORT…]";

/// One Redis server, or some members of a Redis Cluster; discovery finds the others.
#[derive(Clone)]
pub struct RedisConfig {
    pub(super) seeds: Vec<Address>,
    pub(super) is_tls: bool,
    login: RedisConnectionInfo,
    /// From a file, for the connections to come.
    password: Option<Followed<String>>,
}

impl RedisConfig {
    /// The configuration with the password that its text does not have, as a file has it.
    ///
    /// # Errors
    /// When both or neither have one for its user, as a line for the operator.
    pub(in crate::map) fn with_password(
        mut self,
        password: Option<Followed<String>>,
    ) -> Result<Self, String> {
        let user = self.login.username();
        match (self.login.password(), &password) {
            (Some(_), Some(_)) => Err(
                "--map has a password, too; write it in --map-password-file alone".to_owned(),
            ),
            (None, None) if user.is_some() => Err(
                "the user in --map has no password; write redis://USER:PASSWORD@HOST:PORT, or name a \
                 --map-password-file"
                    .to_owned(),
            ),
            (_, _) => {
                self.password = password;
                Ok(self)
            }
        }
    }

    fn login(&self) -> RedisConnectionInfo {
        let login = self.login.clone().set_skip_set_lib_name();
        match &self.password {
            Some(password) => login.set_password(password.borrow().as_str()),
            None => login,
        }
    }

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
        let info = address.into_connection_info().map(|info| {
            info.set_redis_settings(self.login())
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
            Some((login, hosts)) => (parse_login(login)?, hosts),
            None => (RedisConnectionInfo::default(), rest),
        };
        let hosts = hosts.strip_suffix('/').unwrap_or(hosts);
        if hosts.contains('/') {
            return Err(format!("{WRITE_INSTEAD}; the map is always in database 0"));
        }
        let seeds: Result<_, _> = hosts.split(',').map(Address::from_str).collect();
        Ok(Self {
            seeds: seeds?,
            is_tls: scheme == "rediss",
            login,
            password: None,
        })
    }
}

/// Parses `USER:PASSWORD`, `:PASSWORD` or `USER`.
fn parse_login(login: &str) -> Result<RedisConnectionInfo, &'static str> {
    if login.is_empty() {
        return Err(WRITE_INSTEAD);
    }
    let info = if login.contains(['/', '?', '#']) {
        None
    } else {
        format!("redis://{login}@host").into_connection_info().ok()
    };
    let info = info.ok_or("the user and password must be UTF-8, percent-encoded")?;
    let parsed = info.redis_settings().clone();
    Ok(match parsed.password() {
        None if login.contains(':') => parsed.set_password(""),
        _ => parsed,
    })
}

/// Omits the password, as this is logged.
impl fmt::Debug for RedisConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.is_tls { "rediss://" } else { "redis://" })?;
        if self.password.is_some() || self.login.password().is_some() {
            write!(f, "{}:…@", self.login.username().unwrap_or_default())?;
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

impl Address {
    /// Each IP address has one spelling, so that equal ones are equal.
    pub(super) fn new(host: &str, port: u16) -> Self {
        let host = host.trim_start_matches('[').trim_end_matches(']');
        let ip = host.parse::<IpAddr>();
        let host = ip.map_or_else(|_| host.to_owned(), |ip| ip.to_canonical().to_string());
        Self { host, port }
    }

    /// Parses `HOST:PORT` as members write it: an IPv6 address has no brackets, and an unknown host is empty
    /// or `?`.
    pub(super) fn of_member(text: &str) -> Option<Self> {
        let (host, port) = text.rsplit_once(':')?;
        Some(Self::new(host.trim_matches('?'), port.parse().ok()?))
    }
}

impl FromStr for Address {
    type Err = String;

    /// Parses `HOST`, `HOST:PORT`, or an IPv6 address in brackets instead of the name.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let is_address = !text.contains(['@', '/', '?', '#']) && !text.ends_with(':');
        let info = is_address.then(|| format!("redis://{text}").into_connection_info());
        let info = info.and_then(Result::ok);
        match info.as_ref().map(ConnectionInfo::addr) {
            Some(ConnectionAddr::Tcp(host, port)) => Ok(Self::new(host, *port)),
            _ => Err(WRITE_INSTEAD.to_owned()),
        }
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
    use std::sync::Arc;

    use tokio::sync::watch;

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
        assert_eq!(servers.login.username(), Some("log:er"));
        assert_eq!(servers.login.password(), Some("p@ss/word"));
        assert_eq!(
            format!("{servers:?}"),
            "rediss://log:er:…@10.0.0.1:7001,[::1]:7002,[fe80::2]:6379"
        );
    }

    #[test]
    fn password_alone_is_the_default_users() {
        let servers: RedisConfig = "redis://:secret@host:1".parse().unwrap();
        assert_eq!(servers.login.username(), None);
        assert_eq!(servers.login.password(), Some("secret"));
        let servers: RedisConfig = "redis://user:@host".parse().unwrap();
        assert_eq!(servers.login.password(), Some(""));
    }

    #[test]
    fn user_has_one_password() {
        let with = |text: &str, password: Option<&str>| {
            let servers: RedisConfig = text.parse().unwrap();
            let file = password.map(|password| watch::channel(Arc::new(password.to_owned())).1);
            servers.with_password(file)
        };
        let login = with("redis://user@host", Some("p@ss")).unwrap().login();
        assert_eq!(login.username(), Some("user"));
        assert_eq!(login.password(), Some("p@ss"));
        let login = with("redis://host", Some("secret")).unwrap().login();
        assert_eq!((login.username(), login.password()), (None, Some("secret")));
        assert!(with("redis://host", None).is_ok());
        assert!(with("redis://user@host", None).is_err());
        assert!(with("redis://user:secret@host", Some("secret")).is_err());
    }

    #[test]
    fn other_forms_are_refused() {
        for text in [
            "redis:host",
            "redis://",
            "redis://host:",
            "redis://host:port",
            "redis://host:70000",
            "redis://host?db=1",
            "rediss://host#insecure",
            "redis://::1",
            "redis://[::1",
            "redis://::1:7001",
            "redis://@host",
            "redis://user:1/@host",
            "redis://user:%ff@host",
            "redis://host/1",
            "redis://host,,host",
        ] {
            assert!(text.parse::<RedisConfig>().is_err(), "{text}");
        }
    }
}
