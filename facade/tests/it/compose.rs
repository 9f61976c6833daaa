//! The shipped `docker-compose.yml` in a Docker engine: containers are killed, disconnected, restarted,
//! added and removed while messages are posted and read, and the data outlives them.
//!
//! `.ci/stand-ins.sh run` makes the images, see `scripts/test.sh`. Without a Docker engine these tests are
//! skipped; with `REQUIRE_DOCKER` they fail.

mod project;

use std::fs::File;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use self::project::{Compose, docker, inspect, succeed};
use crate::load::Load;
use testing::process::LOOK_AGAIN;

/// Timeout for containers to reach the expected state.
const PATIENCE: Duration = Duration::from_secs(120);

/// POSTs answered between two events, so that every phase is under load.
const PHASE: u64 = 1000;

/// The services of the map's members.
const MEMBERS: [&str; 6] = [
    "redis-1", "redis-2", "redis-3", "redis-4", "redis-5", "redis-6",
];

/// Under load, a logging container and a primary's container are killed together, twice; a primary and a
/// logging container are disconnected from their networks; instances are added and removed.
#[tokio::test(flavor = "multi_thread")]
async fn messages_survive_containers_that_die_or_are_disconnected() {
    let Some(compose) = Compose::new() else {
        return;
    };
    let begin = Instant::now();
    compose.up(&[]);
    compose.wait_until_ready().await;
    for n in 1..=10 {
        compose.post(&format!("msg{n}")).await;
    }
    let stored = compose.read_all().await;
    println!(
        "up, ten messages stored and read after {:.0?}",
        begin.elapsed()
    );
    assert_eq!(stored.len(), 10);

    let load = Load::start(&compose.http, &compose.url());
    let mut failovers = Vec::new();
    for pair in 0..2 {
        load.wait_for_more(PHASE).await;
        let killed = Instant::now();
        let logging = &compose.containers("logging")[pair];
        let primary = &compose.primary(&format!("redis-{}", pair + 1));
        docker(&["kill", logging, primary]);
        compose.read_all().await;
        let readable = Instant::now();
        load.wait_for_more(PHASE).await;
        docker(&["start", primary, logging]);
        compose.wait_until_whole().await;
        compose.wait_for_instances(3).await;
        load.wait_for_more(PHASE).await;
        failovers.push(("pair killed", killed, readable, Instant::now()));
    }

    let primary = compose.primary("redis-3");
    let map = compose.network("map");
    let cut = Instant::now();
    docker(&["network", "disconnect", "--force", &map, &primary]);
    compose.read_all().await;
    let readable = Instant::now();
    load.wait_for_more(PHASE).await;
    let address = format!("{}.13", compose.subnet);
    docker(&["network", "connect", "--ip", &address, &map, &primary]);
    compose.wait_until_whole().await;
    failovers.push(("primary disconnected", cut, readable, Instant::now()));

    let begin = Instant::now();
    let logging = &compose.containers("logging")[2];
    let services = compose.network("services");
    docker(&["network", "disconnect", "--force", &services, logging]);
    docker(&["network", "disconnect", "--force", &map, logging]);
    load.wait_for_more(PHASE).await;
    compose.wait_for_instances(2).await;
    docker(&["network", "connect", &map, logging]);
    docker(&[
        "network", "connect", "--alias", "logging", &services, logging,
    ]);
    compose.wait_for_instances(3).await;

    let scaled = Instant::now();
    compose.up(&["--scale", "logging=5"]);
    let is_up = scaled.elapsed();
    compose.wait_for_instances(5).await;
    let known = scaled.elapsed() - is_up;
    println!("four and five are found {known:.1?} after compose said that they are up");
    load.wait_for_more(PHASE).await;
    compose.up(&["--scale", "logging=2"]);
    compose.wait_for_instances(2).await;
    load.wait_for_more(PHASE).await;
    let end = Instant::now();

    let (record, reads) = load.finish().await;
    println!(
        "{} POSTs acknowledged, {} failed, {} GETs, the longest without an answer {:.1} s",
        record.acknowledged.len(),
        record.failed.len(),
        reads.count,
        reads.silence.as_secs_f64()
    );
    for (what, fault, readable, over) in failovers {
        let readable_after = readable - fault;
        let failed = record.failed_after(fault, over);
        println!("{what}: readable after {readable_after:.1?}; {failed}");
        record.assert_none_failed_between(readable, over);
    }
    record.assert_none_failed_between(begin, end);
    let after = compose.read_all().await;
    let (first, under_load) = after.split_at(stored.len());
    assert_eq!(first, stored);
    record.assert_kept(under_load);
}

