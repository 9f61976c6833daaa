//! The logging instances: the uniform random choice among healthy ones, and the failover of reads.
//! `delivery` has the retries of a POST.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use parking_lot::{Mutex, RwLock};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use smallvec::SmallVec;
use tokio::sync::Notify;
use tokio::time;
use tower::retry::budget::TpsBudget;
use uuid::Uuid;

use crate::backoff::Backoff;
use crate::batcher::Batcher;
use crate::client::LoggingApi;
use crate::health::Health;
use crate::identifiers::Identifiers;
use crate::names::{Names, Naming};
use crate::served_map::ServedMap;
use crate::upstream::{UpstreamError, say_once};

/// Pause after a read failed on every instance; it doubles up to [`MAX_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const MAX_PAUSE: Duration = Duration::from_millis(500);

/// The retry budget: retries and hedges may be this share of the POSTs of the last [`BUDGET_SPAN`],
/// plus [`FREE_RETRIES_PER_SECOND`]. Above 500 POSTs a second that is less than a tenth in all, so
/// retries do not multiply overload. (The budget rounds the share to one retry for 12 POSTs.)
const RETRY_SHARE: f32 = 0.08;
const BUDGET_SPAN: Duration = Duration::from_secs(10);
const FREE_RETRIES_PER_SECOND: u32 = 10;

#[derive(Debug)]
pub struct Instance {
    /// As log, errors and statistics name it.
    pub name: String,
    /// `HOST:PORT`, as callers see it in `x-logging-instance`.
    pub address: String,
    pub client: Arc<dyn LoggingApi>,
    pub batcher: Batcher,
    pub health: Arc<Health>,
}

impl Instance {
    /// An instance that counts as healthy until a request fails.
    fn new(
        name: String,
        address: String,
        client: Arc<dyn LoggingApi>,
        readmitted: Arc<Notify>,
        served_map: Arc<ServedMap>,
    ) -> Self {
        let health = Health::start(
            name.clone(),
            address.clone(),
            client.clone(),
            readmitted,
            served_map,
        );
        Self {
            name,
            address,
            batcher: Batcher::start(client.clone(), health.clone()),
            client,
            health,
        }
    }
}

#[derive(Debug)]
pub struct Pool {
    members: RwLock<Vec<Member>>,
    names: Mutex<Names>,
    random: Mutex<StdRng>,
    /// The retry budget of POSTs.
    pub retry_budget: TpsBudget,
    /// Wakes messages that wait for a healthy instance.
    readmitted: Arc<Notify>,
    pub served_map: Arc<ServedMap>,
    identifiers: Identifiers,
}

/// An instance and the configured addresses that resolve to it.
#[derive(Clone, Debug)]
struct Member {
    origins: BTreeSet<String>,
    instance: Arc<Instance>,
}

impl Pool {
    /// An empty pool of instances of one map; `random` chooses among them.
    pub fn new(random: StdRng, served_map: ServedMap) -> Self {
        Self {
            members: RwLock::default(),
            names: Mutex::default(),
            random: Mutex::new(random),
            retry_budget: TpsBudget::new(BUDGET_SPAN, FREE_RETRIES_PER_SECOND, RETRY_SHARE),
            readmitted: Arc::default(),
            served_map: Arc::new(served_map),
            identifiers: Identifiers::default(),
        }
    }

    /// A UUID for a message; `None` before an instance has told the map's clock.
    pub fn next_uuid(&self) -> Option<Uuid> {
        let now = self.served_map.clock.now()?;
        Some(self.identifiers.next(now))
    }

    /// The map's clock; before an instance has told it, this machine's.
    pub(crate) fn clock(&self) -> SystemTime {
        let clock = self.served_map.clock.now();
        clock.unwrap_or_else(SystemTime::now)
    }

