//! Which servers are members of the map's cluster. Addresses change their owners, and a node that has left
//! keeps its id, so one shared node or address proves nothing: an answer counts when it lists more than half
//! of the nodes that were members before.

use std::collections::HashSet;

use uuid::Uuid;

use super::config::Address;
use super::discovery::Answer;
use super::map_id::MapId;

/// The node ids of the map's cluster.
#[derive(Debug, Default)]
pub(super) struct Members(HashSet<String>);

impl Members {
    /// Chooses the answers of the map's cluster, whose nodes are the members from now on. If none of the
    /// members answers as one, the cluster of a server that has the map takes its place: the map was restored.
    /// While no map is known, members are found anew.
    pub(super) fn select<'a>(
        &mut self,
        answers: &[&'a Answer],
        map: Option<Uuid>,
    ) -> Vec<&'a Answer> {
        if map.is_none() {
            self.0.clear();
        }
        if !answers.iter().any(|answer| self.is_listed(answer)) {
            let found = match map {
                Some(id) => answers
                    .iter()
                    .find(|answer| answer.map_id == Ok(MapId::Made(id))),
                None => answers.iter().max_by_key(|answer| answer.has_slots()),
            };
            let Some(found) = found else {
                return Vec::new();
            };
            self.0 = found.node_ids().map(str::to_owned).collect();
        }
        let listed = answers.iter().filter(|answer| self.is_listed(answer));
        let listed: Vec<&Answer> = listed.copied().collect();
        let ids = listed.iter().flat_map(|answer| answer.node_ids());
        self.0 = ids.map(str::to_owned).collect();
        listed
    }

    /// Whether the server that gave this answer is a member.
    pub(super) fn contains(&self, answer: &Answer) -> bool {
        self.0.contains(&answer.info.id)
    }

    fn is_listed(&self, answer: &Answer) -> bool {
        let ids: Vec<&str> = answer.node_ids().collect();
        let shared = ids.iter().filter(|id| self.0.contains(**id)).count();
        2 * shared > self.0.len() && (shared > 1 || ids.len() == 1)
    }
}

