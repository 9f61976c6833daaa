//! Discovery: asks members of the cluster for the primary that owns each partition, every 2 s, and
//! at once when a primary does not answer, refuses a command, or does not own a partition.
//!
//! Only answers of `members` count. Where they disagree about a slot, the greatest configuration epoch wins,
//! so the outdated view of a paused or disconnected member is ignored.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use rand::seq::IteratorRandom;
use redis::Value;
use tokio::sync::{Notify, watch};
use tokio::time::{sleep, timeout};
use uuid::Uuid;

use super::cluster::{Cluster, ClusterState, STRANGER, Shard, Topology};
use super::config::{Address, RedisConfig};
use super::connection::ServerConnection;
use super::known_map::{KnownMap, Properties};
use super::map_id::{self, Making, MapId};
use super::members::{Members, require_one_cluster};
use super::partition::{self, PARTITIONS};
use super::primary_writer::PrimaryWriter;
use super::replies::{Direction, Node, ServerInfo};
use super::timeouts::answer_timeout;
use crate::map::contract::{Access, DEFAULT_SETTLE, Options};
use crate::map::rules::{log_opened, millis};

/// The commands that the user of `--map` needs, with arguments like those that are sent.
const RIGHTS: [&str; 15] = [
    "get id:x",
    "getrange message:x 0 1",
    "set message:x x",
    "asking",
    "evalsha x 0",
    "zadd entries:x 0 x",
    "zrange entries:x 0 1",
    "zrevrange entries:x 0 1",
    "zrangebylex entries:x - +",
    "zrevrangebylex entries:x + -",
    "zcard entries:x",
    "readonly",
    "incr fence:x",
    "time",
    "wait 0 0",
];

