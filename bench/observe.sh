#!/usr/bin/env bash
# The cost of looking: the time of /stats and /metrics on a large map, and what a scrape costs POSTs.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/system.sh
source bench/maps.sh
source bench/cost.sh

rounds=${1:-10}
count=${2:-1000000}
duration=${3:-5}

if [[ $rounds == --help || $rounds == -h ]]; then
    cat <<'HELP'
usage: bench/observe.sh [ROUNDS] [MESSAGES] [SECONDS]

Fills an LMDB map, one Redis server and a Redis Cluster of six with MESSAGES (1000000), and prints the
median and the longest time of 50 requests for /stats and for /metrics; on the cluster also of /stats
while one member hangs. Then wrk posts with 256 connections for SECONDS (5), ROUNDS times (10) without
and with a scrape of all services each second, in turn, and the CPU time of the facade and the logging
instances (user and system, from /proc) is divided by the POSTs; the ratio is the median of the pairs'.
The rounds differ by several per cent, so the CPU time of a scrape is also measured by itself, over
1,000 of them.
HELP
    exit 0
fi

for program in wrk redis-server redis-cli; do
    command -v "$program" >/dev/null || { echo "error: please install $program" >&2; exit 1; }
done
build_quietly

folder=$(mktemp -d)
stop_all() {
    stop TERM "${!pids[@]}"
    if [[ -d $folder/cluster ]]; then scripts/cluster.sh wipe "$folder/cluster"; fi
}
at_end 'stop_all; rm -rf "$folder"'

# times URL: of 50 requests, in ms, in ascending order.
times() {
    local request
    for ((request = 0; request < 50; request++)); do
        curl --silent --fail --output /dev/null --write-out '%{time_total}\n' "$1"
    done | awk '{ printf "%.1f\n", $1 * 1000 }' | sort --numeric-sort
}

# middle_and_last NUMBER…: of sorted ones.
middle_and_last() { echo "$(sed -n "$((($# + 1) / 2))p" <(printf '%s\n' "$@")) / ${*: -1}"; }

# scrape: all services once a second, from one process: one that starts for each request costs the services their caches.
scrape() {
    local second name requests=()
    for ((second = 0; second < duration + 5; second++)); do
        for name in facade "${instances[@]}"; do requests+=(--output /dev/null "http://$(address "$name")/metrics"); done
    done
    exec curl --silent --rate "$((${#instances[@]} + 1))/s" "${requests[@]}"
}

describe_run "bench/observe.sh $rounds $count $duration"
echo "| map of $count | /stats, median / longest, ms | /metrics of the facade | /metrics of an instance | /stats while a member hangs |"
echo "|---|---|---|---|---|"
for engine in lmdb 'one Redis server' cluster; do
    start_map "$engine"
    start_system "$map"
    fill "$map" 0 "$count" 65
    row="| $engine"
    for url in "$facade/stats" "$facade/metrics" "$(address logging-1)/metrics"; do
        mapfile -t sorted < <(times "http://$url")
        row+=" | $(middle_and_last "${sorted[@]}")"
    done
    if [[ $engine == cluster ]]; then
        paused=$(redis-cli -u "${map%%,*}" info server | sed -n 's/^process_id:\([0-9]*\).*/\1/p')
        kill -STOP "$paused"
        mapfile -t sorted < <(times "http://$facade/stats")
        kill -CONT "$paused"
        row+=" | $(middle_and_last "${sorted[@]}") |"
    else
        row+=" | |"
    fi
    echo "$row"
    stop_all
done

start_map lmdb
start_system "$map"
without=() with=() pairs=()
for ((round = 0; round < rounds; round++)); do
    without+=("$(cost_of_post "http://$facade" facade "${instances[@]}")")
    scrape &
    scraper=$!
    with+=("$(cost_of_post "http://$facade" facade "${instances[@]}")")
    kill "$scraper"
    wait "$scraper" 2>/dev/null || true
    pairs+=("$(precise_ratio "${with[-1]}" "${without[-1]}")")
done
require_no_failures
echo
echo "CPU time of a POST on LMDB, medians of $rounds: $(median "${without[@]}") us without a scrape," \
    "$(median "${with[@]}") us with one each second; of the ratios of pairs: $(median "${pairs[@]}")"

before=$(ticks facade "${instances[@]}")
for name in facade "${instances[@]}"; do
    curl --silent --output /dev/null "http://$(address "$name")/metrics?[1-1000]"
done
echo "CPU time of a scrape of all services: $(awk "BEGIN { print ($(ticks facade "${instances[@]}") - $before) * 1000 / $(getconf CLK_TCK) / 1000 }") ms"
