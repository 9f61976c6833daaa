#!/usr/bin/env bash
# The POST rate of the whole system as a share of that of a bare axum handler, beside what a user could take
# instead, bulk uploads, one connection, and the rate on a large map.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/system.sh
source bench/maps.sh

rounds=${1:-5}
seconds=${2:-5}
engine=${3:-lmdb}

if [[ $rounds == --help || $rounds == -h ]]; then
    cat <<'HELP'
usage: bench/post.sh [ROUNDS] [SECONDS] [lmdb|redis|cluster] [PART…]

The map is an LMDB folder, a Redis server with a replica (--backups 1), or a Redis Cluster of three
primaries and three replicas, all on this machine, each server with an fsync before it answers. Parts,
all of them but `large` unless some are named:

  rate    wrk with 256 connections against a bare axum handler, the facade and a rival in turn, ROUNDS
          times (5) for SECONDS (5) each: the ratio of each round, and their median. The rival on LMDB
          is nginx, which balances at random over the same logging instances; on one Redis server it
          is webdis, which appends to a list of the same server and waits for no replica.
  bulk    uploads of 200000 messages as NDJSON beside single POSTs, in messages a second
  single  the median time of a POST on one connection, and of the engine's own commit, measured by a
          program that does nothing else
  large   the rate with ENTRIES (10000000) in the map beside that on an empty one, in turn; on LMDB
          and on a cluster. It takes minutes to fill the map.
HELP
    exit 0
fi
parts=("${@:4}")
((${#parts[@]})) || parts=(rate bulk single)

declare -A rivals=([lmdb]=nginx [redis]=webdis)
rival=${rivals[$engine]:-}
for program in wrk python3 $rival; do
    command -v "$program" >/dev/null || { echo "error: please install $program" >&2; exit 1; }
done
cargo build --release --locked --workspace --examples --bins

folder=$(mktemp -d)
chmod a+x "$folder"
stop_all() {
    stop TERM "${!pids[@]}"
    for cluster in "$folder"/cluster*/; do
        if [[ -d $cluster ]]; then scripts/cluster.sh wipe "$cluster"; fi
    done
}
at_end 'stop_all; rm -rf "$folder"'

# start_backed_redis: a Redis server with a replica; sets map.
start_backed_redis() {
    start_map 'one Redis server'
    local port
    port=$(free_port)
    mkdir "$folder/replica"
    start replica redis-server scripts/redis.conf --cluster-enabled no --bind 127.0.0.1 --port "$port" \
        --dir "$folder/replica" --replicaof 127.0.0.1 "$redis_port"
    export LOGGING_BACKUPS=1
    until redis-cli -p "$redis_port" info replication 2>/dev/null | grep -q state=online; do sleep 0.1; done
}

start_engine() {
    case $engine in
        redis) start_backed_redis ;;
        *) start_map "$engine" ;;
    esac
}

# post URL: the rate, the failures, the median and the 99th percentile of wrk.
post() { wrk -t2 -c256 -d"${seconds}s" -s bench/post.lua "http://$1/" 2>&1 >/dev/null; }

start_bare() {
    ports[bare]=$(free_port)
    bare=$(address bare)
    start bare "$binaries/examples/bare" "$bare"
    curl --silent --output /dev/null --retry 100 --retry-delay 1 --retry-connrefused \
        --data msg=warm-up "http://$bare/"
}

start_nginx() {
    {
        echo "daemon off; pid $folder/nginx.pid; error_log $folder/nginx-error.log; worker_processes auto;"
        echo "events { worker_connections 2048; }"
        echo "http { access_log $folder/nginx-access.log; client_body_temp_path $folder; proxy_temp_path $folder;"
        echo "fastcgi_temp_path $folder; uwsgi_temp_path $folder; scgi_temp_path $folder;"
        echo "upstream instances { random; keepalive 256;"
        for name in "${instances[@]}"; do echo "server $(address "$name");"; done
        echo "} server { listen $1; location / { proxy_pass http://instances; proxy_http_version 1.1;"
        echo "proxy_set_header Connection \"\"; proxy_set_header Host localhost; } } }"
    } >"$folder/nginx.conf"
    start rival nginx -c "$folder/nginx.conf" -e "$folder/nginx-error.log"
}

start_webdis() {
    cat >"$folder/webdis.json" <<JSON
{"redis_host": "127.0.0.1", "redis_port": $redis_port, "http_host": "127.0.0.1", "http_port": $1,
 "threads": $(nproc), "pool_size": 20, "daemonize": false, "verbosity": 3, "logfile": "$folder/webdis-access.log"}
JSON
    start rival webdis "$folder/webdis.json"
}

start_rival() {
    ports[rival]=$(free_port)
    "start_$rival" "${ports[rival]}"
    until listens "${ports[rival]}"; do sleep 0.1; done
}

measure_rate() {
    local round bare_rate rate failed p99 rival_rate rival_failed rival_cells shares=() ratios=()
    start_bare
    if [[ -n $rival ]]; then start_rival; fi
    echo "| bare, req/s | facade, req/s | failed | p99, ms | share of bare |${rival:+ $rival, req/s | failed | facade to it |}"
    echo "|---|---|---|---|---|${rival:+---|---|---|}"
    for ((round = 0; round < rounds; round++)); do
        read -r bare_rate _ < <(post "$bare")
        read -r rate failed _ p99 < <(post "$facade")
        shares+=("$(ratio "$rate" "$bare_rate")")
        rival_cells=
        if [[ -n $rival ]]; then
            read -r rival_rate rival_failed _ < <(RIVAL=$rival post "$(address rival)")
            ratios+=("$(ratio "$rate" "$rival_rate")")
            rival_cells=" $rival_rate | $rival_failed | ${ratios[-1]} |"
        fi
        echo "| $bare_rate | $rate | $failed | $p99 | ${shares[-1]} |$rival_cells"
    done
    echo
    echo "median share: $(median "${shares[@]}")"
    if [[ -n $rival ]]; then echo "median ratio to $rival: $(median "${ratios[@]}")"; fi
    stop TERM bare ${rival:+rival}
    echo
}

measure_bulk() {
    local round rate took bulk messages=200000 ratios=()
    awk -v count=$messages 'BEGIN { for (n = 0; n < count; n++)
        printf "{\"msg\":\"message %07d, of the usual length, about sixty-five bytes of text\"}\n", n }' >"$folder/bulk"
    echo "| single POSTs, messages/s | bulk, messages/s | ratio |"
    echo "|---|---|---|"
    for ((round = 0; round < rounds; round++)); do
        read -r rate _ < <(post "$facade")
        took=$(seconds upload)
        bulk=$(awk "BEGIN { printf \"%.0f\", $messages / $took }")
        ratios+=("$(ratio "$bulk" "$rate")")
        echo "| $rate | $bulk | ${ratios[-1]} |"
    done
    echo
    echo "median ratio: $(median "${ratios[@]}")"
    echo
}

