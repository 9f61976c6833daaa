#!/bin/sh
# Makes Redis servers one cluster, in steps that may be repeated: a step that is done changes nothing.
set -eu

usage() {
    cat <<'HELP'
usage: scripts/make-cluster.sh ADDRESS:PORT…

Makes these Redis servers (an even number, at least six, each by its IP address) one cluster: the first
half become primaries of equal shares of the slots, the second half their replicas, in the same order.
Then waits until all slots are served and every primary has its replica.

The script may be interrupted and repeated, also on servers that are already a cluster and after
failovers. A server that has lost its data becomes the replica of its partner. Start such a server only
when its partner is a primary (redis-cli role): a replica copies the server at its primary's address,
even if that is empty.

Needs redis-cli, which takes a password from REDISCLI_AUTH.

Exit code: 0 when the cluster is whole, 1 when it is not after five minutes.
HELP
}

if [ "${1:-}" = --help ] || [ "${1:-}" = -h ]; then
    usage
    exit 0
fi
if [ $# -lt 6 ] || [ $(($# % 2)) -ne 0 ]; then
    usage >&2
    exit 2
fi
trap 'exit 143' TERM
trap 'exit 130' INT

count=$#
primaries=$((count / 2))

# ask NODE COMMAND…: prints nothing when the node does not answer.
ask() {
    asked=$1
    shift
    timeout 5 redis-cli -h "${asked%:*}" -p "${asked##*:}" "$@" 2>/dev/null || true
}

now() { date +%s; }
deadline=$(($(now) + 300))

# wait_for WHAT COMMAND…: waits until the deadline, and names WHAT every ten seconds.
wait_for() {
    what=$1
    shift
    told=$(now)
    until "$@"; do
        if [ "$(now)" -ge $deadline ]; then
            echo "error: gave up waiting for $what; start it and run this again" >&2
            exit 1
        fi
        if [ $(($(now) - told)) -ge 10 ]; then
            echo "waiting for $what" >&2
            told=$(now)
        fi
        sleep 0.25
    done
}

answers() { [ "$(ask "$1" ping)" = PONG ]; }

# A node's line about itself: id, address, flags, primary, three numbers, the state of the link, its slots.
itself() { ask "$1" cluster nodes | grep myself; }

is_primary() { itself "$1" | grep -q 'myself,master'; }

has_slots() {
    # shellcheck disable=SC2046
    set -- $(itself "$1")
    [ $# -gt 8 ]
}

knows_all() {
    [ "$(ask "$1" cluster nodes | grep -vc -e handshake -e noaddr)" -ge "$count" ]
}

slots_assigned() { ask "$1" cluster info | sed -n 's/^cluster_slots_assigned:\([0-9]*\).*/\1/p'; }

agrees_with() {
    slots=$(slots_assigned "$1")
    [ -n "$slots" ] && [ "$slots" = "$(slots_assigned "$2")" ]
}

knows_all_slots() { [ "$(slots_assigned "$1")" = 16384 ]; }

replicates() {
    id=$(itself "$2" | cut -d ' ' -f 1)
    case $(ask "$1" cluster replicate "$id") in
        OK*) ;;
        *) return 1 ;;
    esac
}

is_whole() {
    ask "$1" cluster info | grep -q cluster_state:ok || return 1
    if is_primary "$1"; then
        ask "$1" info replication | grep -q state=online
    else
        ask "$1" info replication | grep -q master_link_status:up
    fi
}

for node in "$@"; do
    wait_for "an answer of $node" answers "$node"
done

# A server that already knows another one refuses an epoch and keeps its own.
epoch=0
for node in "$@"; do
    epoch=$((epoch + 1))
    ask "$node" cluster set-config-epoch $epoch >/dev/null
done
for node in "$@"; do
    ask "$1" cluster meet "${node%:*}" "${node##*:}" >/dev/null
done
for node in "$@"; do
    wait_for "$node to know the others" knows_all "$node"
    wait_for "$node to see the slots as $1 does" agrees_with "$node" "$1"
done

if ! knows_all_slots "$1"; then
    n=0
    for node in "$@"; do
        if [ $n -eq $primaries ]; then break; fi
        if ! has_slots "$node"; then
            first=$((16384 * n / primaries))
            last=$((16384 * (n + 1) / primaries - 1))
            echo "$node gets the slots $first to $last"
            ask "$node" cluster addslotsrange $first $last >/dev/null
        fi
        n=$((n + 1))
    done
fi
for node in "$@"; do
    wait_for "all slots to be known to $node" knows_all_slots "$node"
done

n=0
for node in "$@"; do
    n=$((n + 1))
    if ! is_primary "$node" || has_slots "$node"; then continue; fi
    partner=$(((n - 1 + primaries) % count + 1))
    eval "partner=\${$partner}"
    echo "$node becomes the replica of $partner"
    wait_for "$node to become the replica of $partner" replicates "$node" "$partner"
done

for node in "$@"; do
    wait_for "the cluster to be whole, seen from $node" is_whole "$node"
done
echo "the cluster is whole"
