#!/usr/bin/env bash
# Builds and runs the whole system on the embedded map, until Ctrl-C.
set -euo pipefail
cd "$(dirname "$0")/.."

folder=${1:-data/map}

if [[ $folder == --help || $folder == -h ]]; then
    cat <<'HELP'
usage: scripts/run.sh [FOLDER]

Builds the services in release mode and runs messages (8081), three logging instances (8082, 8083,
8084) and the facade (8086) on loopback, over an LMDB map in FOLDER (data/map unless given). Each
line of output begins with the service's name. Ctrl-C stops all of them; requests in flight finish.

Then, from another terminal:
  scripts/post.sh              ten messages
  scripts/get.sh               all messages
  curl -d msg=hello localhost:8086
HELP
    exit 0
fi

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

cargo build --release --locked

# With job control each service is a process group of its own: Ctrl-C reaches this script only,
# which passes it on once.
set -m
pids=()

start() {
    local service=$1
    shift
    "target/release/$1" --listen "127.0.0.1:${ports[$service]}" "${@:2}" \
        > >(trap '' INT TERM; exec sed -u "s/^/$service | /") 2>&1 &
    pids+=($!)
}

stop_all() {
    trap '' INT TERM
    kill -TERM "${pids[@]}" 2>/dev/null || true
    wait "${pids[@]}" 2>/dev/null || true
}

trap 'stop_all; exit 0' INT TERM

start messages messages
for n in 1 2 3; do
    start "logging-$n" logging --map "lmdb:$folder"
done
start facade facade

wait -n || true
echo "error: a service has ended, stopping the others" >&2
stop_all
exit 1