    /// Sets the instances, by `HOST:PORT`, behind `origin`. The pool is the union of all origins. An
    /// instance already in the pool keeps its state. An instance that is behind no origin any more
    /// gets no new requests and finishes its queue.
    pub fn set_instances(
        &self,
        origin: &str,
        naming: &Naming,
        found: Vec<(String, Arc<dyn LoggingApi>)>,
    ) {
        let mut members = self.members.write();
        let mut names = self.names.lock();
        for (address, client) in &found {
            let mut known = members.iter_mut();
            if let Some(member) = known.find(|member| member.instance.address == *address) {
                member.origins.insert(origin.to_owned());
                continue;
            }
            let name = names.take(naming, address);
            tracing::info!(address, "a logging instance is configured: {name}");
            members.push(Member {
                origins: BTreeSet::from([origin.to_owned()]),
                instance: Arc::new(Instance::new(
                    name,
                    address.clone(),
                    client.clone(),
                    self.readmitted.clone(),
                    self.served_map.clone(),
                )),
            });
        }
        members.retain_mut(|member| {
            let Instance { name, address, .. } = &*member.instance;
            if found.iter().all(|(found, _)| found != address) {
                member.origins.remove(origin);
            }
            if !member.origins.is_empty() {
                return true;
            }
            tracing::info!(address, "a logging instance is no longer in DNS: {name}");
            names.leave(name);
            self.served_map.forget(address);
            false
        });
        self.readmitted.notify_waiters();
    }

    /// All instances, up or down.
    pub fn instances(&self) -> Vec<Arc<Instance>> {
        let members = self.members.read();
        members
            .iter()
            .map(|member| member.instance.clone())
            .collect()
    }

    /// A random healthy instance that is not overloaded, each equally likely, for a first try.
    pub fn choose_with_room(&self) -> Option<Arc<Instance>> {
        self.pick(|instance| instance.health.is_up() && instance.batcher.has_room())
    }

    /// A random healthy instance that is not in `tried`, each equally likely.
    pub fn choose_up(&self, tried: &[Arc<Instance>]) -> Option<Arc<Instance>> {
        self.pick(|instance| instance.health.is_up() && !is_among(tried, instance))
    }

    /// As [`Self::choose_up`]; if there is none, an unhealthy instance, which may have recovered.
    fn choose(&self, tried: &[Arc<Instance>]) -> Option<Arc<Instance>> {
        self.choose_up(tried)
            .or_else(|| self.pick(|instance| !is_among(tried, instance)))
    }

    fn pick(&self, is_candidate: impl Fn(&Instance) -> bool) -> Option<Arc<Instance>> {
        let members = self.members.read();
        let instances = members.iter().map(|member| &member.instance);
        let candidates = instances.filter(|one| is_candidate(one));
        let candidates: SmallVec<[_; 8]> = candidates.collect();
        let mut random = self.random.lock();
        candidates.choose(&mut *random).copied().cloned()
    }

    pub fn is_any_up(&self) -> bool {
        self.instances().iter().any(|one| one.health.is_up())
    }

    /// How long no instance has been up; zero while one is.
    pub(crate) fn down_for(&self) -> Duration {
        let instances = self.instances();
        let times = instances.iter().map(|one| one.health.down_for());
        times.min().unwrap_or(Duration::MAX)
    }

    pub async fn any_up(&self) {
        loop {
            let readmitted = self.readmitted.notified();
            if self.is_any_up() {
                return;
            }
            readmitted.await;
        }
    }

    /// Why no instance serves.
    pub fn down_reasons(&self) -> String {
        let instances = self.instances();
        let reasons = instances.iter();
        let reasons =
            reasons.filter_map(|one| Some((one.name.as_str(), one.health.down_reason()?)));
        let reasons: Vec<_> = reasons.collect();
        if instances.is_empty() {
            "no logging instance is in DNS".to_owned()
        } else if reasons.len() < instances.len() {
            "no logging instance could answer; see /readyz?verbose".to_owned()
        } else {
            let reasons = say_once(reasons, instances.len()).join("; ");
            format!("no logging instance is up: {reasons}")
        }
    }

    /// Asks instances in random order until one answers, each at most once.
    ///
    /// # Errors
    /// When none answered: the error after which a retry is most likely to succeed.
    pub async fn ask<T, F>(&self, question: impl Fn(Arc<Instance>) -> F) -> Result<T, UpstreamError>
    where
        F: Future<Output = Result<T, UpstreamError>>,
    {
        self.served_map.all_asked().await;
        let began = time::Instant::now();
        let mut failures = Vec::new();
        let mut tried = Vec::new();
        let mut failure = UpstreamError::Unreachable("no logging instance is in DNS".into());
        while let Some(instance) = self.choose(&tried) {
            match question(instance.clone()).await {
                Ok(answer) => {
                    if !failures.is_empty() {
                        let after_ms = began.elapsed().as_millis();
                        let why = failures.join("; ");
                        let name = &instance.name;
                        tracing::info!(after_ms, why, "a GET was continued on {name}");
                    }
                    return Ok(answer);
                }
                Err(error) => {
                    if is_failure_of_instance(&error) {
                        instance.health.note_failure(&error);
                    }
                    failures.push(format!("{} {error}", instance.name));
                    if retry_rank(&error) >= retry_rank(&failure) {
                        failure = error;
                    }
                }
            }
            tried.push(instance);
        }
        Err(failure)
    }

