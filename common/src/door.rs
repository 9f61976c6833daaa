//! Who may come in: the checks of every request before a handler sees it. Connections, their number and
//! their timeouts are the subject of `serve`.

mod access;
mod host;
mod origin;
mod rate;
mod tokens;

use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::sync::Arc;

use axum::extract::Request;
use axum::http::HeaderValue;
use axum::http::uri::Scheme;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use clap::Args;

pub use self::access::Access;
use self::host::Hosts;
pub use self::host::host_name;
use self::rate::Rate;
pub use self::rate::rate;
use self::tokens::Tokens;
use crate::client::Client;
use crate::files::{Followed, follow};
use crate::problem::Problem;
use crate::tls::{Certificate, follow_certificate};

/// Options of the services that check tokens.
#[derive(Args, Clone, Debug, Default)]
pub struct DoorConfig {
    /// File with one token a line, of at least 16 characters, that requests must carry; the line
    /// `read TOKEN` is a token that may only GET; # begins a comment. Changes count within a second
    #[arg(long, global = true, value_name = "FILE")]
    pub token_file: Option<PathBuf>,

    /// Certificate and those of its issuers, in PEM: the service then speaks HTTPS only. Changes count
    /// within a second
    #[arg(long, global = true, value_name = "FILE")]
    pub tls_cert: Option<PathBuf>,

    /// Private key of --tls-cert, in PEM
    #[arg(long, global = true, value_name = "FILE")]
    pub tls_key: Option<PathBuf>,
}

impl DoorConfig {
    /// Whether the service speaks HTTPS.
    pub(crate) fn has_tls(&self) -> bool {
        self.tls_cert.is_some()
    }

    /// The certificate, if the service is to speak HTTPS.
    ///
    /// # Errors
    /// A line for the operator, when it cannot be read or is wrong.
    pub fn certificate(&self) -> Result<Option<Certificate>, String> {
        match (&self.tls_cert, &self.tls_key) {
            (None, None) => Ok(None),
            (Some(certificate), Some(key)) => {
                let followed = follow_certificate(certificate.clone(), key.clone());
                let named = followed.map_err(|error| format!("--tls-cert and --tls-key: {error}"));
                named.map(Some)
            }
            (Some(_), None) | (None, Some(_)) => {
                Err("--tls-cert and --tls-key go together; give both".to_owned())
            }
        }
    }
}

/// What a service checks of each request. The default lets everyone in.
#[derive(Clone, Debug)]
pub struct Door {
    hosts: Hosts,
    /// Of a service that speaks HTTPS; another one may be behind a proxy that does.
    scheme: Option<Scheme>,
    rate: Option<Arc<Rate>>,
    tokens: Option<Followed<Tokens>>,
}

impl Default for Door {
    fn default() -> Self {
        Self {
            hosts: Hosts::Any,
            scheme: None,
            rate: None,
            tokens: None,
        }
    }
}

impl Door {
    /// The door of a service that listens on `listen` and serves the hosts `names`.
    ///
    /// # Errors
    /// A line for the operator, when the tokens cannot be read.
    pub fn new(config: &DoorConfig, listen: SocketAddr, names: &[String]) -> Result<Self, String> {
        Ok(Self {
            hosts: Hosts::new(listen, names),
            scheme: config.has_tls().then_some(Scheme::HTTPS),
            rate: None,
            tokens: config.token_file.clone().map(follow_tokens).transpose()?,
        })
    }

    /// Limits the requests of each client address to so many a second, but not those for health.
    #[must_use]
    pub fn with_rate(self, per_second: Option<NonZeroU32>) -> Self {
        Self {
            rate: per_second.map(|rate| Arc::new(Rate::new(rate))),
            ..self
        }
    }

    /// Has a handler answer a request that may come in. A GET is refused or aborted when its token no longer
    /// allows it; the handler of another one finds its [`Access`] in the extensions.
    pub(crate) async fn answer(&self, mut request: Request, next: Next) -> Response {
        let access = match self.check(&request) {
            Ok(None) => return next.run(request).await,
            Ok(Some(access)) => access,
            Err(problem) => return problem.into_response(),
        };
        let is_safe = request.method().is_safe();
        request.extensions_mut().insert(access.clone());
        let response = next.run(request).await;
        if !is_safe {
            return response;
        }
        match access.check() {
            Ok(()) => access.guard(response),
            Err(problem) => problem.into_response(),
        }
    }

    /// Whether a request may come in, and by which token. The cheapest check comes first.
    ///
    /// # Errors
    /// The answer to one that may not.
    fn check(&self, request: &Request) -> Result<Option<Access>, Problem> {
        self.hosts.check(request)?;
        if let (Some(rate), false) = (&self.rate, is_open(request)) {
            rate.check(Client::of(request.extensions()))?;
        }
        origin::check(request, self.scheme.as_ref())?;
        match &self.tokens {
            Some(tokens) if !is_open(request) => Access::new(tokens, request).map(Some),
            _ => Ok(None),
        }
    }
}

/// Follows the tokens of `--token-file`.
///
/// # Errors
/// A line for the operator, when the file cannot be read or is wrong.
fn follow_tokens(file: PathBuf) -> Result<Followed<Tokens>, String> {
    let followed = follow(vec![file], |contents| Tokens::parse(&contents.concat()));
    followed.map_err(|error| format!("--token-file {error}"))
}

/// Follows the header that a client sends: the first token of a file that may do everything.
///
/// # Errors
/// A line for the operator, when the file cannot be read, is wrong, or has no such token.
pub fn follow_authorization(file: PathBuf) -> Result<Followed<HeaderValue>, String> {
    follow(vec![file], |contents| {
        Tokens::parse(&contents.concat())?.authorization()
    })
}

/// Whether a request asks only whether the service runs or is ready. The other answers of `/readyz` name
/// the services behind.
fn is_open(request: &Request) -> bool {
    matches!(request.uri().path(), "/livez" | "/readyz") && request.uri().query().is_none()
}
