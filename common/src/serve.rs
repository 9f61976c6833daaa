//! Running a service: start, connection timeouts, stop signals, and a shutdown within the grace period.
//!
//! This module sets no timeout for a whole request: a body may stream as long as it makes progress.

use std::net::{SocketAddr, TcpListener};
use std::pin::Pin;
use std::process::ExitCode;
use std::time::Duration;

use axum::Router;
use axum::extract::ConnectInfo;
use axum::middleware::AddExtension;
use axum_server::Handle;
use axum_server::accept::Accept;
use hyper_util::rt::TokioTimer;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::signal::unix::{SignalKind, signal};
use tokio_io_timeout::TimeoutStream;
use tokio_util::sync::CancellationToken;

use crate::config::{self, ServiceConfig};
use crate::door::DoorConfig;
use crate::health::{Task, healthcheck};
use crate::tls::{Certificate, TlsAcceptor};
use crate::{metrics, telemetry};

/// Response bytes that hyper may buffer for one connection, which bounds the memory of a slow reader
/// (hyper's default is about 400 KiB). A request head that is larger gets a 431.
const CONNECTION_BUFFER: usize = 128 * 1024;

/// Runs the `main` of `service`: the task, if one is given; otherwise it sets up the log, the router and
/// the socket, and serves. The token given to `router` is cancelled by SIGINT or SIGTERM. An error is one
/// line on stderr. `door` is `None` for a service that knows no tokens.
pub async fn run(
    service: &'static str,
    config: &ServiceConfig,
    door: Option<&DoorConfig>,
    listen: SocketAddr,
    task: Option<Task>,
    router: impl FnOnce(CancellationToken) -> anyhow::Result<Router>,
) -> ExitCode {
    config::exit_code(match task {
        Some(Task::Healthcheck) => {
            let has_tls = door.is_some_and(DoorConfig::has_tls);
            let scheme = if has_tls { "https" } else { "http" };
            healthcheck(scheme, listen)
                .await
                .map_err(anyhow::Error::msg)
        }
        None => {
            config::check_exposure(listen, config, door).unwrap_or_else(|line| config::fail(&line));
            let certificate = door.map_or(Ok(None), DoorConfig::certificate);
            let certificate = certificate.unwrap_or_else(|line| config::fail(&line));
            start(service, config, certificate, listen, router).await
        }
    })
}

async fn start(
    service: &'static str,
    config: &ServiceConfig,
    certificate: Option<Certificate>,
    listen: SocketAddr,
    router: impl FnOnce(CancellationToken) -> anyhow::Result<Router>,
) -> anyhow::Result<()> {
    let _telemetry =
        telemetry::init(service, config.log_format).unwrap_or_else(|line| config::fail(&line));
    metrics::install();
    raise_open_files();
    let stop = stop_on_signal()?;
    let router = router(stop.clone())?;
    let listener = config::bind(listen).map_err(anyhow::Error::msg)?;
    tracing::info!(address = %listener.local_addr()?, "serving requests");
    let timeouts = Timeouts::default();
    match certificate {
        None => serve(listener, router, timeouts, stop, config.grace).await?,
        Some(certificate) => {
            serve_tls(listener, certificate, router, timeouts, stop, config.grace).await?;
        }
    }
    Ok(())
}

/// Raises the soft limit of open files to the hard one, because the soft one is often 1024 and each
/// connection is a file. If that fails, connections beyond the limit wait.
fn raise_open_files() {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        ..limit
    };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        tracing::warn!(%error, soft = limit.current, "the limit of open files cannot be raised");
    }
}

/// How long a connection may stall before it is cut.
#[derive(Clone, Copy, Debug)]
pub struct Timeouts {
    /// From the first wait for a request's head until the head is complete; an idle keep-alive
    /// connection is closed after this time too.
    pub head: Duration,
    /// For a whole request body; for an upload, between two pieces of its body.
    pub body: Duration,
    /// Between two reads of a response by the client. TCP reports progress to the sender in steps of up
    /// to 64 KiB on loopback, so a client that reads 1 KiB/s needs more than a minute.
    pub write_idle: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            head: Duration::from_secs(30),
            body: Duration::from_secs(30),
            write_idle: Duration::from_secs(180),
        }
    }
}

