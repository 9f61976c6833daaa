//! The command line and the environment of the binaries.

use std::ffi::OsStr;
use std::net::SocketAddr;
use std::os::unix::ffi::OsStrExt;
use std::process::Command;

use testing::command_line::{assert_help, assert_refused, one_line};
use testing::process::{Process, free_address};

use crate::processes::{Processes, binary, facade};

/// The subcommand `healthcheck` returns the readiness of the service as its exit code, also of a service
/// that listens on all addresses, and prints the reason in one line when it is not ready.
#[test]
fn healthcheck_asks_the_running_service() {
    let healthcheck = |address: SocketAddr| {
        let listen = ["--listen", &address.to_string()];
        let run = |arguments: &[&str]| {
            Command::new(binary("facade"))
                .args(arguments)
                .output()
                .unwrap()
        };
        let before = run(&[&listen[..], &["healthcheck"]].concat());
        let after = run(&[&["healthcheck"], &listen[..]].concat());
        assert_eq!(before.status, after.status);
        after
    };
    let everywhere = SocketAddr::from(([0, 0, 0, 0], free_address().port()));
    let nobody = one_line(&healthcheck(everywhere));
    assert!(nobody.contains("is the service running"), "{nobody}");

    let alone = facade("http://127.0.0.1:1", "http://127.0.0.1:1", &["--open"]);
    let mut alone = Process::start(alone, everywhere);
    let output = healthcheck(alone.address);
    assert_eq!(output.status.code(), Some(1));
    let why = one_line(&output);
    assert!(
        why.contains("not ready: ") && why.contains("logging"),
        "{why}"
    );
    alone.kill();

    let system = Processes::start();
    let output = healthcheck(system.facade.address);
    assert!(output.status.success(), "{output:?}");
    let printed = String::from_utf8(output.stdout).unwrap();
    assert!(printed.contains(r#""status":"ready""#), "{printed}");

    // Without the token too, and where only other names than the address are served.
    let folder = tempfile::tempdir().unwrap();
    let tokens = folder.path().join("tokens");
    std::fs::write(&tokens, "poster-0123456789").unwrap();
    let flags = [
        "--token-file",
        tokens.to_str().unwrap(),
        "--host",
        "a.example",
    ];
    let guarded = Process::start(system.another_facade(&flags), everywhere);
    let output = healthcheck(guarded.address);
    assert!(output.status.success(), "{output:?}");
    let output = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output, "{\"status\":\"ready\"}\n");
}

#[test]
fn wrong_configuration_is_one_line_and_exit_code_2() {
    let binary = binary("facade");
    assert_refused(
        &binary,
        &["--logging", "127.0.0.1:8082"],
        "http://HOST:PORT",
    );
    assert_refused(
        &binary,
        &["--logging", "http://a:1,ftp://b:2"],
        "http://HOST:PORT",
    );
    assert_refused(
        &binary,
        &["--messages", "http://a:1/path"],
        "http://HOST:PORT",
    );
    assert_refused(&binary, &["--max-message", "0"], "64KiB");
    assert_refused(&binary, &["--max-message", "2MiB"], "1MiB");
    assert_refused(&binary, &["--max-reads", "0"], "--max-reads");
    assert_refused(&binary, &["--rate", "0/s"], "50/s");
    assert_refused(&binary, &["--rate", "50"], "50/s");
    assert_refused(&binary, &["--host", "http://a.example"], "log.example.org");
    assert_refused(
        &binary,
        &["--trusted-proxy", "10.0.0.0/33"],
        "172.18.0.0/16",
    );
    assert_refused(
        &binary,
        &["--trusted-proxy", "10.0.0.1:80"],
        "without a port",
    );
    assert_refused(&binary, &["--idle-timeout", "0s"], "at least 10ms");
    assert_refused(&binary, &["--deadline", "5"], "10s");
    assert_refused(&binary, &["--deadline", "0s"], "at least 10ms");
    let endless = "18446744073709551615s";
    assert_refused(&binary, &["--deadline", endless], "365days");
    assert_refused(&binary, &["--logging", "http://:p@a:1"], "http://HOST:PORT");
    assert_refused(&binary, &["--try-timeout"], "--try-timeout");
    assert_refused(
        &binary,
        &["--logging", "localhost:9000"],
        "http://localhost:9000",
    );
    assert_refused(&binary, &["--messages", "https://a:1"], "only http");
    assert_refused(
        &binary,
        &["--logging", "https://127.0.0.1:1"],
        "--logging-ca",
    );
    assert_refused(&binary, &["--logging", "https://a:1/path"], "it has a path");
}

/// The error names the source of the value: the environment variable or the flag.
#[test]
fn wrong_value_is_reported_with_its_flag_or_variable() {
    let mut by_variable = Command::new(binary("facade"));
    let output = by_variable.env("FACADE_DEADLINE", "soon").output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    let line = one_line(&output);
    assert!(
        line.contains("FACADE_DEADLINE") && !line.contains("--deadline"),
        "{line}"
    );
    for arguments in [&["--deadline", "late"][..], &["--deadline=late"]] {
        let mut by_both = Command::new(binary("facade"));
        let by_both = by_both.env("FACADE_DEADLINE", "soon").args(arguments);
        let line = one_line(&by_both.output().unwrap());
        assert!(line.contains("\"late\" for --deadline"), "{line}");
    }
}

/// Beyond loopback a service asks for a token, or was told that it need not.
#[test]
fn service_that_others_can_reach_does_not_start_without_a_decision() {
    for (name, ways_out) in [
        ("facade", &["--token-file", "--open"][..]),
        ("logging", &["--token-file", "--open"]),
        ("messages", &["a loopback address", "--open"]),
    ] {
        for listen in ["0.0.0.0:0", "[::]:0", "192.0.2.1:1"] {
            for way_out in ways_out {
                assert_refused(&binary(name), &["--listen", listen], way_out);
            }
        }
    }
    let everywhere = || SocketAddr::from(([0, 0, 0, 0], free_address().port()));
    let mut open = Command::new(binary("messages"));
    open.env("MESSAGES_OPEN", "true");
    Process::start(open, everywhere());
    let folder = tempfile::tempdir().unwrap();
    let tokens = folder.path().join("tokens");
    std::fs::write(&tokens, "poster-0123456789").unwrap();
    let flags = ["--token-file", tokens.to_str().unwrap()];
    let guarded = facade("http://127.0.0.1:1", "http://127.0.0.1:1", &flags);
    Process::start(guarded, everywhere());
}

#[test]
fn file_of_tokens_that_is_wrong_is_wrong_configuration() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("tokens");
    let path = file.to_str().unwrap();
    let refused = |flag: &str, name: &str, hint: &str| {
        let map = format!("lmdb:{}", folder.path().join("map").display());
        let map = if name == "logging" {
            vec!["--map", &map]
        } else {
            vec![]
        };
        assert_refused(&binary(name), &[&[flag, path][..], &map].concat(), hint);
    };
    let missing = format!("--token-file {path}: No such file");
    for name in ["facade", "logging"] {
        refused("--token-file", name, &missing);
    }
    for flag in ["--logging-token-file", "--logging-ca"] {
        refused(flag, "facade", &format!("{flag} {path}: No such file"));
    }
    for [certificate, key] in [[path, "/dev/null"], ["/dev/null", path]] {
        let pair = ["--tls-cert", certificate, "--tls-key", key];
        let missing = format!("--tls-cert and --tls-key: {path}: No such file");
        assert_refused(&binary("facade"), &pair, &missing);
    }
    std::fs::write(&file, "secret").unwrap();
    for name in ["facade", "logging"] {
        refused(
            "--token-file",
            name,
            "line 1 is wrong: a token has at least 16",
        );
    }
    std::fs::write(&file, "read reader-0123456789").unwrap();
    refused("--logging-token-file", "facade", "may only read");
    refused("--tls-cert", "facade", "--tls-key");
    let with_key = ["--tls-cert", path, "--tls-key", path];
    assert_refused(&binary("facade"), &with_key, "no private key");
}