/// Returns the commands of [`RIGHTS`] that the user may not run.
const LACKING_RIGHTS: &str = "
local lacking = {}
for _, command in ipairs(ARGV) do
    local words = {}
    for word in string.gmatch(command, '%S+') do words[#words + 1] = word end
    if not redis.acl_check_cmd(unpack(words)) then lacking[#lacking + 1] = words[1] end
end
return lacking";

/// The interval between refreshes while nothing wakes discovery.
const REFRESH_INTERVAL: Duration = Duration::from_secs(2);

/// The pause after each refresh, even if discovery was woken meanwhile.
const MIN_INTERVAL: Duration = Duration::from_millis(100);

/// The number of members, drawn at random, that one refresh asks.
const MAX_ASKED: usize = 8;

/// The default of `--backups` in a Redis Cluster.
const CLUSTER_BACKUPS: u16 = 1;

const NO_MEMBER: &str = "none of the redis servers that answer is a member of the map's cluster: start its \
                         members, or correct --map";

const LOST_ID: &str = "the map's id (key id:{0}) is missing, so its entries are probably lost: restore the \
                       map from a copy; partitions that are left are still served";

/// Starts discovery; it ends when the returned [`Cluster`] is dropped.
pub(super) fn start(config: RedisConfig, options: Options) -> Cluster {
    let (publisher, state) = watch::channel(ClusterState::default());
    let wake_discovery = Arc::<Notify>::default();
    let known = Arc::<KnownMap>::default();
    let discovery = Discovery::new(config, options, wake_discovery.clone(), known.clone());
    tokio::spawn(discovery.run(publisher));
    Cluster::new(state, wake_discovery, known)
}

/// The discovery task, with what it keeps between refreshes.
struct Discovery {
    config: RedisConfig,
    options: Options,
    wake: Arc<Notify>,
    known: Arc<KnownMap>,
    connections: HashMap<Address, Arc<ServerConnection>>,
    members: Members,
    /// See [`Topology::spellings`].
    spellings: HashMap<Address, Address>,
    /// The primary that owns each partition, by the greatest configuration epoch seen.
    owners: Vec<Option<Node>>,
    shards: HashMap<Address, Arc<Shard>>,
    /// The primary of each replica.
    primaries: HashMap<Address, Address>,
    /// The lines logged already: each is logged once, also when its fault recurs.
    logged: HashSet<String>,
}

impl Discovery {
    fn new(config: RedisConfig, options: Options, wake: Arc<Notify>, known: Arc<KnownMap>) -> Self {
        let mut discovery = Self {
            config,
            options,
            wake,
            known,
            connections: HashMap::new(),
            members: Members::default(),
            spellings: HashMap::new(),
            owners: vec![None; usize::from(PARTITIONS)],
            shards: HashMap::new(),
            primaries: HashMap::new(),
            logged: HashSet::new(),
        };
        for seed in discovery.config.seeds.clone() {
            discovery.connection(&seed);
        }
        discovery
    }

    async fn run(mut self, publisher: watch::Sender<ClusterState>) {
        while !publisher.is_closed() {
            let previous = publisher.borrow().clone();
            let refreshed = self.refresh(previous).await;
            publisher.send_replace(refreshed);
            sleep(MIN_INTERVAL).await;
            let _ = timeout(REFRESH_INTERVAL, self.wake.notified()).await;
        }
    }

    /// Asks some members and updates the state from their answers.
    async fn refresh(&mut self, mut state: ClusterState) -> ClusterState {
        let mut questions = redis::pipe();
        questions.cmd("INFO").cmd("CLUSTER").arg("NODES");
        map_id::question(&mut questions);
        let rights = questions.cmd("EVAL").arg(LACKING_RIGHTS).arg(0);
        rights.arg(RIGHTS.as_slice());
        // At the start no answer may be missed that shows another cluster.
        let most = state.map_id.map_or(usize::MAX, |_| MAX_ASKED);
        let connections = self.connections.values().cloned();
        let asked = connections.sample(&mut rand::rng(), most.min(self.connections.len()));
        let asked = asked.iter().map(async |connection| {
            let replies = connection.ask(&questions).await?;
            Answer::read(connection, &replies, self.config.is_tls)
        });
        let mut answers = Vec::new();
        state.discovery_error = None;
        for answer in join_all(asked).await {
            match answer {
                Ok(answer) => answers.push(answer),
                Err(reason) => state.discovery_error = Some(reason),
            }
        }
        if !answers.is_empty() {
            state.discovery_error = self.update_topology(&answers, &mut state).err();
            self.update_map_id(&answers, &mut state).await;
        }
        let is_up = |address: &Address| self.connections[address].down_reason().is_none();
        if let Some(reason) = state.eviction(is_up).or_else(|| state.other_map_reason()) {
            state.discovery_error = Some(reason);
            state.topology = Arc::default();
        }
        self.log_state(&state);
        state.was_complete |= state.is_complete() && self.known.get().is_some();
        state
    }

    /// Updates the topology from at least one answer.
    ///
    /// # Errors
    /// Why none of the servers that answered can hold the map.
    fn update_topology(
        &mut self,
        answers: &[Answer],
        state: &mut ClusterState,
    ) -> Result<(), String> {
        let is_cluster = self.config.seeds.len() > 1 || self.owners.iter().any(Option::is_some);
        let mut compatible = Vec::new();
        let mut incompatibility = None;
        for answer in answers {
            match answer.incompatibility(is_cluster) {
                None => compatible.push(answer),
                Some(reason) => incompatibility = Some(reason),
            }
        }
        if let Some(reason) = &incompatibility {
            self.log_once(reason);
        }
        let members = self.members.select(&compatible, state.map_id);
        let others = compatible.iter().copied();
        let others: Vec<&Answer> = others
            .filter(|answer| !self.members.contains(answer))
            .collect();
        for answer in &compatible {
            state.strangers.remove(&answer.address);
        }
        if state.map_id.is_some() {
            let others = others.iter().map(|answer| answer.address.clone());
            state.strangers.extend(others);
        } else if let Err(reason) = require_one_cluster(&self.config.seeds, &members, &others) {
            state.topology = Arc::default();
            return Err(reason);
        }
        let is_cluster = members
            .first()
            .map_or(is_cluster, |member| member.info.is_cluster_enabled);
        let default_backups = if is_cluster { CLUSTER_BACKUPS } else { 0 };
        if is_cluster && !members.is_empty() {
            self.update_owners(&members);
        }
        for member in &members {
            let info = member.info.clone();
            state.infos.insert(member.address.clone(), info);
        }
        let connections = &self.connections;
        let strangers = &mut state.strangers;
        strangers.retain(|address| connections.contains_key(address));
        let infos = &mut state.infos;
        infos
            .retain(|address, _| connections.contains_key(address) && !strangers.contains(address));
        let is_up = |address: &Address| connections[address].down_reason().is_none();
        let infos = infos.iter().filter(|(address, _)| is_up(address));
        let infos: Vec<&ServerInfo> = infos.map(|(_, info)| info).collect();
        let owners: Vec<Option<Address>> = if is_cluster {
            let owners = partition::all().zip(&self.owners);
            let owners = owners.map(|(partition, owner)| {
                let owner = owner.as_ref()?;
                let is_split = is_split(partition::slot(partition), owner, &infos);
                let is_usable = !is_split && !strangers.contains(&owner.address);
                is_usable.then(|| owner.address.clone())
            });
            owners.collect()
        } else {
            let server = members.first().map(|server| server.address.clone());
            vec![server; self.owners.len()]
        };
        state.backups = self.options.backups.unwrap_or(default_backups);
        state.topology = Arc::new(self.topology(&owners, &state.strangers, state.backups));
        if members.is_empty() {
            return Err(incompatibility.unwrap_or_else(|| NO_MEMBER.to_owned()));
        }
        Ok(())
    }

    /// Updates the owners of the partitions and the connections from the members' views.
    fn update_owners(&mut self, answers: &[&Answer]) {
        let nodes: Vec<&Node> = answers.iter().flat_map(|answer| &answer.nodes).collect();
        for (partition, owner) in partition::all().zip(&mut self.owners) {
            let Some(best) = Node::primary_of(partition::slot(partition), &nodes) else {
                continue;
            };
            // If no member knows the previous owner, the cluster was created anew.
            let is_newer = owner.as_ref().is_none_or(|owner| {
                best.epoch >= owner.epoch || nodes.iter().all(|node| node.id != owner.id)
            });
            if is_newer {
                *owner = Some(best.clone());
            }
        }
        for node in &nodes {
            self.connection(&node.address);
        }
        let spellings = nodes.iter().flat_map(|node| {
            let spellings = node.spellings.iter().cloned();
            spellings.map(|spelling| (spelling, node.address.clone()))
        });
        self.spellings = spellings.collect();
        // What a member says of itself comes last, and counts.
        let mut replicas: Vec<&&Node> = nodes.iter().collect();
        replicas.sort_by_key(|node| node.is_myself);
        self.primaries = replicas
            .into_iter()
            .filter_map(|replica| {
                let primary = nodes
                    .iter()
                    .find(|node| Some(&node.id) == replica.primary_id.as_ref())?;
                Some((replica.address.clone(), primary.address.clone()))
            })
            .collect();
        let seeds = &self.config.seeds;
        self.connections.retain(|address, _| {
            seeds.contains(address) || nodes.iter().any(|node| node.address == *address)
        });
    }

    /// Reads the map's id, or creates a missing map once all primaries take entries. An id that is known
    /// never changes: where it is missing, the map was lost.
    async fn update_map_id(&self, answers: &[Answer], state: &mut ClusterState) {
        let topology = &state.topology;
        let Some(owner) = topology.owner(map_id::PARTITION) else {
            state.other_map = None;
            return;
        };
        let connection = &topology.shards[owner].connection;
        let mut answers = answers.iter();
        let Some(answer) = answers.find(|answer| answer.address == connection.address) else {
            return;
        };
        let known = state.map_id;
        state.other_map = None;
        let found = match answer.map_id.clone() {
            Ok(MapId::Made(id)) => {
                state.other_map = known.filter(|known| *known != id).and(Some(id));
                let id = known.unwrap_or(id);
                if state.other_map.is_none() && self.known.settle().is_none() {
                    self.know(id, answer, connection, state.backups).await
                } else {
                    Ok(id)
                }
            }
            Ok(_) if known.is_some() => Err(LOST_ID.to_owned()),
            Ok(MapId::Missing) if self.options.access == Access::Read => {
                Err("holds no map".to_owned())
            }
            Ok(MapId::Missing | MapId::Making(_)) => {
                let mut shards = topology.shards.iter();
                if !topology.is_whole()
                    || shards.any(|shard| shard.writer.closed_reason().is_some())
                {
                    return;
                }
                let making = Making {
                    shards: &topology.shards,
                    owner: connection,
                    backups: state.backups,
                };
                making.run(self.settle()).await
            }
            Err(reason) => Err(reason),
        };
        match found {
            Ok(id) => {
                state.map_id = Some(id);
                state.map_id_error = None;
            }
            Err(reason) => {
                state.map_id_error = Some(format!("redis {}: {reason}", connection.address));
            }
        }
    }

    fn settle(&self) -> u64 {
        millis(self.options.settle.unwrap_or(DEFAULT_SETTLE))
    }

    /// Takes note of the map's properties. A map of before has no settle window until it is served.
    async fn know(
        &self,
        id: Uuid,
        answer: &Answer,
        owner: &ServerConnection,
        backups: u16,
    ) -> Result<Uuid, String> {
        let settle = match (answer.settle.clone()?, self.options.access) {
            (Some(settle), _) => settle,
            (None, Access::Serve) => map_id::store_settle(owner, backups, self.settle()).await?,
            (None, Access::Import | Access::Read) => self.settle(),
        };
        self.known.set(Properties { id, settle });
        let place = format!("{:?}", self.config);
        log_opened(&place, id, settle, self.options.settle);
        Ok(id)
    }

    fn topology(
        &mut self,
        owners: &[Option<Address>],
        strangers: &BTreeSet<Address>,
        backups: u16,
    ) -> Topology {
        let mut partitions: BTreeMap<&Address, Vec<u16>> = BTreeMap::new();
        for (partition, owner) in partition::all().zip(owners) {
            if let Some(address) = owner {
                partitions.entry(address).or_default().push(partition);
            }
        }
        self.shards
            .retain(|address, _| partitions.contains_key(address));
        let mut topology = Topology {
            shards: Vec::new(),
            owners: vec![None; owners.len()],
            connections: self.connections.clone(),
            spellings: self.spellings.clone(),
            primaries: self.primaries.clone(),
        };
        // A member that `--map` names otherwise is not another one.
        let own: HashSet<&Address> = self.spellings.values().collect();
        topology.connections.retain(|address, _| {
            !strangers.contains(address) && (own.is_empty() || own.contains(address))
        });
        for (index, (address, partitions)) in partitions.into_iter().enumerate() {
            for partition in &partitions {
                topology.owners[usize::from(*partition)] = Some(index);
            }
            let shard = self.shard(address, partitions, backups);
            topology.shards.push(shard);
        }
        topology
    }

    fn shard(&mut self, address: &Address, partitions: Vec<u16>, backups: u16) -> Arc<Shard> {
        if let Some(shard) = self.shards.get(address) {
            shard.writer.set_partitions(partitions);
            return shard.clone();
        }
        let connection = self.connection(address);
        let writer = PrimaryWriter::open(
            connection.clone(),
            &self.options,
            self.known.clone(),
            backups,
            partitions,
        );
        let shard = Arc::new(Shard { connection, writer });
        self.shards.insert(address.clone(), shard.clone());
        shard
    }

    fn connection(&mut self, address: &Address) -> Arc<ServerConnection> {
        let connection = self.connections.entry(address.clone()).or_insert_with(|| {
            Arc::new(ServerConnection::new(
                address.clone(),
                self.config.clone(),
                answer_timeout(&self.options),
                self.wake.clone(),
            ))
        });
        connection.clone()
    }

    fn log_state(&mut self, state: &ClusterState) {
        for (address, warning) in state.warnings() {
            self.log_once(&format!("redis {address} {warning}"));
        }
        for address in &state.strangers {
            self.log_once(&format!("redis {address} {STRANGER}"));
        }
        let errors = [&state.discovery_error, &state.map_id_error];
        for error in errors.into_iter().flatten() {
            self.log_once(error);
        }
    }

    fn log_once(&mut self, line: &str) {
        if self.logged.insert(line.to_owned()) {
            tracing::warn!("{line}");
        }
    }
}

/// Whether a member imports a slot whose owner does not report the move. A failover during a move
/// leaves this state: the importing member may hold keys that the owner lacks.
fn is_split(slot: u16, owner: &Node, infos: &[&ServerInfo]) -> bool {
    let reports = |info: &ServerInfo, direction| {
        let mut moving = info.moving.iter();
        moving.any(|moving| moving.slot == slot && moving.direction == direction)
    };
    let mut members = infos.iter();
    let is_imported = members.any(|info| info.id != owner.id && reports(info, Direction::In));
    let mut members = infos.iter();
    is_imported && !members.any(|info| info.id == owner.id && reports(info, Direction::Out))
}

/// The replies of one server.
pub(super) struct Answer {
    pub(super) address: Address,
    pub(super) info: ServerInfo,
    pub(super) nodes: Vec<Node>,
    /// Valid only from the primary that owns [`map_id::PARTITION`].
    pub(super) map_id: Result<MapId, String>,
    /// The same for the settle window, in milliseconds.
    pub(super) settle: Result<Option<u64>, String>,
}

impl Answer {
    /// The ids of the nodes that it lists; a single server lists itself.
    pub(super) fn node_ids(&self) -> impl Iterator<Item = &str> {
        let own = Some(&self.info.id).filter(|_| self.nodes.is_empty());
        let listed = self.nodes.iter().map(|node| &node.id);
        listed.chain(own).map(String::as_str)
    }

    /// Whether it is, or lists, a primary that may hold a map.
    pub(super) fn has_slots(&self) -> bool {
        !self.info.is_cluster_enabled || self.nodes.iter().any(|node| !node.slots.is_empty())
    }

    /// Why this server cannot hold the map or its share of it.
    fn incompatibility(&self, is_cluster: bool) -> Option<String> {
        let Self { address, info, .. } = self;
        if !info.is_new_enough() {
            let version = &info.version;
            Some(format!(
                "redis {address} is version {version}: install 7.0 or later"
            ))
        } else if info.is_cluster_enabled {
            None
        } else if is_cluster {
            Some(format!(
                "redis {address} is not a member of a cluster; name one server, or members of one \
                 cluster"
            ))
        } else if info.is_replica {
            Some(format!("redis {address} is a replica; name its primary"))
        } else {
            None
        }
    }

    fn read(
        connection: &ServerConnection,
        replies: &[Value],
        is_tls: bool,
    ) -> Result<Self, String> {
        let address = &connection.address;
        let text = |reply: &Value| match reply {
            Value::BulkString(bytes) => Ok(String::from_utf8_lossy(bytes).into_owned()),
            Value::ServerError(error) => Err(format!("redis {address} refuses: {error}")),
            _ => Err(partition::unexpected_reply(replies).to_string()),
        };
        let [info, nodes, id, settle, rights] = replies else {
            return Err(partition::unexpected_reply(replies).to_string());
        };
        let mut info = ServerInfo::parse(&text(info)?);
        let nodes = if info.is_cluster_enabled {
            Node::parse_all(&text(nodes)?, address, is_tls)
        } else {
            Vec::new()
        };
        info.id = address.to_string();
        info.lacking_rights = match rights {
            Value::Array(commands) => commands.iter().filter_map(|it| text(it).ok()).collect(),
            Value::ServerError(error) if error.code() == "NOPERM" => vec!["eval".to_owned()],
            _ => Vec::new(),
        };
        if let Some(myself) = nodes.iter().find(|node| node.is_myself) {
            info.id.clone_from(&myself.id);
            info.moving.clone_from(&myself.moving);
        }
        Ok(Self {
            address: address.clone(),
            info,
            nodes,
            map_id: map_id::parse(id),
            settle: map_id::parse_settle(settle),
        })
    }
}