upload() {
    curl --silent --show-error --fail --header 'content-type: application/x-ndjson' --data-binary "@$folder/bulk" \
        --output "$folder/uploaded" "http://$facade/"
    grep --quiet '"stored":200000,' "$folder/uploaded" || fail "not all lines were stored: $(cat "$folder/uploaded")"
}

measure_single() {
    local round median_time commit place=${map##*:} differences=()
    if [[ $engine == lmdb ]]; then place=$folder; fi
    echo "| POST, median, ms | commit, median, ms | difference |"
    echo "|---|---|---|"
    for ((round = 0; round < rounds; round++)); do
        commit=$(python3 bench/commit.py "$engine" "$place" "$seconds")
        read -r _ _ median_time _ < <(wrk -t1 -c1 -d"${seconds}s" -s bench/post.lua "http://$facade/" 2>&1 >/dev/null)
        differences+=("$(awk "BEGIN { printf \"%.2f\", $median_time - $commit }")")
        echo "| $median_time | $commit | ${differences[-1]} |"
    done
    echo
    echo "median difference: $(median "${differences[@]}") ms"
    echo
}

# The two maps have their own instances and facades, which do nothing in the other's turn.
measure_large() {
    local round entries=${ENTRIES:-10000000} empty=$facade large full ratios=() name
    for name in "${instances[@]}" messages facade; do pids[empty-$name]=${pids[$name]}; done
    ports=()
    large_map=$folder/large
    case $engine in
        lmdb) mkdir "$large_map" && map=lmdb:$large_map ;;
        cluster) map=$(scripts/cluster.sh start "$folder/cluster-large" $((20000 + RANDOM % 10000)) 2>"$folder/cluster.log") ;;
        *) fail "write lmdb or cluster" ;;
    esac
    echo "filling a map with $entries entries" >&2
    fill "$map" 0 "$entries" 65
    start_system "$map"
    full=$facade
    echo "| empty, req/s | $entries entries, req/s | ratio |"
    echo "|---|---|---|"
    for ((round = 0; round < rounds; round++)); do
        read -r rate _ < <(post "$empty")
        read -r large _ < <(post "$full")
        ratios+=("$(ratio "$large" "$rate")")
        echo "| $rate | $large | ${ratios[-1]} |"
    done
    echo
    echo "median ratio: $(median "${ratios[@]}")"
    echo
}

describe_run "bench/post.sh $rounds $seconds $engine ${parts[*]}"
start_engine
start_system "$map"
for part in "${parts[@]}"; do "measure_$part"; done
