//! Parsers for the replies to `INFO` and `CLUSTER NODES`.

use std::ops::RangeInclusive;

use redis::InfoDict;

use super::config::Address;

/// A server's reply to `INFO`. Format: <https://redis.io/docs/latest/commands/info/>
#[derive(Clone, Debug, Default)]
pub(super) struct ServerInfo {
    pub(super) version: String,
    pub(super) is_cluster_enabled: bool,
    pub(super) is_replica: bool,
    /// Replicas that are connected at the moment.
    pub(super) replicas: u64,
    /// In bytes; 0 is no limit.
    pub(super) max_memory: u64,
    /// What the server does when `max_memory` is used up.
    pub(super) max_memory_policy: String,
    /// In bytes, all that the server uses, and its data set alone.
    pub(super) used_memory: u64,
    pub(super) dataset_memory: u64,
    /// Keys evicted since the server started.
    pub(super) evicted_keys: u64,
    /// Commands that the map needs and its user may not run.
    pub(super) lacking_rights: Vec<String>,
    /// The server's id in the cluster, from `CLUSTER NODES`; of a single server its address.
    pub(super) id: String,
    /// Slots that the server reports as moving, from `CLUSTER NODES`.
    pub(super) moving: Vec<MovingSlot>,
}

impl ServerInfo {
    pub(super) fn parse(reply: &str) -> Self {
        let info = InfoDict::new(reply);
        let text = |field| info.get::<String>(field).unwrap_or_default();
        let number = |field| info.get::<u64>(field).unwrap_or(0);
        Self {
            version: text("redis_version"),
            is_cluster_enabled: number("cluster_enabled") == 1,
            is_replica: text("role") == "slave",
            replicas: number("connected_slaves"),
            max_memory: number("maxmemory"),
            max_memory_policy: text("maxmemory_policy"),
            used_memory: number("used_memory"),
            dataset_memory: number("used_memory_dataset"),
            evicted_keys: number("evicted_keys"),
            ..Self::default()
        }
    }

    /// Whether the policy may evict entries, which `volatile-*` spares: they have no time to live.
    pub(super) fn may_evict_entries(&self) -> bool {
        self.max_memory > 0 && self.max_memory_policy.starts_with("allkeys-")
    }

    /// Scripts with flags (`#!lua flags=…`) came with Redis 7.0.
    pub(super) fn is_new_enough(&self) -> bool {
        let major = self.version.split('.').next();
        major.is_some_and(|major| major.parse::<u32>().is_ok_and(|major| major >= 7))
    }
}

/// A slot that one end of a move reports as moving.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct MovingSlot {
    pub(super) slot: u16,
    pub(super) direction: Direction,
    /// The id of the other end.
    pub(super) peer: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    /// To the peer.
    Out,
    /// From the peer.
    In,
}

impl MovingSlot {
    /// Parses `[77->-ID]` or `[77-<-ID]`.
    fn parse(text: &str) -> Option<Self> {
        let inner = text.strip_prefix('[')?.strip_suffix(']')?;
        let (slot, direction, peer) = match inner.split_once("->-") {
            Some((slot, peer)) => (slot, Direction::Out, peer),
            None => {
                let (slot, peer) = inner.split_once("-<-")?;
                (slot, Direction::In, peer)
            }
        };
        Some(Self {
            slot: slot.parse().ok()?,
            direction,
            peer: peer.to_owned(),
        })
    }
}

/// A line of `CLUSTER NODES`: one member's view of a member.
/// Format: <https://redis.io/docs/latest/commands/cluster-nodes/>
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Node {
    pub(super) id: String,
    /// Where it is reached.
    pub(super) address: Address,
    /// Its IP address and its announced host name: a redirection may name either.
    pub(super) spellings: Vec<Address>,
    /// Whether the member that was asked is this one.
    pub(super) is_myself: bool,
    /// Of two members that claim a slot, the one with the greater configuration epoch owns it.
    pub(super) epoch: u64,
    /// The id of a replica's primary.
    pub(super) primary_id: Option<String>,
    /// The slots of a primary; a replica has none.
    pub(super) slots: Vec<RangeInclusive<u16>>,
    /// Only in a member's line about itself.
    pub(super) moving: Vec<MovingSlot>,
}

