# A system of a script's own, on free ports of loopback; sourced. The script gives `folder`, where the
# logs go, and calls `stop_system` when it ends.

pids=()

# start COMMAND…: in the background, until stop_system; the last of pids is its id.
start() {
    "$@" >"$folder/${#pids[@]}.log" 2>&1 &
    pids+=($!)
}

stop_system() {
    if ((${#pids[@]})); then kill "${pids[@]}" 2>/dev/null || true; fi
    wait
    pids=()
}

# Below the range from which the system takes ports for outgoing connections.
free_port() {
    local candidate
    while true; do
        candidate=$((10000 + RANDOM % 20000))
        (exec 3<>"/dev/tcp/127.0.0.1/$candidate") 2>/dev/null || break
    done
    echo "$candidate"
}

wait_until_ready() {
    curl --silent --output /dev/null --fail --retry 60 --retry-delay 1 --retry-all-errors \
        "http://$1/readyz"
}

# start_system MAP: messages, three logging instances and the facade; sets facade and instances to
# their addresses.
start_system() {
    local address messages urls=()
    messages=127.0.0.1:$(free_port)
    start target/release/messages --listen "$messages"
    instances=()
    for _ in 1 2 3; do
        address=127.0.0.1:$(free_port)
        start target/release/logging --listen "$address" --map "$1"
        wait_until_ready "$address"
        instances+=("$address")
        urls+=("http://$address")
    done
    facade=127.0.0.1:$(free_port)
    start target/release/facade --listen "$facade" --messages "http://$messages" \
        --logging "$(IFS=,; echo "${urls[*]}")"
    wait_until_ready "$facade"
}

# median NUMBER…
median() { printf '%s\n' "$@" | sort --numeric-sort | sed -n "$((($# + 1) / 2))p"; }

# ratio A B: A / B, with two digits.
ratio() { awk "BEGIN { printf \"%.2f\", $1 / $2 }"; }

# describe_run COMMAND: what a stored result begins with.
describe_run() {
    echo "commit:  $(git rev-parse --short HEAD)$(git diff --quiet HEAD || echo ' with changes')"
    echo "machine: $(nproc) cores, $(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -1), Linux $(uname -r)"
    echo "command: $1"
    echo
}
