//! The state of the whole system, collected once a second for everybody: the statistics and the readiness of all
//! instances, and whether the messages service answers. `/stats`, `/readyz`, the page and the gauges of `/metrics`
//! show the last collection; however often they are asked, instances and members are not.

use std::collections::HashMap;
use std::sync::{Arc, Weak};
use std::time::Duration;

use common::api::{InstanceStats, timestamp};
use common::health::{Check, Health};
use common::latest::Latest;
use futures_util::future::join_all;
use tokio::time::{Instant, sleep_until, timeout};

use crate::client::MessagesClient;
use crate::pool::{Instance, Pool};
use crate::stats::{InstanceRow, MapRows, MessagesRow};
use crate::upstream::{UpstreamError, named, say_once};

/// The interval of collections.
const INTERVAL: Duration = Duration::from_secs(1);

/// The interval while no instance is ready, so that the end of that is known soon.
const UNREADY_INTERVAL: Duration = Duration::from_millis(200);

/// How long a service may take: with [`INTERVAL`], one that does not answer is known within 2 s. An instance
/// answers from its own last check.
const ANSWER_TIMEOUT: Duration = Duration::from_millis(800);

/// What was found at one time.
#[derive(Clone, Debug)]
pub(crate) struct Collection {
    pub(crate) map: Option<MapRows>,
    pub(crate) instances: Vec<InstanceRow>,
    pub(crate) messages: MessagesRow,
    /// Everything that is wrong, each once.
    pub(crate) problems: Vec<String>,
    /// Of the facade: ready while an instance is.
    pub(crate) health: Health,
}

/// Collects until the pool is dropped.
pub(crate) async fn keep_collecting(
    pool: Weak<Pool>,
    messages: MessagesClient,
    latest: Arc<Latest<Collection>>,
) {
    let mut changes = Changes::default();
    while let Some(pool) = pool.upgrade() {
        let began = Instant::now();
        let collection = collect(&pool, &messages, &mut changes).await;
        let interval = match collection.health.not_ready {
            None => INTERVAL,
            Some(_) => UNREADY_INTERVAL,
        };
        latest.publish(collection);
        drop(pool);
        sleep_until(began + interval).await;
    }
}

/// The messages service among the instances, which have addresses.
const MESSAGES: &str = "messages";

/// Since when each service is up or down.
#[derive(Debug, Default)]
struct Changes(HashMap<String, (bool, String)>);

impl Changes {
    fn since(&mut self, service: &str, is_up: bool, now: &str) -> String {
        let known = self.0.get(service).filter(|(was_up, _)| *was_up == is_up);
        let since = known.map_or_else(|| now.to_owned(), |(_, since)| since.clone());
        self.0.insert(service.to_owned(), (is_up, since.clone()));
        since
    }
}

/// An instance in a collection.
pub(crate) struct Seen<'a> {
    pub(crate) instance: &'a Instance,
    /// Its answer, if it gave one.
    pub(crate) stats: Option<&'a InstanceStats>,
    /// Why it gets no messages or gave no answer.
    pub(crate) down: Option<String>,
}

impl Seen<'_> {
    /// Why it does not serve, to follow its name.
    fn failure(&self) -> Option<String> {
        let not_ready = self.stats.and_then(|stats| stats.health.not_ready.as_ref());
        let not_ready = not_ready.map(|reason| format!("is not ready: {reason}"));
        self.down.clone().or(not_ready)
    }
}

async fn collect(pool: &Pool, messages: &MessagesClient, changes: &mut Changes) -> Collection {
    // Before, an instance would pass that serves another map than the others.
    let _ = timeout(ANSWER_TIMEOUT, pool.served_map.all_asked()).await;
    let instances = pool.instances();
    let asked = instances
        .iter()
        .map(|instance| answer_of(instance.client.stats()));
    let (answers, messages) = tokio::join!(join_all(asked), answer_of(messages.ready()));
    let seen: Vec<Seen<'_>> = instances
        .iter()
        .zip(&answers)
        .map(|(instance, answer)| Seen {
            instance,
            stats: answer.as_ref().ok(),
            down: match answer {
                Err(error) => Some(error.to_string()),
                Ok(_) => instance.health.down_reason(),
            },
        })
        .collect();
    let now = timestamp(pool.clock());
    let lately: u64 = seen
        .iter()
        .filter_map(|one| one.stats)
        .fold(0, |sum, stats| sum.saturating_add(stats.received_lately));
    let rows = seen.iter().map(|one| {
        let since = changes.since(&one.instance.address, one.down.is_none(), &now);
        InstanceRow::new(one, since, lately)
    });
    let rows: Vec<InstanceRow> = rows.collect();
    let is_seen = |address: &str| seen.iter().any(|one| one.instance.address == address);
    changes
        .0
        .retain(|service, _| service == MESSAGES || is_seen(service));
    let messages_row = MessagesRow {
        up: messages.is_ok(),
        since: changes.since(MESSAGES, messages.is_ok(), &now),
    };

    let failures = seen
        .iter()
        .filter_map(|one| Some((one.instance.name.as_str(), one.failure()?)));
    let mut problems = say_once(failures, seen.len());
    let mut checks: Vec<Check> = seen.iter().map(check).collect();
    if seen.is_empty() {
        problems.push("no logging instance is in DNS: start one, or correct --logging".to_owned());
    }
    let not_ready = (!checks.iter().any(|check| check.ok)).then(|| {
        let reasons = problems.join("; ");
        format!("no logging instance can read and store: {reasons}")
    });
    for (check, who) in own_checks(&seen) {
        if !check.ok {
            add_problem(&mut problems, &check, &who);
        }
        let name = format!("{who}{}", check.name);
        checks.push(Check { name, ..check });
    }
    checks.push(Check {
        name: MESSAGES.to_owned(),
        ok: messages.is_ok(),
        detail: match &messages {
            Ok(()) => "answers".to_owned(),
            Err(error) => error.to_string(),
        },
    });
    problems.extend(
        messages
            .err()
            .map(|error| format!("the messages service {error}")),
    );
    let map = MapRows::of(&seen);
    problems.extend(map.iter().flat_map(MapRows::nearly_full));
    Collection {
        map,
        instances: rows,
        messages: messages_row,
        problems,
        health: Health { not_ready, checks },
    }
}

