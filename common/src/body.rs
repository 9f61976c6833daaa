//! Bodies with bounded memory: a request reserves memory as its body arrives, and a response holds its
//! reservation until it is written.

use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::body::{Body, HttpBody};
use axum::http::StatusCode;
use axum::response::Response;
use bytes::{Bytes, BytesMut};
use http_body::{Frame, SizeHint};
use http_body_util::BodyExt;

use crate::permits::Permit;
use crate::problem::Problem;

/// A response goes to its connection in pieces of this many bytes. The reservation then lasts until the
/// client has taken nearly all of it, not only until the connection has buffered it.
const PIECE: usize = 64 * 1024;

/// Why a request body could not be read.
#[derive(Debug, thiserror::Error)]
pub enum BodyError {
    /// The body is larger than the limit.
    #[error("the body is larger than {0} bytes")]
    TooLarge(usize),
    /// The body, or its next piece, did not arrive in time.
    #[error("the body stalled; send it without long pauses")]
    TooSlow,
    /// The connection broke, or the body is not valid HTTP.
    #[error("the body ended early or is not valid HTTP")]
    Broken,
    /// All memory for bodies is in use.
    #[error("too many request bodies at once, nothing was done; retry in a moment")]
    NoMemory,
}

impl From<BodyError> for Problem {
    fn from(error: BodyError) -> Self {
        let status = match error {
            BodyError::TooLarge(_) => StatusCode::PAYLOAD_TOO_LARGE,
            BodyError::TooSlow => StatusCode::REQUEST_TIMEOUT,
            BodyError::Broken => StatusCode::BAD_REQUEST,
            BodyError::NoMemory => StatusCode::SERVICE_UNAVAILABLE,
        };
        Self::new(status, error.to_string())
    }
}

/// Reads a whole request body of at most `limit` bytes within `timeout`. Memory is reserved as the body
/// arrives, so a body that was announced and not sent reserves nothing.
///
/// # Errors
/// When the body is larger or slower, breaks off, or exceeds the memory budget, whose permits are bytes.
pub async fn read_body(
    mut body: Body,
    limit: usize,
    timeout: Duration,
    reserved: &mut Permit,
) -> Result<Bytes, BodyError> {
    let reading = async {
        let mut read = BytesMut::new();
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|_| BodyError::Broken)?;
            let Ok(piece) = frame.into_data() else {
                continue;
            };
            let bytes = read.len() + piece.len();
            if bytes > limit {
                return Err(BodyError::TooLarge(limit));
            }
            reserved.resize(bytes).map_err(|_| BodyError::NoMemory)?;
            if read.is_empty() && body.is_end_stream() {
                return Ok(piece);
            }
            read.extend_from_slice(&piece);
            // What has arrived may be in twice as much memory.
            let reserve = reserved.resize(read.capacity());
            reserve.map_err(|_| BodyError::NoMemory)?;
        }
        Ok(read.freeze())
    };
    let read = tokio::time::timeout(timeout, reading).await;
    read.map_err(|_| BodyError::TooSlow)?
}

/// Makes a response hold a permit until its body is written or its connection is closed.
pub fn holding<P: Send + 'static>(response: Response, permit: P) -> Response {
    response.map(|body| {
        Body::new(HoldingBody {
            body,
            piece: Bytes::new(),
            _permit: permit,
        })
    })
}

/// A body that holds a permit until its last piece is taken.
struct HoldingBody<P> {
    body: Body,
    /// Data of `body` that was not passed on yet.
    piece: Bytes,
    _permit: P,
}

// No field needs pinning: the inner body is boxed.
impl<P> Unpin for HoldingBody<P> {}

impl<P> HttpBody for HoldingBody<P> {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        while self.piece.is_empty() {
            let next = ready!(Pin::new(&mut self.body).poll_frame(context));
            match next.map(|frame| frame.map(Frame::into_data)) {
                Some(Ok(Ok(data))) => self.piece = data,
                Some(Ok(Err(trailers))) => return Poll::Ready(Some(Ok(trailers))),
                Some(Err(error)) => return Poll::Ready(Some(Err(error))),
                None => return Poll::Ready(None),
            }
        }
        let length = self.piece.len().min(PIECE);
        let piece = self.piece.split_to(length);
        Poll::Ready(Some(Ok(Frame::data(piece))))
    }

    fn is_end_stream(&self) -> bool {
        self.piece.is_empty() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let rest = self.body.size_hint();
        let here = self.piece.len() as u64;
        let mut hint = SizeHint::new();
        if let Some(upper) = rest.upper() {
            hint.set_upper(upper + here);
        }
        hint.set_lower(rest.lower() + here);
        hint
    }
}

#[cfg(test)]
mod tests {
    use axum::http::Extensions;
    use axum::response::IntoResponse;

    use super::*;
    use crate::client::Client;
    use crate::permits::Permits;

    #[tokio::test]
    async fn permit_is_held_until_the_last_piece_is_taken() {
        let permits = Permits::new(1);
        let text = "x".repeat(PIECE + 1);
        let client = Client::of(&Extensions::new());
        let permit = permits.take(client, 1).expect("1 of 1");
        let mut body = holding(text.clone().into_response(), permit).into_body();
        assert_eq!(body.size_hint().exact(), Some(text.len() as u64));
        let first = body.frame().await.expect("a frame").expect("no error");
        assert_eq!(first.into_data().expect("data").len(), PIECE);
        assert_eq!(permits.free(), 0);
        let second = body.frame().await.expect("a frame").expect("no error");
        assert_eq!(second.into_data().expect("data").len(), 1);
        assert!(body.is_end_stream());
        drop(body);
        assert_eq!(permits.free(), 1);
    }
}
