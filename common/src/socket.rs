//! The socket of a connection: it waits for each request's head, cuts a client that reads too slowly, ends so
//! that an incomplete response cannot look complete, and closes so that an early answer reaches a client that
//! is still sending.

use std::io::{self, ErrorKind, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use metrics::counter;
use rustix::net::sockopt::set_socket_linger;
use rustix::net::{Shutdown, shutdown};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Sleep, sleep, sleep_until};

use crate::connection::Connection;
use crate::metrics::CONNECTIONS_CUT;
use crate::pace::Pace;
use crate::serve::Timeouts;

/// How long, and how many bytes, a closing connection goes on to read and drop, when the client has not sent
/// its whole request: closing at once would make the kernel reset the connection, and the client would lose
/// the answer. The bytes are those of several of the largest messages.
const LINGER_FOR: Duration = Duration::from_secs(5);
const LINGER_BYTES: usize = 8 * 1024 * 1024;

/// The bytes that a closing connection reads at once.
const DROPPED_PIECE: usize = 16 * 1024;

/// The socket of one connection.
#[derive(Debug)]
pub(crate) struct Socket<C> {
    pub(crate) connection: Arc<Connection>,
    timeouts: Timeouts,
    head: Head,
    pace: Pace,
    /// Ends a wait for the client; made at the first one.
    too_slow: Option<Pin<Box<Sleep>>>,
    lingering: Option<Lingering>,
    /// Whether the kernel resets the connection when the socket is closed, also when the process dies.
    resets: bool,
    /// Counts the connection.
    _counted: C,
}

/// The wait for a request's head.
#[derive(Debug)]
struct Head {
    /// When the connection became idle, which tells this wait from the one before.
    idle_since: Option<Instant>,
    has_begun: bool,
    end: Pin<Box<Sleep>>,
}

#[derive(Debug)]
struct Lingering {
    until: Pin<Box<Sleep>>,
    bytes: usize,
}

impl<C> Socket<C> {
    pub(crate) fn new(connection: Arc<Connection>, timeouts: Timeouts, counted: C) -> Self {
        let head = Head {
            idle_since: connection.idle_since(),
            has_begun: true,
            end: Box::pin(sleep(timeouts.head)),
        };
        Self {
            connection,
            timeouts,
            head,
            pace: Pace::new(timeouts.read),
            too_slow: None,
            lingering: None,
            resets: false,
            _counted: counted,
        }
    }

    /// Ready when the client has not sent a request's head in time.
    fn poll_no_head(&mut self, context: &mut Context<'_>) -> Poll<()> {
        let idle_since = self.connection.idle_since();
        if idle_since.is_none() {
            return Poll::Pending;
        }
        if self.head.idle_since != idle_since {
            self.head.idle_since = idle_since;
            self.head.has_begun = false;
            let end = tokio::time::Instant::now() + self.timeouts.idle;
            self.head.end.as_mut().reset(end);
        }
        self.head.end.as_mut().poll(context)
    }

    /// Notes that something has come: between requests it is the begin of a head.
    fn note_read(&mut self) {
        let idle_since = self.connection.idle_since();
        if idle_since.is_some() && !(self.head.has_begun && self.head.idle_since == idle_since) {
            self.head.idle_since = idle_since;
            self.head.has_begun = true;
            let end = tokio::time::Instant::now() + self.timeouts.head;
            self.head.end.as_mut().reset(end);
        }
    }

    fn reset_when_closed(&mut self, resets: bool) {
        if self.resets != resets {
            self.resets = resets;
            let linger = resets.then_some(Duration::ZERO);
            if let Err(error) = set_socket_linger(&self.connection.stream, linger) {
                tracing::debug!(%error, "SO_LINGER cannot be set");
            }
        }
    }

    fn before_write(&mut self) {
        if self.connection.is_unframed() {
            self.reset_when_closed(true);
        }
    }

