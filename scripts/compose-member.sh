#!/bin/sh
# A member of the map in docker-compose.yml: starts Redis as soon as the container `cluster` has made the
# passwords. The arguments are options of redis-server.
set -eu
trap 'exit 143' TERM

until [ -s /passwords/admin ] && [ -s /passwords/logging ]; do sleep 0.2; done
read -r admin </passwords/admin
read -r logging </passwords/logging

# Redis 7.0 does not start with a right to a command that it lacks.
case $(redis-server --version) in
*v=7.0.*) wait_aof= ;;
*) wait_aof=+waitaof ;;
esac

# The passwords go in by standard input: a command line can be seen from outside. The rights are those of
# docs/redis.md.
exec redis-server /redis.conf "$@" - <<CONFIGURATION
requirepass $admin
masterauth $admin
user logging on >$logging ~entries:* ~message:* ~fence:* ~id:* +get +getrange +set +asking +eval +evalsha +zadd +zrange +zrevrange +zrangebylex +zrevrangebylex +zcard +readonly +incr +time +wait $wait_aof +info +ping +cluster|nodes
CONFIGURATION
