//! The flags of a logging instance.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Parser, Subcommand};
use common::config::{self, ServiceConfig};
use common::door::DoorConfig;
use common::health;

use crate::map::{Access, Location, Options};
use crate::transfer::Transfer;

/// Stores entries in a distributed map that all logging instances share
#[derive(Clone, Debug, Parser)]
#[command(name = "logging", version)]
pub struct Config {
    /// Address to serve on, for the facade only: keep it unreachable from outside
    #[arg(long, global = true, default_value = "127.0.0.1:8082", value_parser = config::address)]
    pub listen: SocketAddr,

    /// The shared map, the same for all instances: lmdb:FOLDER, a folder of this machine;
    /// redis://HOST:PORT, a Redis server (7.0 or later); or redis://HOST:PORT,HOST:PORT…, some
    /// members of a Redis Cluster. USER:PASSWORD@ goes before the hosts; rediss:// is for TLS
    #[arg(
        long,
        global = true,
        default_value = "lmdb:data/map",
        hide_env_values = true
    )]
    pub map: Location,

    /// File whose first line is the password of the user in --map redis://USER@HOST:PORT, so that it
    /// is not in the list of processes or the environment
    #[arg(long, global = true)]
    pub map_password_file: Option<PathBuf>,

    /// Replicas that must hold an entry before it is acknowledged; an lmdb map has none
    /// [default: 1 on a Redis Cluster, otherwise 0]
    #[arg(long, global = true)]
    pub backups: Option<u16>,

    /// Timeout for storing a batch; entries not stored by then are answered as refused or unknown
    #[arg(long, global = true, default_value = "800ms", value_parser = config::timeout)]
    pub store_timeout: Duration,

    /// How old the time in a new entry's UUID may be; older parts of the log never change. The map
    /// keeps the value that it was created with [default: 10s]
    #[arg(long, global = true, value_parser = config::duration)]
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
        let file = self.map_password_file.as_deref();
        let password = file.map(read_password).transpose()?;
        let options = Options {
            store_timeout: self.store_timeout,
            settle: self.settle,
            backups: self.backups,
            access: Access::Serve,
        };
        Ok((self.map.clone().with_password(password)?, options))
    }
}

fn read_password(file: &Path) -> Result<String, String> {
    let text = fs::read_to_string(file);
    let text = text.map_err(|error| {
        let file = file.display();
        format!("cannot read --map-password-file {file}: {error}")
    })?;
    match text.lines().next() {
        Some(password) if !password.is_empty() => Ok(password.to_owned()),
        _ => Err("--map-password-file has no password in its first line".to_owned()),
    }
}
