//! The subcommands `export` and `import`: from one engine into another and back, interrupted, and refused.

use std::fs;
use std::io::Write;
use std::ops::Range;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use common::api::write_entry;
use common::entry::{Entry, Outcome};
use reqwest::Client;
use testing::command_line::one_line;
use testing::engine::Engine;
use testing::process::{LOOK_AGAIN, PATIENCE, Process, free_address};
use testing::redis_servers::RedisServer;
use tokio::time::{sleep, timeout};
use uuid::{Builder, Uuid};

use crate::processes::{LOGGING, all, entry, location, logging, mark_of, put_one};

/// Entries of many years, as lines with small and large messages.
fn lines(range: Range<u64>) -> Vec<u8> {
    let mut lines = Vec::new();
    for n in range {
        let uuid = Builder::from_unix_timestamp_millis(n * 100_000_000, &[7; 10]).into_uuid();
        write_entry(&mut lines, uuid, &"größe \"".repeat(1 + n as usize % 200));
    }
    lines
}

/// An export of the first entries.
fn exported(count: u64) -> Vec<u8> {
    let mut file = lines(0..count);
    writeln!(file, "{{\"count\":{count}}}").unwrap();
    file
}

fn run(task: &str, file: &Path, map: &str) -> Output {
    let command = Command::new(LOGGING)
        .args(["--map", map, task])
        .arg(file)
        .output();
    command.unwrap()
}

#[track_caller]
fn succeed(task: &str, file: &Path, map: &str) -> String {
    let output = run(task, file, map);
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{said}");
    said
}

#[track_caller]
fn check(map: &str) -> String {
    let output = Command::new(LOGGING).args(["--map", map, "check"]).output();
    let output = output.unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{said}");
    said
}

/// The last line on stderr of a subcommand that failed.
#[track_caller]
fn fail(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8(output.stderr.clone()).unwrap();
    said.lines().last().unwrap().to_owned()
}

/// Entries older than any settle window go from engine to engine and return unchanged.
#[test]
fn map_moves_from_engine_to_engine() {
    let folder = tempfile::tempdir().unwrap();
    let original = exported(10_000);
    let mut file = folder.path().join("original");
    fs::write(&file, &original).unwrap();
    for engine in [
        Engine::Lmdb,
        Engine::RedisCluster,
        Engine::RedisServer,
        Engine::Lmdb,
    ] {
        let map = engine.empty_map();
        let said = succeed("import", &file, &map.location);
        assert!(
            said.contains("10000 entries stored, 0 were already in the map"),
            "{said}"
        );
        let said = succeed("import", &file, &map.location);
        assert!(
            said.contains("0 entries stored, 10000 were already in the map"),
            "{said}"
        );
        file = folder.path().join(format!("from {engine:?}"));
        fs::remove_file(&file).ok();
        succeed("export", &file, &map.location);
        assert!(fs::read(&file).unwrap() == original, "{engine:?}");
        let said = check(&map.location);
        assert!(
            said.ends_with("checked 10000 entries: no fault found\n"),
            "{said}"
        );
    }
    let to_stdout = run("export", Path::new("/dev/stdout"), "lmdb:nowhere/map");
    assert!(fail(&to_stdout).contains("there is no map in the folder nowhere/map"));
}

#[test]
fn check_names_the_damaged_entry_on_redis() {
    let folder = tempfile::tempdir().unwrap();
    let server = RedisServer::single(folder.path());
    let map = format!("redis://{}", server.address());
    let file = folder.path().join("file");
    fs::write(&file, exported(100)).unwrap();
    succeed("import", &file, &map);
    check(&map);
    let not_utf_8 = "local large = redis.call('keys', 'message:*')[1] \
                     redis.call('append', large, string.char(255)) return large";
    let damaged: String = server.ask(&["eval", not_utf_8, "0"]);
    let (_, uuid) = damaged.rsplit_once(':').unwrap();
    let output = Command::new(LOGGING)
        .args(["--map", &map, "check"])
        .output();
    let line = fail(&output.unwrap());
    assert!(line.contains(&format!("entry {uuid} is damaged")), "{line}");
}

