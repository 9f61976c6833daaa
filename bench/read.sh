#!/usr/bin/env bash
# The cost of reads, in comparisons within one run: whole GETs, the newest ten, searches, slow readers, large
# messages.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/system.sh
source bench/maps.sh

rounds=${1:-5}
count=${2:-1000000}

if [[ $rounds == --help || $rounds == -h ]]; then
    cat <<'HELP'
usage: bench/read.sh [ROUNDS] [MESSAGES] [PART…]

Measures on an LMDB map, on one Redis server and on a Redis Cluster of three primaries and three
replicas, each filled with the same messages. Parts, all of them unless some are named:

  full    a GET of MESSAGES (1000000) of 65 bytes through the facade, ROUNDS times (5) in turn with:
          nginx serving the same bytes from a file (with sendfile, as Debian sets it, and without); a
          logging instance asked directly; redis-cli reading one hash of the same entries
  newest  ?order=desc&limit=10, and the first byte of a whole GET, at 1000, 100000 and ten times
          MESSAGES
  search  one request with ?contains= that finds nothing: 100000 entries of 65 bytes, in both orders, and
          2000 of 64 KiB, ROUNDS times
  slow    the growth of RssAnon while 64 readers of 1 KiB/s read MESSAGES of 65 bytes, and 2000 of
          64 KiB
  large   64 readers at once of 2000 messages of 60 KB, and POSTs at the same time

Needs nginx, redis-server and redis-cli. Prints tables; results/ keeps some.
HELP
    exit 0