async fn answer_of<T>(
    asked: impl Future<Output = Result<T, UpstreamError>>,
) -> Result<T, UpstreamError> {
    let answer = timeout(ANSWER_TIMEOUT, asked).await;
    answer.unwrap_or(Err(UpstreamError::TimedOut))
}

fn check(seen: &Seen<'_>) -> Check {
    let failure = seen.failure();
    let state = failure.as_deref().unwrap_or("is ready");
    Check {
        name: seen.instance.name.clone(),
        ok: failure.is_none(),
        detail: format!("{} {state}", seen.instance.address),
    }
}

/// The instances' own checks, equal ones once, each with those that report it unless all do.
fn own_checks(seen: &[Seen<'_>]) -> Vec<(Check, String)> {
    let answered: Vec<_> = seen
        .iter()
        .filter_map(|one| Some((one.instance, one.stats?)))
        .collect();
    let mut checks: Vec<(&Check, Vec<&str>)> = Vec::new();
    for (instance, stats) in &answered {
        for check in &stats.health.checks {
            match checks.iter_mut().find(|(known, _)| *known == check) {
                Some((_, names)) => names.push(&instance.name),
                None => checks.push((check, vec![&instance.name])),
            }
        }
    }
    let checks = checks.into_iter().map(|(check, names)| {
        let who = if names.len() == answered.len() {
            String::new()
        } else {
            format!("{}: ", named(&names, seen.len()))
        };
        (check.clone(), who)
    });
    checks.collect()
}

/// Adds what a check found, unless it was said already. The subject of the check is added where its text does not
/// name it.
fn add_problem(problems: &mut Vec<String>, check: &Check, who: &str) {
    let Check { name, detail, .. } = check;
    if problems
        .iter()
        .any(|problem| problem.ends_with(detail.as_str()))
    {
        return;
    }
    let subject = name.rsplit_once(' ').map(|(_, subject)| subject);
    let mut words = detail
        .split(' ')
        .map(|word| word.trim_end_matches([':', ',']));
    problems.push(
        if subject.is_none_or(|subject| words.any(|word| word == subject)) {
            format!("{who}{detail}")
        } else {
            format!("{who}{name}: {detail}")
        },
    );
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand::rngs::StdRng;

    use super::*;
    use crate::client::{Clients, LoggingApi, LoggingClient};
    use crate::names::Naming;
    use crate::served_map::ServedMap;

    #[tokio::test]
    async fn instance_that_left_is_forgotten() {
        let pool = Pool::new(StdRng::seed_from_u64(1), ServedMap::default());
        let clients = Clients::new(Duration::from_secs(1), None, None).expect("a client");
        let nobody = "http://127.0.0.1:9".parse().expect("a URL");
        let messages = MessagesClient::new(clients.clone(), nobody, Duration::from_secs(1));
        let mut changes = Changes::default();
        for (addresses, known) in [
            (&["127.0.0.1:9", "127.0.0.2:9"][..], 3),
            (&["127.0.0.2:9"], 2),
        ] {
            let found = addresses.iter().map(|address| {
                let at = address.parse().expect("an address");
                let served = pool.served_map.clone();
                let client = LoggingClient::new(clients.clone(), at, Duration::ZERO, served);
                let client = Arc::new(client) as Arc<dyn LoggingApi>;
                ((*address).to_owned(), client)
            });
            pool.set_instances("name", &Naming::default(), found.collect());
            collect(&pool, &messages, &mut changes).await;
            assert_eq!(changes.0.len(), known);
        }
    }
}
