//! `scripts/run.sh` and `scripts/demo.sh --page` as a newcomer runs them, in a network namespace, where the
//! fixed ports of `run.sh` are free.

use std::path::Path;

use testing::requirements::unshare;

use crate::processes::binary;

/// The functions of the scripts below, in which each step must succeed. With job control a script that runs
/// in the background is a process group, as in a terminal, and receives Ctrl-C.
const PROLOGUE: &str = r#"
set -euo pipefail -o monitor
ip link set lo up
run() { "$root/scripts/run.sh" "$@" >"$folder/output" 2>&1 & run=$!; }
wait_for() { for ((look = 0; look < 600; look++)); do if "$@"; then return; fi; sleep 0.1; done; return 1; }
get() { curl --silent --fail "localhost:8086/$1"; }
ready() { get readyz >/dev/null; }
ctrl_c() { kill -INT -- "-$run"; wait_for ended; wait "$run"; }
ended() { ! kill -0 "$run" 2>/dev/null; }
says() { grep --quiet --extended-regexp "$1" "$folder/output"; }
listens() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }
ends_with() { local status=0; wait_for ended; wait "$run" || status=$?; [[ $status == "$1" ]]; }
deaf() { if listens "$1"; then return 1; fi; }
quiet() { for port in 8081 8082 8083 8084 8086 7001 7006; do deaf "$port" || return 1; done; }
page() { curl --silent --fail "$(grep --only-matching 'http://.*/console' "$folder/output")"; }
page_shows() { [[ $(page) == *"$1"* ]]; }
port_of() { sed --quiet "s/^$1: 127.0.0.1:\([0-9]*\).*/\1/p" "$folder/output"; }
is_stopped() { [[ $(ps --no-headers -o stat -p "$(pgrep --full -- "--listen 127.0.0.1:$1")") == T* ]]; }
nothing_is_left() { [[ -z $(pgrep --full 'release/[flm]|redis-server') && -z $(ls "$TMPDIR") ]]; }
cd "$folder"
mkdir temporary
export TMPDIR=$folder/temporary
"#;

/// Runs a script in a network namespace, and shows its output when it fails. The script is the first
/// process of a PID namespace, so no process that it started outlives it.
#[track_caller]
fn run_on_own_network(script: &str) {
    let namespaces = ["--net", "--pid", "--fork", "--kill-child", "--mount-proc"];
    let Some(mut bash) = unshare(&namespaces, &["ip", "link", "set", "lo", "up"]) else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let _they_are_built = ["logging", "messages"].map(binary);
    // A file and not an argument: `pgrep --full` must find the services, and not this shell.
    let file = folder.path().join("script");
    std::fs::write(&file, format!("{PROLOGUE}{script}")).unwrap();
    // A shell cannot trap a signal that was ignored when it began, as after `&`.
    let output = bash
        .args(["env", "--default-signal=INT", "bash"])
        .arg(&file)
        .env("root", root)
        .env("folder", folder.path())
        .env("SKIP_BUILD", "1")
        .output()
        .unwrap();
    let printed = std::fs::read_to_string(folder.path().join("output"));
    assert!(
        output.status.success(),
        "{}\n{}\n{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
        printed.unwrap_or_default(),
    );
}

/// When a service is killed, `run.sh` prints the command that restarts it, and the command works; the other
/// services keep running. Ctrl-C ends all of them.
#[test]
fn run_script_keeps_running_when_a_service_is_killed() {
    run_on_own_network(
        r#"
run "map of mine"
wait_for ready
curl --silent --fail -d msg=hello localhost:8086
kill -KILL "$(pgrep --full -- '--listen 127.0.0.1:8083')"
wait_for says 'logging-2 has ended'
kill -0 "$run"
get '' | grep '"msg":"hello"'
command=$(sed -n 's/^run.sh |   //p' "$folder/output")
deaf 8083
bash -c "$command" >"$folder/by-hand" 2>&1 &
wait_for listens 8083
test -d "$folder/map of mine"
ctrl_c
kill "$(pgrep --full -- '--listen 127.0.0.1:8083')"
wait_for quiet
"#,
    );
}

/// Ctrl-C stops the six servers, also of a relative folder, and a second start finds the messages.
#[test]
fn run_script_stops_the_cluster_that_it_started() {
    run_on_own_network(
        r#"
run --cluster data
wait_for ready
curl --silent --fail -d msg=hello localhost:8086
ctrl_c
quiet
run --cluster data
wait_for ready
get '' | grep '"msg":"hello"'
ctrl_c
quiet
"#,
    );
}

/// The keys kill, revive, pause and resume an instance. `q` ends all, also what is paused, and leaves the
/// terminal as it was.
#[test]
fn demo_page_kills_and_pauses_by_keys() {
    run_on_own_network(
        r#"
mkfifo keys
script --quiet --return --command 'stty -g; "$root/scripts/demo.sh" --page && stty -g' /dev/null \
    <keys >output 2>&1 &
run=$!
exec 4>keys
press() { printf "$1" >&4; }
wait_for says 'q +stop everything'
wait_for page_shows 'parcel 3 has left'
press 2
wait_for says 'logging-2 killed'
deaf "$(port_of logging-2)"
press 2
wait_for says 'logging-2 is back'
listens "$(port_of logging-2)"
press a
wait_for says 'logging-1 paused'
is_stopped "$(port_of logging-1)"
press a
wait_for says 'logging-1 resumed'
if is_stopped "$(port_of logging-1)"; then exit 1; fi
press ad
wait_for says 'logging-3 paused'
press q
ends_with 0
nothing_is_left
[[ $(head --lines 1 output) == $(tail --lines 1 output) ]]
"#,
    );
}

/// Nothing interrupts the end: neither a second Ctrl-C nor the end of the terminal leaves a server.
#[test]
fn demo_ends_completely_however_often_it_is_interrupted() {
    run_on_own_network(
        r#"
"$root/scripts/demo.sh" --page --cluster </dev/null >output 2>&1 &
run=$!
wait_for says /console
interrupt() { if ended; then return; fi; kill -"$1" -- "-$run" || true; return 1; }
interrupt INT || wait_for eval 'interrupt INT && interrupt HUP && interrupt TERM'
nothing_is_left
"#,
    );
}

/// Without a terminal the page's demo kills, revives and pauses by itself. SIGTERM ends all, also what is
/// paused. The caller has a proxy, and names Cargo's folder relative to its own.
#[test]
fn demo_page_needs_no_terminal() {
    run_on_own_network(
        r#"
ln --symbolic "${CARGO_TARGET_DIR:-$root/target}" built
http_proxy=http://127.0.0.1:9 CARGO_TARGET_DIR=built "$root/scripts/demo.sh" --page </dev/null >output 2>&1 &
run=$!
wait_for says 'logging-2 killed'
wait_for says 'logging-2 is back'
wait_for says 'logging-1 paused'
is_stopped "$(port_of logging-1)"
kill -TERM "$run"
ends_with 143
nothing_is_left
"#,
    );
}
