//! The console while a replica of a Redis Cluster takes over from its primary.

use serde_json::{Value, json};
use testing::redis_servers::RedisCluster;

use super::browser::{Settings, in_browser, value, wait_for};
use super::{open_live, stats, texts};
use crate::processes::Processes;

const TIMELINE: &str =
    "[...document.querySelectorAll('#timeline span')].map((span) => span.textContent)";

/// Name, role and state of a member in the table.
fn member<'a>(table: &'a Value, name: &str) -> &'a [Value] {
    let mut rows = table.as_array().unwrap().iter();
    let row = rows.find(|row| row[0] == name).unwrap();
    &row.as_array().unwrap()[..3]
}

#[tokio::test(flavor = "multi_thread")]
async fn timeline_tells_that_a_replica_took_over() {
    let mut cluster = RedisCluster::start();
    let system = Processes::on_map(&["--map", &cluster.url()], &[]);
    let (first, second) = (cluster.nodes[0].address(), cluster.nodes[3].address());
    in_browser(Settings::default(), async |browser| {
        let happened = async |what: String| {
            wait_for(browser, TIMELINE, |timeline| {
                timeline.as_array().unwrap().contains(&json!(what))
            })
            .await;
        };
        open_live(browser, &system).await;
        let table = value(browser, &texts("members")).await;
        assert_eq!(member(&table, &first), [&first, "primary", "up"]);
        assert_eq!(member(&table, &second), [&second, "replica", "up"]);

        cluster.nodes[0].kill();
        happened(format!("member {first} is down")).await;
        happened(format!("member {second} is now primary, was replica")).await;
        let table = value(browser, &texts("members")).await;
        assert_eq!(member(&table, &first)[2], "down");
        assert_eq!(member(&table, &second), [&second, "primary", "up"]);
        let members = stats(&system).await["map"]["members"].clone();
        let known = members.as_array().unwrap().iter();
        let roles: Vec<&Value> = known
            .filter(|row| row["member"] == second)
            .map(|row| &row["role"])
            .collect();
        assert_eq!(roles, [&json!("primary")]);

        cluster.nodes[0].restart();
        happened(format!("member {first} is back")).await;
        happened(format!("member {first} is now replica, was primary")).await;
        let table = value(browser, &texts("members")).await;
        assert_eq!(member(&table, &first), [&first, "replica", "up"]);
    })
    .await;
}