/// At the start, the addresses in `--map` alone say which cluster has the map.
///
/// # Errors
/// When they name two clusters, or when most of them are not known to be of the one that was found.
pub(super) fn require_one_cluster(
    seeds: &[Address],
    members: &[&Answer],
    others: &[&Answer],
) -> Result<(), String> {
    // No cluster answers, or it is still to be created.
    if !members.iter().any(|member| member.has_slots()) {
        return Ok(());
    }
    let names = |answers: &[&Answer]| {
        let names = answers.iter().map(|answer| answer.address.to_string());
        names.collect::<Vec<_>>().join(", ")
    };
    let others: Vec<&Answer> = others
        .iter()
        .copied()
        .filter(|answer| answer.has_slots())
        .collect();
    if !others.is_empty() {
        return Err(format!(
            "--map names members of different redis clusters: {} of one, {} of another; correct --map",
            names(members),
            names(&others)
        ));
    }
    let is_known = |seed: &&Address| {
        let mut members = members.iter();
        members.any(|answer| {
            let mut spellings = answer.nodes.iter().flat_map(|node| &node.spellings);
            answer.address == **seed || spellings.any(|spelling| spelling == *seed)
        })
    };
    let known = seeds.iter().filter(is_known).count();
    if 2 * known <= seeds.len() {
        return Err(format!(
            "only {known} of the {} servers in --map are known to be of the redis cluster of {}: start the \
             others, or correct --map",
            seeds.len(),
            names(members)
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::replies::{Node, ServerInfo};
    use super::*;

    const MAP: Uuid = Uuid::from_u128(1);
    const OLD: [&str; 6] = ["a1", "a2", "a3", "a4", "a5", "a6"];

    fn address(id: &str) -> Address {
        Address::new(&format!("{id}.example"), 6379)
    }

    /// The answer of the server `id`, with what it found at the map's id.
    fn found(id: &str, listed: &[&str], map: Result<MapId, String>) -> Answer {
        let line = |listed: &&str| {
            format!("{listed} {listed}.example:6379@16379 master - 0 0 1 connected 0-99")
        };
        let lines: Vec<String> = listed.iter().map(line).collect();
        let address = address(id);
        let info = ServerInfo {
            id: id.to_owned(),
            is_cluster_enabled: !listed.is_empty(),
            ..ServerInfo::default()
        };
        Answer {
            nodes: Node::parse_all(&lines.join("\n"), &address, false),
            address,
            info,
            map_id: map,
            settle: Ok(None),
        }
    }

    fn answer(id: &str, listed: &[&str]) -> Answer {
        found(id, listed, Err("MOVED".to_owned()))
    }

    /// The servers whose answers count.
    fn select(members: &mut Members, answers: &[Answer], map: Option<Uuid>) -> Vec<String> {
        let answers: Vec<&Answer> = answers.iter().collect();
        let selected = members.select(&answers, map);
        selected
            .iter()
            .map(|answer| answer.info.id.clone())
            .collect()
    }

    fn old() -> Members {
        Members(OLD.map(str::to_owned).into())
    }

    /// Whether an instance starts with these answers and the addresses of [`OLD`] in `--map`.
    fn start(answers: &[Answer]) -> Result<(), String> {
        let answers: Vec<&Answer> = answers.iter().collect();
        let mut members = Members::default();
        let selected = members.select(&answers, None);
        let others = answers.iter().filter(|answer| !members.contains(answer));
        let others: Vec<&Answer> = others.copied().collect();
        require_one_cluster(&OLD.map(address), &selected, &others)
    }

    #[test]
    fn nodes_that_left_do_not_count_wherever_they_went() {
        let left = [&OLD[..5], &["b1", "b2", "a6"], &["a6"]];
        for nodes in [left[1], left[2]] {
            let answers = [
                answer("a6", nodes),
                answer("a1", left[0]),
                answer("a2", left[0]),
            ];
            let mut members = old();
            assert_eq!(select(&mut members, &answers, Some(MAP)), ["a1", "a2"]);
            assert!(!members.contains(&answers[0]));
            assert!(select(&mut members, &answers[..1], Some(MAP)).is_empty());
            assert_eq!(select(&mut members, &answers, Some(MAP)), ["a1", "a2"]);
        }
    }

    #[test]
    fn only_member_that_joins_another_cluster_does_not_count() {
        let mut members = Members(["a1".to_owned()].into());
        assert_eq!(
            select(&mut members, &[answer("a1", &["a1"])], Some(MAP)),
            ["a1"]
        );
        let joined = [answer("a1", &["a1", "b1"]), answer("b1", &["a1", "b1"])];
        assert!(select(&mut members, &joined, Some(MAP)).is_empty());
        let grown = [found("a1", &["a1", "a2"], Ok(MapId::Made(MAP)))];
        assert_eq!(select(&mut members, &grown, Some(MAP)), ["a1"]);
    }

    #[test]
    fn members_follow_a_cluster_that_changes() {
        let mut members = old();
        for nodes in [
            &["a1", "a2", "a3", "a4", "a5", "a6", "a7"][..],
            &["a2", "a3", "a4", "a5", "a6", "a7", "a8"],
            &["a5", "a6", "a7", "a8"],
            &["a7", "a8", "a6"],
            &["a7", "a8", "a9"],
        ] {
            let answers = [answer(nodes[0], nodes)];
            assert_eq!(select(&mut members, &answers, Some(MAP)), [nodes[0]]);
        }
        // Most of it went at once: the map's id tells it from a stranger.
        let mut members = old();
        assert!(select(&mut members, &[answer("a1", &["a1", "a2"])], Some(MAP)).is_empty());
        let shrunk = [
            found("a1", &["a1", "a2"], Ok(MapId::Made(MAP))),
            answer("a2", &["a1", "a2"]),
        ];
        assert_eq!(select(&mut members, &shrunk, Some(MAP)), ["a1", "a2"]);
    }

    #[test]
    fn servers_with_the_map_take_the_place_of_members_that_are_gone() {
        let new = ["b1", "b2", "b3"];
        let restored = |map| [answer("b1", &new), found("b2", &new, Ok(MapId::Made(map)))];
        assert_eq!(select(&mut old(), &restored(MAP), Some(MAP)), ["b1", "b2"]);
        assert!(select(&mut old(), &restored(Uuid::from_u128(2)), Some(MAP)).is_empty());
        let single = [found("c", &[], Ok(MapId::Made(MAP)))];
        assert_eq!(select(&mut old(), &single, Some(MAP)), ["c"]);
        // A copy elsewhere does not take the instance away.
        let [first, second] = restored(MAP);
        let both = [first, second, answer("a1", &OLD)];
        assert_eq!(select(&mut old(), &both, Some(MAP)), ["a1"]);
    }

    #[test]
    fn start_needs_one_cluster_that_most_addresses_belong_to() {
        assert_eq!(start(&[answer("a1", &OLD), answer("a5", &OLD)]), Ok(()));
        let alone = start(&[answer("a6", &["b1", "b2", "a6"])]);
        assert!(alone.is_err_and(|reason| reason.starts_with("only 1 of the 6 servers")));
        let two = start(&[answer("a1", &OLD[..5]), answer("a6", &["b1", "b2", "a6"])]);
        let two = two.expect_err("they are of two clusters");
        assert!(
            two.contains("a1.example:6379") && two.contains("a6.example:6379"),
            "{two}"
        );
        // A new node that is of no cluster yet holds no map.
        let mut new = answer("new", &["new"]);
        new.nodes[0].slots.clear();
        assert_eq!(start(&[new, answer("a1", &OLD)]), Ok(()));
    }
}
