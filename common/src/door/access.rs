//! What a request's token allows while the request is served: the file of tokens may change.

use std::fmt;
use std::io::{Error, ErrorKind};
use std::pin::Pin;
use std::task::{Context, Poll};

use axum::body::{Body, Bytes, HttpBody};
use axum::extract::Request;
use axum::http::Method;
use axum::response::Response;
use http_body::{Frame, SizeHint};

use super::tokens::{Tokens, presented};
use crate::files::Followed;
use crate::problem::Problem;

/// The token that let a request in.
#[derive(Clone)]
pub struct Access {
    tokens: Followed<Tokens>,
    token: Option<String>,
    method: Method,
}

impl fmt::Debug for Access {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Access").finish_non_exhaustive()
    }
}

impl Access {
    /// # Errors
    /// The answer to a request that has no token which allows it.
    pub(super) fn new(tokens: &Followed<Tokens>, request: &Request) -> Result<Self, Problem> {
        let access = Self {
            tokens: tokens.clone(),
            token: presented(request.headers()),
            method: request.method().clone(),
        };
        access.check()?;
        Ok(access)
    }

    /// # Errors
    /// The answer to a request that its token does not allow any more.
    pub(super) fn check(&self) -> Result<(), Problem> {
        let tokens = self.tokens.borrow();
        tokens.check(self.token.as_deref(), &self.method)
    }

    /// Waits until the token no longer allows the request, and returns the answer to such a request.
    pub async fn lost(mut self) -> Problem {
        loop {
            if let Err(problem) = self.check() {
                return problem;
            }
            let changed = self.tokens.changed().await;
            changed.expect("the file is followed as long as there is a receiver");
        }
    }

    /// Makes a response's body end in the middle when the token no longer allows the request.
    pub(super) fn guard(self, response: Response) -> Response {
        response.map(|body| {
            Body::new(GuardedBody {
                body,
                lost: Box::pin(self.lost()),
            })
        })
    }
}

struct GuardedBody {
    body: Body,
    lost: Pin<Box<dyn Future<Output = Problem> + Send>>,
}

impl HttpBody for GuardedBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        if self.lost.as_mut().poll(context).is_ready() {
            let lost = Error::from(ErrorKind::PermissionDenied);
            return Poll::Ready(Some(Err(axum::Error::new(lost))));
        }
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
