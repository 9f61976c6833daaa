//! HTTP clients of the logging instances and the messages service, with a timeout on every call.
//!
//! They have no failover and no health: these belong to the pool. An answer must bear a logging
//! instance's mark: a proxy or another server at the address may answer anything, whether or not it
//! forwarded the request.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use async_trait::async_trait;
use axum::http::Uri;
use bytes::{Bytes, BytesMut};
use common::api::{
    Batch, InstanceStats, MARK, MAX_BATCH_BYTES, MAX_LINE, Mark, PutResult, READ_END, READ_SETTLED,
    ReadQuery,
};
use common::door::follow_authorization;
use common::entry::Entry;
use common::files::Followed;
use common::middleware::REQUEST_ID;
use common::pace::Pace;
use common::tls::follow_trusted;
use common::traces::{TRACEPARENT, traceparent};
use futures_util::future::BoxFuture;
use futures_util::{FutureExt, StreamExt, TryFutureExt, stream};
use hyper_rustls::{FixedServerNameResolver, HttpsConnector, MaybeHttpsStream};
use hyper_util::client::legacy;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use memchr::memchr;
use reqwest::header::HeaderValue;
use reqwest::{Body, Client, RequestBuilder, Response, StatusCode, Url, header};
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::time::{Instant, timeout, timeout_at};
use tower::Service;
use tracing::Span;
use uuid::Uuid;

use crate::entry_stream::Chunks;
use crate::served_map::{Purpose, ServedMap};
use crate::upstream::{Cause, UpstreamError};

/// Idle connections are closed after this time, well before the services close them.
const IDLE_CONNECTION: Duration = Duration::from_secs(10);

/// The largest answer to a batch; a longer one is an error. A result is not much larger than its
/// entry, and the facade's batches are an eighth of what an instance accepts.
const MAX_RESULTS_BODY: usize = MAX_BATCH_BYTES;

/// The same for a batch of few entries, in bytes for each: a result has some hundred.
const MAX_RESULT: usize = 4096;

/// Longer statistics are not an instance's: a row for a member has some hundred bytes.
const MAX_STATS_BODY: usize = 1024 * 1024;

/// The longest reply of the messages service, and the longest error body; longer ones are errors.
const MAX_REPLY_BYTES: usize = 64 * 1024;

/// What an instance must send of a stream, in bytes a second on average over this time, while the facade waits
/// for it.
const STREAM_THROUGHPUT: u32 = 64 * 1024;
const STREAM_SLACK: Duration = Duration::from_secs(2);

/// The same until its first line has arrived whole, over the try timeout: the line of any message that can be
/// posted, which has 6 MiB at most, arrives soon after that or too late.
const FIRST_LINE_THROUGHPUT: u32 = 8 * 1024 * 1024;

/// The most bytes of a stream that hyper buffers for one GET.
const STREAM_BUFFER: usize = 64 * 1024;

/// The HTTP clients that all calls share. They use no proxies from the environment, follow no
/// redirects, and retry only requests that were never written because an idle connection had been
/// closed.
#[derive(Clone, Debug)]
pub struct Clients {
    /// Builds requests, and sends those to the messages service.
    requests: Client,
    /// Hyper's, because reqwest can neither bound hyper's read buffer, which grows to 512 KiB for each GET whose
    /// caller is slow, nor change the authorities that it trusts.
    instances: legacy::Client<Connector, Body>,
    /// Of the instances' URLs.
    scheme: &'static str,
    /// What logging instances ask for.
    authorization: Option<Followed<HeaderValue>>,
    /// The authorities for HTTPS.
    trust: Option<Followed<ClientConfig>>,
}

impl Clients {
    /// `token_file` has the token for the logging instances, `authorities` the certificates of those that
    /// vouch for them.
    ///
    /// # Errors
    /// A line for the operator, when a file cannot be read or is wrong, or the client for requests cannot be
    /// built.
    pub fn new(
        connect_timeout: Duration,
        token_file: Option<PathBuf>,
        authorities: Option<PathBuf>,
    ) -> Result<Self, String> {
        let trust = authorities.map(follow_trusted).transpose();
        let trust = trust.map_err(|error| format!("--logging-ca {error}"))?;
        let authorization = token_file.map(follow_authorization).transpose();
        let authorization =
            authorization.map_err(|error| format!("--logging-token-file {error}"))?;
        let requests = Client::builder()
            .no_proxy()
            .redirect(reqwest::redirect::Policy::none())
            .retry(reqwest::retry::never())
            .tcp_nodelay(true)
            .connect_timeout(connect_timeout)
            .pool_idle_timeout(IDLE_CONNECTION)
            .build()
            .map_err(|error| error.to_string())?;
        Ok(Self {
            requests,
            instances: instance_client(connect_timeout, None),
            scheme: "http",
            authorization,
            trust,
        })
    }

