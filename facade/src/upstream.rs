//! Why a service behind the facade gave no usable answer, and whether the request may have been executed.

use std::error::Error;

use hyper_util::client::legacy;
use reqwest::StatusCode;

/// What lies behind an [`UpstreamError`], for the log.
pub type Cause = Box<dyn Error + Send + Sync>;

/// Why a service behind the facade gave no usable answer.
#[derive(Debug, thiserror::Error)]
pub enum UpstreamError {
    /// No connection: the request was certainly not executed.
    #[error("cannot be reached")]
    Unreachable(#[source] Cause),
    /// No complete answer in time.
    #[error("did not answer in time")]
    TimedOut,
    /// The connection was lost before the answer was complete.
    #[error("broke the connection off")]
    Lost(#[source] Cause),
    /// The service itself answered that it does not do this.
    #[error("answered {0}: {1}")]
    Status(StatusCode, String),
    /// The answer came from something else: a proxy in between, or another server at the address.
    /// The request may have been executed.
    #[error("gave an answer ({0}) that is not a logging instance's: {1}")]
    Unmarked(StatusCode, String),
    /// The instance serves another map than the facade.
    #[error("{0}")]
    OtherMap(String),
    /// Its answer is not in the form that was agreed on.
    #[error("gave an answer that cannot be read: {0}")]
    Garbled(String),
}

/// What is known about a request that failed, or a message after several, from less doubt to more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum MaybeStored {
    /// It was certainly not executed.
    No,
    /// It may have been executed.
    Unknown,
}

impl MaybeStored {
    /// The word for it in answers.
    pub fn word(self) -> &'static str {
        match self {
            Self::No => "no",
            Self::Unknown => "unknown",
        }
    }
}

impl UpstreamError {
    /// Whether the request may have been executed. Only a connection that was refused and the
    /// instance's own word, with its mark, prove that it was not.
    pub fn maybe_stored(&self) -> MaybeStored {
        match self {
            Self::Unreachable(_) => MaybeStored::No,
            Self::Status(..) if self.is_refusal() => MaybeStored::No,
            Self::Status(..)
            | Self::Unmarked(..)
            | Self::OtherMap(_)
            | Self::TimedOut
            | Self::Lost(_)
            | Self::Garbled(_) => MaybeStored::Unknown,
        }
    }

    /// Whether a logging instance itself says that it executed nothing: it is busy, or it does not
    /// take such a request. Such an instance is well.
    pub fn is_refusal(&self) -> bool {
        matches!(self, Self::Status(status, _) if status.is_client_error() || status.as_u16() == 503)
    }

    /// Whether an instance serves, but its map cannot be read now, as while a failover lasts.
    pub fn is_map_unavailable(&self) -> bool {
        matches!(self, Self::Status(status, _) if status.as_u16() == 503)
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
        match error.is_connect() {
            true => Self::Unreachable(error.into()),
            false => Self::Lost(error.into()),
        }
    }
}
