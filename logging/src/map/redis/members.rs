//! Which primary has which partition, as far as it is known, and how the members fare. What is
//! known comes from `discovery`.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use common::server::Check;
use tokio::sync::Notify;
use uuid::Uuid;

use super::discovery;
use super::lane::Lane;
use super::link::Link;
use super::nodes::{Direction, MovingSlot, ServerInfo};
use super::servers::{Address, Servers};
use crate::map::{Health, MapError, Options};

/// The members of the map.
#[derive(Debug)]
pub(super) struct Members {
    pub(super) servers: Servers,
    pub(super) options: Options,
    /// Wakes the discovery.
    pub(super) refresh: Arc<Notify>,
    known: RwLock<Known>,
    /// Whether every partition has been writable once since the start, and the map's id was known.
    was_complete: AtomicBool,
}

/// What is known of the members.
#[derive(Clone, Debug, Default)]
pub(super) struct Known {
    pub(super) topology: Arc<Topology>,
    /// Why what the servers say, or that they say nothing, makes no map.
    pub(super) trouble: Option<String>,
    pub(super) infos: BTreeMap<Address, ServerInfo>,
    /// Replicas that must hold an entry before it is acknowledged.
    pub(super) backups: u16,
    /// The map's id, as it was read last.
    pub(super) map_id: Option<Uuid>,
    /// Why the map's id could not be read, when its primary answers.
    pub(super) map_id_trouble: Option<String>,
}

/// Which primary has which partition.
#[derive(Debug, Default)]
pub(super) struct Topology {
    /// The primaries that have partitions.
    pub(super) shards: Vec<Arc<Shard>>,
    /// For each partition, its primary's place in `shards`.
    pub(super) owners: Vec<Option<usize>>,
    /// The connections for reads of all members, also of those without partitions.
    pub(super) links: HashMap<Address, Arc<Link>>,
}

/// A primary: one connection for reads, one for writes.
#[derive(Debug)]
pub(super) struct Shard {
    pub(super) link: Arc<Link>,
    pub(super) lane: Lane,
}

impl Members {
    /// Starts to look for the members, until what is returned is dropped.
    pub(super) fn discover(servers: Servers, options: Options) -> Arc<Self> {
        let members = Arc::new(Self {
            servers,
            options,
            refresh: Arc::default(),
            known: RwLock::default(),
            was_complete: AtomicBool::new(false),
        });
        tokio::spawn(discovery::run(Arc::downgrade(&members)));
        members
    }

    /// Which primary has which partition.
    pub(super) fn topology(&self) -> Arc<Topology> {
        self.read().topology.clone()
    }

    pub(super) fn map_id(&self) -> Option<Uuid> {
        self.read().map_id
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
    pub(super) fn trouble(&self) -> String {
        let trouble = self.read().trouble.clone();
        trouble.unwrap_or_else(|| "the cluster has no primary for this partition".to_owned())
    }

    /// Has the members asked who has what: somebody found that it is not as it is known.
    pub(super) fn refresh_soon(&self) {
        self.refresh.notify_one();
    }

    pub(super) fn known(&self) -> Known {
        self.read().clone()
    }

    pub(super) fn publish(&self, known: Known) {
        self.note_if_complete(&known);
        *self.known.write().unwrap_or_else(PoisonError::into_inner) = known;
    }

    /// What the members said and what the lanes found.
    pub(super) fn health(&self) -> Health {
        let known = self.read();
        self.note_if_complete(&known);
        let shards = known.topology.shards.iter().map(|shard| {
            let trouble = shard.link.trouble().or_else(|| shard.lane.trouble());
            Check {
                name: format!("primary {}", shard.link.address),
                ok: trouble.is_none(),
                detail: trouble.unwrap_or_else(|| "takes entries".to_owned()),
            }
        });
        let warnings = known.warnings();
        let warnings = warnings.into_iter().map(|(address, warning)| Check {
            name: format!("server {address}"),
            ok: true,
            detail: format!("warning: {warning}"),
        });
        Health {
            missing: self.missing(&known),
            checks: shards.chain(known.moves()).chain(warnings).collect(),
        }
    }

    /// Why this instance is not ready. Once it was, the loss of a backup or of a whole shard is no
    /// reason: all instances would be taken out at once.
    fn missing(&self, known: &Known) -> Option<String> {
        let shards = &known.topology.shards;
        let is_anybody_there = shards.iter().any(|shard| shard.link.trouble().is_none());
        if self.was_complete.load(Ordering::Relaxed) && is_anybody_there {
            return None;
        }
        if let Some(trouble) = &known.trouble {
            return Some(trouble.clone());
        }
        if let Some(trouble) = shards.iter().find_map(|shard| shard.lane.trouble()) {
            return Some(trouble);
        }
        if !known.topology.is_whole() {
            return Some("not every partition has a primary; was the cluster created?".to_owned());
        }
        if known.map_id.is_none() {
            let trouble = known.map_id_trouble.clone();
            return Some(trouble.unwrap_or_else(|| "the map's id was not read yet".to_owned()));
        }
        Some("no redis primary answers".to_owned())
    }

    fn note_if_complete(&self, known: &Known) {
        let topology = &known.topology;
        let mut shards = topology.shards.iter();
        let takes_entries = shards.all(|shard| shard.lane.trouble().is_none());
        if topology.is_whole() && takes_entries && known.map_id.is_some() {
            self.was_complete.store(true, Ordering::Relaxed);
        }
    }

    fn read(&self) -> RwLockReadGuard<'_, Known> {
        self.known.read().unwrap_or_else(PoisonError::into_inner)
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
        shards.any(|shard| shard.link.address == *address)
    }
}

impl Known {
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
