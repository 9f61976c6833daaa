#!/usr/bin/env bash
# POST rate through the whole system as a share of a bare axum handler's, in pairs in one run.
set -euo pipefail
cd "$(dirname "$0")/.."

rounds=${1:-5}
seconds=${2:-5}
engine=${3:-lmdb}

if [[ $rounds == --help || $rounds == -h ]]; then
    cat <<'HELP'
usage: bench/post.sh [ROUNDS] [SECONDS] [lmdb|cluster]

Runs wrk with 256 connections against a bare axum handler and against the facade in turn, ROUNDS
times (5) for SECONDS (5) each, and prints the ratio of each pair and their median. The map is an
LMDB folder, or a Redis Cluster of three primaries and three replicas on the same machine.
HELP
    exit 0
fi

command -v wrk >/dev/null || { echo "error: please install wrk (apt-get install wrk)" >&2; exit 1; }
cargo build --release --locked --workspace --examples --bins

folder=$(mktemp -d)
pids=()
stop_all() {
    kill "${pids[@]}" 2>/dev/null || true
    wait
    if [[ $engine == cluster ]]; then scripts/cluster.sh wipe "$folder/cluster"; fi
    rm -rf "$folder"
}
trap stop_all EXIT

free_port() {
    local candidate
    while true; do
        candidate=$((10000 + RANDOM % 20000))
        (exec 3<>"/dev/tcp/127.0.0.1/$candidate") 2>/dev/null || break
    done
    echo "$candidate"
}

start() {
    "$@" >"$folder/${#pids[@]}.log" 2>&1 &
    pids+=($!)
}

case $engine in
    lmdb) map=lmdb:$folder/map ;;
    cluster) map=$(scripts/cluster.sh start "$folder/cluster" $((10000 + RANDOM % 10000))) ;;
    *)
        echo "error: $engine is no engine; write lmdb or cluster" >&2
        exit 2
        ;;
esac

messages=127.0.0.1:$(free_port)
bare=127.0.0.1:$(free_port)
facade=127.0.0.1:$(free_port)
start target/release/messages --listen "$messages"
start target/release/examples/bare "$bare"
urls=()
for _ in 1 2 3; do
    address=127.0.0.1:$(free_port)
    urls+=("http://$address")
    start target/release/logging --listen "$address" --map "$map"
done
start target/release/facade --listen "$facade" --messages "http://$messages" \
    --logging "$(IFS=,; echo "${urls[*]}")"
curl --silent --output /dev/null --retry 100 --retry-delay 1 --retry-connrefused \
    --data warm-up "http://$facade/" --output /dev/null "http://$bare/"

cat >"$folder/post.lua" <<'LUA'
wrk.method = "POST"
wrk.headers["content-type"] = "application/x-www-form-urlencoded"
wrk.body = "msg=a+message+of+the+usual+length%2C+about+sixty+five+bytes+of+text"
function done(summary, latency)
    local errors = summary.errors
    local failed = errors.connect + errors.read + errors.write + errors.status + errors.timeout
    io.stderr:write(string.format("%.0f %d %.1f\n", summary.requests / summary.duration * 1e6,
        failed, latency:percentile(99) / 1000))
end
LUA
rate() { wrk -t2 -c256 -d"${seconds}s" -s "$folder/post.lua" "http://$1/" 2>&1 >/dev/null; }

echo "commit:  $(git rev-parse --short HEAD)$(git diff --quiet HEAD || echo ' with changes')"
echo "machine: $(nproc) cores, $(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -1), Linux $(uname -r)"
echo "command: bench/post.sh $rounds $seconds $engine"
echo
echo "| bare, req/s | facade, req/s | facade p99, ms | failed | share |"
echo "|---|---|---|---|---|"
shares=()
for ((round = 0; round < rounds; round++)); do
    read -r bare_rate _ _ < <(rate "$bare")
    read -r facade_rate failed p99 < <(rate "$facade")
    share=$(awk "BEGIN { printf \"%.2f\", $facade_rate / $bare_rate }")
    shares+=("$share")
    echo "| $bare_rate | $facade_rate | $p99 | $failed | $share |"
done
echo
echo "median share: $(printf '%s\n' "${shares[@]}" | sort -n | sed -n "$((rounds / 2 + 1))p")"
