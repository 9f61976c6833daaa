//! The state of the cluster as `discovery` publishes it: its topology, and its members' health.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use common::api::nearly_full;
use common::health::{Check, Health};
use metrics::gauge;
use tokio::sync::{Notify, watch};
use uuid::Uuid;

use super::config::Address;
use super::connection::ServerConnection;
use super::known_map::KnownMap;
use super::partition;
use super::primary_writer::PrimaryWriter;
use super::replies::{Direction, MovingSlot, ServerInfo};
use crate::map::contract::{MapError, failed_checks};
use crate::metrics::{PRIMARY_OPEN, SERVER_MAX_MEMORY, SERVER_MEMORY, SERVER_UP};

/// What to do about a server that is not a member of the map's cluster; follows its name.
pub(super) const STRANGER: &str =
    "is not a member of the map's cluster, and not used: if --map names it, correct --map";

/// The cluster as discovery sees it.
#[derive(Debug)]
pub(super) struct Cluster {
    state: watch::Receiver<ClusterState>,
    wake_discovery: Arc<Notify>,
    pub(super) known: Arc<KnownMap>,
    /// Whether the state was ever complete: see [`ClusterState::is_complete`].
    was_complete: AtomicBool,
    /// Entries of each partition read by this process.
    gets: Vec<AtomicU64>,
}

#[derive(Clone, Debug, Default)]
pub(super) struct ClusterState {
    pub(super) topology: Arc<Topology>,
    /// Why discovery found no usable topology.
    pub(super) discovery_error: Option<String>,
    /// What each member of the map's cluster said of itself last.
    pub(super) infos: BTreeMap<Address, ServerInfo>,
    /// Servers in `--map`, or at the address of a member, that are not members of the map's cluster.
    pub(super) strangers: BTreeSet<Address>,
    /// Replicas that must hold an entry before it is acknowledged.
    pub(super) backups: u16,
    /// Whether a refresh ever found the state complete: see [`Self::is_complete`].
    pub(super) was_complete: bool,
    /// The id of the map, which never changes while the process runs.
    pub(super) map_id: Option<Uuid>,
    /// Why the map's id could not be read although its primary answers.
    pub(super) map_id_error: Option<String>,
    /// The id that the primary has instead of `map_id`.
    pub(super) other_map: Option<Uuid>,
}

/// The primary that owns each partition.
#[derive(Debug, Default)]
pub(super) struct Topology {
    /// The primaries that own partitions.
    pub(super) shards: Vec<Arc<Shard>>,
    /// For each partition, the index of its primary in `shards`.
    pub(super) owners: Vec<Option<usize>>,
    /// The connections for reads to all members, also to members without partitions.
    pub(super) connections: HashMap<Address, Arc<ServerConnection>>,
    /// The address in `connections` of each spelling of a member's address.
    pub(super) spellings: HashMap<Address, Address>,
    /// The primary of each replica.
    pub(super) primaries: HashMap<Address, Address>,
}

/// A primary: one connection for reads, one for writes.
#[derive(Debug)]
pub(super) struct Shard {
    pub(super) connection: Arc<ServerConnection>,
    pub(super) writer: PrimaryWriter,
}

impl Cluster {
    /// Discovery publishes to `state` until this is dropped.
    pub(super) fn new(
        state: watch::Receiver<ClusterState>,
        wake_discovery: Arc<Notify>,
        known: Arc<KnownMap>,
    ) -> Self {
        Self {
            state,
            wake_discovery,
            known,
            was_complete: AtomicBool::new(false),
            gets: partition::all().map(|_| AtomicU64::new(0)).collect(),
        }
    }

    pub(super) fn state(&self) -> ClusterState {
        self.state.borrow().clone()
    }

    /// Counts an entry read from a partition.
    pub(super) fn count_get(&self, partition: u16) {
        self.gets[usize::from(partition)].fetch_add(1, Ordering::Relaxed);
    }

