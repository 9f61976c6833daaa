//! The logging instances: who is up, uniform random choice among them, and what to try next when
//! one fails. Failover lives here and nowhere else.
//!
//! Only a refused connection or a timeout makes the pool skip an instance; what an instance
//! answers about an entry, or its readiness, does not.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use reqwest::Url;

use crate::batcher::Batcher;
use crate::client::{LoggingClient, UpstreamError};

/// How often an instance that is down is asked whether it is back.
const PROBE_INTERVAL: Duration = Duration::from_millis(200);

/// One logging instance with its batcher.
#[derive(Debug)]
pub struct Instance {
    /// `HOST:PORT`, as callers see it in `x-logging-instance`.
    pub name: String,
    pub client: LoggingClient,
    pub batcher: Batcher,
    pub health: Arc<Health>,
}

/// Whether an instance is believed to serve. It is up until a request finds otherwise.
#[derive(Debug)]
pub struct Health {
    name: String,
    client: LoggingClient,
    is_up: AtomicBool,
}

impl Health {
    pub fn is_up(&self) -> bool {
        self.is_up.load(Ordering::Acquire)
    }

    /// Marks the instance down if the error says that it does not serve, and probes it from then
    /// on until it does.
    pub fn note_failure(self: &Arc<Self>, error: &UpstreamError) {
        let serves = match error {
            UpstreamError::Unreachable(_) | UpstreamError::TimedOut => false,
            UpstreamError::Lost(_) | UpstreamError::Status(..) | UpstreamError::Garbled(_) => true,
        };
        if serves || !self.is_up.swap(false, Ordering::AcqRel) {
            return;
        }
        tracing::warn!(instance = self.name, %error, "a logging instance is down");
        tokio::spawn(self.clone().probe_until_up());
    }

    async fn probe_until_up(self: Arc<Self>) {
        loop {
            tokio::time::sleep(PROBE_INTERVAL).await;
            if self.client.probe().await.is_ok() {
                break;
            }
        }
        self.is_up.store(true, Ordering::Release);
        tracing::info!(instance = self.name, "a logging instance is up again");
    }
}

/// All logging instances.
#[derive(Debug)]
pub struct Pool {
    instances: Vec<Arc<Instance>>,
    random: Mutex<StdRng>,
}

impl Pool {
    /// A pool of the instances at these addresses; `random` decides who gets what.
    pub fn new(
        http: &reqwest::Client,
        urls: &[Url],
        try_timeout: Duration,
        random: StdRng,
    ) -> Self {
        let instances = urls.iter().map(|url| {
            let client = LoggingClient::new(http.clone(), url.clone(), try_timeout);
            let name = host_and_port(url);
            let health = Arc::new(Health {
                name: name.clone(),
                client: client.clone(),
                is_up: AtomicBool::new(true),
            });
            let batcher = Batcher::start(client.clone(), health.clone());
            Arc::new(Instance {
                name,
                client,
                batcher,
                health,
            })
        });
        Self {
            instances: instances.collect(),
            random: Mutex::new(random),
        }
    }

    /// All instances, up or down.
    pub fn instances(&self) -> &[Arc<Instance>] {
        &self.instances
    }

    /// One of the instances that are up and not in `tried`, each equally likely. If there is none,
    /// one of those that are down: it may have come back unnoticed.
    pub fn choose(&self, tried: &[Arc<Instance>]) -> Option<Arc<Instance>> {
        let is_untried =
            |instance: &&Arc<Instance>| !tried.iter().any(|tried| Arc::ptr_eq(tried, instance));
        let (up, down): (Vec<_>, Vec<_>) = self
            .instances
            .iter()
            .filter(is_untried)
            .partition(|instance| instance.health.is_up());
        let candidates = if up.is_empty() { down } else { up };
        let mut random = self.random.lock().unwrap_or_else(PoisonError::into_inner);
        candidates
            .choose(&mut *random)
            .map(|chosen| Arc::clone(chosen))
    }

    /// Asks instances in random order until one answers, each at most once.
    ///
    /// # Errors
    /// The last instance's error when none answered.
    pub async fn ask<T, F>(&self, question: impl Fn(LoggingClient) -> F) -> Result<T, UpstreamError>
    where
        F: Future<Output = Result<T, UpstreamError>>,
    {
        let mut tried = Vec::new();
        let mut failure = None;
        while let Some(instance) = self.choose(&tried) {
            match question(instance.client.clone()).await {
                Ok(answer) => return Ok(answer),
                Err(error) => {
                    instance.health.note_failure(&error);
                    failure = Some(error);
                }
            }
            tried.push(instance);
        }
        Err(failure.expect("the configuration names at least one instance"))
    }
}

fn host_and_port(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    let port = url.port_or_known_default().unwrap_or_default();
    format!("{host}:{port}")
}
