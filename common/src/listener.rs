//! The listening socket: it accepts connections up to a limit, and follows each of their requests.

use std::io::{self, ErrorKind};
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes, HttpBody};
use axum::http::{HeaderValue, Method, Request, Response, Version, header};
use axum_server::accept::Accept;
use axum_server::{AddrListener, Address};
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use http_body::{Frame, SizeHint};
use hyper::body::Incoming;
use ipnet::IpNet;
use metrics::counter;
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::sleep;
use tower::Service;

use crate::client::Client;
use crate::connection::{Admitted, Connection, Connections};
use crate::metrics::CONNECTIONS_CUT;
use crate::serve::Timeouts;
use crate::socket::Socket;

/// The pauses after errors of accepting, which begin short and double. Most such errors mean that the
/// process or the machine has no file or no memory left.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// Connections that are told at once that there are too many; more are closed without an answer.
const MAX_REFUSALS: usize = 64;

/// How long a connection that is refused may take to read its answer.
const REFUSE_WITHIN: Duration = Duration::from_secs(1);

/// The answer to a connection for which there is no room; its body ends with the connection.
const TOO_MANY: &str = "HTTP/1.1 503 Service Unavailable\r\n\
    content-type: application/problem+json\r\n\
    retry-after: 1\r\n\
    connection: close\r\n\r\n\
    {\"title\":\"Service Unavailable\",\"status\":503,\
    \"detail\":\"too many connections at once: nothing was done; retry in a moment\"}\n";

/// What axum-server calls an address. The socket knows the one of its client.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Peer;

impl Address for Peer {
    type Stream = Socket<Admitted>;
    type Listener = Listener;
}

/// A listening socket that takes in as many connections as there is room for.
#[derive(Debug)]
pub(crate) struct Listener {
    listener: TcpListener,
    connections: Arc<Connections>,
    refusals: Arc<Semaphore>,
    timeouts: Timeouts,
}

impl Listener {
    pub(crate) fn new(listener: TcpListener, connections: Connections, timeouts: Timeouts) -> Self {
        Self {
            listener,
            connections: Arc::new(connections),
            refusals: Arc::new(Semaphore::new(MAX_REFUSALS)),
            timeouts,
        }
    }

    fn refuse(&self, stream: TcpStream, peer: IpAddr) {
        counter!(CONNECTIONS_CUT, "reason" => "too_many").increment(1);
        let Ok(permit) = self.refusals.clone().try_acquire_owned() else {
            return;
        };
        let connection = Arc::new(Connection::new(stream, peer));
        let timeouts = Timeouts {
            read: REFUSE_WITHIN,
            ..self.timeouts
        };
        let mut socket = Socket::new(connection, timeouts, permit);
        tokio::spawn(tokio::time::timeout(REFUSE_WITHIN, async move {
            socket.write_all(TOO_MANY.as_bytes()).await?;
            socket.shutdown().await
        }));
    }
}

impl AddrListener<Socket<Admitted>, Peer> for Listener {
    async fn bind_to(_address: Peer) -> io::Result<Self> {
        Err(ErrorKind::Unsupported.into())
    }

    async fn accept_stream(&self) -> io::Result<(Socket<Admitted>, Peer)> {
        let mut pause = FIRST_PAUSE;
        loop {
            let (stream, peer) = match self.listener.accept().await {
                Ok(accepted) => accepted,
                // The client has given up while it waited to be accepted.
                Err(error) if error.kind() == ErrorKind::ConnectionAborted => continue,
                Err(error) => {
                    tracing::error!(
                        %error,
                        "no connection can be accepted; if there are too many open files, raise their limit"
                    );
                    sleep(pause).await;
                    pause = (pause * 2).min(LONGEST_PAUSE);
                    continue;
                }
            };
            if let Err(error) = stream.set_nodelay(true) {
                tracing::debug!(%error, "TCP_NODELAY cannot be set");
            }
            let address = peer.ip().to_canonical();
            match self.connections.admit(stream, address) {
                Ok(admitted) => {
                    let connection = admitted.connection.clone();
                    return Ok((Socket::new(connection, self.timeouts, admitted), Peer));
                }
                Err(stream) => self.refuse(stream, address),
            }
        }
    }

    fn get_local_addr(&self) -> io::Result<Peer> {
        Ok(Peer)
    }
}

/// Follows the requests of each connection.
#[derive(Clone, Debug)]
pub(crate) struct Follow {
    pub(crate) trusted_proxies: Arc<[IpNet]>,
    /// What a response says of a connection that is kept.
    pub(crate) keep_alive: HeaderValue,
}

