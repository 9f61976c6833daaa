//! The system as real processes, for tests that kill, pause and restart them.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::entry::Entry;
use reqwest::Client;
use testing::engine::EmptyMap;
use testing::process::{Process, free_address};

use crate::system::{Merged, engine_under_test};

/// All services as processes on one map, by default of the engine under test.
pub(crate) struct Processes {
    pub(crate) messages: Process,
    pub(crate) logging: Vec<Process>,
    pub(crate) facade: Process,
    pub(crate) http: Client,
    logging_flags: Vec<String>,
    _map: Option<EmptyMap>,
}

impl Processes {
    pub(crate) fn start() -> Self {
        Self::start_with(&[])
    }

    /// The same with further flags for the facade.
    pub(crate) fn start_with(flags: &[&str]) -> Self {
        let map = engine_under_test().empty_map();
        let system = Self::on_map(&["--map", &map.location], flags);
        Self {
            _map: Some(map),
            ..system
        }
    }

    /// The same on a map of the test, with flags for logging, which name the map, and for the facade.
    pub(crate) fn on_map(logging_flags: &[&str], facade_flags: &[&str]) -> Self {
        let messages = Process::start(Command::new(binary("messages")), free_address());
        let start = |_| start_logging(logging_flags, free_address());
        let logging: Vec<Process> = (0..3).map(start).collect();
        let urls: Vec<String> = logging.iter().map(Process::url).collect();
        let facade = facade(&urls.join(","), &messages.url(), facade_flags);
        Self {
            messages,
            logging,
            facade: Process::start(facade, free_address()),
            http: Client::new(),
            logging_flags: logging_flags
                .iter()
                .map(|flag| (*flag).to_owned())
                .collect(),
            _map: None,
        }
    }

    /// Kills the facade and starts another one on its address.
    pub(crate) fn restart_facade(&mut self, flags: &[&str]) {
        self.facade.kill();
        let address = self.facade.address;
        self.facade = Process::start(self.another_facade(flags), address);
    }

    /// A command that starts one more facade in front of the same instances.
    pub(crate) fn another_facade(&self, flags: &[&str]) -> Command {
        let urls: Vec<String> = self.logging.iter().map(Process::url).collect();
        facade(&urls.join(","), &self.messages.url(), flags)
    }

    /// Starts a logging instance again on its address.
    pub(crate) fn restart_logging(&mut self, index: usize) {
        let address = self.logging[index].address;
        let flags: Vec<&str> = self.logging_flags.iter().map(String::as_str).collect();
        self.logging[index] = start_logging(&flags, address);
    }

    pub(crate) async fn post(&self, msg: &str) -> reqwest::Response {
        let request = self.http.post(self.facade.url()).body(msg.to_owned());
        request.send().await.unwrap()
    }

    pub(crate) async fn get(&self) -> reqwest::Response {
        self.http.get(self.facade.url()).send().await.unwrap()
    }

    /// The whole log.
    pub(crate) async fn read_all(&self) -> Vec<Entry> {
        let merged: Merged = self.get().await.json().await.unwrap();
        assert_eq!(merged.count, merged.logging_service.len() as u64);
        merged.logging_service
    }

    pub(crate) async fn messages_in_log(&self) -> Vec<String> {
        let entries = self.read_all().await;
        entries.into_iter().map(|entry| entry.msg).collect()
    }
}

/// The path of a binary of the workspace; testing the whole workspace builds all of them.
pub(crate) fn binary(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_BIN_EXE_facade")).with_file_name(name);
    assert!(
        path.exists(),
        "{name} is not built: test the whole workspace, as scripts/test.sh does"
    );
    path
}

pub(crate) fn facade(logging: &str, messages: &str, flags: &[&str]) -> Command {
    let mut command = Command::new(binary("facade"));
    command.args(["--logging", logging, "--messages", messages]);
    command.args(flags);
    command
}

/// Starts a logging instance and waits until it can reach its map.
pub(crate) fn start_logging(flags: &[&str], address: SocketAddr) -> Process {
    let mut command = Command::new(binary("logging"));
    command.args(["--log-format", "json"]).args(flags);
    let process = Process::start(command, address);
    process.wait_until_ready();
    process
}