/// Serves until `stop` is cancelled, then gives requests in flight `grace` to finish. The future is boxed
/// so that the HTTP server is compiled once, and not in each binary and test.
///
/// # Errors
/// When the socket fails.
pub fn serve(
    listener: TcpListener,
    router: Router,
    timeouts: Timeouts,
    stop: CancellationToken,
    grace: Duration,
) -> Pin<Box<dyn Future<Output = std::io::Result<()>> + Send>> {
    let acceptor = WriteIdleAcceptor(timeouts.write_idle);
    Box::pin(serve_with(
        acceptor, listener, router, timeouts, stop, grace,
    ))
}

/// As [`serve`], with TLS.
///
/// # Errors
/// When the socket fails.
pub fn serve_tls(
    listener: TcpListener,
    certificate: Certificate,
    router: Router,
    timeouts: Timeouts,
    stop: CancellationToken,
    grace: Duration,
) -> Pin<Box<dyn Future<Output = std::io::Result<()>> + Send>> {
    let acceptor = TlsAcceptor {
        certificate,
        below: WriteIdleAcceptor(timeouts.write_idle),
    };
    Box::pin(serve_with(
        acceptor, listener, router, timeouts, stop, grace,
    ))
}

/// The router as one connection sees it: with the address of its client.
type WithPeer = AddExtension<Router, ConnectInfo<SocketAddr>>;

async fn serve_with<A>(
    acceptor: A,
    listener: TcpListener,
    router: Router,
    timeouts: Timeouts,
    stop: CancellationToken,
    grace: Duration,
) -> std::io::Result<()>
where
    A: Accept<TcpStream, WithPeer, Service = WithPeer> + Clone + Send + Sync + 'static,
    A::Stream: AsyncRead + AsyncWrite + Unpin + Send,
    A::Future: Send,
{
    listener.set_nonblocking(true)?;
    let handle = Handle::<SocketAddr>::new();
    tokio::spawn(stop_gracefully(handle.clone(), stop, grace));
    let mut server = axum_server::from_tcp(listener)?
        .handle(handle)
        .acceptor(acceptor)
        .http1_only();
    server
        .http_builder()
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(timeouts.head)
        .max_buf_size(CONNECTION_BUFFER);
    let router = router.into_make_service_with_connect_info::<SocketAddr>();
    server.serve(router).await
}

async fn stop_gracefully(handle: Handle<SocketAddr>, stop: CancellationToken, grace: Duration) {
    stop.cancelled().await;
    tracing::info!(
        connections = handle.connection_count(),
        "stopping: requests in flight may finish"
    );
    handle.graceful_shutdown(None);
    tokio::time::sleep(grace).await;
    tracing::warn!(
        connections = handle.connection_count(),
        "the grace period is over: cutting the remaining connections"
    );
    handle.shutdown();
}

/// Cancels the returned token on the first SIGINT or SIGTERM; a second one ends the process at once.
///
/// # Errors
/// When the signal handlers cannot be installed.
fn stop_on_signal() -> std::io::Result<CancellationToken> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let stop = CancellationToken::new();
    let stopping = stop.clone();
    tokio::spawn(async move {
        for _ in 0..2 {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
            if stopping.is_cancelled() {
                std::process::exit(130);
            }
            stopping.cancel();
        }
    });
    Ok(stop)
}

/// Accepts connections and cuts each one whose client reads nothing for this time.
#[derive(Clone, Copy, Debug)]
struct WriteIdleAcceptor(Duration);

impl<S> Accept<TcpStream, S> for WriteIdleAcceptor {
    type Stream = Pin<Box<TimeoutStream<TcpStream>>>;
    type Service = S;
    type Future = std::future::Ready<std::io::Result<(Self::Stream, S)>>;

    fn accept(&self, stream: TcpStream, service: S) -> Self::Future {
        std::future::ready(stream.set_nodelay(true).map(|()| {
            let mut stream = TimeoutStream::new(stream);
            stream.set_write_timeout(Some(self.0));
            (Box::pin(stream), service)
        }))
    }
}