    /// Entries of a partition that were read.
    pub(super) fn gets(&self, partition: u16) -> u64 {
        self.gets[usize::from(partition)].load(Ordering::Relaxed)
    }

    pub(super) fn topology(&self) -> Arc<Topology> {
        self.state.borrow().topology.clone()
    }

    pub(super) fn map_id(&self) -> Option<Uuid> {
        self.state.borrow().map_id
    }

    /// Fails when a partition's mark is another map's, or this map's id was not read yet.
    pub(super) fn require_mark(&self, map: &[u8]) -> Result<(), MapError> {
        let detail = match self.map_id() {
            Some(id) if id.as_bytes() == map => return Ok(()),
            Some(_) => "a partition belongs to another map: the redis servers hold several maps",
            None => "the map's id was not read yet",
        };
        Err(MapError::Unavailable(detail.to_owned()))
    }

    /// Why a partition has no primary.
    pub(super) fn unowned_reason(&self) -> String {
        unowned_reason(&self.state.borrow())
    }

    /// Wakes discovery because a reply contradicted the topology.
    pub(super) fn start_discovery(&self) {
        self.wake_discovery.notify_one();
    }

    /// Sets the gauges of all servers.
    pub(super) fn measure(&self) {
        let as_number = |reason: Option<String>| if reason.is_none() { 1.0 } else { 0.0 };
        let topology = self.topology();
        for (address, connection) in &topology.connections {
            let role = if topology.primaries.contains_key(address) {
                "replica"
            } else {
                "primary"
            };
            gauge!(SERVER_UP, "server" => address.to_string(), "role" => role)
                .set(as_number(connection.down_reason()));
        }
        let is_up = |address: &Address| {
            let connection = topology.connections.get(address);
            connection.is_some_and(|connection| connection.down_reason().is_none())
        };
        let state = self.state.borrow();
        for (address, info) in state.infos.iter().filter(|(address, _)| is_up(address)) {
            gauge!(SERVER_MEMORY, "server" => address.to_string()).set(info.used_memory as f64);
            gauge!(SERVER_MAX_MEMORY, "server" => address.to_string()).set(info.max_memory as f64);
        }
        for Shard { connection, writer } in topology.shards.iter().map(|shard| &**shard) {
            let reason = connection.down_reason().or_else(|| writer.closed_reason());
            gauge!(PRIMARY_OPEN, "server" => connection.address.to_string()).set(as_number(reason));
        }
    }

    /// The health of the map, from discovery and the writers.
    pub(super) fn health(&self) -> Health {
        let state = self.state.borrow();
        if state.is_complete() && self.known.get().is_some() {
            self.was_complete.store(true, Ordering::Relaxed);
        }
        let shards = state.topology.shards.iter().map(|shard| {
            let reason = shard.connection.down_reason();
            let reason = reason.or_else(|| shard.writer.closed_reason());
            Check {
                name: format!("primary {}", shard.connection.address),
                ok: reason.is_none(),
                detail: reason.unwrap_or_else(|| "takes entries".to_owned()),
            }
        });
        let warnings = state.warnings();
        let warnings = warnings.into_iter().map(|(address, warning)| Check {
            name: format!("server {address}"),
            ok: true,
            detail: format!("warning: {warning}"),
        });
        let strangers = state.strangers.iter().map(|address| Check {
            name: format!("server {address}"),
            ok: false,
            detail: STRANGER.to_owned(),
        });
        let rights = state.lacking_rights().map(|(address, detail)| Check {
            name: format!("server {address}"),
            ok: false,
            detail,
        });
        // Before discovery has found anything, `not_ready` says so.
        let is_lost = !state.topology.owners.is_empty() && !state.topology.is_whole();
        let lost = is_lost.then(|| unowned_reason(&state));
        let map_id = state.map_id_error.iter().cloned().chain(lost);
        let members = shards.chain(state.moves()).chain(warnings);
        Health {
            not_ready: self.not_ready(&state),
            checks: members
                .chain(strangers)
                .chain(rights)
                .chain(failed_checks(map_id.collect()))
                .collect(),
        }
    }