impl Node {
    /// Parses the reply of the member at `asked`, which may not know its own address. Members
    /// without an address are left out.
    pub(super) fn parse_all(text: &str, asked: &Address, is_tls: bool) -> Vec<Self> {
        let parse = |line| Self::parse(line, asked, is_tls);
        text.lines().filter_map(parse).collect()
    }

    fn parse(line: &str, asked: &Address, is_tls: bool) -> Option<Self> {
        let fields: Vec<&str> = line.split(' ').collect();
        let [id, endpoint, flags, primary_id, _, _, epoch, _, slots @ ..] = &fields[..] else {
            return None;
        };
        if flags.contains("noaddr") || flags.contains("handshake") {
            return None;
        }
        let (address, names) = endpoint.split_once('@')?;
        let by_ip = Address::of_member(address)?;
        let name = names.split(',').nth(1).filter(|name| !name.is_empty());
        let by_name = name.map(|name| Address::new(name, by_ip.port));
        let address = match &by_name {
            // Certificates usually name hosts, not IP addresses.
            Some(by_name) if is_tls => by_name.clone(),
            _ if by_ip.host.is_empty() => Address::new(&asked.host, by_ip.port),
            _ => by_ip.clone(),
        };
        let has_flag = |name| flags.split(',').any(|flag| flag == name);
        // A moving slot is listed in brackets, besides the range that contains it.
        let moving = slots.iter().filter_map(|slot| MovingSlot::parse(slot));
        let slots = slots.iter().filter_map(|slots| slot_range(slots));
        let spellings = [Some(address.clone()), Some(by_ip), by_name];
        let spellings = spellings.into_iter().flatten();
        Some(Self {
            id: (*id).to_owned(),
            spellings: spellings.filter(|name| !name.host.is_empty()).collect(),
            address,
            epoch: epoch.parse().ok()?,
            primary_id: Some((*primary_id).to_owned()).filter(|id| id != "-"),
            is_myself: has_flag("myself"),
            moving: moving.collect(),
            slots: slots.filter(|_| has_flag("master")).collect(),
        })
    }

    /// The primary that owns a slot: of all that claim it in any member's view, the one with the
    /// greatest configuration epoch. A member may not know that its own address has changed, so
    /// other members' views of it take precedence.
    pub(super) fn primary_of<'a>(slot: u16, nodes: &[&'a Self]) -> Option<&'a Self> {
        let claims = nodes.iter().copied().filter(|node| {
            let mut slots = node.slots.iter();
            slots.any(|slots| slots.contains(&slot))
        });
        claims.max_by_key(|node| (node.epoch, !node.is_myself))
    }
}

