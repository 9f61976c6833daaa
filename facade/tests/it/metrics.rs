//! Metrics, held to what was done, to Prometheus's rules, and to the dashboard and alerts that use them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::process::{Command, Stdio};
use std::time::Instant;

use reqwest::header::{ACCEPT, CONTENT_TYPE};
use serde_json::Value;
use testing::process::{LOOK_AGAIN, PATIENCE, Process, free_address};
use testing::redis_servers::{RedisCluster, RedisServer};
use testing::requirements::{skip, trial_run};

use crate::processes::{Processes, start_logging};
use crate::stats::wait_for;

async fn metrics(system: &Processes, of: &Process) -> String {
    let url = format!("{}/metrics", of.url());
    let response = system.http.get(url).send().await.unwrap();
    assert_eq!(response.status(), 200);
    let content_type = response.headers()[CONTENT_TYPE].to_str().unwrap();
    assert_eq!(content_type, "text/plain; version=0.0.4; charset=utf-8");
    response.text().await.unwrap()
}

/// The sum of all samples of a name whose labels contain all of these.
fn value(metrics: &str, name: &str, labels: &[&str]) -> f64 {
    let samples = metrics.lines().filter_map(|line| {
        let (series, value) = line.rsplit_once(' ')?;
        let (found, found_labels) = series.split_once('{').unwrap_or((series, ""));
        let matches = found == name && labels.iter().all(|label| found_labels.contains(label));
        matches.then(|| value.parse::<f64>().unwrap())
    });
    samples.sum()
}

