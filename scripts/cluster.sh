#!/usr/bin/env bash
# A Redis Cluster of three primaries and three replicas on this machine, with the shipped profile.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)

usage() {
    cat <<'HELP'
usage: scripts/cluster.sh start|stop|status|wipe [FOLDER [PORT]]
       scripts/cluster.sh kill|revive FOLDER NODE

Runs six Redis servers (7.0 or later) on loopback, with scripts/redis.conf and their data in FOLDER
(default: data/cluster).

  start   starts the servers that do not run, makes them a cluster unless they are one, waits
          until every primary has its replica, and prints the value for --map
  stop    stops the servers; the data stays
  status  prints the cluster nodes, as the first server that answers sees them
  wipe    stops the servers and deletes their data
  kill    ends the server of NODE (1 to 6; 1 to 3 begin as primaries) with SIGKILL; the data stays
  revive  starts the server of NODE again; returns before it has rejoined the cluster

The servers listen on PORT and the five ports after it (default: 7001 to 7006; a folder keeps the PORT
of its first start), and for each other on ports 10000 higher.
HELP
}

fail() {
    echo "error: $*" >&2
    exit 1
}

action=${1:-}
# Each server changes to its own folder, where a relative path would name another folder.
folder=$(realpath --canonicalize-missing "${2:-$root/data/cluster}")
node=
case $action in
    start | stop | status | wipe) ;;
    kill | revive)
        if (($# != 3)) || [[ $3 != [1-6] ]]; then
            usage >&2
            exit 2
        fi
        node=$3
        set -- "$1" "$2"
        ;;
    --help | -h)
        usage
        exit 0
        ;;
    *)
        usage >&2
        exit 2
        ;;
esac

nodes=(1 2 3 4 5 6)
first_port=${3:-7001}
if [[ -f $folder/port ]]; then
    first_port=$(<"$folder/port")
    [[ ${3:-$first_port} == "$first_port" ]] ||
        fail "the cluster in $folder listens on $first_port; wipe it first to change that"
fi

port() { echo $((first_port + $1 - 1)); }

# pid NODE: the id of its server, if it runs.
pid() {
    local pid
    pid=$(cat "$folder/node-$1/redis.pid" 2>/dev/null) || return 1
    [[ $(cat "/proc/$pid/comm" 2>/dev/null) == redis-server* ]] && echo "$pid"
}

is_down() { ! pid "$1" >/dev/null; }

ask() { redis-cli -p "$(port "$1")" "${@:2}" 2>/dev/null; }

# wait_for WHAT COMMAND…: tries the command ten times a second, for a minute.
wait_for() {
    local what=$1
    shift
    for ((look = 0; look < 600; look++)); do
        if "$@"; then return; fi
        sleep 0.1
    done
    fail "gave up after a minute waiting for $what; see $folder/node-*/redis.log"
}

answers() { [[ $(ask "$1" ping) == PONG ]]; }

start_server() {
    mkdir -p "$folder/node-$1"
    redis-server "$root/scripts/redis.conf" --bind 127.0.0.1 --port "$(port "$1")" \
        --cluster-port "$(($(port "$1") + 10000))" --dir "$folder/node-$1" \
        --daemonize yes --pidfile "$folder/node-$1/redis.pid" --logfile redis.log \
        >/dev/null
}

start() {
    command -v redis-server redis-cli >/dev/null ||
        fail "redis-server and redis-cli are needed; on Debian: apt install redis-server"
    local node addresses=()
    for node in "${nodes[@]}"; do
        addresses+=("127.0.0.1:$(port "$node")")
        if is_down "$node" && (exec 3<>"/dev/tcp/127.0.0.1/$(port "$node")") 2>/dev/null; then
            fail "port $(port "$node") is taken; stop the process that listens there, or give another PORT"
        fi
    done
    mkdir -p "$folder"
    echo "$first_port" >"$folder/port"
    for node in "${nodes[@]}"; do
        if is_down "$node"; then start_server "$node"; fi
    done
    "$root/scripts/make-cluster.sh" "${addresses[@]}" >&2 ||
        fail "the cluster is not whole; see $folder/node-*/redis.log"
    local list
    list=$(printf ',%s' "${addresses[@]}")
    echo "redis://${list:1}"
}

stop() {
    local node pids=()
    for node in "${nodes[@]}"; do
        if ! is_down "$node"; then pids+=("$(pid "$node")"); fi
    done
    if ((${#pids[@]})); then kill -TERM "${pids[@]}" 2>/dev/null || true; fi
    for node in "${nodes[@]}"; do
        wait_for "the end of the server on port $(port "$node")" is_down "$node"
    done
}

case $action in
    start) start ;;
    stop) stop ;;
    status)
        for node in "${nodes[@]}"; do
            if answers "$node"; then
                ask "$node" cluster nodes
                exit 0
            fi
        done
        fail "no server of $folder answers"
        ;;
    wipe)
        stop
        for node in "${nodes[@]}"; do rm -rf "$folder/node-$node"; done
        rm -f "$folder/port"
        rmdir "$folder" 2>/dev/null || true
        ;;
    kill)
        if server=$(pid "$node"); then kill -KILL "$server"; fi
        wait_for "the end of the server on port $(port "$node")" is_down "$node"
        ;;
    revive) if is_down "$node"; then start_server "$node"; fi ;;
esac
