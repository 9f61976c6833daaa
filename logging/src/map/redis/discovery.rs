//! Finds out which primary has which partition, by asking the members: every few seconds, and at
//! once when somebody finds that a primary does not answer, refuses, or lacks a partition.
//!
//! Where members disagree about a slot, the greater configuration epoch is right, so one that was
//! paused or cut off is not believed.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, Weak};
use std::time::Duration;

use futures_util::future::join_all;
use rand::seq::IteratorRandom;
use redis::{Client, Value};
use tokio::time::{sleep, timeout};
use uuid::Uuid;

use super::lane::Lane;
use super::link::Link;
use super::map_id::{self, Making, MapId};
use super::members::{Known, Members, Shard, Topology};
use super::nodes::{Direction, Node, ServerInfo};
use super::partition::{self, PARTITIONS};
use super::primary::Settings;
use super::servers::Address;
use super::{answer_timeout, wait_timeout};

/// How often the members are asked when nothing seems wrong.
const REFRESH_INTERVAL: Duration = Duration::from_secs(2);

/// Pause after asking, however much seems wrong.
const MIN_INTERVAL: Duration = Duration::from_millis(100);

/// So many members, drawn at random, are asked at once, however large the cluster is.
const MAX_ASKED: usize = 8;

/// Backups in a Redis Cluster unless `--backups` says otherwise.
const CLUSTER_BACKUPS: u16 = 1;

/// Asks until the members are dropped.
pub(super) async fn run(members: Weak<Members>) {
    let mut discovery = match members.upgrade() {
        Some(members) => Discovery::new(&members),
        None => return,
    };
    loop {
        let Some(members) = members.upgrade() else {
            return;
        };
        discovery.refresh(&members).await;
        let refresh = members.refresh.clone();
        drop(members);
        sleep(MIN_INTERVAL).await;
        let _ = timeout(REFRESH_INTERVAL, refresh.notified()).await;
    }
}

/// What is remembered from one refresh to the next.
struct Discovery {
    links: HashMap<Address, Arc<Link>>,
    /// Whose each partition is.
    owners: Vec<Option<Owner>>,
    shards: HashMap<Address, Arc<Shard>>,
    /// What was logged already, so that it is not logged every two seconds; a fault that goes and
    /// comes again is logged once.
    logged: HashSet<String>,
}

/// The member that has a partition, by the greatest configuration epoch that was heard of.
#[derive(Clone, Debug)]
struct Owner {
    epoch: u64,
    id: String,
    address: Address,
}

impl Discovery {
    fn new(members: &Members) -> Self {
        let mut discovery = Self {
            links: HashMap::new(),
            owners: vec![None; usize::from(PARTITIONS)],
            shards: HashMap::new(),
            logged: HashSet::new(),
        };
        for seed in &members.servers.seeds {
            discovery.link(members, seed);
        }
        discovery
    }

    /// Asks some members, and publishes what follows.
    async fn refresh(&mut self, members: &Members) {
        let mut questions = redis::pipe();
        questions.cmd("INFO").cmd("CLUSTER").arg("NODES");
        map_id::question(&mut questions);
        let links = self.links.values().cloned();
        let asked = links.sample(&mut rand::rng(), MAX_ASKED);
        let asked = asked.iter().map(async |link| {
            let replies = link.ask(&questions).await?;
            Answer::read(link, &replies, members.servers.is_tls)
        });
        let mut answers = Vec::new();
        let mut known = members.known();
        known.trouble = None;
        for answer in join_all(asked).await {
            match answer {
                Ok(answer) => answers.push(answer),
                Err(reason) => known.trouble = Some(reason),
            }
        }
        if !answers.is_empty() {
            known.trouble = self.conclude(members, &answers, &mut known).err();
            self.learn_map_id(members, &answers, &mut known).await;
        }
        for answer in answers {
            known.infos.insert(answer.address, answer.info);
        }
        let links = &self.links;
        known.infos.retain(|address, _| links.contains_key(address));
        let is_up = |address: &Address| links[address].trouble().is_none();
        if let Some(reason) = known.eviction(is_up) {
            known.trouble = Some(reason);
            known.topology = Arc::default();
        }
        self.log_news(&known);
        members.publish(known);
    }

