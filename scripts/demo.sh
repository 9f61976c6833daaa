#!/usr/bin/env bash
# Shows that messages survive the death of one, two and all logging instances, also in the middle of a GET;
# on a Redis Cluster, as processes or as containers, the death of an instance and a primary together.
# With --page it shows the same on the console, for as long as somebody looks.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
    cat <<'HELP'
usage: scripts/demo.sh [--cluster | --compose]
       scripts/demo.sh --page [--cluster] [--auto]

Builds the services and starts messages, three logging instances and the facade on free ports of
loopback, with an LMDB map in a temporary folder. Posts ten messages, shows which logging instance
stored which, then reads them with three, two and one instance alive (the others are killed with
kill -9), with none, and with one that has returned. Then uploads 200,000 messages and kills two of
three instances in the middle of a GET. Stops everything it started.

  --cluster   the map is a Redis Cluster of three primaries and three replicas in the same folder.
              Kills a logging instance and a Redis primary together, reads everything, restarts
              them, kills the next pair, and reads everything again.
  --compose   the same on the containers of docker-compose.yml, with a separate project name, port
              and network. Needs docker-compose 1.29 or Docker with Compose v2; builds the image
              if it is missing. Removes its containers and volumes at the end.
  --page      something to look at: posts a few messages a second and prints the address of the
              console. Keys kill, revive, pause and resume services, and are explained at the start;
              q or Ctrl-C ends it.
  --auto      with --page: no keys; services are killed, revived, paused and resumed in turn. So it is
              also without a terminal.

SKIP_BUILD=1 uses the release build that is there.

Exit code: 0 only if every message was read each time; with --page, 0 after q. 130 after Ctrl-C.
HELP
}

engine=lmdb
story=log
keys=
for option in "$@"; do
    case $option in
        --cluster | --compose) engine=${option#--} ;;
        --page) story=page ;;
        --auto) keys=auto ;;
        --help | -h)
            usage
            exit 0
            ;;
        *)
            usage >&2
            exit 2
            ;;
    esac
done
case $story,$engine,$keys in
    log,*, | page,lmdb,* | page,cluster,*) ;;
    *)
        usage >&2
        exit 2
        ;;
esac

source scripts/system.sh
say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
fail() {
    printf '\nFAILED: %s\n' "$*" >&2
    exit 1
}

if [[ $engine == compose ]]; then
    docker info >/dev/null 2>&1 || fail "no Docker engine answers; start one, then try again"
    compose=(docker-compose)
    if docker compose version >/dev/null 2>&1; then compose=(docker compose); fi
    # Only the shipped file with its defaults: .env and an override belong to the user's project.
    compose+=(--file docker-compose.yml --env-file .env.example)
    # A project name of its own, so that no other project is touched.
    export COMPOSE_PROJECT_NAME=message-log-demo-$$ LOGGING_INSTANCES=3 SUBNET=${SUBNET:-10.86.87}
elif [[ -z ${SKIP_BUILD:-} ]]; then
    say "Building (the first time takes a few minutes)"
    build_services
fi

folder=$(mktemp -d)
terminal=
stop_all() {
    if [[ -n $terminal ]]; then stty "$terminal" || true; fi
    stop KILL "${!pids[@]}"
    case $engine in
        cluster) scripts/cluster.sh wipe "$folder/cluster" || true ;;
        # In a session of its own, where Ctrl-C does not reach it.
        compose)
            setsid --wait "${compose[@]}" down --volumes --timeout 1 >"$folder/down.log" 2>&1 ||
                cat "$folder/down.log"
            ;;
    esac
    rm -rf "$folder"
}
at_end stop_all

start_processes() {
    map=lmdb:$folder/map
    if [[ $engine == cluster ]]; then
        say "Making a Redis Cluster of three primaries and three replicas"
        # Each member also listens on a port 10,000 higher.
        map=$(scripts/cluster.sh start "$folder/cluster" $((10000 + RANDOM % 10000)))
        echo "$map"
    fi

    say "Starting messages, three logging instances and the facade"
    start_system "$map"
    for name in messages "${instances[@]}" facade; do echo "$name: $(address "$name")"; done
}

restart_instance() { start_service "$1" logging --map "$map"; }

