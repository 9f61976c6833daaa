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
        match error.is_connect() {
            true => Self::Unreachable(error.into()),
            false => Self::Lost(error.into()),
        }
    }
}