/// The services may share one environment: each knows the modules of all.
#[test]
fn word_that_the_filter_of_the_log_ignored_is_wrong_configuration() {
    for name in ["facade", "logging", "messages"] {
        let folder = tempfile::tempdir().unwrap();
        let run = |filter: &OsStr| {
            let mut command = Command::new(binary(name));
            command.env("RUST_LOG", filter).current_dir(&folder);
            command
        };
        for (filter, wrong) in [
            ("warning", "warning"),
            ("inf", "inf"),
            ("verbose", "verbose"),
            ("facade", "facade"),
            ("info,loging=debug", "loging=debug"),
            ("logging=", "logging="),
            ("info,", ""),
            ("info,debug", "debug"),
            ("=info", "=info"),
            ("a=b=c", "a=b=c"),
            ("logging[put]=info", "logging[put]=info"),
        ] {
            let output = run(OsStr::new(filter)).output().unwrap();
            let line = one_line(&output);
            assert_eq!(output.status.code(), Some(2), "{line}");
            let named =
                format!("RUST_LOG has {wrong:?}: write a level (off, error, warn, info, debug,");
            assert!(line.contains(&named), "{line}");
            assert!(line.contains("common, facade, logging, messages"), "{line}");
        }
        let not_utf_8 = run(OsStr::from_bytes(b"info\xff")).output().unwrap();
        assert!(one_line(&not_utf_8).contains("RUST_LOG has "));
        let filter = OsStr::new("WARN, common=info, logging=Debug");
        Process::start(run(filter), free_address());
    }
}