    /// Repeats [`Self::ask`], with backoff, while `may_wait` accepts its error and until `timeout`.
    ///
    /// # Errors
    /// The last error of [`Self::ask`].
    pub async fn ask_until_deadline<T, F>(
        &self,
        timeout: Duration,
        may_wait: impl Fn(&UpstreamError) -> bool,
        question: impl Fn(Arc<Instance>) -> F,
    ) -> Result<T, UpstreamError>
    where
        F: Future<Output = Result<T, UpstreamError>>,
    {
        let mut failure = UpstreamError::TimedOut;
        let asking = async {
            let mut backoff = Backoff::new(FIRST_PAUSE, MAX_PAUSE);
            loop {
                match self.ask(&question).await {
                    Err(error) if may_wait(&error) => failure = error,
                    answered => return answered,
                }
                backoff.pause().await;
            }
        };
        let asked = time::timeout(timeout, asking).await;
        asked.unwrap_or_else(|_| Err(failure))
    }
}

fn is_among(tried: &[Arc<Instance>], instance: &Instance) -> bool {
    tried.iter().any(|tried| std::ptr::eq(&**tried, instance))
}

/// Whether a read's error makes the instance unhealthy. An error of its map or of one damaged entry
/// does not.
fn is_failure_of_instance(error: &UpstreamError) -> bool {
    match error {
        UpstreamError::Unreachable(_)
        | UpstreamError::TimedOut
        | UpstreamError::Lost(_)
        | UpstreamError::Unmarked(..)
        | UpstreamError::Unauthorized(_)
        | UpstreamError::OtherMap(_) => true,
        UpstreamError::Status(..) | UpstreamError::Garbled(_) => false,
    }
}

/// Whether a read that has not begun is retried: an instance hangs, or its map is unavailable, as
/// during a failover. When all instances are unreachable or refuse, the read fails at once.
pub fn is_worth_waiting(error: &UpstreamError) -> bool {
    error.is_map_unavailable() || matches!(error, UpstreamError::TimedOut)
}

/// Ranks errors by how likely a retry succeeds, from least to most: the instance is unreachable or
/// wrong, it refuses, it hangs, its map is unavailable.
fn retry_rank(error: &UpstreamError) -> u8 {
    match error {
        UpstreamError::Unreachable(_)
        | UpstreamError::Lost(_)
        | UpstreamError::Unmarked(..)
        | UpstreamError::Unauthorized(_)
        | UpstreamError::Garbled(_) => 0,
        UpstreamError::Status(..) if error.is_map_unavailable() => 3,
        UpstreamError::Status(..) | UpstreamError::OtherMap(_) => 1,
        UpstreamError::TimedOut => 2,
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;
    use crate::client::{Clients, LoggingClient};

    fn addresses(pool: &Pool) -> Vec<String> {
        let instances = pool.instances();
        instances.iter().map(|one| one.address.clone()).collect()
    }

    #[tokio::test]
    async fn pool_is_the_union_of_what_each_name_has() {
        let pool = Pool::new(StdRng::seed_from_u64(1), ServedMap::default());
        let clients = Clients::new(Duration::from_secs(1), None, None).expect("a client");
        let found = |at: &str| {
            let address = "127.0.0.1:9".parse().expect("an address");
            let served = pool.served_map.clone();
            let client = LoggingClient::new(clients.clone(), address, Duration::ZERO, served);
            (at.to_owned(), Arc::new(client) as Arc<dyn LoggingApi>)
        };
        pool.set_instances(
            "first",
            &Naming::default(),
            vec![found("shared"), found("own")],
        );
        pool.set_instances("second", &Naming::default(), vec![found("shared")]);
        pool.set_instances("first", &Naming::default(), vec![found("other")]);
        assert_eq!(addresses(&pool), ["shared", "other"]);
        pool.set_instances("second", &Naming::default(), vec![found("other")]);
        assert_eq!(addresses(&pool), ["other"]);
    }
}
