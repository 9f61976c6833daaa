//! Errors of the services behind the facade, and whether the request may have been executed.

use std::error::Error;
use std::io;

use hyper_util::client::legacy;
use reqwest::StatusCode;

/// The source of an [`UpstreamError`].
pub type Cause = Box<dyn Error + Send + Sync>;

#[derive(Debug, thiserror::Error)]
pub enum UpstreamError {
    /// No connection: the request was certainly not executed.
    #[error("{}", describe_unreachable(.0))]
    Unreachable(#[source] Cause),
    #[error("did not answer in time")]
    TimedOut,
    /// The connection was lost before the answer was complete.
    #[error("closed the connection early")]
    Lost(#[source] Cause),
    /// The service answered with an error.
    #[error("answered {0}: {1}")]
    Status(StatusCode, String),
    /// The answer came from a proxy or another server at the address: the request may have been
    /// executed.
    #[error("gave an answer ({0}) that is not from a logging instance: {1}")]
    Unmarked(StatusCode, String),
    /// The instance refuses the facade itself, and did nothing.
    #[error("answered {0}: it does not take this facade's token; see --logging-token-file")]
    Unauthorized(StatusCode),
    /// The instance serves a different map than the facade.
    #[error("{0}")]
    OtherMap(String),
    #[error("gave an invalid answer: {0}")]
    Garbled(String),
}

/// Whether failed requests may have stored a message, from less to more doubt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum MaybeStored {
    /// Certainly not.
    No,
    Unknown,
}

impl MaybeStored {
    /// The value of `stored` in answers.
    pub fn word(self) -> &'static str {
        match self {
            Self::No => "no",
            Self::Unknown => "unknown",
        }
    }
}

impl UpstreamError {
    /// Whether the request may have been executed. Only a failed connection attempt or a marked
    /// refusal of the instance proves that it was not.
    pub fn maybe_stored(&self) -> MaybeStored {
        match self {
            Self::Unreachable(_) | Self::Unauthorized(_) => MaybeStored::No,
            Self::Status(..) if self.is_refusal() => MaybeStored::No,
            Self::Status(StatusCode::INSUFFICIENT_STORAGE, _) => MaybeStored::No,
            Self::Status(..)
            | Self::Unmarked(..)
            | Self::OtherMap(_)
            | Self::TimedOut
            | Self::Lost(_)
            | Self::Garbled(_) => MaybeStored::Unknown,
        }
    }

    /// Whether a healthy logging instance executed nothing: it is busy or rejects the request.
    pub fn is_refusal(&self) -> bool {
        matches!(self, Self::Status(status, _) if status.is_client_error() || status.as_u16() == 503)
    }

    /// Whether a healthy instance cannot read its map now, as during a failover.
    pub fn is_map_unavailable(&self) -> bool {
        matches!(self, Self::Status(status, _) if status.as_u16() == 503)
    }
}

/// What follows the name of a service that cannot be reached.
fn describe_unreachable(cause: &Cause) -> &'static str {
    let mut next: Option<&(dyn Error + 'static)> = Some(&**cause);
    while let Some(cause) = next {
        let kind = cause.downcast_ref::<io::Error>().map(io::Error::kind);
        if kind == Some(io::ErrorKind::ConnectionRefused) {
            return "refuses connections";
        }
        if cause.is::<rustls::Error>() {
            return "has no certificate that --logging-ca vouches for";
        }
        // The source of an I/O error is that of the error in it, which is skipped.
        let within = cause.downcast_ref().and_then(io::Error::get_ref);
        next = match within {
            Some(within) => Some(within),
            None => cause.source(),
        };
    }
    "cannot be reached"
}

/// What is wrong with the instances, each reason once: "all 3 logging instances refuse connections". A reason
/// follows the name of its instance; `total` is the number of instances.
pub(crate) fn say_once<'a>(
    reasons: impl IntoIterator<Item = (&'a str, String)>,
    total: usize,
) -> Vec<String> {
    let mut groups: Vec<(String, Vec<&str>)> = Vec::new();
    for (name, reason) in reasons {
        match groups.iter_mut().find(|(known, _)| *known == reason) {
            Some((_, names)) => names.push(name),
            None => groups.push((reason, vec![name])),
        }
    }
    let groups = groups.into_iter();
    groups
        .map(
            |(reason, names)| match (names.len(), reason.split_once(' ')) {
                (2.., Some((verb, rest))) => {
                    format!("{} {} {rest}", named(&names, total), plural(verb))
                }
                _ => format!("{} {reason}", named(&names, total)),
            },
        )
        .collect()
}

/// These instances of so many, for a sentence.
pub(crate) fn named(names: &[&str], total: usize) -> String {
    match names {
        _ if total > 2 && names.len() == total => format!("all {total} logging instances"),
        [first @ .., last] if !first.is_empty() => format!("{} and {last}", first.join(", ")),
        _ => names.concat(),
    }
}

/// The plural of the verb that begins a reason, if it is in the present.
fn plural(verb: &str) -> &str {
    match verb {
        "is" => "are",
        "has" => "have",
        other => other.strip_suffix('s').unwrap_or(other),
    }
}

impl From<reqwest::Error> for UpstreamError {
    fn from(error: reqwest::Error) -> Self {
        if error.is_connect() {
            Self::Unreachable(error.into())
        } else if error.is_timeout() {
            Self::TimedOut
        } else {
            Self::Lost(error.into())
        }
    }
}

impl From<legacy::Error> for UpstreamError {
    fn from(error: legacy::Error) -> Self {
        if error.is_connect() {
            Self::Unreachable(error.into())
        } else {
            Self::Lost(error.into())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_reasons_are_said_once() {
        let said = |reasons: &[(&'static str, &str)], total| {
            let reasons = reasons
                .iter()
                .map(|(name, reason)| (*name, (*reason).to_owned()));
            say_once(reasons, total).join("; ")
        };
        let refuses = "refuses connections";
        let all = [("a", refuses), ("b", refuses), ("c", refuses)];
        assert_eq!(said(&all, 3), "all 3 logging instances refuse connections");
        assert_eq!(said(&all[..2], 3), "a and b refuse connections");
        assert_eq!(said(&all[..2], 2), "a and b refuse connections");
        assert_eq!(said(&all[..1], 1), "a refuses connections");
        let mixed = [
            ("a", "is not ready: x"),
            ("b", refuses),
            ("c", "is not ready: x"),
        ];
        assert_eq!(
            said(&mixed, 3),
            "a and c are not ready: x; b refuses connections"
        );
        assert_eq!(
            said(
                &[
                    ("a", "did not answer in time"),
                    ("b", "did not answer in time")
                ],
                4
            ),
            "a and b did not answer in time"
        );
    }
}