    /// The same clients for HTTPS with instances whose certificate is for `host`.
    ///
    /// # Errors
    /// A line for the operator, when no authorities are trusted or no certificate can be for that host.
    pub(crate) fn securely(&self, host: &str, connect_timeout: Duration) -> Result<Self, String> {
        let trust = self.trust.clone();
        let trust = trust
            .ok_or("https:// in --logging needs --logging-ca FILE, the authority's certificate")?;
        let name = ServerName::try_from(host.trim_matches(['[', ']']).to_owned());
        let name = name.map_err(|error| format!("{host}: {error}"))?;
        Ok(Self {
            instances: instance_client(connect_timeout, Some((trust, name))),
            scheme: "https",
            ..self.clone()
        })
    }
}

/// Makes connections, with TLS by the current trust if the instances' certificate is for a name.
#[derive(Clone)]
struct Connector {
    tcp: HttpConnector,
    tls: Option<(Followed<ClientConfig>, ServerName<'static>)>,
}

impl Service<Uri> for Connector {
    type Response = MaybeHttpsStream<<HttpConnector as Service<Uri>>::Response>;
    type Error = Cause;
    type Future = BoxFuture<'static, Result<Self::Response, Self::Error>>;

    fn poll_ready(&mut self, _context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let Some((trust, name)) = &self.tls else {
            let connected = self.tcp.call(uri).map_ok(MaybeHttpsStream::Http);
            return connected.err_into().boxed();
        };
        let trust = trust.borrow().clone();
        let name = Arc::new(FixedServerNameResolver::new(name.clone()));
        HttpsConnector::new(self.tcp.clone(), trust, true, name).call(uri)
    }
}

fn instance_client(
    connect_timeout: Duration,
    tls: Option<(Followed<ClientConfig>, ServerName<'static>)>,
) -> legacy::Client<Connector, Body> {
    let mut tcp = HttpConnector::new();
    tcp.enforce_http(tls.is_none());
    tcp.set_nodelay(true);
    tcp.set_connect_timeout(Some(connect_timeout));
    legacy::Client::builder(TokioExecutor::new())
        .pool_timer(TokioTimer::new())
        .pool_idle_timeout(IDLE_CONNECTION)
        .http1_max_buf_size(STREAM_BUFFER)
        .build(Connector { tcp, tls })
}

pub struct ReadAnswer {
    /// Where an ascending read ends: see [`READ_END`].
    pub end: Option<Uuid>,
    /// What is settled: see [`READ_SETTLED`].
    pub settled: Option<Uuid>,
    /// The lines as they arrive. Waiting for the next byte longer than the try timeout is an error, and so are
    /// fewer than [`STREAM_THROUGHPUT`].
    pub chunks: Chunks,
}

impl fmt::Debug for ReadAnswer {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = formatter.debug_struct("ReadAnswer");
        shown.field("end", &self.end);
        shown.field("settled", &self.settled);
        shown.finish_non_exhaustive()
    }
}

/// One logging instance. Failover tests replace it by a simulation that loses and delays messages.
#[async_trait]
pub trait LoggingApi: fmt::Debug + Send + Sync {
    /// Stores a batch and returns the result of each entry, in order.
    async fn put(&self, batch: Batch) -> Result<Vec<PutResult>, UpstreamError>;

    /// Starts a read and returns when the answer begins.
    async fn read(
        &self,
        query: ReadQuery,
        request_id: Option<&str>,
    ) -> Result<ReadAnswer, UpstreamError>;

    /// Reads one entry; `None` when the map has none under this UUID.
    async fn get(&self, uuid: Uuid) -> Result<Option<Entry>, UpstreamError>;

