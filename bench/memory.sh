#!/usr/bin/env bash
# What slow readers and followers of large messages cost each process.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/system.sh
source bench/maps.sh

if [[ ${1:-} == --help || ${1:-} == -h ]]; then
    cat <<'HELP'
usage: bench/memory.sh [lmdb|redis|cluster] [BYTES…]

Stores 128 MiB of messages of BYTES bytes (65536 and 1048576) in each of two kinds, plain text and control
characters, which JSON writes six times as long. Then has 64 slow readers, 64 slow followers, both together, and
64 searches, each for 15 seconds. Prints each process's largest RssAnon: the facade, then the three logging
instances. The map is an LMDB folder, one Redis server, or a Redis Cluster.
HELP
    exit 0
fi
engine=${1:-lmdb}
sizes=("${@:2}")
((${#sizes[@]})) || sizes=(65536 1048576)

build_services
folder=$(mktemp -d)
stop_all() {
    stop TERM "${!pids[@]}"
    if [[ -d $folder/cluster ]]; then scripts/cluster.sh wipe "$folder/cluster"; fi
}
at_end 'stop_all; rm -rf "$folder"'

export FACADE_MAX_MESSAGE=1048576
describe_run "bench/memory.sh $engine ${sizes[*]}"
for bytes in "${sizes[@]}"; do
    for letter in x '\x01'; do
        start_map "${engine/redis/one Redis server}"
        start_system "$map"
        python3 bench/memory.py "$facade" "$bytes" "$letter" "${pids[facade]}" \
            "${pids[logging-1]}" "${pids[logging-2]}" "${pids[logging-3]}"
        stop_all
    done
done
