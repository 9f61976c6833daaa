#!/usr/bin/env bash
# The POST rate of the whole system as a share of that of a bare axum handler, in pairs in one run.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/system.sh
source bench/maps.sh

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
stop_all() {
    stop TERM "${!pids[@]}"
    if [[ -d $folder/cluster ]]; then scripts/cluster.sh wipe "$folder/cluster"; fi
    rm -rf "$folder"
}
at_end stop_all

start_map "$engine"
start_system "$map"
ports[bare]=$(free_port)
bare=$(address bare)
start bare "$binaries/examples/bare" "$bare"
curl --silent --output /dev/null --retry 100 --retry-delay 1 --retry-connrefused \
    --data warm-up "http://$facade/" --output /dev/null "http://$bare/"

rate() { wrk -t2 -c256 -d"${seconds}s" -s bench/post.lua "http://$1/" 2>&1 >/dev/null; }

describe_run "bench/post.sh $rounds $seconds $engine"
echo "| bare, req/s | facade, req/s | facade p99, ms | failed | share |"
echo "|---|---|---|---|---|"
shares=()
for ((round = 0; round < rounds; round++)); do
    read -r bare_rate _ _ < <(rate "$bare")
    read -r facade_rate failed p99 < <(rate "$facade")
    share=$(ratio "$facade_rate" "$bare_rate")
    shares+=("$share")
    echo "| $bare_rate | $facade_rate | $p99 | $failed | $share |"
done
echo
echo "median share: $(median "${shares[@]}")"