    /// Why this instance is not ready. Once ready, it stays so while some primary takes entries and all can be read:
    /// a shard that only lacks its backups would take out all instances at once.
    fn not_ready(&self, state: &ClusterState) -> Option<String> {
        let mut lacking = state.lacking_rights();
        if let Some((_, reason)) = lacking.find(|(address, _)| state.topology.has_primary(address))
        {
            return Some(reason);
        }
        let shards = &state.topology.shards;
        let takes_entries = |shard: &Arc<Shard>| {
            shard.connection.down_reason().is_none() && shard.writer.closed_reason().is_none()
        };
        let was_complete = state.was_complete || self.was_complete.load(Ordering::Relaxed);
        if was_complete && shards.iter().any(takes_entries) {
            let mut primaries = shards.iter();
            let down = primaries.find_map(|shard| shard.connection.down_reason());
            let unowned = (!state.topology.is_whole()).then(|| unowned_reason(state));
            return down.or(unowned).or_else(|| state.map_id_error.clone());
        }
        if let Some(error) = &state.discovery_error {
            return Some(error.clone());
        }
        if let Some(reason) = shards.iter().find_map(|shard| shard.writer.closed_reason()) {
            return Some(reason);
        }
        if !state.topology.is_whole() {
            let detail = "partitions have no primary: create the redis cluster with all its slots";
            return Some(detail.to_owned());
        }
        if state.map_id.is_none() {
            let error = state.map_id_error.clone();
            return Some(error.unwrap_or_else(|| "the map's id was not read yet".to_owned()));
        }
        if self.known.get().is_none() {
            let detail = "the clocks of most redis primaries were not read yet";
            return Some(detail.to_owned());
        }
        Some("no redis primary answers".to_owned())
    }
}

fn unowned_reason(state: &ClusterState) -> String {
    let error = state.discovery_error.clone();
    error.unwrap_or_else(|| "the cluster has no primary for this partition".to_owned())
}

impl Topology {
    /// The index in `shards` of the primary that owns this partition.
    pub(super) fn owner(&self, partition: u16) -> Option<usize> {
        *self.owners.get(usize::from(partition))?
    }

    /// Groups partitions by the primaries that own them. A group has the indices of its partitions;
    /// the last ones returned are of those without a primary.
    pub(super) fn group(
        &self,
        partitions: impl Iterator<Item = u16>,
    ) -> (Vec<(&Shard, Vec<usize>)>, Vec<usize>) {
        let shards = self.shards.iter();
        let mut groups: Vec<_> = shards.map(|shard| (&**shard, Vec::new())).collect();
        let mut unowned = Vec::new();
        for (index, partition) in partitions.enumerate() {
            match self.owner(partition) {
                Some(shard) => groups[shard].1.push(index),
                None => unowned.push(index),
            }
        }
        groups.retain(|(_, indices)| !indices.is_empty());
        (groups, unowned)
    }

    pub(super) fn is_whole(&self) -> bool {
        !self.owners.is_empty() && self.owners.iter().all(Option::is_some)
    }

    /// The hosts by which a member is known.
    pub(super) fn hosts(&self, member: &Address) -> Vec<&str> {
        let spellings = self.spellings.iter();
        let same = spellings.filter(|(_, address)| *address == member);
        same.map(|(spelling, _)| spelling.host.as_str()).collect()
    }

    fn has_primary(&self, address: &Address) -> bool {
        let mut shards = self.shards.iter();
        shards.any(|shard| shard.connection.address == *address)
    }
}

impl ClusterState {
    /// Whether every partition has a primary that takes entries, and the map's id is known.
    pub(super) fn is_complete(&self) -> bool {
        let mut shards = self.topology.shards.iter();
        let takes_entries = shards.all(|shard| shard.writer.closed_reason().is_none());
        self.topology.is_whole() && takes_entries && self.map_id.is_some()
    }

