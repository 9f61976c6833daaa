# The services of a script, as release builds on loopback; sourced after the `cd` to the root. The script sets
# `folder`, where the logs go, and calls `stop` when it ends.

# Cargo's folder; a relative one is the caller's.
if [[ -n ${CARGO_TARGET_DIR:-} ]]; then
    CARGO_TARGET_DIR=$(cd "$OLDPWD" && realpath --canonicalize-missing "$CARGO_TARGET_DIR")
    export CARGO_TARGET_DIR
fi
binaries=${CARGO_TARGET_DIR:-target}/release

# A proxy cannot reach the loopback of this machine.
export no_proxy=${no_proxy:+$no_proxy,}127.0.0.1,localhost

instances=(logging-1 logging-2 logging-3)
# By the name of each service that runs, and of each that was started.
declare -A pids=() ports=()

fail() {
    echo "error: $*" >&2
    exit 1
}

# at_end COMMAND: runs it when the script ends, also by a signal; no second signal interrupts it.
at_end() {
    local ignore="trap '' HUP INT TERM"
    # shellcheck disable=SC2064
    {
        trap "$ignore; $1" EXIT
        trap "$ignore; exit 129" HUP
        trap "$ignore; exit 130" INT
        trap "$ignore; exit 143" TERM
    }
}

build_services() { [[ -n ${SKIP_BUILD:-} ]] || cargo build --release --locked; }

listens() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

# Below the range from which the system takes ports for outgoing connections.
free_port() {
    local candidate
    while true; do
        candidate=$((10000 + RANDOM % 20000))
        if ! listens "$candidate"; then break; fi
    done
    echo "$candidate"
}

address() { echo "127.0.0.1:${ports[$1]}"; }

wait_until_ready() {
    curl --silent --output /dev/null --fail --retry 60 --retry-delay 1 --retry-all-errors \
        "http://$(address "$1")/readyz"
}

# start NAME COMMAND…: in the background, with a log in a file.
start() {
    "${@:2}" >>"$folder/$1.log" 2>&1 &
    pids[$1]=$!
}

# start_service NAME BINARY [ARGUMENT…]: on the port that NAME had before, or on a free one; returns when it
# is ready.
start_service() {
    [[ -n ${ports[$1]:-} ]] || ports[$1]=$(free_port)
    start "$1" "$binaries/$2" --listen "$(address "$1")" "${@:3}"
    wait_until_ready "$1" || fail "$1 does not get ready; its log: $(cat "$folder/$1.log")"
}

# start_system MAP: messages, three logging instances and the facade; sets facade to its address.
start_system() {
    local name urls=()
    start_service messages messages
    for name in "${instances[@]}"; do
        start_service "$name" logging --map "$1"
        urls+=("http://$(address "$name")")
    done
    start_service facade facade --messages "http://$(address messages)" \
        --logging "$(IFS=,; echo "${urls[*]}")"
    facade=$(address facade)
}

# stop SIGNAL NAME…: sends the signal to all of them, then waits for the end of each.
stop() {
    local name stopping=()
    for name in "${@:2}"; do stopping+=("${pids[$name]}"); done
    # In a trap a bare return would have the status of what the signal interrupted.
    if ((${#stopping[@]} == 0)); then return 0; fi
    # Bash reports each end by SIGKILL on standard error.
    { kill "-$1" "${stopping[@]}"; wait "${stopping[@]}"; } 2>/dev/null || true
    # Not earlier: a script that a signal ends here stops them again.
    for name in "${@:2}"; do unset "pids[$name]"; done
}

# median NUMBER…
median() { printf '%s\n' "$@" | sort --numeric-sort | sed -n "$((($# + 1) / 2))p"; }

# ratio A B: A / B, with two digits.
ratio() { awk "BEGIN { printf \"%.2f\", $1 / $2 }"; }

# describe_run COMMAND: the head of a stored result.
describe_run() {
    echo "commit:  $(git rev-parse --short HEAD)$(git diff --quiet HEAD || echo ' with changes')"
    echo "machine: $(nproc) cores, $(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -1), Linux $(uname -r)"
    echo "command: $1"
    echo
}
