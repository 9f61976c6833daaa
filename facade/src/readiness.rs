//! Readiness: the facade is ready while any logging instance is.

use std::time::Duration;

use common::health::Check;
use futures_util::StreamExt;
use futures_util::future::join_all;
use futures_util::stream::FuturesUnordered;
use tokio::sync::Mutex;
use tokio::time::Instant;

use crate::client::MessagesClient;
use crate::pool::Pool;
use crate::upstream::UpstreamError;

/// How long an answer is reused, so that many probes cost the instances one request.
const FRESH: Duration = Duration::from_secs(1);

/// The last answer of the instances; the lock is held while they are asked again.
#[derive(Debug, Default)]
pub(crate) struct Readiness {
    last: Mutex<Option<(Instant, Result<(), String>)>>,
}

impl Readiness {
    /// Asks all instances in parallel and returns when the first is ready.
    pub(crate) async fn any_instance(&self, pool: &Pool) -> Result<(), String> {
        let mut last = self.last.lock().await;
        if let Some((at, ready)) = &*last
            && at.elapsed() < FRESH
        {
            return ready.clone();
        }
        let instances = pool.instances();
        let asked = instances.iter().map(async |instance| {
            let ready = instance.client.ready().await;
            ready.map_err(|error| format!("{} {error}", instance.name))
        });
        let mut asked: FuturesUnordered<_> = asked.collect();
        let mut reasons = Vec::new();
        let ready = loop {
            match asked.next().await {
                Some(Ok(())) => break Ok(()),
                Some(Err(reason)) => reasons.push(reason),
                None => break Err(none_is_ready(&reasons)),
            }
        };
        *last = Some((Instant::now(), ready.clone()));
        ready
    }
}

pub(crate) async fn check_all(
    pool: &Pool,
    messages: &MessagesClient,
) -> (Result<(), String>, Vec<Check>) {
    let instances = pool.instances();
    let asked = instances.iter().map(async |instance| {
        let name = format!("logging {}", instance.name);
        check(name, instance.client.ready().await)
    });
    let (mut checks, messages) = tokio::join!(join_all(asked), messages.reply(None));
    let is_any_ready = checks.iter().any(|check| check.ok);
    let reasons = checks.iter().map(|check| {
        let name = check.name.trim_start_matches("logging ");
        format!("{name} {}", check.detail)
    });
    let ready = match is_any_ready {
        true => Ok(()),
        false => Err(none_is_ready(&reasons.collect::<Vec<_>>())),
    };
    checks.push(check("messages".to_owned(), messages.map(|_| ())));
    (ready, checks)
}

fn none_is_ready(reasons: &[String]) -> String {
    let reasons = match reasons.is_empty() {
        true => "none is in DNS".to_owned(),
        false => reasons.join("; "),
    };
    format!("no logging instance can read and store; start one, or correct --logging: {reasons}")
}

fn check(name: String, asked: Result<(), UpstreamError>) -> Check {
    Check {
        name,
        ok: asked.is_ok(),
        detail: match asked {
            Ok(()) => "answers".to_owned(),
            Err(error) => error.to_string(),
        },
    }
}
