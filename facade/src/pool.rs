//! The logging instances: who is up, uniform random choice among them, and what to try next when
//! one fails. Failover lives here and nowhere else.
//!
//! Only a refused connection or a timeout makes the pool skip an instance; what an instance
//! answers about an entry, or its readiness, does not.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, Weak};
use std::time::Duration;

use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use tokio::time::{sleep, timeout};
use tower::retry::budget::TpsBudget;

use crate::batcher::Batcher;
use crate::client::{Logging, UpstreamError};

/// How often an instance that is down is asked whether it is back.
const PROBE_INTERVAL: Duration = Duration::from_millis(200);

/// Pause before all instances are asked again for what none of them gave, doubled each time up to
/// [`MAX_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const MAX_PAUSE: Duration = Duration::from_millis(500);

/// Repeats of POSTs may be this share of the POSTs of the last [`BUDGET_SPAN`], and
/// [`FREE_RETRIES_PER_SECOND`] besides: enough for the death of instances, not for a storm.
const RETRY_SHARE: f32 = 0.1;
const BUDGET_SPAN: Duration = Duration::from_secs(10);
const FREE_RETRIES_PER_SECOND: u32 = 10;

/// One logging instance with its batcher.
#[derive(Debug)]
pub struct Instance {
    /// `HOST:PORT`, as callers see it in `x-logging-instance`.
    pub name: String,
    pub client: Arc<dyn Logging>,
    pub batcher: Batcher,
    pub health: Arc<Health>,
}

impl Instance {
    /// An instance that is believed to be up. Its batcher ends when it has been dropped and what
    /// was queued is answered.
    fn new(name: String, client: Arc<dyn Logging>) -> Self {
        let health = Arc::new(Health {
            name: name.clone(),
            client: client.clone(),
            is_up: AtomicBool::new(true),
        });
        Self {
            name,
            batcher: Batcher::start(client.clone(), health.clone()),
            client,
            health,
        }
    }
}

/// Whether an instance is believed to serve. It is up until a request finds otherwise.
#[derive(Debug)]
pub struct Health {
    name: String,
    client: Arc<dyn Logging>,
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
        tokio::spawn(probe_until_up(Arc::downgrade(self)));
    }
}

/// Ends also when the instance is no longer one of the pool's.
async fn probe_until_up(health: Weak<Health>) {
    loop {
        sleep(PROBE_INTERVAL).await;
        let Some(health) = health.upgrade() else {
            return;
        };
        if health.client.probe().await.is_ok() {
            health.is_up.store(true, Ordering::Release);
            tracing::info!(instance = health.name, "a logging instance is up again");
            return;
        }
    }
}

/// All logging instances.
#[derive(Debug)]
pub struct Pool {
    members: RwLock<Vec<Member>>,
    random: Mutex<StdRng>,
    /// What POSTs may be repeated, so that trouble does not multiply the load.
    pub retries: TpsBudget,
}

/// An instance and the configured address that it was found under.
#[derive(Clone, Debug)]
struct Member {
    origin: String,
    instance: Arc<Instance>,
}

impl Pool {
    /// A pool without instances; `random` decides who gets what.
    pub fn new(random: StdRng) -> Self {
        Self {
            members: RwLock::default(),
            random: Mutex::new(random),
            retries: TpsBudget::new(BUDGET_SPAN, FREE_RETRIES_PER_SECOND, RETRY_SHARE),
        }
    }

    /// Makes these, by name, the instances that were found under `origin`. Those that were there
    /// already stay as they are; those that are missing get nothing new, and what they have is
    /// finished.
    pub fn set_instances(&self, origin: &str, found: Vec<(String, Arc<dyn Logging>)>) {
        let mut members = self.members.write().unwrap_or_else(PoisonError::into_inner);
        members.retain(|member| {
            let is_found = found.iter().any(|(name, _)| *name == member.instance.name);
            let stays = is_found || member.origin != origin;
            if !stays {
                tracing::info!(
                    instance = member.instance.name,
                    "a logging instance has vanished"
                );
            }
            stays
        });
        for (name, client) in found {
            if members.iter().any(|member| member.instance.name == name) {
                continue;
            }
            tracing::info!(instance = name, "a logging instance is known");
            members.push(Member {
                origin: origin.to_owned(),
                instance: Arc::new(Instance::new(name, client)),
            });
        }
    }

    /// All instances, up or down.
    pub fn instances(&self) -> Vec<Arc<Instance>> {
        let members = self.members.read().unwrap_or_else(PoisonError::into_inner);
        members
            .iter()
            .map(|member| member.instance.clone())
            .collect()
    }

    /// One of the instances that are up and not in `tried`, each equally likely. If there is none,
    /// one of those that are down: it may have come back unnoticed.
    pub fn choose(&self, tried: &[Arc<Instance>]) -> Option<Arc<Instance>> {
        let is_untried =
            |instance: &Arc<Instance>| !tried.iter().any(|tried| Arc::ptr_eq(tried, instance));
        let instances = self.instances().into_iter().filter(is_untried);
        let (up, down): (Vec<_>, Vec<_>) = instances.partition(|one| one.health.is_up());
        let candidates = if up.is_empty() { down } else { up };
        let mut random = self.random.lock().unwrap_or_else(PoisonError::into_inner);
        candidates.choose(&mut *random).cloned()
    }

    /// Asks instances in random order until one answers, each at most once.
    ///
    /// # Errors
    /// When none answered: what one that serves said, or else the last one's error.
    pub async fn ask<T, F>(
        &self,
        question: impl Fn(Arc<dyn Logging>) -> F,
    ) -> Result<T, UpstreamError>
    where
        F: Future<Output = Result<T, UpstreamError>>,
    {
        let mut tried = Vec::new();
        let mut failure = UpstreamError::Unreachable("no logging instance is known".into());
        while let Some(instance) = self.choose(&tried) {
            match question(instance.client.clone()).await {
                Ok(answer) => return Ok(answer),
                Err(error) => {
                    instance.health.note_failure(&error);
                    if !matches!(failure, UpstreamError::Status(..)) {
                        failure = error;
                    }
                }
            }
            tried.push(instance);
        }
        Err(failure)
    }

    /// Asks all instances again and again until one answers, for as long as the errors are worth
    /// waiting and at most for `patience`.
    ///
    /// # Errors
    /// As [`Self::ask`], of the last time.
    pub async fn ask_patiently<T, F>(
        &self,
        patience: Duration,
        is_worth_waiting: impl Fn(&UpstreamError) -> bool,
        question: impl Fn(Arc<dyn Logging>) -> F,
    ) -> Result<T, UpstreamError>
    where
        F: Future<Output = Result<T, UpstreamError>>,
    {
        let mut failure = UpstreamError::TimedOut;
        let asking = async {
            let mut pause = FIRST_PAUSE;
            loop {
                match self.ask(&question).await {
                    Err(error) if is_worth_waiting(&error) => failure = error,
                    answered => return answered,
                }
                sleep(pause).await;
                pause = (pause * 2).min(MAX_PAUSE);
            }
        };
        let asked = timeout(patience, asking).await;
        asked.unwrap_or_else(|_| Err(failure))
    }
}

/// Whether an instance serves, but its map cannot be read now, as while a failover lasts.
pub fn is_unavailable(error: &UpstreamError) -> bool {
    matches!(error, UpstreamError::Status(status, _) if status.as_u16() == 503)
}
