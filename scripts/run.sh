#!/usr/bin/env bash
# Builds and runs the whole system until Ctrl-C, on the embedded map or on a Redis Cluster.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)

usage() {
    cat <<'HELP'
usage: scripts/run.sh [--cluster] [FOLDER]

Builds the services in release mode and runs messages (8081), three logging instances (8082, 8083,
8084) and the facade (8086) on loopback, on an LMDB map in FOLDER (default: data/map). Each line of
output begins with the name of its service. Ctrl-C stops all services; requests in flight finish.

Kill any service: the others keep running, and the command that restarts it is printed.

  --cluster   the map is a Redis Cluster of six servers (7001 to 7006) with their data in FOLDER
              (default: data/cluster), see scripts/cluster.sh; Ctrl-C stops the servers too

SKIP_BUILD=1 uses the release build that is there.

Then, from another terminal:
  scripts/post.sh              ten messages
  scripts/get.sh               all messages
  curl -d msg=hello localhost:8086
HELP
}

engine=lmdb
case ${1:-} in
    --cluster)
        engine=cluster
        shift
        ;;
    --help | -h)
        usage
        exit 0
        ;;
    -*)
        usage >&2
        exit 2
        ;;
esac
case $engine in
    lmdb) folder=${1:-$root/data/map} ;;
    cluster) folder=${1:-$root/data/cluster} ;;
esac
folder=$(realpath --canonicalize-missing "$folder")
cd "$root"
source scripts/system.sh

ports=([messages]=8081 [logging-1]=8082 [logging-2]=8083 [logging-3]=8084 [facade]=8086)
for service in messages "${instances[@]}" facade; do
    port=${ports[$service]}
    if listens "$port"; then
        fail "port $port, which $service needs, is taken; stop the process that listens there"
    fi
done

build_services

# With job control each service is a process group of its own: Ctrl-C reaches only this script, which
# passes it on once.
set -m
declare -A commands

# run SERVICE BINARY [ARGUMENT…]: in the background, with the service's name before each line.
run() {
    local service=$1
    local command=("$binaries/$2" --listen "$(address "$service")" "${@:3}")
    "${command[@]}" > >(trap '' HUP INT TERM; exec sed -u "s/^/$service | /") 2>&1 &
    pids[$service]=$!
    commands[$service]=${command[*]@Q}
}

# Names each service that has ended since the last call, and the command that restarts it.
report_ended() {
    local service
    for service in "${!pids[@]}"; do
        if kill -0 "${pids[$service]}" 2>/dev/null; then continue; fi
        unset "pids[$service]"
        printf '\nrun.sh | %s has ended; the others keep running. To restart it, in another terminal:\n' \
            "$service"
        printf 'run.sh |   cd %s && %s\n\n' "${root@Q}" "${commands[$service]}"
    done
}

stop_all() {
    trap '' HUP INT TERM
    stop TERM "${!pids[@]}"
    if [[ $engine == cluster ]]; then scripts/cluster.sh stop "$folder"; fi
}

trap 'stop_all; exit 0' HUP INT TERM

case $engine in
    lmdb) map=lmdb:$folder ;;
    cluster)
        echo "starting a Redis Cluster in $folder"
        map=$(scripts/cluster.sh start "$folder")
        ;;
esac

run messages messages
for service in "${instances[@]}"; do run "$service" logging --map "$map"; done
run facade facade

while ((${#pids[@]})); do
    wait -n || true
    report_ended
done
stop_all
fail "all services have ended"