    /// What follows from at least one answer.
    ///
    /// # Errors
    /// Why none of these servers can hold the map.
    fn conclude(
        &mut self,
        members: &Members,
        answers: &[Answer],
        known: &mut Known,
    ) -> Result<(), String> {
        let is_cluster = members.servers.seeds.len() > 1 || self.owners.iter().any(Option::is_some);
        let mut fitting = Vec::new();
        let mut misfit = None;
        for answer in answers {
            match answer.misfit(is_cluster) {
                None => fitting.push(answer),
                Some(reason) => misfit = Some(reason),
            }
        }
        let Some(first) = fitting.first() else {
            if !is_cluster {
                known.topology = Arc::default();
            }
            return misfit.map_or(Ok(()), Err);
        };
        if let Some(reason) = misfit {
            self.log_once(&reason);
        }
        let (owners, default_backups) = if first.info.is_cluster_enabled {
            self.learn(members, &fitting);
            let owners = self.owners.iter().map(Option::as_ref);
            let owners = owners.map(|owner| Some(owner?.address.clone()));
            let mut owners: Vec<Option<Address>> = owners.collect();
            for (partition, owner) in partition::all().zip(&mut owners) {
                if let Some(address) = &*owner
                    && is_split(partition::slot(partition), address, answers)
                {
                    *owner = None;
                }
            }
            (owners, CLUSTER_BACKUPS)
        } else {
            (vec![Some(first.address.clone()); self.owners.len()], 0)
        };
        known.backups = members.options.backups.unwrap_or(default_backups);
        known.topology = Arc::new(self.topology(members, &owners, known.backups));
        Ok(())
    }

    /// Takes over from the members' views who has which partition, and who else is a member.
    fn learn(&mut self, members: &Members, answers: &[&Answer]) {
        let nodes: Vec<&Node> = answers.iter().flat_map(|answer| &answer.nodes).collect();
        for (partition, owner) in partition::all().zip(&mut self.owners) {
            let Some(best) = Node::primary_of(partition::slot(partition), &nodes) else {
                continue;
            };
            // Only a cluster that was created anew does not know the member that we know.
            let is_news = owner.as_ref().is_none_or(|owner| {
                best.epoch >= owner.epoch || nodes.iter().all(|node| node.id != owner.id)
            });
            if is_news {
                *owner = Some(Owner {
                    epoch: best.epoch,
                    id: best.id.clone(),
                    address: best.address.clone(),
                });
            }
        }
        for node in &nodes {
            self.link(members, &node.address);
        }
        let seeds = &members.servers.seeds;
        self.links.retain(|address, _| {
            seeds.contains(address) || nodes.iter().any(|node| node.address == *address)
        });
    }

    /// Takes the map's id from the primary that has it, or gives a new map one, once that primary
    /// takes entries.
    async fn learn_map_id(&self, members: &Members, answers: &[Answer], known: &mut Known) {
        let topology = &known.topology;
        let Some(owner) = topology.owner(map_id::PARTITION) else {
            return;
        };
        let link = &topology.shards[owner].link;
        let mut answers = answers.iter();
        let Some(answer) = answers.find(|answer| answer.address == link.address) else {
            return;
        };
        let found = match &answer.map_id {
            Ok(MapId::Made(id)) => Ok(*id),
            Ok(MapId::Missing) if !members.options.create => Err("holds no map".to_owned()),
            Ok(MapId::Missing | MapId::Making(_)) => {
                let mut shards = topology.shards.iter();
                if !topology.is_whole() || shards.any(|shard| shard.lane.trouble().is_some()) {
                    return;
                }
                make_map(members, topology, known.backups).await
            }
            Err(reason) => Err(reason.clone()),
        };
        match found {
            Ok(id) => {
                if known.map_id.is_some_and(|known_id| known_id != id) {
                    tracing::error!(%id, "the redis servers hold another map than before");
                }
                known.map_id = Some(id);
                known.map_id_trouble = None;
            }
            Err(reason) => {
                known.map_id_trouble = Some(format!("redis {}: {reason}", link.address));
            }
        }
    }