# container SERVICE NUMBER: its name, which differs between the two versions of compose.
container() {
    docker ps --all --format '{{.Names}}' \
        --filter "label=com.docker.compose.project=$COMPOSE_PROJECT_NAME" \
        --filter "label=com.docker.compose.service=$1" \
        --filter "label=com.docker.compose.container-number=$2"
}

start_containers() {
    ports[facade]=$(free_port)
    export PORT=${ports[facade]}
    say "Starting the containers (the first time builds their image, which takes minutes)"
    "${compose[@]}" up --detach
    "${compose[@]}" ps
    wait_until_ready facade || fail "the facade does not get ready"
}

case $engine in
    compose) start_containers ;;
    lmdb | cluster) start_processes ;;
esac
FACADE_URL=http://$(address facade)
export FACADE_URL

if [[ $story == page ]]; then
    source scripts/demo-page.sh
    show_page
fi

# log_of INSTANCE: its log.
log_of() {
    case $engine in
        compose) docker logs "$(container logging "${1#logging-}")" ;;
        lmdb | cluster) cat "$folder/$1.log" ;;
    esac
}

# post MESSAGE…: posts each and fails unless all are stored.
posted=()
post() {
    scripts/post.sh "$@" || fail "a POST was not answered with 200"
    posted+=("$@")
}

say "Posting ten messages (status, logging instance, answer)"
post msg{1..10}

say "Which logging instance stored which message, by their logs"
stored=0
for name in "${instances[@]}"; do
    messages=$(log_of "$name" | grep -o 'msg="msg[0-9]*"' || true)
    [[ -z $messages ]] || stored=$((stored + $(wc -l <<<"$messages")))
    echo "$name: $(tr '\n' ' ' <<<"$messages")"
done
((stored == 10)) || fail "the logs name $stored messages instead of ten"

# expect_all: fails unless a GET returns all posted messages, in order.
expect_all() {
    local body expected actual
    body=$(scripts/get.sh) || fail "the GET was not answered with 200: $body"
    echo "$body"
    expected=$(printf '"msg":"%s"\n' "${posted[@]}")
    actual=$(grep -o '"msg":"[^"]*"' <<<"$body" || true)
    [[ $actual == "$expected" ]] || fail "not all messages are there, in order"
    [[ $body == *'"messages_service":"Messages Service not Implemented","count":'${#posted[@]}'}'* ]] ||
        fail "the body does not end with the messages service's reply and the count"
}

end_instance() {
    say "kill -9 $1"
    stop KILL "$1"
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
    if body=$(scripts/get.sh); then fail "a GET without any instance succeeded: $body"; fi
    echo "$body"
    [[ $body == *'"status":503'* && $body == *503 ]] || fail "the answer is not a 503"

    say "logging-2 returns"
    restart_instance logging-2
    expect_all

    say "All return, and 200,000 more messages are uploaded"
    for name in logging-1 logging-3; do restart_instance "$name"; done
    for ((n = 1; n <= 200000; n++)); do printf '"upload %d"\n' "$n"; done >"$folder/upload.ndjson"
    summary=$(curl --silent --show-error --header 'content-type: application/x-ndjson' \
        --data-binary "@$folder/upload.ndjson" "$FACADE_URL/")
    echo "$summary"
    [[ $summary == '{"stored":200000,"failed":0,"errors":[]}' ]] || fail "not all messages were stored"

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
    wait "$reader" || fail "the GET was aborted"
    echo "the last lines: $tail"
    [[ $tail == *"upload 200000"*"200010 messages"*"Messages Service not Implemented" ]] ||
        fail "the body is not complete"
}

# kill_pair INSTANCE NODE: nodes 1, 2 and 3 began as primaries.
kill_pair() {
    case $engine in
        compose) docker kill "$(container logging "${1#logging-}")" "$(container "redis-$2" 1)" ;;
        cluster)
            scripts/cluster.sh kill "$folder/cluster" "$2"
            stop KILL "$1"
            ;;
    esac
}

start_pair_again() {
    case $engine in
        compose) "${compose[@]}" up --detach ;;
        cluster)
            scripts/cluster.sh start "$folder/cluster"
            restart_instance "$1"
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