    /// Names a server that evicts entries when its memory is used up, even by reads alone; a
    /// replica does so once it is promoted. It cannot hold the map.
    pub(super) fn eviction(&self, is_up: impl Fn(&Address) -> bool) -> Option<String> {
        let mut infos = self.infos.iter();
        let (address, info) =
            infos.find(|(address, info)| info.may_evict_entries() && is_up(address))?;
        let (memory, policy) = (info.max_memory, &info.max_memory_policy);
        Some(format!(
            "redis {address} evicts entries when its memory is used up (maxmemory {memory}, \
             maxmemory-policy {policy}): set maxmemory-policy noeviction"
        ))
    }

    /// The servers on which the user of `--map` lacks rights, and which.
    fn lacking_rights(&self) -> impl Iterator<Item = (&Address, String)> {
        let lacking = self
            .infos
            .iter()
            .filter(|(_, info)| !info.lacking_rights.is_empty());
        lacking.map(|(address, info)| {
            let rights = info.lacking_rights.join(" +");
            let detail = format!(
                "redis {address} gives the user of --map no right to +{rights}: see docs/redis.md for the \
                 line with all rights that it needs"
            );
            (address, detail)
        })
    }

    /// Names the other map that the servers hold.
    pub(super) fn other_map_reason(&self) -> Option<String> {
        let (id, other) = self.map_id.zip(self.other_map)?;
        Some(format!(
            "the redis servers hold map {other}, but this instance serves map {id}: correct --map, restore \
             the map from a copy, or restart logging instances and facades to use the other map"
        ))
    }

    /// Slots that are moving between members, or whose move was interrupted.
    pub(super) fn moves(&self) -> Vec<Check> {
        let named = |id: &str| {
            let mut infos = self.infos.iter();
            let found = infos.find(|(_, info)| info.id == id);
            found.map_or_else(|| format!("member {id}"), |(at, _)| format!("redis {at}"))
        };
        let peer_reports = |coming: &MovingSlot| {
            let mut peers = self.infos.values().filter(|info| info.id == coming.peer);
            peers.any(|peer| peer.moving.iter().any(|moving| moving.slot == coming.slot))
        };
        let mut checks = Vec::new();
        for (address, info) in &self.infos {
            for moving in &info.moving {
                let MovingSlot { slot, peer, .. } = moving;
                let detail = match moving.direction {
                    Direction::Out => format!(
                        "it is moving from redis {address} to {}; if no move is running, finish it \
                         with scripts/move-slots.sh",
                        named(peer)
                    ),
                    Direction::In if peer_reports(moving) => continue,
                    Direction::In => format!(
                        "redis {address} imports it from {}, which does not report the move: its \
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

    /// Settings to change on servers that still serve; each text follows the server's name.
    pub(super) fn warnings(&self) -> Vec<(&Address, String)> {
        let mut warnings = Vec::new();
        for (address, info) in &self.infos {
            if info.evicted_keys > 0 {
                let warning = "has evicted keys since it started: entries can be lost; restore the \
                               map from a copy";
                warnings.push((address, warning.to_owned()));
            }
            if let Some(percent) = nearly_full(info.used_memory, info.max_memory) {
                let warning = format!(
                    "uses {percent} % of its maxmemory, and refuses entries beyond it: raise it, or \
                     add members and move slots"
                );
                warnings.push((address, warning));
            }
            let (replicas, backups) = (info.replicas, self.backups);
            if replicas > u64::from(backups) && self.topology.has_primary(address) {
                let warning = format!(
                    "has {replicas} replicas, but {backups} must hold an entry before it is \
                     acknowledged: a failover can lose it; set --backups {replicas}"
                );
                warnings.push((address, warning));
            }
        }
        warnings
    }
}