    /// The instance's statistics and readiness.
    async fn stats(&self) -> Result<InstanceStats, UpstreamError>;
}

/// A logging instance behind HTTP.
#[derive(Clone, Debug)]
pub struct LoggingClient {
    clients: Clients,
    name: String,
    base: Url,
    timeout: Duration,
    served: Arc<ServedMap>,
}

impl LoggingClient {
    pub fn new(
        clients: Clients,
        address: SocketAddr,
        timeout: Duration,
        served: Arc<ServedMap>,
    ) -> Self {
        let base = format!("{}://{address}", clients.scheme);
        let base = Url::parse(&base).expect("an address makes a URL");
        Self {
            clients,
            name: address.to_string(),
            base,
            timeout,
            served,
        }
    }

    /// Sends a request and accepts any status from a logging instance that serves the facade's map.
    async fn send(
        &self,
        request: RequestBuilder,
        purpose: Purpose,
    ) -> Result<Response, UpstreamError> {
        let request = self.introduced(request).build()?.try_into()?;
        let response = self.clients.instances.request(request).await?;
        self.check(Response::from(response.map(Body::wrap)), purpose)
    }

    async fn in_time<T>(
        &self,
        answer: impl Future<Output = Result<T, UpstreamError>>,
    ) -> Result<T, UpstreamError> {
        let answer = timeout(self.timeout, answer).await;
        answer.unwrap_or(Err(UpstreamError::TimedOut))
    }

    /// Adds the map that this facade serves, and the token that the instance asks for.
    fn introduced(&self, request: RequestBuilder) -> RequestBuilder {
        let mark = Mark {
            map: self.served.named(),
            clock: None,
        };
        let request = request.header(MARK, mark.to_string());
        match &self.clients.authorization {
            None => request,
            Some(value) => {
                let value = HeaderValue::clone(&value.borrow());
                request.header(header::AUTHORIZATION, value)
            }
        }
    }

    fn mark(&self, response: &Response) -> Result<Mark, UpstreamError> {
        let mark = match response.headers().get(MARK).map(|mark| mark.to_str()) {
            None => Err("its mark is missing".to_owned()),
            Some(Err(_)) => Err("its mark is not text".to_owned()),
            Some(Ok(mark)) => mark.parse::<Mark>(),
        };
        mark.map_err(|reason| UpstreamError::Unmarked(response.status(), reason))
    }

    fn check(&self, response: Response, purpose: Purpose) -> Result<Response, UpstreamError> {
        let mark = self.mark(&response)?;
        let checked = self.served.check(&self.name, mark.map, purpose);
        checked.map_err(UpstreamError::OtherMap)?;
        if let Some(clock) = mark.clock {
            self.served.clock.follow(clock);
        }
        match response.status() {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                Err(UpstreamError::Unauthorized(response.status()))
            }
            _ => Ok(response),
        }
    }
}

#[async_trait]
impl LoggingApi for LoggingClient {
    async fn put(&self, batch: Batch) -> Result<Vec<PutResult>, UpstreamError> {
        let limit = MAX_RESULTS_BODY.min((1 + batch.count()) * MAX_RESULT);
        let purpose = match batch.count() {
            0 => Purpose::State,
            _ => Purpose::Caller,
        };
        let request = self
            .clients
            .requests
            .post(self.base.clone())
            .header(header::CONTENT_TYPE, Batch::CONTENT_TYPE)
            .body(batch.into_body());
        let answer = async {
            let response = require_success(self.send(request, purpose).await?).await?;
            let clock = self.mark(&response)?.clock;
            Ok((clock, read_body(response, limit).await?))
        };
        let (clock, body) = self.in_time(answer).await?;
        let results: Vec<PutResult> = serde_json::from_slice(&body).map_err(garbled)?;
        if let Some(clock) = clock
            && results.iter().any(|result| result.outcome.is_about_time())
        {
            self.served.retime(clock);
        }
        Ok(results)
    }

