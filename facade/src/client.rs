//! Clients to the services behind the facade: one method a call, every call with a deadline.
//!
//! They know no failover and keep no state about which instance is up: that is the pool's subject.
//! An answer counts as a logging instance's only when it bears the instance's mark: a proxy, or
//! another server at the address, may answer anything after it forwarded a request or not.

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use common::api::{Batch, MARK, MAX_BATCH_BYTES, Mark, PutResult, READ_END, ReadQuery};
use common::entry::Entry;
use common::middleware::REQUEST_ID;
use futures_util::{StreamExt, stream};
use hyper_util::client::legacy;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use reqwest::{Body, Client, RequestBuilder, Response, StatusCode, Url, header};
use tokio::time::timeout;
use uuid::Uuid;

use crate::entry_stream::Chunks;
use crate::served_map::ServedMap;
use crate::upstream::UpstreamError;

/// Idle connections are dropped after this time, well before the services behind drop theirs.
const IDLE_CONNECTION: Duration = Duration::from_secs(10);

/// A longer answer to a read of one entry is not an instance's: an entry can be as large as a batch.
const MAX_ENTRY_BODY: usize = MAX_BATCH_BYTES + 1024;

/// A longer answer to a batch is not an instance's: an outcome is not much larger than its entry,
/// and a batch of the facade is an eighth of what an instance accepts.
const MAX_OUTCOMES_BODY: usize = MAX_BATCH_BYTES;

/// The longest reply of the messages service that is passed on.
const MAX_REPLY_BYTES: usize = 64 * 1024;

/// How many bytes of a stream hyper may hold for one GET.
const STREAM_BUFFER: usize = 64 * 1024;

/// The HTTP client for all calls but streams. It goes straight to the services: proxies from the
/// environment and redirects are off, and so are retries, except of requests that were never
/// written because a kept connection had been closed.
///
/// # Errors
/// When the client cannot be built.
pub fn http_client(connect_timeout: Duration) -> reqwest::Result<Client> {
    Client::builder()
        .no_proxy()
        .redirect(reqwest::redirect::Policy::none())
        .retry(reqwest::retry::never())
        .tcp_nodelay(true)
        .connect_timeout(connect_timeout)
        .pool_idle_timeout(IDLE_CONNECTION)
        .build()
}

/// The HTTP client for streams. It is the one inside reqwest, built here because reqwest cannot bound
/// hyper's read buffer, which grows to half a mebibyte for each GET whose caller is slow.
type StreamClient = legacy::Client<HttpConnector, Body>;

fn stream_client(connect_timeout: Duration) -> StreamClient {
    let mut connector = HttpConnector::new();
    connector.set_nodelay(true);
    connector.set_connect_timeout(Some(connect_timeout));
    legacy::Client::builder(TokioExecutor::new())
        .pool_timer(TokioTimer::new())
        .pool_idle_timeout(IDLE_CONNECTION)
        .http1_max_buf_size(STREAM_BUFFER)
        .build(connector)
}

/// The answer to a read.
pub struct ReadAnswer {
    /// Where an ascending read ends: see [`READ_END`].
    pub end: Option<Uuid>,
    /// The lines, as they come. No byte for the time of one try, while one is waited for, is an error.
    pub chunks: Chunks,
}

impl fmt::Debug for ReadAnswer {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = formatter.debug_struct("ReadAnswer");
        shown.field("end", &self.end).finish_non_exhaustive()
    }
}

/// One logging instance, as the pool, the batcher and reads see it. Tests of failover put a
/// simulated one in its place, whose network loses and delays what the test says.
#[async_trait]
pub trait LoggingApi: fmt::Debug + Send + Sync {
    /// Puts a batch and returns what became of each entry, in order.
    async fn put(&self, batch: Batch) -> Result<Vec<PutResult>, UpstreamError>;

    /// Begins to read entries; waits until the answer begins.
    async fn read(
        &self,
        query: ReadQuery,
        request_id: Option<&str>,
    ) -> Result<ReadAnswer, UpstreamError>;

    /// Reads one entry; `None` when the instance says that there is none.
    async fn get(&self, uuid: Uuid) -> Result<Option<Entry>, UpstreamError>;

    /// Asks whether the instance can read and store now; what it says is missing is the error.
    async fn ready(&self) -> Result<(), UpstreamError>;
}

/// A logging instance behind HTTP.
#[derive(Clone, Debug)]
pub struct LoggingClient {
    http: Client,
    streams: StreamClient,
    name: String,
    base: Url,
    timeout: Duration,
    served: Arc<ServedMap>,
}

