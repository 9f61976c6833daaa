#!/usr/bin/env bash
# The time of a GET of a million messages, as a ratio to redis-cli reading the same data from one
# server, in pairs in one run.
set -euo pipefail
cd "$(dirname "$0")/.."

rounds=${1:-5}
count=${2:-1000000}

if [[ $rounds == --help || $rounds == -h ]]; then
    cat <<'HELP'
usage: bench/read.sh [ROUNDS] [MESSAGES]

Stores MESSAGES (1000000) of 65 bytes on a Redis Cluster of three primaries and three replicas, and
the same on one Redis server. Then reads, ROUNDS times (5) in turn: all partitions of the one server
by redis-cli (not merged, so in no order), and the whole log by a GET of the facade in front of the
cluster, in both orders. Prints the ratio of each pair and their medians.
HELP
    exit 0
fi

cargo build --release --locked --workspace --bins

folder=$(mktemp -d)
pids=()
stop_all() {
    kill "${pids[@]}" 2>/dev/null || true
    wait
    scripts/cluster.sh wipe "$folder/cluster"
    rm -rf "$folder"
}
trap stop_all EXIT

free_port() {
    local candidate
    while true; do
        candidate=$((21000 + RANDOM % 8000))
        (exec 3<>"/dev/tcp/127.0.0.1/$candidate") 2>/dev/null || break
    done
    echo "$candidate"
}

start() {
    "$@" >"$folder/${#pids[@]}.log" 2>&1 &
    pids+=($!)
}

# start_system MAP: sets facade to its address.
start_system() {
    local address messages urls=()
    messages=127.0.0.1:$(free_port)
    start target/release/messages --listen "$messages"
    for _ in 1 2 3; do
        address=127.0.0.1:$(free_port)
        start target/release/logging --listen "$address" --map "$1"
        curl --silent --output /dev/null --fail --retry 60 --retry-delay 1 --retry-all-errors \
            "http://$address/readyz"
        urls+=("http://$address")
    done
    facade=127.0.0.1:$(free_port)
    start target/release/facade --listen "$facade" --messages "http://$messages" \
        --logging "$(IFS=,; echo "${urls[*]}")"
    curl --silent --output /dev/null --retry 60 --retry-delay 1 --retry-connrefused \
        "http://$facade/livez"
}

upload() {
    awk "BEGIN { for (n = 0; n < $count; n++)
        printf \"\\\"message %07d, of the usual length, about sixty-five bytes of text\\\"\\n\", n }" |
        curl --silent --show-error --header 'content-type: application/x-ndjson' \
            --upload-file - --request POST "http://$1/"
}

single_port=$(free_port)
mkdir "$folder/single"
start redis-server scripts/redis.conf --cluster-enabled no --min-replicas-to-write 0 \
    --bind 127.0.0.1 --port "$single_port" --dir "$folder/single"
cluster=$(scripts/cluster.sh start "$folder/cluster" $((10000 + RANDOM % 10000)))
echo "storing $count messages twice"
start_system "redis://127.0.0.1:$single_port"
upload "$facade"
start_system "$cluster"
upload "$facade"
echo

seconds() {
    local begin=$EPOCHREALTIME
    "$@" >"$folder/out"
    awk "BEGIN { printf \"%.2f\", $EPOCHREALTIME - $begin }"
}
by_redis_cli() {
    for ((partition = 0; partition < 271; partition++)); do
        echo "ZRANGE entries:{$partition} 0 -1"
    done | redis-cli -p "$single_port"
}
by_get() {
    curl --silent --header 'accept: application/x-ndjson' "http://$facade/?order=$1"
}
expect() {
    local found
    found=$(grep --count --text "$1" "$folder/out")
    ((found == count)) || { echo "error: $found of $count were read" >&2; exit 1; }
}

echo "commit:  $(git rev-parse --short HEAD)$(git diff --quiet HEAD || echo ' with changes')"
echo "machine: $(nproc) cores, $(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -1), Linux $(uname -r)"
echo "command: bench/read.sh $rounds $count"
echo
echo "| redis-cli, s | GET asc, s | GET desc, s | ratio asc | ratio desc |"
echo "|---|---|---|---|---|"
ascending=()
descending=()
for ((round = 0; round < rounds; round++)); do
    cli=$(seconds by_redis_cli)
    expect 'of the usual length'
    asc=$(seconds by_get asc)
    expect '^{"uuid"'
    desc=$(seconds by_get desc)
    expect '^{"uuid"'
    ascending+=("$(awk "BEGIN { printf \"%.2f\", $asc / $cli }")")
    descending+=("$(awk "BEGIN { printf \"%.2f\", $desc / $cli }")")
    echo "| $cli | $asc | $desc | ${ascending[-1]} | ${descending[-1]} |"
done
median() { printf '%s\n' "$@" | sort -n | sed -n "$((rounds / 2 + 1))p"; }
echo
echo "median ratio: $(median "${ascending[@]}") ascending, $(median "${descending[@]}") descending"
