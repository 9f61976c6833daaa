//! What an instance finds out about itself once a second, for all who ask: whether the map can be read and
//! written and the log be printed, and what the map's members hold. `/readyz` tells the first.

use std::sync::{Arc, Weak};
use std::time::Duration;

use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::response::Response;
use common::api::MapStats;
use common::health::{Check, Health, ReadinessQuery, check_running, readiness};
use common::output;
use common::problem::Problem;
use tokio::time::{Instant, sleep_until};

use crate::state::App;

/// The interval of the checks.
const INTERVAL: Duration = Duration::from_secs(1);

/// The interval while the instance is not ready, so that the end of that is known soon.
const UNREADY_INTERVAL: Duration = Duration::from_millis(200);

/// The result of one check.
#[derive(Debug)]
pub(crate) struct Report {
    pub(crate) health: Health,
    pub(crate) map: MapStats,
}

/// Checks until the state is dropped.
pub(crate) async fn keep_checking(app: Weak<App>) {
    while let Some(app) = app.upgrade() {
        let began = Instant::now();
        let report = check(&app).await;
        let interval = match report.health.not_ready {
            None => INTERVAL,
            Some(_) => UNREADY_INTERVAL,
        };
        app.report.publish(report);
        drop(app);
        sleep_until(began + interval).await;
    }
}

async fn check(app: &App) -> Report {
    let (health, map) = tokio::join!(app.map.health(), app.map.stats());
    let (reason, output) = (health.not_ready, check_output(app.store_timeout));
    let mut checks = vec![Check {
        name: "map".to_owned(),
        ok: reason.is_none(),
        detail: reason.clone().unwrap_or("answers".to_owned()),
    }];
    let failed = |name: String, detail: &str| Check {
        name,
        ok: false,
        detail: detail.to_owned(),
    };
    let output_check = output.as_ref().err();
    let output_check = output_check.map(|detail| failed("output".to_owned(), detail));
    let mut add = |check: Check| {
        if check.ok || checks.iter().all(|known| known.detail != check.detail) {
            checks.push(check);
        }
    };
    health
        .checks
        .into_iter()
        .chain(output_check)
        .for_each(&mut add);
    for member in &map.members {
        // What failed a check gives no numbers for the same reason.
        let is_known = |known: &Check| !known.ok && known.name.ends_with(&member.member);
        if let Some(problem) = &member.problem
            && !checks.iter().any(is_known)
        {
            checks.push(failed(format!("member {}", member.member), problem));
        }
    }
    let not_ready = reason.or(output.err());
    Report {
        health: Health { not_ready, checks },
        map,
    }
}

/// Ready while the map is and the log moves; `?verbose` also lists the map's parts.
pub(crate) async fn readyz(
    State(app): State<Arc<App>>,
    query: Result<Query<ReadinessQuery>, QueryRejection>,
) -> Result<Response, Problem> {
    let Query(query) = query?;
    let report = app.report.get().await;
    let Health { not_ready, checks } = &report.health;
    let ready = check_running(&app.stop).and(not_ready.clone().map_or(Ok(()), Err));
    Ok(if query.is_verbose() {
        readiness(ready, checks)
    } else {
        readiness(ready, &[])
    })
}

/// Checks that standard output takes the log's lines: an entry is acknowledged only after its line is printed.
///
/// # Errors
/// A sentence for the caller, when it has taken nothing for `store_timeout`.
pub(crate) fn check_output(store_timeout: Duration) -> Result<(), String> {
    if output::stuck_for() > store_timeout {
        Err(
            "standard output takes no line of the log, and no entry is stored without its line: \
             unblock what reads it, or free its disk"
                .to_owned(),
        )
    } else {
        Ok(())
    }
}
