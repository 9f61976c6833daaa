//! Refuses requests that change something and come from a page of another origin. Browsers say where a
//! request comes from; other clients send neither header and are served.

use axum::extract::Request;
use axum::http::uri::Authority;
use axum::http::{HeaderMap, HeaderValue, StatusCode, Uri, header};

use crate::problem::Problem;

const SEC_FETCH_SITE: &str = "sec-fetch-site";

/// Without this, a page on any site could post messages through a browser that can reach the service, also
/// with the token that the browser keeps for it.
pub(super) fn check(request: &Request) -> Result<(), Problem> {
    if request.method().is_safe() || !is_from_another_origin(request.headers()) {
        return Ok(());
    }
    let detail = "a page of another origin sent this request; nothing was done: post from the \
                  facade's own page, or from a program that is not a browser";
    Err(Problem::new(StatusCode::FORBIDDEN, detail))
}

fn is_from_another_origin(headers: &HeaderMap) -> bool {
    let mut sites = headers.get_all(SEC_FETCH_SITE).iter();
    if sites.any(|site| site == "cross-site" || site == "same-site") {
        return true;
    }
    let mut origins = headers.get_all(header::ORIGIN).iter();
    origins.any(|origin| {
        let origin: Option<Uri> = origin.to_str().ok().and_then(|text| text.parse().ok());
        let origin = origin.and_then(|uri| uri.into_parts().authority);
        // `null`, the origin of a sandboxed page, is no host of a service.
        origin.is_none() || origin != headers.get(header::HOST).and_then(authority)
    })
}

fn authority(host: &HeaderValue) -> Option<Authority> {
    host.to_str().ok()?.parse().ok()
}