    fn topology(
        &mut self,
        members: &Members,
        owners: &[Option<Address>],
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
            links: self.links.clone(),
        };
        for (place, (address, partitions)) in partitions.into_iter().enumerate() {
            for partition in &partitions {
                topology.owners[usize::from(*partition)] = Some(place);
            }
            topology
                .shards
                .push(self.shard(members, address, partitions, backups));
        }
        topology
    }

    /// The shard of a primary, made when it is needed first.
    fn shard(
        &mut self,
        members: &Members,
        address: &Address,
        partitions: Vec<u16>,
        backups: u16,
    ) -> Arc<Shard> {
        if let Some(shard) = self.shards.get(address) {
            shard.lane.set_partitions(partitions);
            return shard.clone();
        }
        let settings = Settings {
            store_timeout: members.options.store_timeout,
            answer_timeout: answer_timeout(&members.options),
            settle: members.options.settle,
            backups,
        };
        let link = self.link(members, address);
        let client = members.servers.client(address);
        let refresh = members.refresh.clone();
        let lane = Lane::open(link.clone(), client, settings, partitions, refresh);
        let shard = Arc::new(Shard { link, lane });
        self.shards.insert(address.clone(), shard.clone());
        shard
    }

    /// The link to a server, made when it is needed first.
    fn link(&mut self, members: &Members, address: &Address) -> Arc<Link> {
        let link = self.links.entry(address.clone()).or_insert_with(|| {
            let client = members.servers.client(address);
            let patience = answer_timeout(&members.options);
            let refresh = members.refresh.clone();
            Arc::new(Link::new(address.clone(), client, patience, refresh))
        });
        link.clone()
    }

    fn log_news(&mut self, known: &Known) {
        for (address, warning) in known.warnings() {
            if self.logged.insert(format!("{address}: {warning}")) {
                tracing::warn!(%address, warning, "a redis server should be set up otherwise");
            }
        }
        let troubles = [&known.trouble, &known.map_id_trouble];
        for trouble in troubles.into_iter().flatten() {
            self.log_once(trouble);
        }
    }

    fn log_once(&mut self, trouble: &str) {
        if self.logged.insert(trouble.to_owned()) {
            tracing::warn!(trouble, "redis servers are not as they should be");
        }
    }
}

/// Makes a new map; all its primaries must take entries.
async fn make_map(members: &Members, topology: &Topology, backups: u16) -> Result<Uuid, String> {
    let clients = topology.shards.iter();
    let clients = clients.map(|shard| members.servers.client(&shard.link.address));
    let clients: Vec<Client> = clients.collect();
    let mut primaries: Vec<(&Client, Vec<u16>)> =
        clients.iter().map(|client| (client, Vec::new())).collect();
    for partition in partition::all() {
        if let Some(owner) = topology.owner(partition) {
            primaries[owner].1.push(partition);
        }
    }
    primaries.sort_by_key(|(_, partitions)| partitions.first().copied());
    let answer_timeout = answer_timeout(&members.options);
    let making = Making {
        primaries,
        backups,
        answer_timeout,
        wait_timeout: wait_timeout(answer_timeout),
    };
    making.run().await
}

/// Whether a slot comes to one member while the one that has it does not know so. That is what a
/// failover in the middle of a move leaves: some of the slot's keys may be at the other end, and an
/// empty partition here may be a full one there.
fn is_split(slot: u16, owner: &Address, answers: &[Answer]) -> bool {
    let says = |answer: &Answer, direction| {
        let mut moving = answer.info.moving.iter();
        moving.any(|moving| moving.slot == slot && moving.direction == direction)
    };
    let mut others = answers.iter().filter(|answer| answer.address != *owner);
    let comes_elsewhere = others.any(|answer| says(answer, Direction::In));
    let mut answers = answers.iter();
    let knows_it = |answer: &Answer| answer.address == *owner && says(answer, Direction::Out);
    comes_elsewhere && !answers.any(knows_it)
}

/// What a member said.
struct Answer {
    address: Address,
    info: ServerInfo,
    nodes: Vec<Node>,
    /// Only the primary that has it can say so.
    map_id: Result<MapId, String>,
}

impl Answer {
    /// Why this server cannot hold the map, or its part of it, if so.
    fn misfit(&self, is_cluster: bool) -> Option<String> {
        let Self { address, info, .. } = self;
        if !info.is_new_enough() {
            let version = &info.version;
            Some(format!(
                "redis {address} is version {version}, and 7.0 or later is needed"
            ))
        } else if info.is_cluster_enabled {
            None
        } else if is_cluster {
            Some(format!(
                "redis {address} is no member of a cluster; name one server, or members of one \
                 cluster"
            ))
        } else if info.is_replica {
            Some(format!("redis {address} is a replica; name its primary"))
        } else {
            None
        }
    }

    fn read(link: &Link, replies: &[Value], is_tls: bool) -> Result<Self, String> {
        let address = &link.address;
        let text = |reply: &Value| match reply {
            Value::BulkString(bytes) => Ok(String::from_utf8_lossy(bytes).into_owned()),
            Value::ServerError(error) => Err(format!("redis {address} refuses: {error}")),
            _ => Err(partition::strange(replies).to_string()),
        };
        let [info, nodes, id] = replies else {
            return Err(partition::strange(replies).to_string());
        };
        let mut info = ServerInfo::parse(&text(info)?);
        let nodes = if info.is_cluster_enabled {
            Node::parse_all(&text(nodes)?, address, is_tls)
        } else {
            Vec::new()
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
        })
    }
}