fn slot_range(text: &str) -> Option<RangeInclusive<u16>> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    Some(first.parse().ok()?..=last.parse().ok()?)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use testing::fuzz::near;

    use super::*;
    use crate::map::RedisConfig;

    const NODES: &[&[u8]] = &[
        b"aaa :7001@17001 myself,master - 0 1780000000000 4 connected 0-5460 9000 [77->-bbb]\n\
          bbb 10.0.0.2:7002@17002,two.example master,fail - 0 1780000000000 2 disconnected 5461-8999\n",
        b"ccc [::1]:7003@17003 slave aaa 0 1780000000000 4 connected [1-<-aaa]\n",
    ];

    const INFO: &[&[u8]] = &[
        b"# Server\r\nredis_version:7.0.15\r\ncluster_enabled:1\r\naof_enabled:0\r\n# Memory\r\n\
          used_memory:1000\r\nmaxmemory:2000\r\nmaxmemory_policy:noeviction\r\nrole:slave\r\n",
    ];

    proptest! {
        /// Whatever a server says of its cluster, each member that is read from it can be connected to.
        #[test]
        fn members_are_read_or_left_out(reply in near(NODES), is_tls in any::<bool>()) {
            let reply = String::from_utf8_lossy(&reply);
            let asked = Address { host: "10.0.0.1".to_owned(), port: 7001 };
            let scheme = if is_tls { "rediss" } else { "redis" };
            let config: RedisConfig = format!("{scheme}://10.0.0.1:7001").parse().expect("a location");
            let nodes = Node::parse_all(&reply, &asked, is_tls);
            for node in &nodes {
                let _ = config.client(&node.address);
            }
            let nodes: Vec<&Node> = nodes.iter().collect();
            for slot in [0, 77, 5460, 16383, u16::MAX] {
                let _ = Node::primary_of(slot, &nodes);
            }
        }

        #[test]
        fn info_is_read(reply in near(INFO)) {
            let info = ServerInfo::parse(&String::from_utf8_lossy(&reply));
            let _ = (info.is_new_enough(), info.may_evict_entries());
        }
    }

    #[test]
    fn members_and_their_slots() {
        let text = "\
aaa :7001@17001 myself,master - 0 1780000000000 4 connected 0-5460 9000 [77->-bbb]
bbb 10.0.0.2:7002@17002,two.example master,fail - 0 1780000000000 2 disconnected 5461-8999
ccc 10.0.0.3:7003@17003 slave aaa 0 1780000000000 4 connected
ddd :0@0 master,noaddr - 0 0 0 disconnected
eee 10.0.0.5:7005@17005 handshake - 0 0 0 disconnected
";
        let asked = Address {
            host: "10.0.0.1".to_owned(),
            port: 7001,
        };
        let nodes = Node::parse_all(text, &asked, false);
        let shown = |node: &Node| (node.address.to_string(), node.epoch, node.slots.clone());
        assert_eq!(
            nodes.iter().map(shown).collect::<Vec<_>>(),
            [
                ("10.0.0.1:7001".to_owned(), 4, vec![0..=5460, 9000..=9000]),
                ("10.0.0.2:7002".to_owned(), 2, vec![5461..=8999]),
                ("10.0.0.3:7003".to_owned(), 4, vec![]),
            ]
        );
        assert!(nodes[0].is_myself && !nodes[1].is_myself);
        let leaving = MovingSlot {
            slot: 77,
            direction: Direction::Out,
            peer: "bbb".to_owned(),
        };
        assert_eq!(nodes[0].moving, [leaving]);
        let coming = MovingSlot::parse("[78-<-aaa]").map(|slot| slot.direction);
        assert_eq!(coming, Some(Direction::In));
        let nodes = Node::parse_all(text, &asked, true);
        assert_eq!(nodes[1].address.host, "two.example");
    }

    #[test]
    fn greatest_epoch_wins_and_other_members_know_an_address_better() {
        let asked = Address {
            host: "10.0.0.9".to_owned(),
            port: 7009,
        };
        let read = |text: &str| Node::parse_all(text, &asked, false);
        let stale = read("aaa 10.0.0.1:7001@17001 myself,master - 0 0 1 connected 0-99");
        let current = read("bbb 10.0.0.2:7001@17001 myself,master - 0 0 7 connected 0-99");
        let moved = read("bbb 10.0.0.3:7001@17001 master - 0 0 7 connected 0-99");
        for views in [[&stale, &current, &moved], [&moved, &current, &stale]] {
            let nodes: Vec<&Node> = views.into_iter().flatten().collect();
            let primary = Node::primary_of(50, &nodes).map(|node| node.address.to_string());
            assert_eq!(primary.as_deref(), Some("10.0.0.3:7001"));
            assert_eq!(Node::primary_of(100, &nodes), None);
        }
    }

    #[test]
    fn server_info_is_read() {
        let info = ServerInfo::parse(
            "# Server\r\nredis_version:7.0.15\r\ncluster_enabled:1\r\n\
             connected_slaves:2\r\n",
        );
        assert!(info.is_new_enough() && info.is_cluster_enabled);
        assert_eq!((info.replicas, info.is_replica), (2, false));
        let evicting = |policy| ServerInfo::parse(policy).may_evict_entries();
        assert!(evicting("maxmemory:1\r\nmaxmemory_policy:allkeys-lru\r\n"));
        assert!(!evicting("maxmemory:0\r\nmaxmemory_policy:allkeys-lru\r\n"));
        assert!(!evicting("maxmemory:1\r\nmaxmemory_policy:noeviction\r\n"));
        assert!(!evicting(
            "maxmemory:1\r\nmaxmemory_policy:volatile-ttl\r\n"
        ));
        assert!(ServerInfo::parse("role:slave\r\n").is_replica);
        assert!(!ServerInfo::parse("redis_version:6.2.1\r\n").is_new_enough());
        assert!(ServerInfo::parse("redis_version:10.0.0\r\n").is_new_enough());
    }
}
