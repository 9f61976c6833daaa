//! Which primary has which partition, as far as it is known, and how the members fare. What is
//! known comes from `discovery`.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use common::health::Check;
use tokio::sync::{Notify, watch};
use uuid::Uuid;

use super::config::Address;
use super::connection::ServerConnection;
use super::primary_writer::PrimaryWriter;
use super::replies::{Direction, MovingSlot, ServerInfo};
use crate::map::contract::{Health, MapError};

/// The members of the map, as discovery sees them.
#[derive(Debug)]
pub(super) struct Cluster {
    state: watch::Receiver<ClusterState>,
    wake_discovery: Arc<Notify>,
    /// Whether every partition has been writable once since the start, and the map's id was state.
    was_complete: AtomicBool,
}

/// What is known of the members.
#[derive(Clone, Debug, Default)]
pub(super) struct ClusterState {
    pub(super) topology: Arc<Topology>,
    /// Why what the servers say, or that they say nothing, makes no map.
    pub(super) discovery_error: Option<String>,
    pub(super) infos: BTreeMap<Address, ServerInfo>,
    /// Replicas that must hold an entry before it is acknowledged.
    pub(super) backups: u16,
    /// Whether it was complete since the start: see [`Self::is_complete`].
    pub(super) was_complete: bool,
    /// The map's id, as it was read last.
    pub(super) map_id: Option<Uuid>,
    /// Why the map's id could not be read, when its primary answers.
    pub(super) map_id_error: Option<String>,
}

/// Which primary has which partition.
#[derive(Debug, Default)]
pub(super) struct Topology {
    /// The primaries that have partitions.
    pub(super) shards: Vec<Arc<Shard>>,
    /// For each partition, its primary's place in `shards`.
    pub(super) owners: Vec<Option<usize>>,
    /// The connections for reads of all members, also of those without partitions.
    pub(super) connections: HashMap<Address, Arc<ServerConnection>>,
}

/// A primary: one connection for reads, one for writes.
#[derive(Debug)]
pub(super) struct Shard {
    pub(super) connection: Arc<ServerConnection>,
    pub(super) writer: PrimaryWriter,
}

impl Cluster {
    /// What discovery publishes in `state`; it works until this is dropped.
    pub(super) fn new(state: watch::Receiver<ClusterState>, wake_discovery: Arc<Notify>) -> Self {
        Self {
            state,
            wake_discovery,
            was_complete: AtomicBool::new(false),
        }
    }

    /// Which primary has which partition.
    pub(super) fn topology(&self) -> Arc<Topology> {
        self.state.borrow().topology.clone()
    }

    pub(super) fn map_id(&self) -> Option<Uuid> {
        self.state.borrow().map_id
    }

    /// Fails when a partition's mark is another map's.
    pub(super) fn require_mark(&self, map: &[u8]) -> Result<(), MapError> {
        let known = self.map_id();
        if known.is_none_or(|known| known.as_bytes() == map) {
            return Ok(());
        }
        let detail = "a partition is another map's; the redis servers do not belong together";
        Err(MapError::Unavailable(detail.to_owned()))
    }

    /// Why a partition has no primary.
    pub(super) fn unowned_reason(&self) -> String {
        let error = self.state.borrow().discovery_error.clone();
        error.unwrap_or_else(|| "the cluster has no primary for this partition".to_owned())
    }

    /// Starts discovery because a reply contradicted the known topology.
    pub(super) fn start_discovery(&self) {
        self.wake_discovery.notify_one();
    }

    /// What the members said and what the writers found.
    pub(super) fn health(&self) -> Health {
        let state = self.state.borrow();
        if state.is_complete() {
            self.was_complete.store(true, Ordering::Relaxed);
        }
        let shards = state.topology.shards.iter().map(|shard| {
            let trouble = shard
                .connection
                .down_reason()
                .or_else(|| shard.writer.closed_reason());
            Check {
                name: format!("primary {}", shard.connection.address),
                ok: trouble.is_none(),
                detail: trouble.unwrap_or_else(|| "takes entries".to_owned()),
            }
        });
        let warnings = state.warnings();
        let warnings = warnings.into_iter().map(|(address, warning)| Check {
            name: format!("server {address}"),
            ok: true,
            detail: format!("warning: {warning}"),
        });
        Health {
            not_ready: self.not_ready(&state),
            checks: shards.chain(state.moves()).chain(warnings).collect(),
        }
    }