    /// Passes on what a write returned, and ends the connection when the client has taken too little.
    fn paced(
        &mut self,
        written: Poll<io::Result<usize>>,
        context: &mut Context<'_>,
    ) -> Poll<io::Result<usize>> {
        match written {
            Poll::Ready(Ok(bytes)) => {
                if self.pace.is_waiting() {
                    self.connection.wake_evicted();
                }
                self.pace.progress(bytes);
                return Poll::Ready(Ok(bytes));
            }
            Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
            Poll::Pending => {}
        }
        let goes_on = self.pace.is_waiting();
        let end = self.pace.wait();
        let too_slow = self
            .too_slow
            .get_or_insert_with(|| Box::pin(sleep_until(end)));
        if !goes_on {
            too_slow.as_mut().reset(end);
        }
        ready!(too_slow.as_mut().poll(context));
        counter!(CONNECTIONS_CUT, "reason" => "slow_reader").increment(1);
        tracing::info!(client = %self.connection.peer, "a connection is cut: its client reads too slowly");
        // What the client did not take would otherwise stay in the kernel's memory.
        self.reset_when_closed(true);
        Poll::Ready(Err(ErrorKind::TimedOut.into()))
    }

    /// Reads and drops what the client still sends.
    fn poll_linger(&mut self, context: &mut Context<'_>) -> Poll<()> {
        let lingering = self.lingering.get_or_insert_with(|| Lingering {
            until: Box::pin(sleep(LINGER_FOR)),
            bytes: 0,
        });
        loop {
            let mut piece = [0; DROPPED_PIECE];
            let mut buffer = ReadBuf::new(&mut piece);
            let read = poll_read(&self.connection.stream, context, &mut buffer);
            let bytes = buffer.filled().len();
            match read {
                Poll::Ready(Ok(())) if bytes > 0 => lingering.bytes += bytes,
                Poll::Ready(_) => return Poll::Ready(()),
                Poll::Pending if lingering.bytes == 0 && self.connection.is_request_read() => {
                    return Poll::Ready(());
                }
                Poll::Pending if self.connection.must_end(context) => return Poll::Ready(()),
                Poll::Pending => return lingering.until.as_mut().poll(context),
            }
            if lingering.bytes > LINGER_BYTES {
                return Poll::Ready(());
            }
        }
    }
}

impl<C: Unpin> AsyncRead for Socket<C> {
    /// A connection that makes room for another one, or whose client sends no request, looks as if the client
    /// had closed it.
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let read = poll_read(&self.connection.stream, context, buffer);
        if read.is_ready() {
            self.note_read();
            return read;
        }
        let must_end = !self.pace.is_waiting() && self.connection.must_end(context);
        if must_end || self.poll_no_head(context).is_ready() {
            return Poll::Ready(Ok(()));
        }
        Poll::Pending
    }
}

impl<C: Unpin> AsyncWrite for Socket<C> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.before_write();
        let written = poll_write(&self.connection.stream, context, |stream| {
            stream.try_write(bytes)
        });
        self.paced(written, context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.before_write();
        let written = poll_write(&self.connection.stream, context, |stream| {
            stream.try_write_vectored(slices)
        });
        self.paced(written, context)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.lingering.is_none() {
            if !self.connection.is_unframed() {
                self.reset_when_closed(false);
            }
            shutdown(&self.connection.stream, Shutdown::Write)?;
        }
        self.poll_linger(context).map(Ok)
    }
}

fn poll_read(
    stream: &TcpStream,
    context: &mut Context<'_>,
    buffer: &mut ReadBuf<'_>,
) -> Poll<io::Result<()>> {
    loop {
        ready!(stream.poll_read_ready(context))?;
        match stream.try_read_buf(buffer) {
            Ok(_) => return Poll::Ready(Ok(())),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return Poll::Ready(Err(error)),
        }
    }
}

fn poll_write(
    stream: &TcpStream,
    context: &mut Context<'_>,
    write: impl Fn(&TcpStream) -> io::Result<usize>,
) -> Poll<io::Result<usize>> {
    loop {
        ready!(stream.poll_write_ready(context))?;
        match write(stream) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            written => return Poll::Ready(written),
        }
    }
}
