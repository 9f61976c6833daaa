#!/usr/bin/env bash
# The story in one command: messages survive the death of one, two and all logging instances, also
# in the middle of a GET; on a Redis Cluster, as processes or as containers, the death of instances and
# primaries together.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
    cat <<'HELP'
usage: scripts/demo.sh [--cluster | --compose]

Builds the services and starts messages, three logging instances and the facade on free ports of
loopback, with an embedded map in a temporary folder. Posts ten messages, shows which logging
instance took which, then reads them with three, two and one instance alive (the others are ended
with kill -9), with none, and with one that has returned. Then uploads 200,000 messages and ends two
of three instances in the middle of a GET. Stops everything it started.

  --cluster   the map is a Redis Cluster of three primaries and three replicas instead, made in the
              same folder. Ends a logging instance and a Redis primary together, reads everything,
              starts them again, ends the next pair, and reads everything again.
  --compose   the same on containers, as docker-compose.yml says, with a project name, port and
              network of its own. Needs docker-compose 1.29 or Docker with Compose v2; builds the
              image if it is not there. Removes its containers and volumes at the end.

SKIP_BUILD=1 takes the binaries in target/release as they are.

Exit code: 0 only if everything was as it should be.
HELP
}

engine=lmdb
case ${1:-} in
    '') ;;
    --cluster) engine=cluster ;;
    --compose) engine=compose ;;
    --help | -h)
        usage
        exit 0
        ;;
    *)
        usage >&2
        exit 2
        ;;
esac

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
fail() {
    printf '\nFAILED: %s\n' "$*" >&2
    exit 1
}

# Only the shipped file, with its defaults: whatever .env and an override say is for the user's project.
compose() {
    local version=(docker-compose)
    if docker compose version >/dev/null 2>&1; then version=(docker compose); fi
    "${version[@]}" --file docker-compose.yml --env-file .env.example "$@"
}

if [[ $engine == compose ]]; then
    docker info >/dev/null 2>&1 || fail "no Docker engine answers; start one, then try again"
    # Nothing below may touch a project that is not ours.
    export COMPOSE_PROJECT_NAME=message-log-demo-$$ LOGGING_INSTANCES=3 SUBNET=${SUBNET:-10.86.87}
elif [[ -z ${SKIP_BUILD:-} ]]; then
    say "Building (the first time takes a few minutes)"
    cargo build --release --locked
fi

folder=$(mktemp -d)
declare -A pid port
stop_all() {
    for name in "${!pid[@]}"; do kill -KILL "${pid[$name]}" 2>/dev/null || true; done
    wait 2>/dev/null || true
    case $engine in
        cluster) scripts/cluster.sh wipe "$folder/cluster" || true ;;
        compose) compose down --volumes --timeout 1 >"$folder/down.log" 2>&1 || cat "$folder/down.log" ;;
    esac
    rm -rf "$folder"
}
trap stop_all EXIT
trap 'exit 130' INT TERM

free_port() {
    local candidate
    while true; do
        candidate=$((10000 + RANDOM % 20000))
        [[ " ${port[*]} " == *" $candidate "* ]] && continue
        if ! (exec 3<>"/dev/tcp/127.0.0.1/$candidate") 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
}

# start NAME BINARY [ARGUMENT…]: on the service's port, with its log in a file.
start() {
    local name=$1 binary=$2
    shift 2
    "target/release/$binary" --listen "127.0.0.1:${port[$name]}" "$@" \
        >>"$folder/$name.log" 2>&1 &
    pid[$name]=$!
    disown
    curl --silent --output /dev/null --retry 100 --retry-delay 1 --retry-max-time 30 \
        --retry-connrefused "http://127.0.0.1:${port[$name]}/livez" ||
        fail "$name does not serve; its log: $(cat "$folder/$name.log")"
}

wait_until_ready() {
    curl --silent --output /dev/null --fail --retry 30 --retry-delay 1 --retry-all-errors \
        "http://127.0.0.1:${port[$1]}/readyz" || fail "$1 does not get ready"
}

start_logging() {
    start "$1" logging --map "$map"
    wait_until_ready "$1"
}

instances=(logging-1 logging-2 logging-3)

start_processes() {
    for name in messages "${instances[@]}" facade; do port[$name]=$(free_port); done

    map=lmdb:$folder/map
    if [[ $engine == cluster ]]; then
        say "Making a Redis Cluster of three primaries and three replicas"
        # The members also listen 10,000 ports higher.
        map=$(scripts/cluster.sh start "$folder/cluster" $((10000 + RANDOM % 10000)))
        echo "$map"
    fi

    say "Starting messages, three logging instances and the facade"
    start messages messages
    for name in "${instances[@]}"; do start_logging "$name"; done
    urls=$(printf ',http://127.0.0.1:%s' "${port[logging-1]}" "${port[logging-2]}" "${port[logging-3]}")
    start facade facade --messages "http://127.0.0.1:${port[messages]}" --logging "${urls:1}"
    for name in messages "${instances[@]}" facade; do echo "$name: 127.0.0.1:${port[$name]}"; done
}

# container SERVICE NUMBER: its name, which is where the two versions of compose differ.
container() {
    docker ps --all --format '{{.Names}}' \
        --filter "label=com.docker.compose.project=$COMPOSE_PROJECT_NAME" \
        --filter "label=com.docker.compose.service=$1" \
        --filter "label=com.docker.compose.container-number=$2"
}

