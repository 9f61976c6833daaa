//! Refuses requests that change something and come from a page of another origin. Browsers say where a
//! request comes from; other clients send neither header and are served.

use axum::extract::Request;
use axum::http::uri::{Authority, Scheme};
use axum::http::{HeaderMap, HeaderValue, StatusCode, Uri, header};

use crate::problem::Problem;

const SEC_FETCH_SITE: &str = "sec-fetch-site";

/// Without this, a page on any site could post messages through a browser that can reach the service, also
/// with the token that the browser keeps for it.
/// `scheme` is that of the service, if it is known.
pub(super) fn check(request: &Request, scheme: Option<&Scheme>) -> Result<(), Problem> {
    if request.method().is_safe() || !is_from_another_origin(request.headers(), scheme) {
        return Ok(());
    }
    let detail = "a page of another origin sent this request; nothing was done: post from the \
                  facade's own page, or from a program that is not a browser";
    Err(Problem::new(StatusCode::FORBIDDEN, detail))
}

/// A browser's own verdict counts before its `Origin`, as a proxy may have rewritten `Host`.
fn is_from_another_origin(headers: &HeaderMap, scheme: Option<&Scheme>) -> bool {
    let has_site = |sites: [&str; 2]| {
        let mut values = headers.get_all(SEC_FETCH_SITE).iter();
        values.any(|value| sites.iter().any(|site| value == site))
    };
    if has_site(["cross-site", "same-site"]) {
        return true;
    }
    let mut origins = headers.get_all(header::ORIGIN).iter();
    !has_site(["same-origin", "none"]) && origins.any(|origin| !is_own(origin, headers, scheme))
}

/// Whether an origin is that of the request's host. A service without TLS may be behind a proxy with TLS and
/// does not know the scheme; a `Host` without a port then has the default port of the origin's.
fn is_own(origin: &HeaderValue, headers: &HeaderMap, own: Option<&Scheme>) -> bool {
    let Some(origin) = parsed::<Uri>(origin) else {
        return false;
    };
    // `null`, the origin of a sandboxed page, has no scheme.
    let scheme = origin
        .scheme()
        .filter(|scheme| own.is_none_or(|own| own == *scheme));
    let default_port = match scheme.map(Scheme::as_str) {
        Some("http") => 80,
        Some("https") => 443,
        _ => return false,
    };
    let host = headers.get(header::HOST).and_then(parsed::<Authority>);
    let is_same = |host: Authority, origin: &Authority| {
        let port = |of: &Authority| of.port_u16().unwrap_or(default_port);
        host.host().eq_ignore_ascii_case(origin.host()) && port(&host) == port(origin)
    };
    host.zip(origin.authority())
        .is_some_and(|(host, origin)| is_same(host, origin))
}

fn parsed<T: std::str::FromStr>(value: &HeaderValue) -> Option<T> {
    value.to_str().ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn origin_is_compared_with_scheme_and_default_port() {
        for (host, origin, site, is_other) in [
            ("log.example.org", "https://log.example.org", "", false),
            ("log.example.org:443", "https://log.example.org", "", false),
            ("log.example.org", "https://LOG.example.org:443", "", false),
            ("log.example.org:80", "http://log.example.org", "", false),
            ("localhost:8086", "http://localhost:8086", "", false),
            ("log.example.org:443", "http://log.example.org", "", true),
            ("log.example.org:80", "https://log.example.org", "", true),
            ("log.example.org", "https://log.example.org:8443", "", true),
            ("log.example.org", "ftp://log.example.org", "", true),
            ("log.example.org", "https://example.org", "", true),
            ("log.example.org", "null", "", true),
            ("inner:8086", "https://h", "same-origin", false),
            ("inner:8086", "https://h", "none", false),
            ("inner:8086", "https://h", "same-site", true),
            ("inner:8086", "https://h", "unknown", true),
            ("h", "https://h", "cross-site", true),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(header::HOST, host.parse().expect("a value"));
            headers.insert(header::ORIGIN, origin.parse().expect("a value"));
            if !site.is_empty() {
                headers.insert(SEC_FETCH_SITE, site.parse().expect("a value"));
            }
            let found = is_from_another_origin(&headers, None);
            assert_eq!(found, is_other, "{host} {origin} {site}");
        }
        for (origin, is_other) in [("http://h", true), ("https://h", false)] {
            let mut headers = HeaderMap::new();
            headers.insert(header::HOST, HeaderValue::from_static("h"));
            headers.insert(header::ORIGIN, HeaderValue::from_static(origin));
            let found = is_from_another_origin(&headers, Some(&Scheme::HTTPS));
            assert_eq!(found, is_other, "{origin}");
        }
    }
}