    /// Why this instance is not ready. Once it was, the loss of a backup or of a whole shard is no
    /// reason: all instances would be taken out at once.
    fn not_ready(&self, state: &ClusterState) -> Option<String> {
        let shards = &state.topology.shards;
        let is_anybody_there = shards
            .iter()
            .any(|shard| shard.connection.down_reason().is_none());
        if (state.was_complete || self.was_complete.load(Ordering::Relaxed)) && is_anybody_there {
            return None;
        }
        if let Some(trouble) = &state.discovery_error {
            return Some(trouble.clone());
        }
        if let Some(trouble) = shards.iter().find_map(|shard| shard.writer.closed_reason()) {
            return Some(trouble);
        }
        if !state.topology.is_whole() {
            return Some("not every partition has a primary; was the cluster created?".to_owned());
        }
        if state.map_id.is_none() {
            let trouble = state.map_id_error.clone();
            return Some(trouble.unwrap_or_else(|| "the map's id was not read yet".to_owned()));
        }
        Some("no redis primary answers".to_owned())
    }
}

impl Topology {
    /// The place in `shards` of the primary that has this partition.
    pub(super) fn owner(&self, partition: u16) -> Option<usize> {
        *self.owners.get(usize::from(partition))?
    }

    pub(super) fn is_whole(&self) -> bool {
        !self.owners.is_empty() && self.owners.iter().all(Option::is_some)
    }

    fn has_primary(&self, address: &Address) -> bool {
        let mut shards = self.shards.iter();
        shards.any(|shard| shard.connection.address == *address)
    }
}

impl ClusterState {
    /// Whether every partition has a primary that takes entries, and the map's id is state.
    pub(super) fn is_complete(&self) -> bool {
        let mut shards = self.topology.shards.iter();
        let takes_entries = shards.all(|shard| shard.writer.closed_reason().is_none());
        self.topology.is_whole() && takes_entries && self.map_id.is_some()
    }

    /// Why a server must not be trusted with entries, though it may hold them all at the moment: it
    /// evicts when its memory is used up, even while it is only read. A replica does so once it is
    /// promoted.
    pub(super) fn eviction(&self, is_up: impl Fn(&Address) -> bool) -> Option<String> {
        let mut infos = self.infos.iter();
        let (address, info) =
            infos.find(|(address, info)| info.may_evict_entries() && is_up(address))?;
        let ServerInfo {
            max_memory,
            max_memory_policy,
            evicted_keys,
            ..
        } = info;
        Some(format!(
            "redis {address} evicts entries when its memory is used up (maxmemory {max_memory}, \
             maxmemory-policy {max_memory_policy}, {evicted_keys} keys evicted so far): set \
             maxmemory-policy noeviction"
        ))
    }

    /// Slots that are moving from one member to another, or were when somebody stopped moving them.
    pub(super) fn moves(&self) -> Vec<Check> {
        let named = |id: &str| {
            let mut infos = self.infos.iter();
            let found = infos.find(|(_, info)| info.id == id);
            found.map_or_else(|| format!("member {id}"), |(at, _)| format!("redis {at}"))
        };
        let knows_it = |coming: &MovingSlot| {
            let mut peers = self.infos.values().filter(|info| info.id == coming.peer);
            peers.any(|peer| peer.moving.iter().any(|moving| moving.slot == coming.slot))
        };
        let mut checks = Vec::new();
        for (address, info) in &self.infos {
            for moving in &info.moving {
                let MovingSlot { slot, peer, .. } = moving;
                let detail = match moving.direction {
                    Direction::Out => format!(
                        "it is moving from redis {address} to {}; if nobody is moving it now, \
                         finish that with scripts/move-slots.sh",
                        named(peer)
                    ),
                    Direction::In if knows_it(moving) => continue,
                    Direction::In => format!(
                        "redis {address} is taking it from {}, which does not know so: its \
                         partitions are neither read nor written; see docs/redis.md, Moving slots",
                        named(peer)
                    ),
                };
                checks.push(Check {
                    name: format!("slot {slot}"),
                    ok: false,
                    detail,
                });
            }
        }
        checks
    }

    /// What should be changed about servers though they serve.
    pub(super) fn warnings(&self) -> Vec<(&Address, String)> {
        let mut warnings = Vec::new();
        for (address, info) in &self.infos {
            if !info.has_append_only_file {
                let warning = "it keeps no append-only file, so its entries are gone when it \
                               ends; set appendonly yes and appendfsync always";
                warnings.push((address, warning.to_owned()));
            }
            if info.evicted_keys > 0 {
                let warning = format!(
                    "it has evicted {} keys since it started; if entries were among them, they are \
                     lost: restore the map from a copy",
                    info.evicted_keys
                );
                warnings.push((address, warning));
            }
            let (replicas, backups) = (info.replicas, self.backups);
            if replicas > usize::from(backups) && self.topology.has_primary(address) {
                let warning = format!(
                    "it has {replicas} replicas, but an entry is acknowledged when {backups} have \
                     it; a failover may choose one that lacks it: set --backups {replicas}"
                );
                warnings.push((address, warning));
            }
        }
        warnings
    }
}
