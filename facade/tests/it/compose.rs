//! The shipped `docker-compose.yml`, brought up for real: containers that are killed, cut off,
//! restarted, added and removed while messages are posted and read, and data that outlives them.
//!
//! The images are made by `scripts/stand-ins.sh run`, see `scripts/test.sh`. Without a Docker engine
//! these tests say so and do nothing, unless `REQUIRE_DOCKER` is set.

use std::fs::File;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use common::entry::Entry;
use reqwest::Client;
use serde_json::{Value, json};

use crate::load::Load;
use crate::process::{LOOK_AGAIN, free_address};
use crate::system::Merged;

/// How long a test waits for containers to be as they must be.
const PATIENCE: Duration = Duration::from_secs(120);

/// Posts that are answered between two events, so that every phase has its load.
const PHASE: u64 = 1000;

/// The services that hold the map.
const MEMBERS: [&str; 6] = [
    "redis-1", "redis-2", "redis-3", "redis-4", "redis-5", "redis-6",
];

/// Compose v2 and v1.
const COMPOSE: [&[&str]; 2] = [&["docker", "compose"], &["docker-compose"]];

const REPOSITORY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");

/// A project of its own: names, networks, volumes and a free port. Everything is removed when it is
/// dropped.
struct Compose {
    program: &'static [&'static str],
    project: String,
    subnet: String,
    port: u16,
    http: Client,
}

impl Compose {
    /// `None` where no Docker engine answers and none is required. Nothing runs yet.
    fn new() -> Option<Self> {
        /// Two projects at once must not have the same network.
        static NEXT: AtomicU8 = AtomicU8::new(0);
        let has_engine = is_there(Command::new("docker").arg("info"));
        let program = COMPOSE.iter().find(|program| {
            let mut version = Command::new(program[0]);
            is_there(version.args(&program[1..]).arg("version"))
        });
        let Some(program) = program.filter(|_| has_engine) else {
            assert!(
                std::env::var_os("REQUIRE_DOCKER").is_none(),
                "REQUIRE_DOCKER is set, and there is no Docker engine with compose"
            );
            println!("skipped: there is no Docker engine with compose");
            return None;
        };
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let pid = std::process::id();
        let run = std::env::var("TEST_PROJECT").unwrap_or(format!("message-log-test-{pid}"));
        Some(Self {
            program,
            project: format!("{run}-{number}"),
            subnet: format!("10.{}.{}", 64 + pid % 128, number),
            port: free_address().port(),
            http: Client::new(),
        })
    }

