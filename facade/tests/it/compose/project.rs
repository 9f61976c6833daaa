//! A project of the shipped `docker-compose.yml`, with the operations that the tests need.

use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Instant;

use common::entry::Entry;
use reqwest::Client;
use serde_json::Value;
use testing::process::{LOOK_AGAIN, free_address};
use testing::requirements::skip;

use super::PATIENCE;
use crate::system::Merged;

/// Compose v2 and v1.
const COMPOSE: [&[&str]; 2] = [&["docker", "compose"], &["docker-compose"]];

const REPOSITORY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");

/// A project with its own names, networks, volumes and port. Dropping it removes everything.
pub(super) struct Compose {
    program: &'static [&'static str],
    project: String,
    pub(super) subnet: String,
    pub(super) port: u16,
    pub(super) http: Client,
}

impl Compose {
    /// A project that is not started. `None` when no Docker engine answers: the test is skipped.
    pub(super) fn new() -> Option<Self> {
        /// Projects that run at once need different networks.
        static NEXT: AtomicU8 = AtomicU8::new(0);
        let has_engine = is_there(Command::new("docker").arg("info"));
        let program = COMPOSE.iter().find(|program| {
            let mut version = Command::new(program[0]);
            is_there(version.args(&program[1..]).arg("version"))
        });
        let Some(program) = program.filter(|_| has_engine) else {
            skip("no Docker engine with compose answers", "REQUIRE_DOCKER");
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

    /// A command on the shipped file with its defaults; `.env` and an override on this machine are ignored.
    pub(super) fn command(&self, arguments: &[&str]) -> Command {
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
    pub(super) fn run(&self, arguments: &[&str]) {
        succeed(&mut self.command(arguments));
    }

    #[track_caller]
    pub(super) fn up(&self, arguments: &[&str]) {
        self.run(&[&["up", "--detach", "--no-build"], arguments].concat());
    }

    /// Service and id of all containers, also of stopped ones, in order.
    pub(super) fn all_containers(&self) -> Vec<(String, String)> {
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
    pub(super) fn containers(&self, service: &str) -> Vec<String> {
        let all = self.all_containers().into_iter();
        let of_service = all.filter(|(name, _)| name == service);
        of_service.map(|(_, id)| id).collect()
    }

    /// The only container of a service.
    pub(super) fn container(&self, service: &str) -> String {
        let mut containers = self.containers(service);
        assert_eq!(containers.len(), 1, "{service}");
        containers.remove(0)
    }

    /// The answer of a member to a command of its administrator.
    pub(super) fn redis(&self, service: &str, command: &[&str]) -> String {
        let container = self.container(service);
        let with_password =
            "read -r REDISCLI_AUTH </passwords/admin; export REDISCLI_AUTH; redis-cli \"$@\"";
        let shell = ["exec", &container, "sh", "-c", with_password, "redis-cli"];
        docker(&[&shell, command].concat())
    }

    /// The container of a member, which must be a primary now.
    pub(super) fn primary(&self, service: &str) -> String {
        let container = self.container(service);
        let role = self.redis(service, &["role"]);
        assert!(role.starts_with("master"), "{service}: {role}");
        container
    }

    pub(super) fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    pub(super) async fn post(&self, msg: &str) {
        let form = format!("msg={msg}");
        let request = self.http.post(self.url()).body(form);
        let request = request.header("content-type", "application/x-www-form-urlencoded");
        let response = request.send().await.unwrap();
        assert_eq!(response.status(), 200);
    }

    /// The whole log.
    pub(super) async fn read_all(&self) -> Vec<Entry> {
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

    pub(super) async fn messages(&self) -> Vec<String> {
        let entries = self.read_all().await;
        entries.into_iter().map(|entry| entry.msg).collect()
    }

    async fn health(&self) -> Value {
        self.ask("/readyz?verbose").await
    }

    /// The facade's answer; null while it cannot be reached.
    async fn ask(&self, path: &str) -> Value {
        let url = format!("{}{path}", self.url());
        match self.http.get(url).send().await {
            Ok(response) => response.json().await.unwrap(),
            Err(_) => Value::Null,
        }
    }

    /// The number of logging instances that the facade has found, and whether all of them are up.
    async fn known_instances(&self) -> (usize, bool) {
        let stats = self.ask("/stats").await;
        let instances = stats["instances"].as_array();
        let instances = instances.map_or(&[][..], Vec::as_slice);
        let all_serve = instances
            .iter()
            .all(|row| row["up"] == true && row["ready"] == true);
        (instances.len(), all_serve)
    }

    /// Waits until the facade has found exactly `count` instances and all of them are up.
    pub(super) async fn wait_for_instances(&self, count: usize) {
        let begin = Instant::now();
        while self.known_instances().await != (count, true) {
            assert!(
                begin.elapsed() < PATIENCE,
                "the facade does not find {count} logging instances that are up"
            );
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }

    /// Waits until three instances, the messages service and the facade are ready.
    pub(super) async fn wait_until_ready(&self) {
        self.wait_for_instances(3).await;
        let begin = Instant::now();
        while self.health().await["status"] != "ready" {
            assert!(begin.elapsed() < PATIENCE, "{}", self.health().await);
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }

    /// Asserts that no container runs and that none had to be killed.
    #[track_caller]
    pub(super) fn assert_ended_by_themselves(&self) {
        for (service, id) in self.all_containers() {
            let state = &inspect(&id)["State"];
            assert_eq!(state["Running"], false, "{service}");
            assert_eq!(state["ExitCode"], 0, "{service}");
        }
    }

    /// Waits until a logging instance reports that every primary of the map has its backup.
    pub(super) async fn wait_until_whole(&self) {
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

    /// A command that runs as `user` in a container with a volume at `/data`.
    pub(super) fn with_volume(&self, user: &str, volume: &str, command: &[&str]) -> Command {
        let volume = format!("{}_{volume}:/data", self.project);
        let image = inspect(&self.container("redis-1"))["Config"]["Image"].clone();
        let mut docker = Command::new("docker");
        docker.args([
            "run",
            "--rm",
            "--interactive",
            "--user",
            user,
            "--volume",
            &volume,
        ]);
        docker.arg(image.as_str().unwrap()).args(command);
        docker
    }

    pub(super) fn network(&self, name: &str) -> String {
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
pub(super) fn succeed(command: &mut Command) -> Output {
    let output = command.output().unwrap();
    assert!(
        output.status.success(),
        "{command:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    output
}

/// Runs `docker` and returns its output.
#[track_caller]
pub(super) fn docker(arguments: &[&str]) -> String {
    let output = succeed(Command::new("docker").args(arguments));
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

pub(super) fn inspect(container: &str) -> Value {
    let inspected: Value = serde_json::from_str(&docker(&["inspect", container])).unwrap();
    inspected[0].clone()
}
