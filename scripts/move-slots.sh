#!/bin/sh
# Moves slots of a Redis Cluster so that no acknowledged entry can be lost, whatever fails meanwhile.
set -eu

usage() {
    cat <<'HELP'
usage: scripts/move-slots.sh FROM TO COUNT

Moves COUNT slots from the primary FROM to the primary TO (each ADDRESS:PORT) while the map is in use,
those that hold entries too. Slots whose move was interrupted go first. COUNT may be 0: only those.

redis-cli --cluster reshard can lose entries: Redis deletes a key at FROM as soon as TO has it, before
TO's replica does. This goes slot by slot instead, and goes on when TO's replicas have the slot. All
replicas of both must serve; until the end they are kept from taking over (cluster-replica-no-failover), so that what only
TO has cannot be replaced by a replica without it. If FROM or TO ends meanwhile, start it again where it
was and run this again.

Needs redis-cli; a password is taken from REDISCLI_AUTH.

Exit code: 0 when all were moved, 1 when something failed; then the replicas stay as they are until
this is run again and ends well.
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

# ask NODE COMMAND…: fails when the node does, or answers with an error.
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

# What NODE says of its own slots, one range or moving slot a line.
slots_of() { ask "$1" cluster nodes | grep myself | tr ' ' '\n' | sed 1,8d; }

# The slots that FROM says are on their way to TO, and those that TO says come from FROM.
leaving_slots() { slots_of "$from" | sed -n "s/^\[\([0-9]*\)->-$to_id\]$/\1/p"; }
coming_slots() { slots_of "$to" | sed -n "s/^\[\([0-9]*\)-<-$from_id\]$/\1/p"; }

# The slots of FROM that are not moving, one a line.
own_slots() {
    slots_of "$from" | grep -v '\[' |
        awk -F- '{ last = NF > 1 ? $2 : $1; for (slot = $1; slot <= last; slot++) print slot }'
}

# Waits until TO's replicas have what is in the slot. WAIT counts what its own connection wrote, so
# that writes something into the slot first.
wait_for_replicas() {
    answer=$(printf 'ASKING\nINCR "%s"\nWAIT %s %s\n' "$1" "$backups" $WAIT_MILLIS |
        redis-cli -h "${to%:*}" -p "${to##*:}" 2>&1 | tr '\n' ' ')
    case $answer in
        "OK "[0-9]*" $backups ") ;;
        *) fail "not all $backups replicas of $to have slot $slot: $answer" ;;
    esac
}

move_slot() {
    slot=$1
    # A copy that is at TO already is of a MIGRATE that failed, and FROM's is as new or newer: that is
    # so if FROM knows that the slot is moving. Otherwise FROM may have begun an empty one.
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
        # The partition's fence, in the slot that its entries are in.
        tag=${moved#*\{}
        wait_for_replicas "fence:{${tag%%\}*}}"
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

tell_of_replicas() {
    if [ $is_done = no ]; then
        echo "the replicas of both stay kept from taking over until this is run again and ends well" >&2
    fi
}
is_done=no
trap tell_of_replicas EXIT
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
