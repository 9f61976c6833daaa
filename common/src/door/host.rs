//! Refuses requests for a host that is not served. A page of another site can point its own name at this
//! machine (DNS rebinding) and is then of the service's origin, but its browser still sends that name.

use std::net::{IpAddr, SocketAddr};

use axum::extract::Request;
use axum::http::uri::Authority;
use axum::http::{StatusCode, Version, header};

use super::is_open;
use crate::problem::Problem;

/// The hosts that are served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Hosts {
    Any,
    /// Loopback, and these names in lowercase.
    Loopback {
        and: Vec<String>,
    },
}

impl Hosts {
    /// Those of a service that listens there and was told these names: on loopback a browser of this machine is
    /// the way in from outside, elsewhere the names are known only if they are given.
    pub(super) fn new(listen: SocketAddr, names: &[String]) -> Self {
        if names.is_empty() && !listen.ip().to_canonical().is_loopback() {
            return Self::Any;
        }
        let and = names.iter().map(|name| name.to_ascii_lowercase()).collect();
        Self::Loopback { and }
    }

    /// Of a question about health, any host is served: kubelets and balancers send the address.
    pub(super) fn check(&self, request: &Request) -> Result<(), Problem> {
        let mut hosts = request.headers().get_all(header::HOST).iter();
        let host = match (hosts.next(), hosts.next()) {
            (Some(host), None) => host,
            (None, _) if request.version() < Version::HTTP_11 => return Ok(()),
            _ => return Err(Problem::bad_request("send one host header")),
        };
        let host: Option<Authority> = host.to_str().ok().and_then(|text| text.parse().ok());
        let host = host.filter(|host| !host.as_str().contains('@'));
        let host = host.ok_or_else(|| Problem::bad_request("the host header is malformed"))?;
        // The target of a request to a proxy names a host too, and then counts.
        let target = request.uri().authority();
        let is_served = |host: &Authority| self.serve(host.host());
        if is_open(request) || (is_served(&host) && target.is_none_or(is_served)) {
            return Ok(());
        }
        Err(Problem::new(
            StatusCode::MISDIRECTED_REQUEST,
            "this host is not served here; use localhost, or start the facade with --host and the name",
        ))
    }

    fn serve(&self, host: &str) -> bool {
        match self {
            Self::Any => true,
            Self::Loopback { and } => {
                is_loopback(host) || and.iter().any(|name| host.eq_ignore_ascii_case(name))
            }
        }
    }
}

fn is_loopback(host: &str) -> bool {
    let address: Result<IpAddr, _> = host.trim_matches(['[', ']']).parse();
    host.eq_ignore_ascii_case("localhost") || address.is_ok_and(|address| address.is_loopback())
}

/// Parses a host name, or an address, of `--host`.
///
/// # Errors
/// A sentence that says what to write instead.
pub fn host_name(text: &str) -> Result<String, String> {
    let parsed: Option<Authority> = text.parse().ok();
    if parsed.is_some_and(|authority| authority.host() == text) {
        Ok(text.to_owned())
    } else {
        Err("write a name without scheme and port, for example log.example.org".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use axum::body::Body;

    use super::*;

    fn status(hosts: &Hosts, version: Version, headers: &[&str]) -> u16 {
        let request = Request::get("/").version(version);
        let request = headers
            .iter()
            .fold(request, |request, host| request.header(header::HOST, *host));
        let request = request.body(Body::empty()).expect("a request");
        match hosts.check(&request) {
            Ok(()) => 200,
            Err(problem) => axum::response::IntoResponse::into_response(problem)
                .status()
                .as_u16(),
        }
    }

    fn hosts(listen: &str, names: &[&str]) -> Hosts {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        Hosts::new(listen.parse().expect("an address"), &names)
    }

    #[test]
    fn only_served_hosts_pass() {
        let loopback = hosts("127.0.0.1:80", &[]);
        assert_eq!(hosts("[::1]:80", &[]), loopback);
        assert_eq!(hosts("[::ffff:127.0.0.1]:80", &[]), loopback);
        let everywhere = hosts("0.0.0.0:80", &[]);
        let named = hosts("0.0.0.0:80", &["log.example.org", "[fd00::1]"]);
        for (host, on_loopback, with_names) in [
            ("localhost", 200, 200),
            ("LOCALHOST:8086", 200, 200),
            ("127.0.0.1:1", 200, 200),
            ("127.255.0.9", 200, 200),
            ("[::1]:8086", 200, 200),
            ("log.example.org", 421, 200),
            ("LOG.example.org:8443", 421, 200),
            ("[fd00::1]:80", 421, 200),
            ("evil.example", 421, 421),
            ("localhost.evil.example", 421, 421),
            ("127.0.0.1.evil.example", 421, 421),
            ("127.1", 421, 421),
            ("0.0.0.0", 421, 421),
            ("localhost@evil.example", 400, 400),
            ("evil.example@localhost", 400, 400),
            ("a b", 400, 400),
            ("", 400, 400),
        ] {
            let version = Version::HTTP_11;
            assert_eq!(status(&loopback, version, &[host]), on_loopback, "{host}");
            assert_eq!(status(&named, version, &[host]), with_names, "{host}");
            let expected = if on_loopback == 400 { 400 } else { 200 };
            assert_eq!(status(&everywhere, version, &[host]), expected, "{host}");
        }
    }

    #[test]
    fn one_host_is_required() {
        let any = Hosts::Any;
        assert_eq!(status(&any, Version::HTTP_11, &[]), 400);
        assert_eq!(status(&any, Version::HTTP_10, &[]), 200);
        let two = ["localhost", "localhost"];
        assert_eq!(status(&any, Version::HTTP_11, &two), 400);
        assert_eq!(status(&any, Version::HTTP_10, &two), 400);
    }

    #[test]
    fn name_of_the_flag_has_no_port() {
        for right in ["localhost", "log.example.org", "10.0.0.1", "[fd00::1]"] {
            assert_eq!(host_name(right).as_deref(), Ok(right));
        }
        for wrong in ["", "a:80", "http://a", "a/b", "x@a", "a b"] {
            assert!(host_name(wrong).is_err(), "{wrong}");
        }
    }
}