impl LoggingClient {
    pub fn new(
        http: Client,
        address: SocketAddr,
        timeout: Duration,
        served: Arc<ServedMap>,
    ) -> Self {
        let base = Url::parse(&format!("http://{address}")).expect("an address makes a URL");
        Self {
            http,
            streams: stream_client(timeout / 2),
            name: address.to_string(),
            base,
            timeout,
            served,
        }
    }

    /// Sends a request and lets the answer pass, whatever its status, if a logging instance wrote
    /// it and serves the facade's map.
    async fn send(&self, request: RequestBuilder) -> Result<Response, UpstreamError> {
        self.check(request.timeout(self.timeout).send().await?)
    }

    fn check(&self, response: Response) -> Result<Response, UpstreamError> {
        let mark = match response.headers().get(MARK).map(|mark| mark.to_str()) {
            None => Err("it does not bear an instance's mark".to_owned()),
            Some(Err(_)) => Err("its mark is not text".to_owned()),
            Some(Ok(mark)) => mark.parse::<Mark>(),
        };
        let mark = mark.map_err(|reason| UpstreamError::Unmarked(response.status(), reason))?;
        let checked = self.served.check(&self.name, mark.map);
        checked.map_err(UpstreamError::OtherMap)?;
        Ok(response)
    }
}

#[async_trait]
impl LoggingApi for LoggingClient {
    async fn put(&self, batch: Batch) -> Result<Vec<PutResult>, UpstreamError> {
        let request = self
            .http
            .post(self.base.clone())
            .header(header::CONTENT_TYPE, "application/json")
            .body(batch.into_body());
        let response = require_success(self.send(request).await?).await?;
        let body = read_body(response, MAX_OUTCOMES_BODY).await?;
        serde_json::from_slice(&body).map_err(garbled)
    }

    async fn read(
        &self,
        query: ReadQuery,
        request_id: Option<&str>,
    ) -> Result<ReadAnswer, UpstreamError> {
        let mut request = self.http.get(self.base.clone()).query(&query);
        if let Some(id) = request_id {
            request = request.header(REQUEST_ID, id);
        }
        let request = request.build()?.try_into()?;
        let asked = async {
            let response = self.streams.request(request).await?;
            let response = Response::from(response.map(Body::wrap));
            require_success(self.check(response)?).await
        };
        let asked = timeout(self.timeout, asked).await;
        let response = asked.unwrap_or(Err(UpstreamError::TimedOut))?;
        let end = response.headers().get(READ_END).map(|end| {
            let end = Uuid::try_parse_ascii(end.as_bytes());
            end.map_err(|_| UpstreamError::Garbled("its end is no UUID".to_owned()))
        });
        let patience = self.timeout;
        let chunks = stream::try_unfold(response, move |mut response| async move {
            let chunk = timeout(patience, response.chunk()).await;
            let chunk = chunk.map_err(|_| UpstreamError::TimedOut)??;
            Ok(chunk.map(|chunk| (chunk, response)))
        });
        Ok(ReadAnswer {
            end: end.transpose()?,
            chunks: chunks.boxed(),
        })
    }

    async fn get(&self, uuid: Uuid) -> Result<Option<Entry>, UpstreamError> {
        let mut url = self.base.clone();
        url.set_path(&uuid.to_string());
        let response = self.send(self.http.get(url)).await?;
        if response.status() == StatusCode::NOT_FOUND {
            return Ok(None);
        }
        let body = read_body(require_success(response).await?, MAX_ENTRY_BODY).await?;
        serde_json::from_slice(&body).map(Some).map_err(garbled)
    }

    async fn ready(&self) -> Result<(), UpstreamError> {
        let mut url = self.base.clone();
        url.set_path("readyz");
        require_success(self.send(self.http.get(url)).await?).await?;
        Ok(())
    }
}

/// The messages service.
#[derive(Clone, Debug)]
pub struct MessagesClient {
    http: Client,
    base: Url,
    timeout: Duration,
}

impl MessagesClient {
    pub fn new(http: Client, base: Url, timeout: Duration) -> Self {
        Self {
            http,
            base,
            timeout,
        }
    }

    /// Its reply, whatever that is.
    pub async fn reply(&self, request_id: Option<&str>) -> Result<String, UpstreamError> {
        let mut request = self.http.get(self.base.clone()).timeout(self.timeout);
        if let Some(id) = request_id {
            request = request.header(REQUEST_ID, id);
        }
        let response = require_success(request.send().await?).await?;
        let body = read_body(response, MAX_REPLY_BYTES).await?;
        String::from_utf8(body.into())
            .map_err(|_| UpstreamError::Garbled("the reply is not UTF-8".to_owned()))
    }
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