    async fn read(
        &self,
        query: ReadQuery,
        request_id: Option<&str>,
    ) -> Result<ReadAnswer, UpstreamError> {
        let request = self.clients.requests.get(self.base.clone()).query(&query);
        let request = identified(request, request_id);
        let first_line_due = Instant::now() + self.timeout;
        let answer = async { require_success(self.send(request, Purpose::Caller).await?).await };
        let response = self.in_time(answer).await?;
        let position = |name: &str| {
            let value = response.headers().get(name);
            let uuid = value.map(|value| Uuid::try_parse_ascii(value.as_bytes()));
            let reason = || format!("its {name} is not a UUID");
            uuid.transpose()
                .map_err(|_| UpstreamError::Garbled(reason()))
        };
        let (end, settled) = (position(READ_END)?, position(READ_SETTLED)?);
        let arriving = Arriving::new(response, first_line_due, self.timeout);
        let chunks = stream::try_unfold(arriving, async |mut arriving| {
            Ok(arriving.chunk().await?.map(|chunk| (chunk, arriving)))
        });
        Ok(ReadAnswer {
            end,
            settled,
            chunks: chunks.boxed(),
        })
    }

    async fn get(&self, uuid: Uuid) -> Result<Option<Entry>, UpstreamError> {
        let mut url = self.base.clone();
        url.set_path(&uuid.to_string());
        let request = identified(self.clients.requests.get(url), None);
        let answer = async {
            let response = self.send(request, Purpose::Caller).await?;
            if response.status() == StatusCode::NOT_FOUND {
                return Ok(None);
            }
            let body = read_body(require_success(response).await?, MAX_LINE).await?;
            Ok(Some(body))
        };
        let Some(body) = self.in_time(answer).await? else {
            return Ok(None);
        };
        let entry: Entry = serde_json::from_slice(&body).map_err(garbled)?;
        if entry.uuid != uuid {
            let reason = format!("it was asked for {uuid} and gave {}", entry.uuid);
            return Err(UpstreamError::Garbled(reason));
        }
        Ok(Some(entry))
    }

    async fn stats(&self) -> Result<InstanceStats, UpstreamError> {
        let mut url = self.base.clone();
        url.set_path("stats");
        let request = self.clients.requests.get(url);
        let answer = async {
            let response = require_success(self.send(request, Purpose::State).await?).await?;
            read_body(response, MAX_STATS_BODY).await
        };
        let body = self.in_time(answer).await?;
        serde_json::from_slice(&body).map_err(garbled)
    }
}

/// A stream of an instance that is being read.
struct Arriving {
    response: Response,
    try_timeout: Duration,
    has_line: bool,
    pace: Pace,
}

impl Arriving {
    fn new(response: Response, first_line_due: Instant, try_timeout: Duration) -> Self {
        let left = first_line_due.saturating_duration_since(Instant::now());
        Self {
            response,
            try_timeout,
            has_line: false,
            pace: Pace::at(FIRST_LINE_THROUGHPUT, left),
        }
    }

    async fn chunk(&mut self) -> Result<Option<Bytes>, UpstreamError> {
        let due = self.pace.wait().min(Instant::now() + self.try_timeout);
        let chunk = timeout_at(due, self.response.chunk()).await;
        let chunk = chunk.map_err(|_| UpstreamError::TimedOut)??;
        let bytes = chunk.as_deref().unwrap_or_default();
        self.pace.progress(bytes.len());
        if !self.has_line && memchr(b'\n', bytes).is_some() {
            self.has_line = true;
            self.pace = Pace::at(STREAM_THROUGHPUT, STREAM_SLACK.max(self.try_timeout));
        }
        Ok(chunk)
    }
}

/// The messages service.
#[derive(Clone, Debug)]
pub struct MessagesClient {
    clients: Clients,
    base: Url,
    timeout: Duration,
}

impl MessagesClient {
    pub fn new(clients: Clients, base: Url, timeout: Duration) -> Self {
        Self {
            clients,
            base,
            timeout,
        }
    }

    /// Asks whether the service can answer.
    pub async fn ready(&self) -> Result<(), UpstreamError> {
        let mut url = self.base.clone();
        url.set_path("readyz");
        let request = self.clients.requests.get(url).timeout(self.timeout);
        require_success(request.send().await?).await?;
        Ok(())
    }

    pub async fn reply(&self, request_id: Option<&str>) -> Result<String, UpstreamError> {
        let request = self.clients.requests.get(self.base.clone());
        let request = identified(request, request_id).timeout(self.timeout);
        let response = require_success(request.send().await?).await?;
        let body = read_body(response, MAX_REPLY_BYTES).await?;
        String::from_utf8(body.into())
            .map_err(|_| UpstreamError::Garbled("the reply is not UTF-8".to_owned()))
    }
}