fi
parts=("${@:3}")
((${#parts[@]})) || parts=(full newest search slow large)

for program in nginx redis-server redis-cli; do
    command -v "$program" >/dev/null || { echo "error: please install $program" >&2; exit 1; }
done
cargo build --release --locked --workspace --bins

folder=$(mktemp -d)
chmod a+x "$folder"
stop_all() {
    stop TERM "${!pids[@]}"
    if [[ -d $folder/cluster ]]; then scripts/cluster.sh wipe "$folder/cluster"; fi
}
at_end 'stop_all; rm -rf "$folder"'

get() { curl --silent --show-error --fail --header "accept: application/$1" "http://$2"; }

# A separate Redis server with a hash of the same entries, and nginx with the two bodies as files.
start_yardsticks() {
    hash_port=$(free_port)
    mkdir -p "$folder/hash" "$folder/nginx"
    start hash redis-server --save '' --bind 127.0.0.1 --port "$hash_port" --dir "$folder/hash"
    nginx_port=$(free_port)
    slow_nginx_port=$(free_port)
    cat >"$folder/nginx.conf" <<NGINX
daemon off;
pid $folder/nginx.pid;
error_log $folder/nginx.log;
events {}
http {
    access_log off;
    server { listen 127.0.0.1:$nginx_port; root $folder/nginx; sendfile on; tcp_nopush on; }
    server { listen 127.0.0.1:$slow_nginx_port; root $folder/nginx; }
}
NGINX
    start nginx nginx -c "$folder/nginx.conf"
    get json "$facade/" >"$folder/nginx/json"
    get x-ndjson "$facade/" >"$folder/nginx/ndjson"
    sed -n 's/^{"uuid":"\(.*\)","msg":\(.*\)}$/HSET log \1 \2/p' "$folder/nginx/ndjson" |
        redis-cli -p "$hash_port" --pipe >/dev/null
    [[ $(redis-cli -p "$hash_port" hlen log) == "$count" ]]
}

full() {
    local engine command columns round
    echo "Whole GETs of $count messages, in seconds:"
    echo
    echo "| map | JSON | NDJSON | NDJSON, newest first | the instance directly | nginx, JSON | nginx, NDJSON | nginx without sendfile, NDJSON | hgetall |"
    echo "|---|---|---|---|---|---|---|---|---|"
    local ratios=()
    for engine in lmdb 'one Redis server' cluster; do
        start_map "$engine"
        start_system "$map"
        fill "$map" 0 "$count" 65
        start_yardsticks
        columns=(
            "get json $facade/" "get x-ndjson $facade/" "get x-ndjson $facade/?order=desc"
            "get x-ndjson $(address logging-1)/" "get json 127.0.0.1:$nginx_port/json"
            "get x-ndjson 127.0.0.1:$nginx_port/ndjson"
            "get x-ndjson 127.0.0.1:$slow_nginx_port/ndjson" "redis-cli -p $hash_port hgetall log"
        )
        local -A times=()
        for ((round = 0; round < rounds; round++)); do
            for ((column = 0; column < ${#columns[@]}; column++)); do
                times[$column]+=" $(seconds ${columns[column]})"
            done
        done
        local medians=()
        for ((column = 0; column < ${#columns[@]}; column++)); do
            medians+=("$(median ${times[$column]})")
        done
        printf '| %s ' "$engine" "${medians[@]}"
        echo '|'
        case $engine in
            lmdb)
                ratios+=(
                    "JSON to nginx: $(ratio "${medians[0]}" "${medians[4]}")"
                    "NDJSON to nginx: $(ratio "${medians[1]}" "${medians[5]}"), without sendfile $(ratio "${medians[1]}" "${medians[6]}")"
                    "NDJSON to the instance directly: $(ratio "${medians[1]}" "${medians[3]}"), JSON $(ratio "${medians[0]}" "${medians[3]}")"
                )
                ;;
            *) ratios+=("$engine to hgetall: JSON $(ratio "${medians[0]}" "${medians[7]}"), NDJSON $(ratio "${medians[1]}" "${medians[7]}"), newest first $(ratio "${medians[2]}" "${medians[7]}")") ;;
        esac
        stop_all
    done
    echo
    printf -- '- %s\n' "${ratios[@]}"
    echo
}

# median_of_gets FIELD TIMES PATH: the median of curl's FIELD, in milliseconds, without the rest of the body.
median_of_gets() {
    local times=() time
    for ((time = 0; time < $2; time++)); do
        times+=("$(curl --silent --output /dev/full --write-out "%{$1}" "http://$facade$3" || true)")
    done
    awk "BEGIN { printf \"%.1f\", 1000 * $(median "${times[@]}") }"
}

newest() {
    local engine size stored
    echo "The newest ten, and the first byte of a whole GET, medians of 50, in milliseconds:"
    echo
    echo "| map | messages | newest ten | first byte |"
    echo "|---|---|---|---|"
    for engine in lmdb cluster; do
        start_map "$engine"
        start_system "$map"
        stored=0
        for size in 1000 100000 $((10 * count)); do
            fill "$map" "$stored" $((size - stored)) 65
            stored=$size
            median_of_gets time_total 5 '/?order=desc&limit=10' >/dev/null
            echo "| $engine | $size | $(median_of_gets time_total 50 '/?order=desc&limit=10') | $(median_of_gets time_starttransfer 50 /) |"
        done
        stop_all
    done
    echo
}

# median_of_searches QUERY: the median of a search that finds nothing, in seconds.
median_of_searches() {
    local times=() round
    for ((round = 0; round < rounds; round++)); do
        times+=("$(seconds get json "$facade/?contains=nothing$1")")
    done
    median "${times[@]}"
}

search() {
    local engine
    echo "A search that finds nothing, one request, in seconds:"
    echo
    echo "| map | 100000 of 65 bytes | newest first | 2000 of 64 KiB |"
    echo "|---|---|---|---|"
    for engine in lmdb 'one Redis server' cluster; do
        start_map "$engine"
        start_system "$map"
        fill "$map" 0 100000 65
        printf '| %s | %s | %s ' "$engine" "$(median_of_searches '')" "$(median_of_searches '&order=desc')"
        stop_all
        start_map "$engine"
        start_system "$map"
        fill "$map" 0 2000 65536
        echo "| $(median_of_searches '') |"
        stop_all
    done
    echo
}

# anonymous SERVICE: its RssAnon in KiB.
anonymous() { awk '/^RssAnon/ { print $2 }' "/proc/${pids[$1]}/status"; }

slow() {
    local engine shape bytes messages readers reader service
    local services=("${instances[@]}" facade)
    echo "RssAnon with 64 readers of 1 KiB/s after 30 s, in MiB (in parentheses the growth):"
    echo
    echo "| map | messages | facade | instances |"
    echo "|---|---|---|---|"
    for engine in lmdb 'one Redis server' cluster; do
        for shape in "$count 65" '2000 65536'; do
            read -r messages bytes <<<"$shape"
            start_map "$engine"
            start_system "$map"
            fill "$map" 0 "$messages" "$bytes"
            local before=() grown=()
            for service in "${services[@]}"; do before+=("$(anonymous "$service")"); done
            readers=()
            for ((reader = 0; reader < 64; reader++)); do
                curl --silent --limit-rate 1k --max-time 60 --output /dev/null "http://$facade/" &
                readers+=($!)
            done
            sleep 30
            for ((n = 0; n < 4; n++)); do
                local now
                now=$(anonymous "${services[n]}")
                grown+=("$((now / 1024)) (+$(((now - before[n]) / 1024)))")
            done
            kill "${readers[@]}"
            echo "| $engine | $messages of $bytes bytes | ${grown[3]} | ${grown[*]::3} |"
            stop_all
        done
    done
    echo
}

large() {
    local engine readers reader refused posts
    echo "64 readers at once of 2000 messages of 60 KB:"
    echo
    echo "| map | one reader, s | 64 readers, s | not whole | POSTs at the same time that were refused | answers of /readyz?verbose with a member down |"
    echo "|---|---|---|---|---|---|"
    for engine in lmdb cluster; do
        start_map "$engine"
        start_system "$map"
        fill "$map" 0 2000 60000
        local one begin failed=0 down=0 instance
        one=$(seconds get x-ndjson "$facade/")
        begin=$EPOCHREALTIME
        readers=()
        for ((reader = 0; reader < 64; reader++)); do
            get x-ndjson "$facade/?before=01a00000-0000-0000-0000-000000000000" | tail -n 1 >"$folder/tail-$reader" &
            readers+=($!)
        done
        refused=0
        posts=0
        while kill -0 "${readers[-1]}" 2>/dev/null; do
            posts=$((posts + 1))
            curl --silent --fail --output /dev/null --data msg=meanwhile "http://$facade/" || refused=$((refused + 1))
            for instance in "${instances[@]}"; do
                if curl --silent "http://$(address "$instance")/readyz?verbose" | grep --quiet '"ok":false'; then
                    down=$((down + 1))
                fi
            done
        done
        for reader in "${readers[@]}"; do wait "$reader"; done
        local all
        all=$(awk "BEGIN { printf \"%.1f\", $EPOCHREALTIME - $begin }")
        for ((reader = 0; reader < 64; reader++)); do
            grep --quiet '"count":2000' "$folder/tail-$reader" || failed=$((failed + 1))
        done
        echo "| $engine | $one | $all | $failed | $refused of $posts | $down |"
        stop_all
    done
    echo
}

describe_run "bench/read.sh $rounds $count ${parts[*]}"
for part in "${parts[@]}"; do "$part"; done
