//! Which client a request comes from.

use std::convert::Infallible;
use std::net::{IpAddr, Ipv6Addr};

use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use axum::http::{Extensions, HeaderMap};
use ipnet::IpNet;

/// The address of a request's client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Client(pub IpAddr);

impl Client {
    /// The client of a request that [`crate::serve`] has received.
    pub fn of(request: &Extensions) -> Self {
        let local = Self(IpAddr::V6(Ipv6Addr::LOCALHOST));
        request.get().copied().unwrap_or(local)
    }

    /// The client behind `peer`, the other end of the connection. A trusted proxy's word is taken for the
    /// address that it got the request from: the last one of its `X-Forwarded-For`, or else of its
    /// `Forwarded`. Those before it are the client's word.
    pub(crate) fn behind(peer: IpAddr, headers: &HeaderMap, trusted_proxies: &[IpNet]) -> Self {
        if !is_trusted(peer, trusted_proxies) {
            return Self(peer);
        }
        let last = |name: &str| {
            let values = headers.get_all(name).iter().next_back()?.to_str().ok()?;
            Some(values.rsplit(',').next().unwrap_or(values).trim())
        };
        let forwarded_for = || {
            let element = last("forwarded")?;
            element.split(';').find_map(|pair| {
                let (name, value) = pair.split_once('=')?;
                let is_for = name.trim().eq_ignore_ascii_case("for");
                is_for.then(|| value.trim().trim_matches('"'))
            })
        };
        let address = last("x-forwarded-for").or_else(forwarded_for);
        Self(address.and_then(parse_address).unwrap_or(peer))
    }

    /// What counts as one client when permits are shared out; `None` for this machine, which may have all.
    pub(crate) fn sharer(self) -> Option<IpAddr> {
        (!self.0.is_loopback()).then(|| self.network())
    }

    /// The address, of IPv6 its /64: each member of such a network has as many addresses as it likes.
    pub(crate) fn network(self) -> IpAddr {
        match self.0.to_canonical() {
            IpAddr::V4(ip) => ip.into(),
            IpAddr::V6(ip) => Ipv6Addr::from_bits(ip.to_bits() & !u128::from(u64::MAX)).into(),
        }
    }
}

/// Whether the other end of a connection is a trusted proxy.
pub(crate) fn is_trusted(peer: IpAddr, trusted_proxies: &[IpNet]) -> bool {
    trusted_proxies
        .iter()
        .any(|network| network.contains(&peer))
}

impl<S: Sync> FromRequestParts<S> for Client {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, Infallible> {
        Ok(Self::of(&parts.extensions))
    }
}

/// An address, with or without a port: `192.0.2.1`, `192.0.2.1:80`, `2001:db8::1`, `[2001:db8::1]:80`.
fn parse_address(text: &str) -> Option<IpAddr> {
    let inside = text
        .strip_prefix('[')
        .and_then(|rest| rest.split_once(']'))
        .map(|(inside, _port)| inside);
    let without_port = || text.rsplit_once(':').map(|(address, _port)| address);
    let candidates = [Some(inside.unwrap_or(text)), without_port()];
    let mut parsed = candidates.into_iter().flatten().map(str::parse);
    let address: IpAddr = parsed.find_map(Result::ok)?;
    Some(address.to_canonical())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(peer: &str, headers: &[(&'static str, &'static str)]) -> String {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.append(*name, value.parse().expect("a value"));
        }
        let proxies = ["10.0.0.1/32", "172.18.0.0/16", "fd00::/8"];
        let proxies = proxies.map(|network| network.parse().expect("a network"));
        let peer = peer.parse().expect("an address");
        Client::behind(peer, &map, &proxies).0.to_string()
    }

    #[test]
    fn only_a_trusted_proxy_names_its_client_and_only_by_its_last_word() {
        let spoofed = [("x-forwarded-for", "192.0.2.1")];
        for stranger in ["10.0.0.2", "172.19.0.1", "2001:db8::9"] {
            assert_eq!(client(stranger, &spoofed), stranger);
        }
        for proxy in ["172.18.0.1", "172.18.255.9", "fd00::1"] {
            assert_eq!(client(proxy, &spoofed), "192.0.2.1");
        }
        assert_eq!(client("10.0.0.1", &[]), "10.0.0.1");
        assert_eq!(client("10.0.0.1", &[("x-forwarded-for", "x")]), "10.0.0.1");
        for (name, value, expected) in [
            ("x-forwarded-for", "192.0.2.9, 192.0.2.1", "192.0.2.1"),
            ("x-forwarded-for", "192.0.2.1:4711", "192.0.2.1"),
            ("x-forwarded-for", "2001:db8::1", "2001:db8::1"),
            (
                "forwarded",
                "for=192.0.2.9, for=192.0.2.1;proto=http",
                "192.0.2.1",
            ),
            (
                "forwarded",
                "proto=http;For=\"[2001:db8::1]:80\"",
                "2001:db8::1",
            ),
        ] {
            assert_eq!(
                client("10.0.0.1", &[(name, value)]),
                expected,
                "{name}: {value}"
            );
        }
        let twice = [
            ("x-forwarded-for", "192.0.2.9"),
            ("x-forwarded-for", "192.0.2.1"),
        ];
        assert_eq!(client("10.0.0.1", &twice), "192.0.2.1");
    }

    #[test]
    fn network_of_ipv6_is_one_client() {
        let sharer = |text: &str| Client(text.parse().expect("an address")).sharer();
        assert_eq!(sharer("127.0.0.9"), None);
        assert_eq!(sharer("::1"), None);
        assert_eq!(sharer("2001:db8::1"), sharer("2001:db8::2"));
        assert_ne!(sharer("2001:db8::1"), sharer("2001:db8:0:1::1"));
        assert_ne!(sharer("192.0.2.1"), sharer("192.0.2.2"));
    }
}
