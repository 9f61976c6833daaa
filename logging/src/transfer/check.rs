//! The task `check`.

use std::env;
use std::process::{self, Command};

use anyhow::{Context, bail};

/// Checks in a process of its own: at a page of its tree that is damaged, LMDB ends the process.
///
/// # Errors
/// When a signal ended it. It has printed any other fault.
pub(super) fn in_child() -> anyhow::Result<()> {
    let mut command = Command::new(env::current_exe()?);
    command.args(env::args_os().skip(1)).arg("--in-child");
    let status = command.status().context("cannot start the check")?;
    match status.code() {
        Some(code) => process::exit(code),
        None => {
            bail!("the check was ended ({status}): a page is damaged; restore the map from a copy")
        }
    }
}
