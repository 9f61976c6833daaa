//! The listening socket: it accepts connections up to a limit, and follows each of their requests.

use std::io::{self, ErrorKind};
use std::net::IpAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes, HttpBody};
use axum::http::{HeaderValue, Method, Request, Response, Version, header};
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use http_body::{Frame, SizeHint};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::Service;
use hyper_util::rt::TokioIo;
use ipnet::IpNet;
use metrics::counter;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::sleep;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;

use crate::client::Client;
use crate::connection::{Admitted, Connection, Connections};
use crate::metrics::CONNECTIONS_CUT;
use crate::serve::{Limits, Timeouts};
use crate::socket::Socket;
use crate::tls::Certificate;

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

/// The largest request head; a larger one gets a 431. It is also what one read of a body returns at most, and
/// the response bytes that hyper buffers for one connection, besides one piece. So connections are small.
const CONNECTION_BUFFER: usize = 16 * 1024;

/// A listening socket that takes in as many connections as there is room for.
#[derive(Debug)]
pub(crate) struct Listener {
    listener: TcpListener,
    router: Router,
    certificate: Option<Certificate>,
    trusted_proxies: Arc<[IpNet]>,
    /// What a response says of a connection that is kept.
    keep_alive: HeaderValue,
    connections: Arc<Connections>,
    refusals: Arc<Semaphore>,
    timeouts: Timeouts,
}

impl Listener {
    pub(crate) fn new(
        listener: TcpListener,
        router: Router,
        certificate: Option<Certificate>,
        limits: Limits,
    ) -> Self {
        let Limits {
            timeouts,
            max_connections,
            trusted_proxies,
        } = limits;
        let keep_alive = format!("timeout={}", timeouts.idle.as_secs());
        let connections = Connections::new(max_connections, trusted_proxies.clone());
        Self {
            listener,
            router,
            certificate,
            trusted_proxies,
            keep_alive: HeaderValue::try_from(keep_alive).expect("a number is plain ASCII"),
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

    /// Waits for a connection for which there is room.
    pub(crate) async fn accept(&self) -> Socket<Admitted> {
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
                    return Socket::new(connection, self.timeouts, admitted);
                }
                Err(stream) => self.refuse(stream, address),
            }
        }
    }

    /// Serves the requests of a connection until it ends; from `stop` on, only one that has begun.
    pub(crate) fn serve(
        &self,
        socket: Socket<Admitted>,
        stop: CancellationToken,
    ) -> impl Future<Output = ()> + Send + 'static {
        let requests = Requests {
            router: self.router.clone(),
            connection: socket.connection.clone(),
            trusted_proxies: self.trusted_proxies.clone(),
            keep_alive: self.keep_alive.clone(),
        };
        let certificate = self.certificate.as_ref();
        let tls = certificate.map(|certificate| TlsAcceptor::from(certificate.borrow().clone()));
        async move {
            let Some(tls) = tls else {
                return serve_requests(socket, requests, stop).await;
            };
            match stop.run_until_cancelled(tls.accept(socket)).await {
                Some(Ok(secure)) => serve_requests(secure, requests, stop).await,
                Some(Err(error)) => tracing::debug!(%error, "a TLS handshake failed"),
                None => {}
            }
        }
    }
}

async fn serve_requests(
    stream: impl AsyncRead + AsyncWrite + Unpin,
    requests: Requests,
    stop: CancellationToken,
) {
    let mut http = http1::Builder::new();
    http.max_buf_size(CONNECTION_BUFFER).half_close(true);
    let mut connection = pin!(http.serve_connection(TokioIo::new(stream), requests));
    let ended = match stop.run_until_cancelled(connection.as_mut()).await {
        Some(ended) => ended,
        None => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "a connection ended early");
    }
}

/// The requests of one connection: tells the router the client of each, and the socket how far each is.
#[derive(Debug)]
struct Requests {
    router: Router,
    connection: Arc<Connection>,
    trusted_proxies: Arc<[IpNet]>,
    keep_alive: HeaderValue,
}

impl Service<Request<Incoming>> for Requests {
    type Response = Response<ResponseBody>;
    type Error = io::Error;
    type Future = BoxFuture<'static, io::Result<Self::Response>>;

    fn call(&self, request: Request<Incoming>) -> Self::Future {
        let busy = Busy::begin(&self.connection);
        let peer = self.connection.peer;
        let client = Client::behind(peer, request.headers(), &self.trusted_proxies);
        let keep_alive = self.keep_alive.clone();
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
        let answer = self.router.clone().oneshot(request);
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

struct ResponseBody {
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