/// An export continues an interrupted one wherever it was cut, and never changes any other file.
#[test]
fn export_continues_behind_the_last_whole_line() {
    let folder = tempfile::tempdir().unwrap();
    let map = location(folder.path());
    let whole = exported(100);
    let file = folder.path().join("file");
    fs::write(&file, &whole).unwrap();
    succeed("import", &file, &map);
    assert!(fail(&run("export", &file, &map)).contains("this export is finished"));
    let first_line = lines(0..1).len();
    let cuts = [
        0,
        1,
        first_line - 1,
        first_line,
        whole.len() / 2,
        whole.len() - 1,
    ];
    for length in cuts {
        fs::write(&file, &whole[..length]).unwrap();
        succeed("export", &file, &map);
        assert!(fs::read(&file).unwrap() == whole, "{length}");
    }
    let second_first = [lines(1..2), lines(0..1)].concat();
    for other in [
        &b"notes"[..],
        b"notes
",
        b"{}
",
        b"{\"a\":1}",
        &second_first,
    ] {
        fs::write(&file, other).unwrap();
        assert!(fail(&run("export", &file, &map)).contains("this is not an export"));
        assert_eq!(fs::read(&file).unwrap(), other);
    }
}

/// An import that was killed in the middle can be repeated.
#[tokio::test(flavor = "multi_thread")]
async fn killed_import_can_be_repeated() {
    let folder = tempfile::tempdir().unwrap();
    let http = Client::new();
    for engine in [Engine::Lmdb, Engine::RedisCluster] {
        let map = engine.empty_map();
        let serving = || {
            let mut command = Command::new(LOGGING);
            command.args(["--map", &map.location]);
            Process::start(command, free_address())
        };
        let whole = exported(10_000);
        let mut killed = Command::new(LOGGING)
            .args(["--map", &map.location, "import"])
            .stdin(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let half = &whole[..whole.len() / 2];
        killed.stdin.as_mut().unwrap().write_all(half).unwrap();
        let watching = serving();
        watching.wait_until_ready();
        let imported = async {
            while all(&http, &watching.url()).await.is_empty() {
                sleep(LOOK_AGAIN).await;
            }
        };
        timeout(PATIENCE, imported).await.unwrap();
        killed.kill().unwrap();
        killed.wait().unwrap();
        let file = folder.path().join("file");
        fs::write(&file, &whole).unwrap();
        let said = succeed("import", &file, &map.location);
        assert!(!said.contains(" 0 were already in the map"), "{said}");
        let copy = folder.path().join(format!("{engine:?}"));
        succeed("export", &copy, &map.location);
        assert!(fs::read(&copy).unwrap() == whole, "{engine:?}");
    }
}

/// Nothing is added to the history of a log in use, except with `--force`, whose help says what is risked: a key
/// that the map called never stored is stored then.
#[tokio::test(flavor = "multi_thread")]
async fn import_is_refused_while_others_write() {
    let folder = tempfile::tempdir().unwrap();
    let map = location(folder.path());
    let file = folder.path().join("file");
    fs::write(&file, exported(3)).unwrap();
    let http = Client::new();
    let process = Process::start(logging(folder.path()), free_address());
    let url = process.url();
    let stored = entry("first");
    assert_eq!(put_one(&http, &url, &stored).await, Outcome::Stored);
    let writing = tokio::spawn({
        let (http, url) = (http.clone(), url.clone());
        async move {
            loop {
                put_one(&http, &url, &entry("one of many")).await;
            }
        }
    });
    let import = |flags: &[&str]| {
        let mut command = Command::new(LOGGING);
        command.args(["--map", &map, "--settle", "1s", "import"]);
        command.args(flags).arg(&file).output().unwrap()
    };
    let refused = import(&[]);
    assert!(fail(&refused).contains("--force"), "{refused:?}");
    assert_eq!(all(&http, &url).await[0], stored);
    let denied = Entry {
        uuid: Builder::from_unix_timestamp_millis(0, &[7; 10]).into_uuid(),
        msg: "größe \"".to_owned(),
    };
    assert_eq!(put_one(&http, &url, &denied).await, Outcome::Stale);
    let forced = import(&["--force"]);
    assert!(forced.status.success(), "{forced:?}");
    assert_eq!(all(&http, &url).await[0], denied);
    assert_eq!(put_one(&http, &url, &denied).await, Outcome::Duplicate);
    let help = String::from_utf8(import(&["--help"]).stdout).unwrap();
    let help = help.split_whitespace().collect::<Vec<_>>().join(" ");
    for risk in [
        "entries that no POST acknowledged on this map then appear in its settled history",
        "clients that continue from a cursor or follow the log miss those before their position",
        "a key that a 409 called never stored can become stored",
    ] {
        assert!(help.contains(risk), "{help}");
    }
    writing.abort();
}

#[test]
fn file_that_cannot_be_imported_is_refused_with_the_reason() {
    let folder = tempfile::tempdir().unwrap();
    let map = location(folder.path());
    let file = folder.path().join("file");
    let import = |content: &[u8]| {
        fs::write(&file, content).unwrap();
        run("import", &file, &map)
    };
    let line = |uuid: Uuid, msg: &str| {
        let mut line = Vec::new();
        write_entry(&mut line, uuid, msg);
        [&line[..], b"{\"count\":1}\n"].concat()
    };
    let page = |tail: &str| {
        let entry = format!(r#"{{"uuid":"{}","msg":"a"}}"#, Uuid::now_v7());
        format!(r#"{{"logging_service":[{entry}],{tail}}}"#).into_bytes()
    };
    let (v7, v4) = (Uuid::now_v7(), Uuid::from_u128(4 << 76 | 2 << 62));
    let of_2100 = Builder::from_unix_timestamp_millis(4_102_444_800_000, &[7; 10]).into_uuid();
    for (content, reason) in [
        (lines(0..3), "the file is truncated: its 3 entries"),
        (
            [lines(0..3), b"{\"count\":4}\n".to_vec()].concat(),
            "has 3 entries, but its count says 4",
        ),
        (
            [lines(0..3), b"hello\n".to_vec()].concat(),
            "expected value at line 4 column 1; import what `logging export` writes",
        ),
        (
            format!("{v7} hello\n1 messages\n").into(),
            "as JSON or NDJSON",
        ),
        (
            page(r#""count":1,"next":"01a203b3-3bd3-7041-bd9b-405a081b6b3b""#),
            "the file is one page, after which the log goes on",
        ),
        (
            page(r#""scanned":7,"messages_service":null,"count":1"#),
            "the file has only what a search found",
        ),
        (
            page(r#""messages_service":null"#),
            "the body of a GET at line 1",
        ),
        (page(r#""count":2"#), "has 1 entries, but its count says 2"),
        (
            format!(r#"[{{"uuid":"{v7}","msg":"a"}}]"#).into(),
            "the body of a GET without a query",
        ),
        (
            format!(r#"{{"uuid":"{v7}","msg":"a","uuid":"{v7}"}}{{"count":1}}"#).into(),
            "this is not an entry",
        ),
        (
            format!(r#"{{"uuid":"{v7}","msg":"a","count":1}}"#).into(),
            "this is not an entry",
        ),
        (
            [exported(3), exported(3)].concat(),
            "more follows behind the count",
        ),
        (
            [
                lines(0..3),
                b"{\"count\":3,\"go_on_elsewhere\":\"stopping\"}\n".to_vec(),
            ]
            .concat(),
            "the file is incomplete",
        ),
        (line(v4, "a"), "is not a version 7 UUID"),
        (line(v7, ""), "the message is empty at line 1 column "),
        (line(of_2100, "a"), "in the future"),
    ] {
        let refused = fail(&import(&content));
        assert!(refused.contains(reason), "{refused}");
    }
    let old = Builder::from_unix_timestamp_millis(1, &[7; 10]).into_uuid();
    assert!(import(&line(old, "a")).status.success());
    let conflict = fail(&import(&line(old, "b")));
    assert!(
        conflict.contains(&format!("the first is {old}")),
        "{conflict}"
    );
    let missing = run("import", Path::new("no/such/file"), &map);
    assert!(one_line(&missing).contains("cannot read no/such/file"));
}

/// What other programs make of a file is the same JSON, whatever their white space, order of keys and escapes.
#[test]
fn file_that_another_program_wrote_again_is_imported() {
    let folder = tempfile::tempdir().unwrap();
    let uuid = |n: u64| Builder::from_unix_timestamp_millis(n, &[7; 10]).into_uuid();
    let (first, second) = (uuid(1), uuid(2));
    let mut original = Vec::new();
    write_entry(&mut original, first, "größe 👍 \"\u{7f}");
    write_entry(&mut original, second, "b");
    original.extend_from_slice(b"{\"count\":2}\n");
    let escaped = r#"gr\u00f6\u00dfe \ud83d\udc4d \"\u007F"#;
    for (name, text) in [
        (
            "json.dumps of each line",
            format!(
                r#"{{"uuid": "{first}", "msg": "{escaped}"}}
{{"msg": "b", "uuid": "{second}"}}
{{"messages_service": "-", "count": 2}}
"#
            ),
        ),
        (
            "jq -c . of a body",
            format!(
                r#"{{"logging_service":[{{"uuid":"{first}","msg":"{escaped}"}},{{"uuid":"{second}","msg":"b"}}],"messages_service":null,"messages_service_error":"away","count":2}}"#
            ),
        ),
        (
            "json.dumps with indent and sort_keys of a body",
            format!(
                r#"{{
  "count": 2,
  "logging_service": [
    {{
      "msg": "{escaped}",
      "uuid": "{first}"
    }},
    {{
      "msg": "b",
      "uuid": "{second}"
    }}
  ],
  "messages_service": "-"
}}"#
            ),
        ),
        (
            "jq . of lines",
            format!(
                "{{\n  \"uuid\": \"{first}\",\n  \"msg\": \"{escaped}\"\n}}\n{{\n  \"uuid\": \
                 \"{second}\",\n  \"msg\": \"b\"\n}}\n{{\n  \"count\": 2\n}}\n"
            ),
        ),
    ] {
        let map = format!("lmdb:{}", folder.path().join(name).display());
        let file = folder.path().join("file");
        fs::write(&file, text).unwrap();
        succeed("import", &file, &map);
        let copy = folder.path().join("copy");
        fs::remove_file(&copy).ok();
        succeed("export", &copy, &map);
        assert!(fs::read(&copy).unwrap() == original, "{name}");
    }
}

/// A folder of another layout version is not changed.
#[tokio::test]
async fn other_layout_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let mut process = Process::start(logging(folder.path()), free_address());
    process.wait_until_ready();
    let id = mark_of(&Client::new(), &process.url()).await.map.unwrap();
    process.kill();
    let file = folder.path().join("map/data.mdb");
    let mut data = fs::read(&file).unwrap();
    let text = format!("1 {id}");
    let found = data.windows(text.len()).enumerate();
    let found: Vec<usize> = found
        .filter(|(_, at)| *at == text.as_bytes())
        .map(|(at, _)| at)
        .collect();
    assert!(!found.is_empty());
    for at in found {
        data[at] = b'2';
    }
    fs::write(&file, data).unwrap();
    let output = logging(folder.path())
        .args(["--listen", "127.0.0.1:0"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let line = one_line(&output);
    assert!(
        line.contains("layout") && line.contains("logging export"),
        "{line}"
    );
}
