//! Running a service: start, connection timeouts, stop signals, and a shutdown within the grace period.
//!
//! This module sets no timeout for a whole request: a body may stream as long as it makes progress.

use std::net::{SocketAddr, TcpListener};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use futures_util::future::BoxFuture;
use ipnet::IpNet;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::config::{self, ServiceConfig};
use crate::door::DoorConfig;
use crate::health::{Task, healthcheck};
use crate::listener::Listener;
use crate::tls::Certificate;
use crate::{metrics, telemetry};

/// The share of the process's files that connections may be, as one in so many is left for other uses: the
/// map, and connections to other services.
const FILES_KEPT_FREE: u64 = 4;

/// Runs the `main` of `service`: the task, if one is given; otherwise it sets up the log, the router and
/// the socket, and serves. The token given to `router` is cancelled by SIGINT, SIGTERM or SIGHUP. An error is
/// one line on stderr. `door` is `None` for a service that knows no tokens.
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
    let max_connections = within_open_files(config.max_connections as usize, raise_open_files());
    let stop = stop_on_signal()?;
    // Before the router, whose service may make files.
    let listener = config::bind(listen).map_err(anyhow::Error::msg)?;
    let router = router(stop.clone())?;
    tracing::info!(address = %listener.local_addr()?, "serving requests");
    let limits = Limits {
        timeouts: Timeouts {
            idle: config.idle_timeout,
            ..Timeouts::default()
        },
        max_connections,
        trusted_proxies: config.trusted_proxy.clone().into(),
    };
    serve(listener, certificate, router, limits, stop, config.grace).await?;
    Ok(())
}

/// Raises the soft limit of open files to the hard one, because the soft one is often 1024 and each
/// connection is a file. Returns the limit; `None` is no limit.
fn raise_open_files() -> Option<u64> {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        ..limit
    };
    match setrlimit(Resource::Nofile, raised) {
        Ok(()) => limit.maximum,
        Err(error) => {
            tracing::warn!(%error, soft = limit.current, "the limit of open files cannot be raised");
            limit.current
        }
    }
}

/// So many connections as are wanted and as the limit of open files leaves room for.
fn within_open_files(wanted: usize, files: Option<u64>) -> usize {
    let Some(files) = files else {
        return wanted;
    };
    let most = usize::try_from(files - files / FILES_KEPT_FREE).unwrap_or(usize::MAX);
    if most < wanted {
        tracing::warn!(
            files,
            connections = most,
            "the limit of open files is too low for --max-connections; raise it, for example with ulimit -n"
        );
    }
    wanted.min(most)
}

/// How long a connection may stall before it is cut.
#[derive(Clone, Copy, Debug)]
pub struct Timeouts {
    /// For the head of a request, from its first byte; of a connection's first request, from the connection's
    /// begin.
    pub head: Duration,
    /// For the first byte of the next request.
    pub idle: Duration,
    /// For a whole request body; for an upload, how far its client may fall behind
    /// [`MIN_THROUGHPUT`](crate::pace::MIN_THROUGHPUT).
    pub body: Duration,
    /// How far a client may fall behind that while it reads responses.
    pub read: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            head: Duration::from_secs(30),
            idle: config::IDLE_TIMEOUT,
            body: Duration::from_secs(30),
            read: Duration::from_secs(30),
        }
    }
}

/// What clients may use of a service.
#[derive(Clone, Debug)]
pub struct Limits {
    /// How long they may stall.
    pub timeouts: Timeouts,
    /// Connections at once. A further one takes the place of an idle one, or gets a 503.
    pub max_connections: usize,
    /// Proxies whose word for a client's address is taken.
    pub trusted_proxies: Arc<[IpNet]>,
}

impl From<Timeouts> for Limits {
    /// The other limits are the defaults of the flags.
    fn from(timeouts: Timeouts) -> Self {
        Self {
            timeouts,
            max_connections: config::MAX_CONNECTIONS as usize,
            trusted_proxies: Arc::default(),
        }
    }
}

/// Serves until `stop` is cancelled, with TLS if there is a certificate, then gives requests in flight `grace` to
/// finish. The future is boxed so that the HTTP server is compiled once, and not in each binary and test.
///
/// # Errors
/// When the socket fails.
pub fn serve(
    listener: TcpListener,
    certificate: Option<Certificate>,
    router: Router,
    limits: Limits,
    stop: CancellationToken,
    grace: Duration,
) -> BoxFuture<'static, std::io::Result<()>> {
    let serving = async move {
        listener.set_nonblocking(true)?;
        let listener = tokio::net::TcpListener::from_std(listener)?;
        let listener = Listener::new(listener, router, certificate, limits);
        let (connections, cut) = (TaskTracker::new(), CancellationToken::new());
        while let Some(socket) = stop.run_until_cancelled(listener.accept()).await {
            let served = listener.serve(socket, stop.clone());
            connections.spawn(cut.clone().run_until_cancelled_owned(served));
        }
        drop(listener);
        connections.close();
        tracing::info!(
            connections = connections.len(),
            "stopping: requests in flight may finish"
        );
        if timeout(grace, connections.wait()).await.is_err() {
            tracing::warn!(
                connections = connections.len(),
                "the grace period is over: cutting the remaining connections"
            );
            cut.cancel();
        }
        Ok(())
    };
    Box::pin(serving)
}

/// Cancels the returned token on the first SIGINT, SIGTERM or SIGHUP; a second one ends the process at once,
/// but not a SIGHUP, which a terminal or a supervisor sends besides. One that was started with `nohup` goes on.
///
/// # Errors
/// When the signal handlers cannot be installed.
fn stop_on_signal() -> std::io::Result<CancellationToken> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let is_hangup_ignored = is_hangup_ignored();
    let mut hangup = signal(SignalKind::hangup())?;
    let stop = CancellationToken::new();
    let stopping = stop.clone();
    tokio::spawn(async move {
        for _ in 0..2 {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
                _ = hangup.recv(), if !is_hangup_ignored && !stopping.is_cancelled() => {}
            }
            if stopping.is_cancelled() {
                std::process::exit(130);
            }
            stopping.cancel();
        }
    });
    Ok(stop)
}

/// Whether the process was started with SIGHUP ignored.
fn is_hangup_ignored() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let ignored = ignored.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    ignored.is_some_and(|mask| mask & 1 == 1)
}
