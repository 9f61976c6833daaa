//! `GET /stats`: the map's members and their total, the logging instances, and this facade, as of the last
//! collection. The console shows the same.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use common::api::{MapStats, MemberStats, OutcomeCounts, nearly_full, timestamp};
use common::json::JsonLine;
use serde::Serialize;

use crate::collection::{Collection, Seen};
use crate::counters::FacadeStats;
use crate::state::App;

/// The statistics of the system.
#[derive(Serialize)]
pub(crate) struct Stats {
    at: String,
    /// As the instance sees it that reached most members; null while no instance answers.
    map: Option<MapRows>,
    instances: Vec<InstanceRow>,
    messages: MessagesRow,
    facade: FacadeStats,
    /// Everything that is wrong, also what `/readyz?verbose` calls degraded.
    problems: Vec<String>,
}

/// The map: its members and their total.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct MapRows {
    #[serde(flatten)]
    map: MapStats,
    total: Total,
    /// Whether every member and every partition was seen.
    #[serde(skip)]
    pub(crate) is_whole: bool,
}

/// The sums over the members and instances that answered.
#[derive(Clone, Debug, Default, Serialize)]
struct Total {
    entries: u64,
    gets: u64,
    puts: u64,
    entry_memory_bytes: u64,
    backups: u64,
    backup_memory_bytes: u64,
    /// Only when it is false: a member or an instance does not answer, or a partition has no primary.
    #[serde(skip_serializing_if = "Option::is_none")]
    complete: Option<bool>,
}

/// A row for a logging instance; one that does not answer has no numbers.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct InstanceRow {
    instance: String,
    pub(crate) name: String,
    /// Whether it gets messages and answered the last collection.
    pub(crate) up: bool,
    /// Whether it can read and store, by its own checks.
    pub(crate) ready: bool,
    /// Since when it is up or down, as this facade sees it.
    since: String,
    /// The start of its process, from which its numbers count.
    counts_since: Option<String>,
    version: Option<String>,
    engine: Option<String>,
    received: Option<u64>,
    /// Its part of the entries that all instances received in the last 10 s.
    share: Option<f64>,
    outcomes: Option<OutcomeCounts>,
    in_flight: Option<u64>,
    /// Of the last 5 minutes.
    put_p50_ms: Option<f64>,
    put_p99_ms: Option<f64>,
}

/// The messages service.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct MessagesRow {
    pub(crate) up: bool,
    pub(crate) since: String,
}

pub(crate) async fn show(State(app): State<Arc<App>>) -> Response {
    JsonLine(last(&app).await).into_response()
}

/// The last collection, and this facade's numbers of now.
pub(crate) async fn last(app: &App) -> Stats {
    let collected = app.collected.get().await;
    let Collection {
        map,
        instances,
        messages,
        problems,
        health: _,
    } = Collection::clone(&collected);
    let now = app.pool.clock();
    Stats {
        at: timestamp(now),
        map,
        instances,
        messages,
        facade: app.counters.stats(now, app.followers.count()),
        problems,
    }
}

impl MapRows {
    /// `None` when no instance answered.
    pub(crate) fn of(seen: &[Seen<'_>]) -> Option<Self> {
        let answered = || seen.iter().filter_map(|one| Some(&one.stats?.map));
        let members_up = |map: &&MapStats| map.members.iter().filter(|member| member.up).count();
        let mut map = answered().max_by_key(members_up)?.clone();
        let is_whole = map.problem.take().is_none() && map.members.iter().all(|member| member.up);
        let mut gets: BTreeMap<&str, u64> = BTreeMap::new();
        for member in answered().flat_map(|map| &map.members) {
            let sum = gets.entry(&member.member).or_default();
            *sum = sum.saturating_add(member.gets.unwrap_or(0));
        }
        let mut total = Total::default();
        for member in map.members.iter_mut().filter(|member| member.up) {
            member.gets = gets.get(member.member.as_str()).copied();
            total.add(member);
        }
        let is_complete = is_whole && seen.iter().all(|one| one.stats.is_some());
        total.complete = (!is_complete).then_some(false);
        Some(Self {
            map,
            total,
            is_whole,
        })
    }

    /// A sentence for each member that soon refuses entries.
    pub(crate) fn nearly_full(&self) -> impl Iterator<Item = String> {
        self.map.members.iter().filter_map(|member| {
            let percent = nearly_full(member.used_memory_bytes?, member.max_memory_bytes?)?;
            Some(format!(
                "member {} uses {percent} % of its memory, and refuses entries when it is full: raise its \
                 maxmemory, or add members",
                member.member
            ))
        })
    }
}

impl Total {
    fn add(&mut self, member: &MemberStats) {
        for (sum, number) in [
            (&mut self.entries, member.entries),
            (&mut self.gets, member.gets),
            (&mut self.puts, member.puts),
            (&mut self.entry_memory_bytes, member.entry_memory_bytes),
            (&mut self.backups, member.backups),
            (&mut self.backup_memory_bytes, member.backup_memory_bytes),
        ] {
            *sum = sum.saturating_add(number.unwrap_or(0));
        }
    }
}

impl InstanceRow {
    /// `lately` is what all instances received in the last 10 s.
    pub(crate) fn new(seen: &Seen<'_>, since: String, lately: u64) -> Self {
        let stats = seen.stats;
        let share = |received: u64| (1000.0 * received as f64 / lately as f64).round() / 1000.0;
        Self {
            instance: seen.instance.address.clone(),
            name: seen.instance.name.clone(),
            up: seen.down.is_none(),
            ready: stats.is_some_and(|stats| stats.health.not_ready.is_none()),
            since,
            counts_since: stats.map(|stats| stats.since.clone()),
            version: stats.map(|stats| stats.version.clone()),
            engine: stats.map(|stats| stats.map.engine.clone()),
            received: stats.map(|stats| stats.received),
            share: stats
                .filter(|_| lately > 0)
                .map(|stats| share(stats.received_lately)),
            outcomes: stats.map(|stats| stats.outcomes),
            in_flight: stats.map(|stats| stats.in_flight),
            put_p50_ms: stats.and_then(|stats| stats.put_p50_ms),
            put_p99_ms: stats.and_then(|stats| stats.put_p99_ms),
        }
    }
}
