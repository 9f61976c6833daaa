//! Assertions on the command line of a service.

use std::path::Path;
use std::process::{Command, Output};

/// Asserts that wrong configuration gets exit code 2 and one line on stderr with a hint.
#[track_caller]
pub fn assert_refused(binary: &Path, arguments: &[&str], hint: &str) {
    let output = Command::new(binary).args(arguments).output().unwrap();
    let line = one_line(&output);
    assert_eq!(output.status.code(), Some(2), "{arguments:?}: {line}");
    assert!(line.contains(hint), "{arguments:?}: {line}");
}

/// Asserts that the help names each flag with its environment variable and its default.
#[track_caller]
pub fn assert_help(binary: &Path, flags: &[(&str, &str, &str)]) {
    let output = Command::new(binary).arg("--help").output().unwrap();
    assert!(output.status.success());
    let help = String::from_utf8(output.stdout).unwrap();
    let words: Vec<&str> = help.split_whitespace().collect();
    let help = words.join(" ");
    for (flag, variable, default) in flags {
        assert!(help.contains(flag), "{flag} in {help}");
        // For a variable that may hold a password, the help shows neither its value nor the `=` before it.
        let is_named = ["=]", "]"]
            .iter()
            .any(|end| help.contains(&format!("[env: {variable}{end}")));
        assert!(is_named, "{variable} in {help}");
        let default = format!("[default: {default}]");
        assert!(help.contains(&default), "{flag}: {default} in {help}");
    }
}

/// The output on stderr, which must be one line.
#[track_caller]
pub fn one_line(output: &Output) -> String {
    let text = String::from_utf8(output.stderr.clone()).unwrap();
    assert_eq!(text.lines().count(), 1, "{text}");
    text
}
