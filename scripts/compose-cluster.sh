#!/bin/sh
# The container `cluster` of docker-compose.yml: makes the passwords of the map in its volume, unless they
# exist, and then makes the members (ADDRESS:PORT…) one cluster.
set -eu

# make_password FILE MODE: with 122 bits from the kernel's random numbers.
make_password() {
    if [ -s "$1" ]; then return; fi
    read -r password </proc/sys/kernel/random/uuid
    (umask "$2" && echo "$password" >"$1")
}

# Members run as this user and can read both; logging instances run as another.
make_password /data/admin 077
make_password /data/logging 022

read -r REDISCLI_AUTH </data/admin
export REDISCLI_AUTH
exec sh /make-cluster.sh "$@"
