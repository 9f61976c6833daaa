#!/usr/bin/env bash
# Builds and runs the whole system until Ctrl-C, on the embedded map or on a Redis Cluster.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)

usage() {
    cat <<'HELP'
usage: scripts/run.sh [--cluster] [FOLDER]

Builds the services in release mode and runs messages (8081), three logging instances (8082, 8083,
8084) and the facade (8086) on loopback, over an LMDB map in FOLDER (data/map unless given). Each
line of output begins with the service's name. Ctrl-C stops all of them; requests in flight finish.

Kill any of them: the others go on, and the command that starts it again is printed.

  --cluster   the map is a Redis Cluster of six servers (7001 to 7006) with their data in FOLDER
              (data/cluster unless given), see scripts/cluster.sh; Ctrl-C stops them too

SKIP_BUILD=1 takes the binaries in target/release as they are.

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

declare -A ports=(
    [messages]=8081 [logging-1]=8082 [logging-2]=8083 [logging-3]=8084 [facade]=8086
)
services=(messages logging-1 logging-2 logging-3 facade)

for service in "${services[@]}"; do
    port=${ports[$service]}
    if (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
        echo "error: port $port, which $service needs, is taken; stop what listens there" >&2
        exit 1
    fi
done

[[ -n ${SKIP_BUILD:-} ]] || cargo build --release --locked

# With job control each service is a process group of its own: Ctrl-C reaches this script only,
# which passes it on once.
set -m
declare -A pids commands

start() {
    local service=$1
    local command=("target/release/$2" --listen "127.0.0.1:${ports[$service]}" "${@:3}")
    "${command[@]}" > >(trap '' INT TERM; exec sed -u "s/^/$service | /") 2>&1 &
    pids[$service]=$!
    commands[$service]=${command[*]@Q}
}

# Says which services have ended since the last look, and how to start them again.
report_ended() {
    local service
    for service in "${!pids[@]}"; do
        if kill -0 "${pids[$service]}" 2>/dev/null; then continue; fi
        unset "pids[$service]"
        printf '\nrun.sh | %s has ended; the others go on. To start it again, in another terminal:\n' \
            "$service"
        printf 'run.sh |   cd %s && %s\n\n' "${root@Q}" "${commands[$service]}"
    done
}

stop_all() {
    trap '' INT TERM
    if ((${#pids[@]})); then
        kill -TERM "${pids[@]}" 2>/dev/null || true
        wait "${pids[@]}" 2>/dev/null || true
    fi
    if [[ $engine == cluster ]]; then scripts/cluster.sh stop "$folder"; fi
}

trap 'stop_all; exit 0' INT TERM

case $engine in
    lmdb) map=lmdb:$folder ;;
    cluster)
        echo "starting a Redis Cluster in $folder"
        map=$(scripts/cluster.sh start "$folder")
        ;;
esac

start messages messages
for n in 1 2 3; do
    start "logging-$n" logging --map "$map"
done
start facade facade

while ((${#pids[@]})); do
    wait -n || true
    report_ended
done
echo "error: all services have ended" >&2
stop_all
exit 1
