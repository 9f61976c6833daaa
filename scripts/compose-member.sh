#!/bin/sh
# A member of the map in docker-compose.yml: starts Redis as soon as the container `cluster` has made the
# passwords. The arguments are options of redis-server.
set -eu
trap 'exit 143' TERM

until [ -s /passwords/admin ] && [ -s /passwords/logging ]; do sleep 0.2; done
read -r admin </passwords/admin
read -r logging </passwords/logging

# The passwords go in by standard input: a command line can be seen from outside. The rights are those of
# docs/redis.md.
exec redis-server /redis.conf "$@" - <<CONFIGURATION
requirepass $admin
masterauth $admin
user logging on >$logging ~entries:* ~message:* ~fence:* ~id:* +get +set +asking +eval +evalsha +zadd +zrange +zrevrange +zrangebylex +zrevrangebylex +zcard +readonly +incr +time +wait +info +ping +cluster|nodes
CONFIGURATION
