//! The flags of a logging instance.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Parser, Subcommand};
use common::config::{self, ServiceConfig};
use common::door::DoorConfig;
use common::files::{Followed, follow};
use common::health;

use crate::map::{Access, Location, Options};
use crate::transfer::Transfer;

/// A message is under way for longer than a shorter settle window when the system is busy.
const SHORTEST_SETTLE: Duration = Duration::from_secs(1);

/// Stores entries in a distributed map that all logging instances share
#[derive(Clone, Debug, Parser)]
#[command(name = "logging", version)]
pub struct Config {
    /// Address to serve on, for the facade only: keep it unreachable from outside
    #[arg(long, global = true, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:8082", value_parser = config::address)]
    pub listen: SocketAddr,

    /// The shared map, the same for all instances: lmdb:FOLDER, a folder of this machine;
    /// redis://HOST:PORT, a Redis server (7.0 or later); or redis://HOST:PORT,HOST:PORT…, some
    /// members of a Redis Cluster. USER:PASSWORD@ goes before the hosts; rediss:// is for TLS
    #[arg(
        long,
        global = true,
        value_name = "LOCATION",
        default_value = "lmdb:data/map",
        hide_env_values = true
    )]
    pub map: Location,

    /// File whose first line is the password of the user in --map redis://USER@HOST:PORT, so that it
    /// is not in the list of processes or the environment. Changes take effect within a second
    #[arg(long, global = true, value_name = "FILE")]
    pub map_password_file: Option<PathBuf>,

    /// Replicas that must hold an entry before it is acknowledged; an lmdb map has none
    /// [default: 1 on a Redis Cluster, otherwise 0]
    #[arg(long, global = true, value_name = "N")]
    pub backups: Option<u16>,

    /// Timeout for storing a batch; entries not stored by then are answered as refused or unknown.
    /// Shorter than the facade's --try-timeout
    #[arg(long, global = true, value_name = "TIME", default_value = "800ms", value_parser = config::timeout)]
    pub store_timeout: Duration,

    /// How old the time in a new entry's UUID may be, at least 1s; older parts of the log never change.
    /// A map keeps the value that it was created with: leave the flag out then [default: 10s]
    #[arg(long, global = true, value_name = "TIME", value_parser = settle)]
    pub settle: Option<Duration>,

    #[command(flatten)]
    pub door: DoorConfig,

    #[command(flatten)]
    pub service: ServiceConfig,

    /// What to do instead of serving.
    #[command(subcommand)]
    pub task: Option<Task>,
}

/// What the binary does instead of serving.
#[derive(Clone, Debug, Subcommand)]
pub enum Task {
    #[command(flatten)]
    Service(health::Task),
    #[command(flatten)]
    Transfer(Transfer),
}

impl Config {
    /// The map's location, with its password, and the options for serving it.
    ///
    /// # Errors
    /// When flags contradict each other or the password cannot be read, as a line for the operator.
    pub fn map(&self) -> Result<(Location, Options), String> {
        let has_replicas = matches!(self.map, Location::Redis(_));
        if !has_replicas && self.backups.is_some_and(|count| count > 0) {
            return Err("an lmdb map keeps no replicas; write --backups 0".to_owned());
        }
        let password = self.map_password_file.clone();
        let password = password.map(follow_password).transpose()?;
        let options = Options {
            store_timeout: self.store_timeout,
            settle: self.settle,
            backups: self.backups,
            access: Access::Serve,
        };
        Ok((self.map.clone().with_password(password)?, options))
    }
}

/// Parses a settle window.
///
/// # Errors
/// A sentence that says what to write instead.
fn settle(text: &str) -> Result<Duration, String> {
    match config::duration(text)? {
        settle if settle >= SHORTEST_SETTLE => Ok(settle),
        _ => Err(
            "write a time of at least 1s, for example 10s: with less, messages are too old to be \
             stored when they arrive"
                .to_owned(),
        ),
    }
}

fn follow_password(file: PathBuf) -> Result<Followed<String>, String> {
    let password = follow(vec![file], |contents| match contents[0].lines().next() {
        Some(password) if !password.is_empty() => Ok(password.to_owned()),
        _ => Err("it has no password in its first line".to_owned()),
    });
    password.map_err(|error| format!("cannot read --map-password-file {error}"))
}
