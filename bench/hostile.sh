#!/usr/bin/env bash
# What hostile clients on 127.0.0.1, as if from one address elsewhere, do to well-behaved ones on 127.0.0.2: 10,000 idle connections, 200 slow
# posters, 64 slow readers and 16 slow uploads together. Prints the 99th percentile of both, requests that
# failed, when the slow ones were cut, and the memory of each process. Needs a limit of 11,000 open files.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/system.sh

seconds=20
limit=$(ulimit -Hn)
if [[ $limit != unlimited ]] && ((limit < 11000)); then fail "the limit of open files is $limit"; fi
ulimit -Sn "$limit"
build_services
folder=$(mktemp -d)
stop_all() {
    stop TERM "${!pids[@]}"
    rm -rf "$folder"
}
at_end stop_all
export FACADE_TRUSTED_PROXY=127.0.0.1
start_system "lmdb:$folder/map"
# Larger than what the kernel buffers for the slow readers.
awk 'BEGIN { for (m = 0; m < 2000; m++) printf "\"%060000d\"\n", m }' |
    curl --silent --show-error --fail --output /dev/null --header 'content-type: application/x-ndjson' \
        --data-binary @- "http://$facade"

describe_run bench/hostile.sh
read -r requests failures quiet < <(python3 bench/hostile.py behave "$facade" "$seconds")
echo "quiet: $requests requests, $failures failed, p99 $quiet ms"
python3 bench/hostile.py attack "$facade" >"$folder/attack" &
attack=$!
sleep 5
read -r requests failures attacked < <(python3 bench/hostile.py behave "$facade" "$seconds")
echo "under attack: $requests requests, $failures failed, p99 $attacked ms, $(ratio "$attacked" "$quiet") times"
for name in facade "${instances[@]}" messages; do
    peak=$(sed -n 's/^VmHWM:[^0-9]*\([0-9]*\) kB/\1/p' "/proc/${pids[$name]}/status")
    anonymous=$(sed -n 's/^RssAnon:[^0-9]*\([0-9]*\) kB/\1/p' "/proc/${pids[$name]}/status")
    echo "$name: $((anonymous / 1024)) MiB now, at most $((peak / 1024)) MiB with the pages of files"
done
wait "$attack"
cat "$folder/attack"
