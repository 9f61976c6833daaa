#!/usr/bin/env bash
# How long after a POST's answer followers get the message, and what followers cost.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/system.sh
source bench/maps.sh

engine=${1:-lmdb}
seconds=${2:-20}

if [[ $engine == --help || $engine == -h ]]; then
    cat <<'HELP'
usage: bench/follow.sh [lmdb|cluster] [SECONDS]

Prints the CPU of the facade and of a logging instance with no follower, and with 100 that wait; the
time of a POST and the delay from its answer to the delivery, with nobody and with 100 followers, at 100
and 500 messages a second; and the same, and the facade's memory, with 1,000 at 100 a second. Each takes
SECONDS (20). The map is an LMDB folder, or a Redis Cluster of six; load and system share the machine.
HELP
    exit 0
fi

cargo build --release --locked --workspace --examples --bins

folder=$(mktemp -d)
stop_all() {
    stop TERM "${!pids[@]}"
    if [[ -d $folder/cluster ]]; then scripts/cluster.sh wipe "$folder/cluster"; fi
    rm -rf "$folder"
}
at_end stop_all

# Followers are connections too.
export FACADE_MAX_CONNECTIONS=2048
start_map "$engine"
start_system "$map"
facade_pid=${pids[facade]}
logging_pid=${pids[logging-1]}
followers=$binaries/examples/followers

# In hundredths of a second.
cpu() { awk '{ print $14 + $15 }' "/proc/$1/stat"; }
anonymous() { awk '/^RssAnon/ { printf "%.0f", $2 / 1024 }' "/proc/$1/status"; }

# idle NAME: CPU over SECONDS, in percent of a core.
idle() {
    local facade_before logging_before
    facade_before=$(cpu "$facade_pid")
    logging_before=$(cpu "$logging_pid")
    sleep "$seconds"
    awk "BEGIN { printf \"| %s | %.2f | %.2f |\n\", \"$1\",
        ($(cpu "$facade_pid") - $facade_before) / $seconds,
        ($(cpu "$logging_pid") - $logging_before) / $seconds }"
}

describe_run "bench/follow.sh $engine $seconds"
echo "| idle | facade, % of a core | a logging instance, % of a core |"
echo "|---|---|---|"
idle "nobody follows"
waiting=()
for _ in {1..100}; do
    curl --silent --no-buffer --header 'accept: text/event-stream' "http://$facade/?tail=0" \
        --output /dev/null &
    waiting+=($!)
done
sleep 2
idle "100 followers"
kill "${waiting[@]}"
wait "${waiting[@]}" 2>/dev/null || true

echo
echo "| followers | messages/s | POST p50, ms | p99, ms | longest, ms | delay p50, ms | p99, ms | longest, ms |"
echo "|---|---|---|---|---|---|---|---|"
before=$(anonymous "$facade_pid")
"$followers" "http://$facade" 0 100 "$seconds"
"$followers" "http://$facade" 100 100 "$seconds"
"$followers" "http://$facade" 100 500 "$seconds"
"$followers" "http://$facade" 1000 100 "$seconds"
echo
echo "RssAnon of the facade: $before MiB before, $(anonymous "$facade_pid") MiB after"