/// Adds the request's id, and its trace: that of the current span.
fn identified(mut request: RequestBuilder, request_id: Option<&str>) -> RequestBuilder {
    if let Some(id) = request_id {
        request = request.header(REQUEST_ID, id);
    }
    if let Some(trace) = traceparent(&Span::current()) {
        request = request.header(TRACEPARENT, trace);
    }
    request
}

async fn require_success(response: Response) -> Result<Response, UpstreamError> {
    #[derive(serde::Deserialize)]
    struct Problem {
        detail: String,
    }
    let status = response.status();
    if status.is_success() {
        return Ok(response);
    }
    let body = read_body(response, MAX_REPLY_BYTES).await?;
    let detail = match serde_json::from_slice(&body) {
        Ok(Problem { detail }) => detail,
        Err(_) => "no reason given".to_owned(),
    };
    Err(UpstreamError::Status(status, detail))
}

async fn read_body(mut response: Response, limit: usize) -> Result<Bytes, UpstreamError> {
    let mut body = BytesMut::new();
    while let Some(chunk) = response.chunk().await? {
        if body.len() + chunk.len() > limit {
            let reason = format!("the answer is longer than {limit} bytes");
            return Err(UpstreamError::Garbled(reason));
        }
        body.extend_from_slice(&chunk);
    }
    Ok(body.freeze())
}

fn garbled(error: serde_json::Error) -> UpstreamError {
    UpstreamError::Garbled(error.to_string())
}

#[cfg(test)]
mod tests {
    use axum::http;

    use super::*;

    const TRY_TIMEOUT: Duration = Duration::from_secs(1);

    /// Reads a stream whose pieces come after pauses in milliseconds, for a caller that pauses before each.
    async fn read(pieces: Vec<(u64, usize)>, caller: Duration) -> Result<(), Duration> {
        let began = Instant::now();
        let pieces = stream::iter(pieces).then(async |(pause, bytes)| {
            tokio::time::sleep(Duration::from_millis(pause)).await;
            let mut piece = vec![b'x'; bytes];
            // Pieces of a byte are of one line.
            if bytes > 1 {
                piece[0] = b'\n';
            }
            Ok::<_, std::io::Error>(piece)
        });
        let body = Body::wrap_stream(pieces);
        let response = Response::from(http::Response::new(body));
        let mut arriving = Arriving::new(response, began + TRY_TIMEOUT, TRY_TIMEOUT);
        loop {
            match arriving.chunk().await {
                Ok(None) => return Ok(()),
                Ok(Some(_)) => tokio::time::sleep(caller).await,
                Err(_) => return Err(began.elapsed()),
            }
        }
    }

    /// What counts is how long the facade waits for the instance, not how long its caller takes.
    #[tokio::test(start_paused = true)]
    async fn instance_is_too_slow_only_while_it_is_waited_for() {
        let (quick, slow) = (Duration::ZERO, Duration::from_secs(60));
        let line_then = |pieces: Vec<(u64, usize)>| [vec![(900, 80)], pieces].concat();
        for caller in [quick, slow] {
            for pieces in [
                line_then(vec![]),
                line_then(vec![(900, 80)]),
                line_then(vec![(400, 32 * 1024); 100]),
                line_then(vec![(0, 1); 100]),
                vec![(100, 1 << 20); 100],
            ] {
                assert_eq!(read(pieces.clone(), caller).await, Ok(()), "{pieces:?}");
            }
        }
        for (pieces, at_least, at_most) in [
            (vec![(500, 1); 100], 1000, 1001),
            (vec![(1, 1); 100_000], 1000, 1001),
            (line_then(vec![(500, 1); 100]), 2900, 2901),
            (line_then(vec![(500, 16 * 1024); 100]), 4000, 6000),
            (line_then(vec![(1001, 80)]), 1900, 1901),
        ] {
            let after = read(pieces.clone(), quick)
                .await
                .expect_err("it is too slow");
            let expected = Duration::from_millis(at_least)..=Duration::from_millis(at_most);
            assert!(expected.contains(&after), "{after:?}: {:?}", &pieces[..2]);
        }
    }
}