/// The data outlives everything except `down --volumes`: a first start that was interrupted, `up` of a
/// running project, a restart of each container, `stop` and `start`, `down` and `up`, and Ctrl-C. Stopped
/// containers end within their grace period. After `down --volumes` a backup of the volumes restores the
/// data.
#[tokio::test(flavor = "multi_thread")]
async fn messages_outlive_containers_that_are_stopped_or_removed() {
    let Some(compose) = Compose::new() else {
        return;
    };
    compose.up(&["cluster"]);
    let cluster = compose.container("cluster");
    wait_for_log(&cluster, "gets the slots").await;
    docker(&["kill", &cluster]);

    compose.up(&[]);
    compose.wait_until_ready().await;
    let mut expected: Vec<String> = (1..=10).map(|n| format!("msg{n}")).collect();
    for msg in &expected {
        compose.post(msg).await;
    }
    assert_eq!(compose.messages().await, expected);

    let before = compose.all_containers();
    compose.up(&[]);
    assert_eq!(
        compose.all_containers(),
        before,
        "up of a running project replaces no container"
    );
    assert_eq!(compose.messages().await, expected);

    for (service, container) in before {
        if service == "cluster" {
            continue;
        }
        docker(&["restart", &container]);
        compose.wait_until_ready().await;
        compose.wait_until_whole().await;
        let msg = format!("after {service}");
        compose.post(&msg).await;
        expected.push(msg);
        assert_eq!(compose.messages().await, expected);
    }

    compose.run(&["stop"]);
    compose.assert_ended_by_themselves();
    compose.run(&["start"]);
    compose.wait_until_ready().await;
    assert_eq!(compose.messages().await, expected);

    compose.run(&["down"]);
    assert_eq!(compose.all_containers(), []);
    compose.up(&[]);
    compose.wait_until_ready().await;
    assert_eq!(compose.messages().await, expected);

    compose.run(&["stop"]);
    let mut foreground = compose.command(&["up", "--no-build"]);
    let silent = foreground.stdout(Stdio::null()).stderr(Stdio::null());
    let mut foreground = silent.process_group(0).spawn().unwrap();
    compose.wait_until_ready().await;
    assert_eq!(compose.messages().await, expected);
    interrupt(&mut foreground).await;
    compose.assert_ended_by_themselves();

    let backup = tempfile::tempdir().unwrap();
    for member in MEMBERS {
        let file = File::create(backup.path().join(member)).unwrap();
        let mut tar = compose.with_volume("0:0", member, &["tar", "-c", "-C", "/data", "."]);
        assert!(tar.stdout(file).status().unwrap().success());
    }
    compose.run(&["down", "--volumes"]);
    compose.up(&[]);
    compose.wait_until_ready().await;
    assert_eq!(compose.messages().await, Vec::<String>::new());

    compose.run(&["down", "--volumes"]);
    compose.run(&[&["up", "--no-start", "--no-build"], &MEMBERS[..]].concat());
    for member in MEMBERS {
        let file = File::open(backup.path().join(member)).unwrap();
        let mut tar = compose.with_volume("0:0", member, &["tar", "-x", "-C", "/data"]);
        assert!(tar.stdin(file).status().unwrap().success());
    }
    compose.up(&[]);
    compose.wait_until_ready().await;
    assert_eq!(compose.messages().await, expected);
}

/// Waits until a container has logged `text`.
async fn wait_for_log(container: &str, text: &str) {
    let begin = Instant::now();
    while !docker(&["logs", container]).contains(text) {
        assert!(
            begin.elapsed() < PATIENCE,
            "{container} does not log {text:?}"
        );
        tokio::time::sleep(LOOK_AGAIN).await;
    }
}

