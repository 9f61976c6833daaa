#!/bin/sh
# Moves slots of a Redis Cluster such that no failure can lose an acknowledged entry.
set -eu

usage() {
    cat <<'HELP'
usage: scripts/move-slots.sh FROM TO COUNT

Moves COUNT slots with their entries from the primary FROM to the primary TO (each ADDRESS:PORT) while the
map is in use. Slots whose move was interrupted go first; with COUNT 0 only they are moved.

redis-cli --cluster reshard can lose entries: Redis deletes a key at FROM as soon as TO has it, before the
replica of TO has it. This script moves one slot at a time and waits until the replicas of TO have it. All
replicas of both primaries must serve. During the move their failover is disabled
(cluster-replica-no-failover), so that no replica can replace TO without the moved entries. If FROM or TO
dies during the move, restart it at its address and repeat the command.

Needs redis-cli, which takes a password from REDISCLI_AUTH.

Exit code: 0 when all slots were moved, 1 otherwise; the failover of the replicas then stays disabled
until the command is repeated and succeeds.
HELP
}

if [ "${1:-}" = --help ] || [ "${1:-}" = -h ]; then
    usage
    exit 0
fi
if [ $# -ne 3 ]; then
    usage >&2
    exit 2
fi
from=$1
to=$2
count=$3

# A key of a million entries takes about a second.
MIGRATE_MILLIS=60000
WAIT_MILLIS=10000

fail() {
    echo "error: $*" >&2
    exit 1
}

# ask NODE COMMAND…: ends the script when the node does not answer or answers with an error.
ask() {
    asked=$1
    shift
    answer=$(redis-cli -e -h "${asked%:*}" -p "${asked##*:}" "$@" 2>&1) ||
        fail "$asked: $*: $answer"
    printf '%s\n' "$answer"
}

id_of() { ask "$1" cluster myid; }

# The addresses of a primary's replicas.
replicas_of() {
    ask "$1" cluster nodes | awk -v id="$2" '
        $4 == id && $3 ~ /slave/ { sub(/@.*/, "", $2); print $2 }'
}

# The slots of NODE as it reports them, one range or moving slot a line.
slots_of() { ask "$1" cluster nodes | grep myself | tr ' ' '\n' | sed 1,8d; }

# The slots that FROM reports as moving to TO, and those that TO reports as moving from FROM.
leaving_slots() { slots_of "$from" | sed -n "s/^\[\([0-9]*\)->-$to_id\]$/\1/p"; }
coming_slots() { slots_of "$to" | sed -n "s/^\[\([0-9]*\)-<-$from_id\]$/\1/p"; }

# The slots of FROM that are not moving, one a line.
own_slots() {
    slots_of "$from" | grep -v '\[' |
        awk -F- '{ last = NF > 1 ? $2 : $1; for (slot = $1; slot <= last; slot++) print slot }'
}

# Waits until the replicas of TO have the slot's keys. WAIT covers only the writes of its own connection,
# which therefore first writes a key into the slot.
wait_for_replicas() {
    answer=$(printf 'ASKING\nINCR "%s"\nWAIT %s %s\n' "$1" "$backups" $WAIT_MILLIS |
        redis-cli -h "${to%:*}" -p "${to##*:}" 2>&1 | tr '\n' ' ')
    case $answer in
        "OK "[0-9]*" $backups ") ;;
        *) fail "not all $backups replicas of $to have slot $slot: $answer" ;;
    esac
}

# What a server is given while it writes a new append-only file, as after a full copy, is in its memory only.
wait_for_files() {
    for node in $to $to_replicas; do
        looks=0
        until [ "$(ask "$node" info persistence | tr -d '\r' | grep -c -x \
            -e aof_enabled:1 -e aof_rewrite_in_progress:0 -e aof_rewrite_scheduled:0)" = 3 ]; do
            looks=$((looks + 1))
            [ $looks -lt 1500 ] || fail "$node has no complete append-only file"
            sleep 0.2
        done
    done
}

move_slot() {
    slot=$1
    # If FROM reports that the slot is moving, a copy at TO is the result of a MIGRATE that failed, and the
    # copy at FROM is as new or newer. Otherwise FROM may have begun an empty copy.
    at_from=$(ask "$from" cluster getkeysinslot "$slot" 1)
    at_to=$(ask "$to" cluster getkeysinslot "$slot" 1)
    if [ -n "$at_from" ] && [ -n "$at_to" ] && ! leaving_slots | grep -qx "$slot"; then
        fail "both servers have keys of slot $slot: compare them before one replaces the other"
    fi
    ask "$to" cluster setslot "$slot" importing "$from_id" >/dev/null
    ask "$from" cluster setslot "$slot" migrating "$to_id" >/dev/null
    while :; do
        keys=$(ask "$from" cluster getkeysinslot "$slot" 1)
        [ -n "$keys" ] || break
        ask "$from" migrate "${to%:*}" "${to##*:}" "$keys" 0 $MIGRATE_MILLIS replace \
            ${REDISCLI_AUTH:+auth "$REDISCLI_AUTH"} >/dev/null
    done
    moved=$(ask "$to" cluster getkeysinslot "$slot" 1)
    if [ -n "$moved" ]; then
        # The fence of the partition, which is in the same slot.
        tag=${moved#*\{}
        wait_for_replicas "fence:{${tag%%\}*}}"
        wait_for_files
    fi
    ask "$to" cluster setslot "$slot" node "$to_id" >/dev/null
    ask "$from" cluster setslot "$slot" node "$to_id" >/dev/null
}

from_id=$(id_of "$from")
to_id=$(id_of "$to")
[ "$from_id" != "$to_id" ] || fail "$from and $to are the same server"
from_replicas=$(replicas_of "$from" "$from_id")
to_replicas=$(replicas_of "$to" "$to_id")
[ -n "$to_replicas" ] || fail "$to has no replica that could hold the entries: add one first"
backups=$(printf '%s\n' "$to_replicas" | wc -l)
for node in $from $to; do
    case $(ask "$node" role | head -n 1) in
        master) ;;
        *) fail "$node is not a primary" ;;
    esac
done

report_replicas() {
    if [ $is_done = no ]; then
        echo "the failover of the replicas of both stays disabled; repeat the command until it succeeds" >&2
    fi
}
is_done=no
trap report_replicas EXIT
trap 'exit 143' TERM
trap 'exit 130' INT
for replica in $from_replicas $to_replicas; do
    ask "$replica" config set cluster-replica-no-failover yes >/dev/null
done

done_slots=0
open=$({ leaving_slots; coming_slots; } | sort -nu)
slots=$(own_slots | grep -vxF "${open:-none}" | head -n "$count")
for slot in $open $slots; do
    move_slot "$slot"
    done_slots=$((done_slots + 1))
done

for replica in $from_replicas $to_replicas; do
    ask "$replica" config set cluster-replica-no-failover no >/dev/null
done
is_done=yes
echo "$done_slots slots moved from $from to $to"
