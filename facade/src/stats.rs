//! `GET /stats`: the map's members and their total, the logging instances, and this facade. The console
//! shows the same.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use common::api::{InstanceStats, MapStats, MemberStats, OutcomeCounts, nearly_full, timestamp};
use common::json::JsonLine;
use common::problem::Problem;
use futures_util::future::join_all;
use serde::Serialize;
use tokio::time::timeout;
use utoipa::ToSchema;

use crate::counters::FacadeStats;
use crate::error::too_many;
use crate::pool::Instance;
use crate::state::App;
use crate::upstream::UpstreamError;

/// How long an instance may take; it gives each member of its map half of that.
const INSTANCE_TIMEOUT: Duration = Duration::from_millis(800);

/// The statistics of the system.
#[derive(Serialize, ToSchema)]
pub(crate) struct Stats {
    at: String,
    /// As the instance sees it that reached most members; null while no instance answers.
    map: Option<MapRows>,
    instances: Vec<InstanceRow>,
    facade: FacadeStats,
    problems: Vec<String>,
}

/// The map: its members and their total.
#[derive(Serialize, ToSchema)]
struct MapRows {
    #[serde(flatten)]
    map: MapStats,
    total: Total,
}

/// The sums over the members that answered.
#[derive(Default, Serialize, ToSchema)]
struct Total {
    entries: u64,
    gets: u64,
    puts: u64,
    entry_memory_bytes: u64,
    backups: u64,
    backup_memory_bytes: u64,
    /// Only when it is false: a member is down, or a partition has no primary.
    #[serde(skip_serializing_if = "Option::is_none")]
    complete: Option<bool>,
}

/// A row for a logging instance; one that does not answer has no numbers.
#[derive(Serialize, ToSchema)]
struct InstanceRow {
    instance: String,
    up: bool,
    /// Since when it is up or down, as this facade sees it.
    since: String,
    /// The start of its process, from which its numbers count.
    counts_since: Option<String>,
    version: Option<String>,
    engine: Option<String>,
    received: Option<u64>,
    /// Its part of the entries that all instances received.
    share: Option<f64>,
    outcomes: Option<OutcomeCounts>,
    in_flight: Option<u64>,
    put_p50_ms: Option<f64>,
    put_p99_ms: Option<f64>,
}

pub(crate) async fn show(State(app): State<Arc<App>>) -> Result<Response, Problem> {
    Ok(JsonLine(collect(&app).await?).into_response())
}

/// Asks all instances at once; one that does not answer in time is a row without numbers.
///
/// # Errors
/// 503 while too many requests for statistics are answered.
pub(crate) async fn collect(app: &App) -> Result<Stats, Problem> {
    let permit = app.statistics.try_acquire();
    let _permit = permit.map_err(|_| too_many("requests for statistics"))?;
    let instances = app.pool.instances();
    let asked = instances.iter().map(async |instance| {
        let answer = timeout(INSTANCE_TIMEOUT, instance.client.stats()).await;
        answer.unwrap_or(Err(UpstreamError::TimedOut))
    });
    let answers = join_all(asked).await;
    let mut problems: Vec<String> = instances
        .iter()
        .zip(&answers)
        .filter_map(|(instance, answer)| {
            let error = answer.as_ref().err()?;
            Some(format!("logging {} {error}", instance.name))
        })
        .collect();
    let now = app.pool.clock();
    let answered: Vec<&InstanceStats> = answers.iter().flatten().collect();
    problems.extend(map_problems(&instances, &answers));
    let map = map_rows(&answered, &mut problems);
    let received: u64 = answered.iter().map(|stats| stats.received).sum();
    let rows = instances.iter().zip(&answers);
    Ok(Stats {
        at: timestamp(now),
        map,
        instances: rows
            .map(|(instance, answer)| {
                InstanceRow::new(instance, now, answer.as_ref().ok(), received)
            })
            .collect(),
        facade: app.counters.stats(now, app.followers.count()),
        problems,
    })
}

/// The problems that instances see in the map, each once, with the instances that see it.
fn map_problems(
    instances: &[Arc<Instance>],
    answers: &[Result<InstanceStats, UpstreamError>],
) -> impl Iterator<Item = String> {
    let mut seen_by: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (instance, answer) in instances.iter().zip(answers) {
        for problem in answer.iter().flat_map(|stats| &stats.map.problems) {
            seen_by.entry(problem).or_default().push(&instance.name);
        }
    }
    let lines = seen_by.into_iter();
    lines.map(|(problem, names)| format!("logging {}: {problem}", names.join(", ")))
}

fn map_rows(answered: &[&InstanceStats], problems: &mut Vec<String>) -> Option<MapRows> {
    let members_up = |stats: &&&InstanceStats| {
        let members = stats.map.members.iter();
        members.filter(|member| member.up).count()
    };
    let mut map = answered.iter().max_by_key(members_up)?.map.clone();
    let mut gets: BTreeMap<&str, u64> = BTreeMap::new();
    for member in answered.iter().flat_map(|stats| &stats.map.members) {
        *gets.entry(&member.member).or_default() += member.gets.unwrap_or(0);
    }
    let mut total = Total::default();
    let mut is_complete = map.problem.is_none();
    problems.extend(map.problem.take());
    map.problems.clear();
    for member in &mut map.members {
        if !member.up {
            is_complete = false;
            problems.push(format!("member {} does not answer", member.member));
            continue;
        }
        let memory = member.used_memory_bytes.zip(member.max_memory_bytes);
        if let Some(percent) = memory.and_then(|(used, most)| nearly_full(used, most)) {
            problems.push(format!(
                "member {} uses {percent} % of its memory, and refuses entries when it is full: raise its \
                 maxmemory, or add members",
                member.member
            ));
        }
        member.gets = gets.get(member.member.as_str()).copied();
        total.add(member);
    }
    total.complete = (!is_complete).then_some(false);
    Some(MapRows { map, total })
}

impl Total {
    fn add(&mut self, member: &MemberStats) {
        self.entries += member.entries.unwrap_or(0);
        self.gets += member.gets.unwrap_or(0);
        self.puts += member.puts.unwrap_or(0);
        self.entry_memory_bytes += member.entry_memory_bytes.unwrap_or(0);
        self.backups += member.backups.unwrap_or(0);
        self.backup_memory_bytes += member.backup_memory_bytes.unwrap_or(0);
    }
}

impl InstanceRow {
    fn new(
        instance: &Arc<Instance>,
        now: SystemTime,
        stats: Option<&InstanceStats>,
        received: u64,
    ) -> Self {
        Self {
            instance: instance.name.clone(),
            up: instance.health.is_up(),
            since: timestamp(now - instance.health.age()),
            counts_since: stats.map(|stats| stats.since.clone()),
            version: stats.map(|stats| stats.version.clone()),
            engine: stats.map(|stats| stats.map.engine.clone()),
            received: stats.map(|stats| stats.received),
            share: stats
                .filter(|_| received > 0)
                .map(|stats| (1000.0 * stats.received as f64 / received as f64).round() / 1000.0),
            outcomes: stats.map(|stats| stats.outcomes),
            in_flight: stats.map(|stats| stats.in_flight),
            put_p50_ms: stats.and_then(|stats| stats.put_p50_ms),
            put_p99_ms: stats.and_then(|stats| stats.put_p99_ms),
        }
    }
}