    /// The shipped file with its defaults, whatever `.env` and an override on this machine say.
    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(self.program[0]);
        command
            .args(&self.program[1..])
            .args(["--file", "docker-compose.yml", "--env-file", ".env.example"])
            .args(arguments)
            .current_dir(REPOSITORY)
            .env("COMPOSE_PROJECT_NAME", &self.project)
            .env("LOGGING_INSTANCES", "3")
            .env("PORT", self.port.to_string())
            .env("SUBNET", &self.subnet);
        command
    }

    /// Runs a command of compose, for example `up --detach`.
    #[track_caller]
    fn run(&self, arguments: &[&str]) {
        succeed(&mut self.command(arguments));
    }

    #[track_caller]
    fn up(&self, arguments: &[&str]) {
        self.run(&[&["up", "--detach", "--no-build"], arguments].concat());
    }

    /// Service and container of all that there is, also of what does not run, in order.
    fn all_containers(&self) -> Vec<(String, String)> {
        let of_project = format!("label=com.docker.compose.project={}", self.project);
        let label = |name: &str| format!(r#"{{{{.Label "com.docker.compose.{name}"}}}}"#);
        let format = [&label("service"), &label("container-number"), "{{.ID}}"].join(" ");
        let listed = docker(&["ps", "--all", "--format", &format, "--filter", &of_project]);
        let mut containers: Vec<(String, u32, String)> = listed
            .lines()
            .map(|line| {
                let fields: Vec<&str> = line.split(' ').collect();
                let number = fields[1].parse().unwrap();
                (fields[0].to_owned(), number, fields[2].to_owned())
            })
            .collect();
        containers.sort();
        let numbered = containers.into_iter();
        numbered.map(|(service, _, id)| (service, id)).collect()
    }

    /// The containers of a service, by number.
    fn containers(&self, service: &str) -> Vec<String> {
        let all = self.all_containers().into_iter();
        let of_service = all.filter(|(name, _)| name == service);
        of_service.map(|(_, id)| id).collect()
    }

    /// The one container of a service.
    fn container(&self, service: &str) -> String {
        let mut containers = self.containers(service);
        assert_eq!(containers.len(), 1, "{service}");
        containers.remove(0)
    }

    /// The container of a member that is a primary now.
    fn primary(&self, service: &str) -> String {
        let container = self.container(service);
        let role = docker(&["exec", &container, "redis-cli", "role"]);
        assert!(role.starts_with("master"), "{service}: {role}");
        container
    }

    fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    async fn post(&self, msg: &str) {
        let form = format!("msg={msg}");
        let request = self.http.post(self.url()).body(form);
        let request = request.header("content-type", "application/x-www-form-urlencoded");
        let response = request.send().await.unwrap();
        assert_eq!(response.status(), 200);
    }

    /// The whole log.
    async fn read_all(&self) -> Vec<Entry> {
        let response = self.http.get(self.url()).send().await.unwrap();
        assert_eq!(response.status(), 200);
        let merged: Merged = response.json().await.unwrap();
        assert_eq!(merged.count, merged.logging_service.len() as u64);
        assert_eq!(
            merged.messages_service.as_deref(),
            Some("Messages Service not Implemented")
        );
        merged.logging_service
    }

    async fn messages(&self) -> Vec<String> {
        let entries = self.read_all().await;
        entries.into_iter().map(|entry| entry.msg).collect()
    }

    /// What the facade says of its readiness; null while it cannot be reached.
    async fn health(&self) -> Value {
        let url = format!("{}/readyz?verbose", self.url());
        match self.http.get(url).send().await {
            Ok(response) => response.json().await.unwrap(),
            Err(_) => Value::Null,
        }
    }

    /// How many logging instances the facade knows, and whether all of them answer.
    async fn known_instances(&self) -> (usize, bool) {
        let health = self.health().await;
        let checks = health["checks"].as_array().into_iter().flatten();
        let is_instance = |check: &&Value| check["name"].as_str().unwrap().starts_with("logging ");
        let instances: Vec<&Value> = checks.filter(is_instance).collect();
        let all_answer = instances.iter().all(|check| check["ok"] == true);
        (instances.len(), all_answer)
    }

    /// Waits until the facade knows exactly so many instances, and all of them answer.
    async fn wait_for_instances(&self, count: usize) {
        let begin = Instant::now();
        while self.known_instances().await != (count, true) {
            assert!(begin.elapsed() < PATIENCE, "no {count} logging instances");
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }

    /// Waits until three instances, the messages service, and with them the facade, are ready.
    async fn wait_until_ready(&self) {
        self.wait_for_instances(3).await;
        let begin = Instant::now();
        while self.health().await["status"] != "ready" {
            assert!(begin.elapsed() < PATIENCE, "{}", self.health().await);
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }

    /// Asserts that no container runs, and that none had to be killed.
    #[track_caller]
    fn assert_ended_by_themselves(&self) {
        for (service, id) in self.all_containers() {
            let state = &inspect(&id)["State"];
            assert_eq!(state["Running"], false, "{service}");
            assert_eq!(state["ExitCode"], 0, "{service}");
        }
    }

    /// Waits until every primary of the map has its backup again, as a logging instance sees it.
    async fn wait_until_whole(&self) {
        let logging = &self.containers("logging")[0];
        let begin = Instant::now();
        loop {
            let arguments = ["exec", logging, "logging", "healthcheck"];
            let output = Command::new("docker").args(arguments).output().unwrap();
            if String::from_utf8_lossy(&output.stdout).contains(r#""status":"ready""#) {
                return;
            }
            assert!(begin.elapsed() < PATIENCE, "{output:?}");
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }

    /// What runs a command on a member's volume.
    fn with_volume(&self, member: &str, command: &[&str]) -> Command {
        let volume = format!("{}_{member}:/data", self.project);
        let image = inspect(&self.container(member))["Config"]["Image"].clone();
        let mut docker = Command::new("docker");
        docker.args(["run", "--rm", "--interactive", "--volume", &volume]);
        docker.arg(image.as_str().unwrap()).args(command);
        docker
    }

    fn network(&self, name: &str) -> String {
        format!("{}_{name}", self.project)
    }
}

impl Drop for Compose {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let logs = self.command(&["logs", "--tail", "20"]).output().unwrap();
            println!("{}", String::from_utf8_lossy(&logs.stdout));
        }
        let mut down = self.command(&["down", "--volumes", "--timeout", "1"]);
        down.output().unwrap();
    }
}

fn is_there(command: &mut Command) -> bool {
    let status = command.stdout(Stdio::null()).stderr(Stdio::null()).status();
    status.is_ok_and(|status| status.success())
}

#[track_caller]
fn succeed(command: &mut Command) -> Output {
    let output = command.output().unwrap();
    assert!(
        output.status.success(),
        "{command:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    output
}

/// What `docker` prints.
#[track_caller]
fn docker(arguments: &[&str]) -> String {
    let output = succeed(Command::new("docker").args(arguments));
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

fn inspect(container: &str) -> Value {
    let inspected: Value = serde_json::from_str(&docker(&["inspect", container])).unwrap();
    inspected[0].clone()
}

/// The story on containers, under load from its first kill to its last: a logging container and a
/// primary's are killed together, twice; a primary and a logging container are cut off; instances are
/// added and removed.
#[tokio::test(flavor = "multi_thread")]
async fn messages_survive_containers_that_die_or_are_cut_off() {
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
    failovers.push(("primary cut off", cut, readable, Instant::now()));

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
    println!("four and five are known {known:.1?} after compose said that they are up");
    load.wait_for_more(PHASE).await;
    compose.up(&["--scale", "logging=2"]);
    compose.wait_for_instances(2).await;
    load.wait_for_more(PHASE).await;
    let end = Instant::now();

    let record = load.finish().await;
    println!(
        "{} POSTs acknowledged, {} failed, {} GETs, the longest without an answer {:.1} s",
        record.acknowledged.len(),
        record.failed.len(),
        record.reads,
        record.silence.as_secs_f64()
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

/// The data outlives everything but `down --volumes`: a first start that broke off half-way, `up` again
/// while all runs, a restart of each container, `stop` and `start`, `down` and `up`, and Ctrl-C. What
/// is stopped ends by itself in time. After `down --volumes` a backup of the volumes brings it back.
#[tokio::test(flavor = "multi_thread")]
async fn messages_outlive_containers_that_are_stopped_or_removed() {
    let Some(compose) = Compose::new() else {
        return;
    };
    compose.up(&MEMBERS);
    let first = compose.container("redis-1");
    let second = format!("{}.12", compose.subnet);
    let redis = |command: &[&str]| docker(&[&["exec", &first, "redis-cli"], command].concat());
    assert_eq!(redis(&["cluster", "meet", &second, "6379"]), "OK");
    assert_eq!(redis(&["cluster", "addslotsrange", "0", "5460"]), "OK");

    compose.up(&[]);
    compose.wait_until_ready().await;
    let mut expected: Vec<String> = (1..=10).map(|n| format!("msg{n}")).collect();
    for msg in &expected {
        compose.post(msg).await;
    }
    assert_eq!(compose.messages().await, expected);

    let before = compose.all_containers();
    compose.up(&[]);
    assert_eq!(compose.all_containers(), before, "nothing is made anew");
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
        let mut tar = compose.with_volume(member, &["tar", "-c", "-C", "/data", "."]);
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
        let mut tar = compose.with_volume(member, &["tar", "-x", "-C", "/data"]);
        assert!(tar.stdin(file).status().unwrap().success());
    }
    compose.up(&[]);
    compose.wait_until_ready().await;
    assert_eq!(compose.messages().await, expected);
}

/// Ctrl-C, which a terminal sends to the whole process group, and its end.
async fn interrupt(process: &mut Child) {
    let group = format!("-{}", process.id());
    succeed(Command::new("kill").args(["-INT", "--", &group]));
    let begin = Instant::now();
    while process.try_wait().unwrap().is_none() {
        assert!(begin.elapsed() < PATIENCE, "Ctrl-C does not end it");
        tokio::time::sleep(LOOK_AGAIN).await;
    }
}

/// Nobody is root, may write outside the volumes, or gain a right; only the facade's port is
/// published, on loopback.
#[tokio::test(flavor = "multi_thread")]
async fn containers_have_no_right_that_they_do_not_need() {
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