/// Sends Ctrl-C, as a terminal does to the whole process group, and waits for the end of the process.
async fn interrupt(process: &mut Child) {
    let group = format!("-{}", process.id());
    succeed(Command::new("kill").args(["-INT", "--", &group]));
    let begin = Instant::now();
    while process.try_wait().unwrap().is_none() {
        assert!(begin.elapsed() < PATIENCE, "compose does not end on Ctrl-C");
        tokio::time::sleep(LOOK_AGAIN).await;
    }
}

/// Each project has passwords of its own. A logging instance cannot read the administrator's, and no command
/// line or environment shows one.
#[tokio::test(flavor = "multi_thread")]
async fn members_take_no_command_without_a_password() {
    let Some(compose) = Compose::new() else {
        return;
    };
    compose.up(&[]);
    let read = |user, file| {
        compose
            .with_volume(user, "passwords", &["sed", "", file])
            .output()
    };
    let [admin, logging] = ["/data/admin", "/data/logging"].map(|file| {
        let read = read("999:999", file).unwrap();
        String::from_utf8(read.stdout).unwrap().trim().to_owned()
    });
    let passwords = [&admin, &logging];
    let of_instances = read("65532:65532", "/data/admin").unwrap();
    assert!(of_instances.stdout.is_empty());
    assert!(String::from_utf8_lossy(&of_instances.stderr).contains("Permission denied"));
    assert_ne!(passwords[0], passwords[1]);
    assert_eq!([admin.len(), logging.len()], [36, 36]);
    let first = compose.container("redis-1");
    let refused = docker(&["exec", &first, "redis-cli", "cluster", "nodes"]);
    assert!(refused.starts_with("NOAUTH"), "{refused}");
    assert_eq!(compose.redis("redis-1", &["ping"]), "PONG");
    let as_logging = format!("redis-cli --user logging --pass {logging} flushall");
    let refused = docker(&["exec", &first, "sh", "-c", &as_logging]);
    assert!(refused.contains("NOPERM"), "{refused}");
    for (service, id) in compose.all_containers() {
        if service == "cluster" {
            continue;
        }
        let processes = docker(&["top", &id, "-eo", "pid,args"]);
        let visible = format!("{}{processes}", inspect(&id));
        assert!(
            !passwords
                .iter()
                .any(|password| visible.contains(password.as_str())),
            "{service}"
        );
    }
}

/// No container runs as root, may write outside the volumes, may gain a privilege, or may take all memory or
/// processes of the machine; only the facade's port is published, on loopback.
#[tokio::test(flavor = "multi_thread")]
async fn containers_have_no_privilege_that_they_do_not_need() {
    let Some(compose) = Compose::new() else {
        return;
    };
    compose.up(&[]);
    let containers = compose.all_containers();
    assert_eq!(containers.len(), 12);
    for (service, id) in containers {
        let container = inspect(&id);
        let host = &container["HostConfig"];
        assert_eq!(host["ReadonlyRootfs"], true, "{service}");
        assert_eq!(host["CapDrop"], json!(["ALL"]), "{service}");
        assert_eq!(host["CapAdd"], Value::Null, "{service}");
        assert_eq!(host["Privileged"], false, "{service}");
        assert!(host["Memory"].as_u64().unwrap() > 0, "{service}");
        assert!(host["PidsLimit"].as_u64().unwrap() > 0, "{service}");
        let published = match service.as_str() {
            "facade" => {
                json!({"8086/tcp": [{"HostIp": "127.0.0.1", "HostPort": compose.port.to_string()}]})
            }
            _ => json!({}),
        };
        assert_eq!(host["PortBindings"], published, "{service}");
        let user = container["Config"]["User"].as_str().unwrap();
        assert!(
            !user.is_empty() && !user.starts_with('0'),
            "{service}: {user}"
        );
        if service == "cluster" {
            continue;
        }
        let pid = &container["State"]["Pid"];
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let field = |name: &str| {
            let line = status.lines().find(|line| line.starts_with(name)).unwrap();
            line[name.len()..]
                .split_whitespace()
                .next()
                .unwrap()
                .to_owned()
        };
        assert_ne!(field("Uid:"), "0", "{service}");
        assert_eq!(field("CapEff:"), "0000000000000000", "{service}");
        assert_eq!(field("CapBnd:"), "0000000000000000", "{service}");
        assert_eq!(field("NoNewPrivs:"), "1", "{service}");
    }
}