start_containers() {
    port[facade]=$(free_port)
    export PORT=${port[facade]}
    say "Starting the containers (the first time builds their image, which takes minutes)"
    compose up --detach
    compose ps
    wait_until_ready facade
}

case $engine in
    compose) start_containers ;;
    lmdb | cluster) start_processes ;;
esac
export FACADE_URL=http://127.0.0.1:${port[facade]}

# log_of INSTANCE: what it printed.
log_of() {
    case $engine in
        compose) docker logs "$(container logging "${1#logging-}")" ;;
        lmdb | cluster) cat "$folder/$1.log" ;;
    esac
}

# post MESSAGE…: each must be stored.
posted=()
post() {
    scripts/post.sh "$@" || fail "a POST was not answered with 200"
    posted+=("$@")
}

say "Posting ten messages (status, logging instance, answer)"
post msg{1..10}

say "Which logging instance took which message, by their own logs"
taken=0
for name in "${instances[@]}"; do
    messages=$(log_of "$name" | grep -o 'msg="msg[0-9]*"' || true)
    [[ -z $messages ]] || taken=$((taken + $(wc -l <<<"$messages")))
    echo "$name: $(tr '\n' ' ' <<<"$messages")"
done
((taken == 10)) || fail "the logs name $taken messages, not ten"

# expect_all: one GET gives all that was posted, in order.
expect_all() {
    local body expected actual
    body=$(scripts/get.sh) || fail "the GET was not answered with 200: $body"
    echo "$body"
    expected=$(printf '"msg":"%s"\n' "${posted[@]}")
    actual=$(grep -o '"msg":"[^"]*"' <<<"$body" || true)
    [[ $actual == "$expected" ]] || fail "not all messages are there, in order"
    [[ $body == *'"messages_service":"Messages Service not Implemented","count":'${#posted[@]}'}'* ]] ||
        fail "the body does not end as it should"
}

end_instance() {
    say "kill -9 $1"
    kill -KILL "${pid[$1]}"
    while kill -0 "${pid[$1]}" 2>/dev/null; do :; done
    unset "pid[$1]"
}

story_of_instances() {
    say "GET with three logging instances alive"
    expect_all
    end_instance logging-2
    say "GET with two alive"
    expect_all
    end_instance logging-1
    say "GET with one alive"
    expect_all
    end_instance logging-3
    say "GET with none alive: a clear 503"
    if body=$(scripts/get.sh); then fail "there was nobody to read from, and yet: $body"; fi
    echo "$body"
    [[ $body == *'"status":503'* && $body == *503 ]] || fail "this is no clear 503"

    say "logging-2 returns"
    start_logging logging-2
    expect_all

    say "All return, and 200,000 more messages are uploaded"
    for name in logging-1 logging-3; do start_logging "$name"; done
    for ((n = 1; n <= 200000; n++)); do printf '"upload %d"\n' "$n"; done >"$folder/upload.ndjson"
    summary=$(curl --silent --show-error --header 'content-type: application/x-ndjson' \
        --data-binary "@$folder/upload.ndjson" "$FACADE_URL/")
    echo "$summary"
    [[ $summary == '{"stored":200000,"failed":0,"errors":[]}' ]] || fail "not all were stored"

    say "A GET of all of them loses logging-1 and logging-2 in the middle"
    mkfifo "$folder/body"
    curl --silent --show-error --no-buffer --header 'accept: text/plain' "$FACADE_URL/" \
        >"$folder/body" &
    reader=$!
    exec 4<"$folder/body"
    read -r -u 4 first_line
    echo "the first line has come: $first_line"
    end_instance logging-1
    end_instance logging-2
    tail=$(tail -n 3 <&4)
    exec 4<&-
    wait "$reader" || fail "the GET broke off"
    echo "the last lines: $tail"
    [[ $tail == *"upload 200000"*"200010 messages"*"Messages Service not Implemented" ]] ||
        fail "the body is not complete"
}

# kill_pair INSTANCE NODE: the nodes that began as primaries are 1, 2 and 3.
kill_pair() {
    case $engine in
        compose) docker kill "$(container logging "${1#logging-}")" "$(container "redis-$2" 1)" ;;
        cluster)
            kill -KILL "${pid[$1]}" "$(<"$folder/cluster/node-$2/redis.pid")"
            unset "pid[$1]"
            ;;
    esac
}

start_pair_again() {
    case $engine in
        compose) compose up --detach ;;
        cluster)
            scripts/cluster.sh start "$folder/cluster"
            start_logging "$1"
            ;;
    esac
}

end_pair() {
    local instance=$1 node=$2
    say "kill -9 $instance and the Redis primary of node $node"
    kill_pair "$instance" "$node"
    say "GET: it waits until the replica of node $node has taken over"
    local begin=$SECONDS
    expect_all
    echo "(after $((SECONDS - begin)) seconds)"
}

story_of_pairs() {
    say "GET with all alive"
    expect_all
    end_pair logging-2 1
    say "POSTs go on meanwhile, in the partitions of the other primaries"
    post meanwhile{1..3}
    say "Both return"
    start_pair_again logging-2
    expect_all
    end_pair logging-1 2
}

case $engine in
    lmdb) story_of_instances ;;
    cluster | compose) story_of_pairs ;;
esac

say "Every message was there each time."