#[test]
fn flag_without_a_value_says_how_to_write_it() {
    for (name, variable) in [
        ("facade", "FACADE_OPEN"),
        ("logging", "LOGGING_OPEN"),
        ("messages", "MESSAGES_OPEN"),
    ] {
        let binary = binary(name);
        assert_refused(&binary, &["--open=yes"], "write --open without a value");
        let output = Command::new(&binary).env(variable, "maybe").output();
        let line = one_line(&output.unwrap());
        assert!(
            line.contains(&format!("{variable}: write true or false")),
            "{line}"
        );
    }
}

#[test]
fn each_flag_of_the_help_is_in_the_docs() {
    let docs = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/configuration.md");
    let docs = std::fs::read_to_string(docs).unwrap();
    for name in ["facade", "logging", "messages"] {
        let help = Command::new(binary(name)).arg("--help").output().unwrap();
        let help = String::from_utf8(help.stdout).unwrap();
        let words = help.lines().map(|line| line.split_whitespace().next());
        let flags = words.flatten().filter(|word| word.starts_with("--"));
        let missing: Vec<&str> = flags
            .filter(|flag| !docs.contains(&format!("`{flag}")))
            .collect();
        assert!(missing.is_empty(), "{name}: {missing:?}");
    }
}

/// A terminal that closes stops a service as SIGTERM does, with code 0; `nohup` keeps it.
#[tokio::test]
async fn hangup_stops_a_service_unless_it_is_ignored() {
    let folder = tempfile::tempdir().unwrap();
    let map = format!("lmdb:{}", folder.path().join("map").display());
    let of_logging = ["--map", &map];
    for (name, flags) in [
        ("facade", &[][..]),
        ("logging", &of_logging),
        ("messages", &[]),
    ] {
        let mut command = Command::new(binary(name));
        command.args(flags);
        let mut process = Process::start(command, free_address());
        process.signal("HUP");
        assert!(process.wait().success(), "{name}");
    }
    let mut shell = Command::new("sh");
    shell.args(["-c", "trap '' HUP; exec \"$0\" \"$@\""]);
    shell.arg(binary("messages"));
    let mut kept = Process::start(shell, free_address());
    kept.signal("HUP");
    assert!(kept.ask("/livez").starts_with("HTTP/1.1 200"));
    kept.signal("TERM");
    assert!(kept.wait().success());
}

#[test]
fn help_names_each_flag_with_its_environment_variable() {
    let three = "http://127.0.0.1:8082,http://127.0.0.1:8083,http://127.0.0.1:8084";
    let flags = [
        ("--listen", "FACADE_LISTEN", "127.0.0.1:8086"),
        ("--logging", "FACADE_LOGGING", three),
        ("--messages", "FACADE_MESSAGES", "http://127.0.0.1:8081"),
        ("--try-timeout", "FACADE_TRY_TIMEOUT", "1s"),
        ("--deadline", "FACADE_DEADLINE", "10s"),
        ("--read-deadline", "FACADE_READ_DEADLINE", "15s"),
        ("--messages-timeout", "FACADE_MESSAGES_TIMEOUT", "1s"),
        ("--max-message", "FACADE_MAX_MESSAGE", "64KiB"),
        ("--max-reads", "FACADE_MAX_READS", "64"),
        ("--grace", "FACADE_GRACE", "10s"),
        ("--idle-timeout", "FACADE_IDLE_TIMEOUT", "75s"),
        ("--log-format", "FACADE_LOG_FORMAT", "text"),
    ];
    assert_help(&binary("facade"), &flags);
    let flags = [
        ("--listen", "MESSAGES_LISTEN", "127.0.0.1:8081"),
        ("--grace", "MESSAGES_GRACE", "10s"),
        ("--idle-timeout", "MESSAGES_IDLE_TIMEOUT", "75s"),
        ("--log-format", "MESSAGES_LOG_FORMAT", "text"),
    ];
    assert_help(&binary("messages"), &flags);
}