/// The kind of each metric, by its name.
fn kinds(metrics: &str) -> BTreeMap<&str, &str> {
    let types = metrics
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE "));
    types.map(|line| line.split_once(' ').unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn numbers_are_what_was_done() {
    let mut system = Processes::start();
    let facade = metrics(&system, &system.facade).await;
    for (method, route) in [
        ("POST", "/"),
        ("POST", "upload"),
        ("GET", "/"),
        ("GET", "/{uuid}"),
    ] {
        for status in ["200", "500", "503"] {
            let series = format!(
                "http_request_duration_seconds_count{{method=\"{method}\",route=\"{route}\",status=\"{status}\"}} 0"
            );
            assert!(facade.contains(&series), "{series} is missing");
        }
    }
    for n in 0..30 {
        assert_eq!(system.post(&n.to_string()).await.status(), 200);
    }
    assert_eq!(system.post("").await.status(), 400);
    let read = system.get().await.text().await.unwrap();
    for path in [
        "no-such-path",
        "no/such/path",
        "01a203b3-3bd3-7041-bd9b-405a081b6b3b",
    ] {
        let url = format!("{}/{path}", system.facade.url());
        assert_eq!(system.http.get(url).send().await.unwrap().status(), 404);
    }
    let odd = system
        .http
        .request("BREW".parse().unwrap(), system.facade.url());
    assert_eq!(odd.send().await.unwrap().status(), 405);

    let upload = system.http.post(system.facade.url()).body("\"30\"\n");
    let upload = upload.header(CONTENT_TYPE, "application/x-ndjson");
    assert_eq!(upload.send().await.unwrap().status(), 200);

    let facade = metrics(&system, &system.facade).await;
    let answered = |labels: &[&str]| value(&facade, "http_request_duration_seconds_count", labels);
    assert_eq!(
        answered(&["method=\"POST\"", "route=\"/\"", "status=\"200\""]),
        30.0
    );
    assert_eq!(answered(&["route=\"upload\"", "status=\"200\""]), 1.0);
    assert_eq!(answered(&["method=\"POST\"", "status=\"400\""]), 1.0);
    assert_eq!(
        answered(&["method=\"GET\"", "route=\"/\"", "status=\"200\""]),
        1.0
    );
    assert_eq!(answered(&["route=\"/{uuid}\"", "status=\"404\""]), 2.0);
    assert_eq!(answered(&["route=\"other\"", "status=\"404\""]), 1.0);
    assert_eq!(answered(&["method=\"other\"", "status=\"405\""]), 1.0);
    assert!(
        !facade.contains("such") && !facade.contains("BREW"),
        "{facade}"
    );
    assert_eq!(value(&facade, "facade_batch_entries_sum", &[]), 31.0);
    let posted: usize = (0..31).map(|n| n.to_string().len()).sum();
    assert_eq!(
        value(&facade, "facade_posted_bytes_total", &[]),
        posted as f64
    );
    assert_eq!(
        value(&facade, "facade_read_bytes_total", &[]),
        read.len() as f64
    );
    assert_eq!(value(&facade, "facade_instance_up", &[]), 3.0);
    assert_eq!(value(&facade, "facade_repeats_total", &[]), 0.0);
    assert_eq!(
        value(&facade, "facade_free_permits", &["kind=\"read\""]),
        64.0
    );

    let past_deadlines = [10.0, 15.0].map(|deadline| {
        let bounds = facade.lines().filter_map(|line| {
            let of_posts = "http_request_duration_seconds_bucket{method=\"POST\",route=\"/\",status=\"503\",le=\"";
            let (bound, _) = line.strip_prefix(of_posts)?.split_once('"')?;
            bound.parse::<f64>().ok().filter(|bound| *bound > deadline)
        });
        bounds.fold(f64::INFINITY, f64::min)
    });
    assert_eq!(past_deadlines, [10.5, 15.5]);

    let (mut stored, mut cpu_seconds) = (0.0, Vec::new());
    for instance in &system.logging {
        // An instance counts the map's entries once a second.
        let begin = Instant::now();
        let logging = loop {
            let logging = metrics(&system, instance).await;
            if value(&logging, "logging_map_entries", &[]) == 31.0 {
                break logging;
            }
            assert!(begin.elapsed() < PATIENCE, "{logging}");
            tokio::time::sleep(LOOK_AGAIN).await;
        };
        let put = value(&logging, "logging_put_entries_sum", &[]);
        assert_eq!(
            value(&logging, "logging_entries_total", &["outcome=\"stored\""]),
            put
        );
        assert_eq!(value(&logging, "logging_commit_entries_sum", &[]), put);
        assert_eq!(value(&logging, "logging_puts_in_flight", &[]), 0.0);
        assert!(value(&logging, "logging_map_entry_bytes", &[]) > 0.0);
        assert_eq!(kinds(&logging)["process_cpu_seconds_total"], "counter");
        cpu_seconds.push(value(&logging, "process_cpu_seconds_total", &[]));
        stored += put;
    }
    assert_eq!(stored, 31.0);
    assert!(
        cpu_seconds.iter().any(|seconds| seconds.fract() > 0.0),
        "{cpu_seconds:?}"
    );

    system.logging[0].kill();
    for n in 0..30 {
        assert_eq!(system.post(&n.to_string()).await.status(), 200);
    }
    let name = "upstream=\"logging-1\"";
    wait_for(&system, |stats| stats["instances"][0]["up"] == false).await;
    let facade = metrics(&system, &system.facade).await;
    assert_eq!(value(&facade, "facade_instance_up", &[name]), 0.0);
    assert_eq!(value(&facade, "facade_instance_up", &[]), 2.0);
    assert_eq!(
        value(&facade, "facade_instance_failures_total", &[name]),
        1.0
    );
    assert_eq!(
        value(&facade, "facade_repeats_total", &["instance_down"]),
        1.0
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn followers_that_are_cut_are_counted() {
    let mut system = Processes::start_with(&["--read-deadline", "1s"]);
    let url = format!("{}/?follow=true&tail=1", system.facade.url());
    assert_eq!(system.post("hello").await.status(), 200);
    let follow = system.http.get(url).header(ACCEPT, "application/x-ndjson");
    let mut follower = follow.send().await.unwrap();
    let first = follower.chunk().await.unwrap().unwrap();
    assert!(first.starts_with(b"{"), "{first:?}");
    let facade = metrics(&system, &system.facade).await;
    assert_eq!(value(&facade, "facade_followers", &[]), 1.0);
    assert_eq!(value(&facade, "facade_followers_cut_total", &[]), 0.0);

    for instance in &mut system.logging {
        instance.kill();
    }
    while follower.chunk().await.is_ok() {}
    let facade = metrics(&system, &system.facade).await;
    let cut = ["reason=\"no_instance\""];
    assert_eq!(value(&facade, "facade_followers_cut_total", &cut), 1.0);
    assert_eq!(value(&facade, "facade_followers_cut_total", &[]), 1.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn server_that_is_dead_has_no_memory() {
    let folder = tempfile::tempdir().unwrap();
    let mut server = RedisServer::single(folder.path());
    let map = format!("redis://{}", server.address());
    let instance = start_logging(&["--map", &map], free_address());
    let measured = instance.ask("/metrics");
    let name = format!("server=\"{}\"", server.address());
    assert!(value(&measured, "logging_map_server_memory_bytes", &[&name]) > 0.0);
    assert_eq!(value(&measured, "logging_map_server_up", &[&name]), 1.0);
    server.kill();
    let begin = Instant::now();
    loop {
        let measured = instance.ask("/metrics");
        let states = ["logging_map_server_up", "logging_map_primary_open"];
        let states = states.map(|state| value(&measured, state, &[&name]));
        let numbers = ["logging_map_server_memory_bytes{", "logging_map_entries{"];
        if states == [0.0, 0.0] && numbers.iter().all(|number| !measured.contains(number)) {
            break;
        }
        assert!(begin.elapsed() < PATIENCE, "{measured}");
        tokio::time::sleep(LOOK_AGAIN).await;
    }
}

/// Each alert has a case in which it fires, and one in which it does not.
#[test]
fn alerts_fire_when_they_must_and_only_then() {
    let test = ["test", "rules", &monitoring("alerts_test.yml")];
    if promtool(&test, Stdio::null()).is_none() {
        return;
    }
    let rules = fs::read_to_string(monitoring("alerts.yml")).unwrap();
    let cases = fs::read_to_string(monitoring("alerts_test.yml")).unwrap();
    for alert in rules
        .lines()
        .filter_map(|line| line.trim().strip_prefix("- alert: "))
    {
        let fires = cases.contains(&format!("alertname: {alert}\n        exp_alerts:"));
        let is_silent = cases.contains(&format!("alertname: {alert}, exp_alerts: []}}"));
        assert!(
            fires && is_silent,
            "{alert}: fires {fires}, silent {is_silent}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn promtool_finds_nothing() {
    let check = ["check", "config", &monitoring("prometheus.yml")];
    if promtool(&check, Stdio::null()).is_none() {
        return;
    }
    let system = Processes::start();
    assert_eq!(system.post("hello").await.status(), 200);
    assert_eq!(system.read_all().await.len(), 1);
    for service in [&system.facade, &system.logging[0], &system.messages] {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), metrics(&system, service).await).unwrap();
        let found = promtool(&["check", "metrics"], file.reopen().unwrap().into());
        assert_eq!(found.as_deref(), Some(""));
    }
}

/// What promtool says, which must be content; `None` where it is not installed.
#[track_caller]
fn promtool(arguments: &[&str], input: Stdio) -> Option<String> {
    if let Err(why) = trial_run(Command::new("promtool").arg("--version")) {
        skip(&format!("no promtool: {why}"), "REQUIRE_ALL");
        return None;
    }
    let mut command = Command::new("promtool");
    let output = command.args(arguments).stdin(input).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    Some(said.into_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn open_metrics_when_asked_for() {
    let system = Processes::start();
    let url = format!("{}/metrics", system.facade.url());
    let request = system.http.get(url).header(
        ACCEPT,
        "application/openmetrics-text;version=1.0.0;q=0.6,text/plain;version=0.0.4;q=0.5",
    );
    let response = request.send().await.unwrap();
    let content_type = response.headers()[CONTENT_TYPE].to_str().unwrap();
    assert!(content_type.starts_with("application/openmetrics-text; version=1.0.0"));
    let text = response.text().await.unwrap();
    assert!(text.ends_with("# EOF\n"), "{text}");
    assert!(text.lines().all(|line| !line.is_empty()), "{text}");
    assert_eq!(kinds(&text)["facade_reads_resumed"], "counter");
    assert!(text.contains("\nfacade_reads_resumed_total 0\n"), "{text}");
}

fn monitoring(file: &str) -> String {
    format!("{}/../docs/monitoring/{file}", env!("CARGO_MANIFEST_DIR"))
}

/// What looks like a metric of ours in a text.
fn named_metrics(text: &str) -> BTreeSet<&str> {
    let is_part = |character: char| character.is_ascii_alphanumeric() || character == '_';
    let words = text.split(|character| !is_part(character));
    let is_metric = |word: &&str| {
        let prefixes = ["facade_", "logging_", "http_", "process_"];
        prefixes.iter().any(|prefix| word.starts_with(prefix))
    };
    words.filter(is_metric).collect()
}

fn without_suffix(name: &str) -> &str {
    ["_bucket", "_sum", "_count"]
        .iter()
        .find_map(|suffix| name.strip_suffix(suffix))
        .unwrap_or(name)
}

/// Each metric that the dashboard, an alert or the documentation names is exported, and each of ours is
/// documented.
#[tokio::test(flavor = "multi_thread")]
async fn names_in_dashboard_alerts_and_documentation_are_exported() {
    let cluster = RedisCluster::start();
    let system = Processes::on_map(&["--map", &cluster.url()], &[]);
    assert_eq!(system.post("hello").await.status(), 200);
    let of_facade = metrics(&system, &system.facade).await;
    let of_logging = metrics(&system, &system.logging[0]).await;
    let mut exported = kinds(&of_facade);
    exported.extend(kinds(&of_logging));

    let dashboard: Value =
        serde_json::from_str(&fs::read_to_string(monitoring("dashboard.json")).unwrap()).unwrap();
    let panels = dashboard["panels"].as_array().unwrap();
    let targets = panels
        .iter()
        .flat_map(|panel| panel["targets"].as_array().unwrap());
    let queries: Vec<&str> = targets
        .map(|target| target["expr"].as_str().unwrap())
        .collect();
    let alerts = fs::read_to_string(monitoring("alerts.yml")).unwrap();
    let documentation = fs::read_to_string(monitoring("../observing.md")).unwrap();
    for (place, text) in [
        ("dashboard.json", &queries.join(" ")),
        ("alerts.yml", &alerts),
        ("observing.md", &documentation),
    ] {
        let named = named_metrics(text);
        assert!(named.len() > 8, "{place}: {named:?}");
        for name in named {
            assert!(
                exported.contains_key(without_suffix(name)),
                "{place}: {name}"
            );
        }
    }
    for name in exported.keys().filter(|name| !name.starts_with("process_")) {
        assert!(
            documentation.contains(name),
            "observing.md does not explain {name}"
        );
    }
}