impl Accept<Socket<Admitted>, Router> for Follow {
    type Stream = Socket<Admitted>;
    type Service = Requests;
    type Future = std::future::Ready<io::Result<(Self::Stream, Requests)>>;

    fn accept(&self, socket: Socket<Admitted>, router: Router) -> Self::Future {
        let requests = Requests {
            router,
            connection: socket.connection.clone(),
            following: self.clone(),
        };
        std::future::ready(Ok((socket, requests)))
    }
}

/// The requests of one connection: tells the router the client of each, and the socket how far each is.
#[derive(Clone, Debug)]
pub(crate) struct Requests {
    router: Router,
    connection: Arc<Connection>,
    following: Follow,
}

impl Service<Request<Incoming>> for Requests {
    type Response = Response<ResponseBody>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Self::Response>> + Send>>;

    fn poll_ready(&mut self, _context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Incoming>) -> Self::Future {
        let busy = Busy::begin(&self.connection);
        let peer = self.connection.peer;
        let trusted_proxies = &self.following.trusted_proxies;
        let client = Client::behind(peer, request.headers(), trusted_proxies);
        let keep_alive = self.following.keep_alive.clone();
        let ends_with_the_connection =
            request.version() < Version::HTTP_11 && request.method() != Method::HEAD;
        // What changes something is finished, and its answer is sent.
        let ends_with_its_client = request.method().is_safe();
        let connection = self.connection.clone();
        let mut request = request.map(|body| {
            if body.is_end_stream() {
                connection.note_request_read();
            }
            Body::new(RequestBody { body, connection })
        });
        request.extensions_mut().insert(client);
        let answer = self.router.call(request);
        Box::pin(async move {
            let mut response = tokio::select! {
                biased;
                Ok(response) = answer => response,
                gone = busy.0.client_gone(), if ends_with_its_client => {
                    tracing::info!(client = %peer, "a client has left before its answer began");
                    return Err(gone);
                }
            };
            if is_early(&response, &busy.0) {
                let close = HeaderValue::from_static("close");
                response.headers_mut().insert(header::CONNECTION, close);
            } else {
                let headers = response.headers_mut();
                headers.insert("keep-alive", keep_alive);
            }
            if ends_with_the_connection && response.body().size_hint().exact().is_none() {
                busy.0.begin_unframed_response();
            }
            Ok(response.map(|body| ResponseBody {
                body,
                busy,
                ends_with_its_client,
                gone: None,
            }))
        })
    }
}

/// Whether the rest of the request will not be read: no other can follow it on its connection.
fn is_early(response: &Response<Body>, connection: &Connection) -> bool {
    let is_complete = response.body().size_hint().exact().is_some();
    !connection.is_request_read() && (is_complete || connection.is_request_dropped())
}

/// A request that is being served, until its response is written.
#[derive(Debug)]
struct Busy(Arc<Connection>);

impl Busy {
    fn begin(connection: &Arc<Connection>) -> Self {
        connection.begin_request();
        Self(connection.clone())
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.end_request();
    }
}

#[derive(Debug)]
struct RequestBody {
    body: Incoming,
    connection: Arc<Connection>,
}

impl HttpBody for RequestBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<hyper::Result<Frame<Bytes>>>> {
        let frame = Pin::new(&mut self.body).poll_frame(context);
        if matches!(frame, Poll::Ready(None)) || self.body.is_end_stream() {
            self.connection.note_request_read();
        }
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for RequestBody {
    fn drop(&mut self) {
        self.connection.note_request_dropped();
    }
}

pub(crate) struct ResponseBody {
    body: Body,
    busy: Busy,
    ends_with_its_client: bool,
    /// While there is nothing to send: whether the client is still there.
    gone: Option<BoxFuture<'static, io::Error>>,
}

impl HttpBody for ResponseBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let this = &mut *self;
        let frame = Pin::new(&mut this.body).poll_frame(context);
        if frame.is_pending() && this.ends_with_its_client {
            let connection = &this.busy.0;
            let gone = this.gone.get_or_insert_with(|| {
                let connection = connection.clone();
                Box::pin(async move { connection.client_gone().await })
            });
            let gone = ready!(gone.poll_unpin(context));
            return Poll::Ready(Some(Err(axum::Error::new(gone))));
        }
        this.gone = None;
        if matches!(frame, Poll::Ready(None)) || this.body.is_end_stream() {
            this.busy.0.end_complete_response();
        }
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
