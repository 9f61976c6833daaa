# The story of demo.sh --page, told on the console while messages are posted; sourced. Each key kills, revives,
# pauses or resumes one service. Without a terminal the keys are pressed in turn, by PRESSED.

# Of each service that has a key: up, paused, killed, or returning until it answers.
declare -A state=()

# A dot lets time pass: a Redis primary is replaced about five seconds after its death.
PRESSED='2 2 a a . 1 3 . 1 3 .'
PRESSED_ON_CLUSTER='2 2 a a . 4 . 4 . . 7 . 7 . .'
PRESSED_EVERY_SECONDS=5

LOOK_EVERY_SECONDS=0.3

PLACES=(Amsterdam Bergen Cork Dresden Edinburgh Florence Ghent Helsinki)

# In UTC, as on the page.
tell() { TZ=UTC printf '%(%T)T %s\n' -1 "$*"; }

post_gently() {
    local n
    for ((n = 1; ; n++)); do
        curl --silent --output /dev/null --max-time 10 \
            --data-urlencode "msg=parcel $n has left ${PLACES[n % ${#PLACES[@]}]}" "$FACADE_URL" || true
        sleep 0.3
    done
}

end_service() {
    case $1 in
        logging-*) stop KILL "$1" ;;
        redis-*) scripts/cluster.sh kill "$folder/cluster" "${1#redis-}" ;;
    esac
}

# Returns before the service is ready, so that no key has to wait for that.
begin_service() {
    case $1 in
        logging-*) start "$1" "$binaries/logging" --listen "$(address "$1")" --map "$map" ;;
        redis-*) scripts/cluster.sh revive "$folder/cluster" "${1#redis-}" ;;
    esac
}

is_ready() {
    case $1 in
        logging-*) curl --silent --output /dev/null --fail --max-time 1 "http://$(address "$1")/readyz" ;;
        redis-*) [[ $(timeout 1 redis-cli -p "${ports[$1]}" ping 2>/dev/null) == PONG ]] ;;
    esac
}

kill_or_revive() {
    case ${state[$1]} in
        killed)
            begin_service "$1"
            state[$1]=returning
            ;;
        up | paused | returning)
            end_service "$1"
            state[$1]=killed
            tell "$1 killed"
            ;;
    esac
}

pause_or_resume() {
    case ${state[$1]} in
        up)
            kill -STOP "${pids[$1]}"
            state[$1]=paused
            tell "$1 paused"
            ;;
        paused)
            kill -CONT "${pids[$1]}"
            state[$1]=up
            tell "$1 resumed"
            ;;
        killed | returning) tell "$1 is not up" ;;
    esac
}

press() {
    case $1 in
        [1-3]) kill_or_revive "logging-$1" ;;
        [4-9]) if [[ $engine == cluster ]]; then kill_or_revive "redis-$(($1 - 3))"; fi ;;
        a) pause_or_resume logging-1 ;;
        s) pause_or_resume logging-2 ;;
        d) pause_or_resume logging-3 ;;
        q) exit 0 ;;
    esac
}

# Tells which services have returned, and which have ended without a key.
look_around() {
    local name
    for name in "${!state[@]}"; do
        if [[ $name == logging-* && ${state[$name]} != killed ]] && ! kill -0 "${pids[$name]}" 2>/dev/null; then
            state[$name]=killed
            tell "$name has ended"
        elif [[ ${state[$name]} == returning ]] && is_ready "$name"; then
            state[$name]=up
            tell "$name is back"
        fi
    done
}

explain() {
    say "The page: $FACADE_URL/console"
    if [[ $keys == auto ]]; then
        echo "Services are killed (kill -9), revived, paused and resumed in turn. Ctrl-C stops everything."
        return
    fi
    echo "1 2 3    kill (kill -9) and revive logging-1, logging-2, logging-3"
    echo "a s d    pause and resume them"
    if [[ $engine == cluster ]]; then
        echo "4 5 6    kill and revive redis-1, redis-2, redis-3, the primaries at first"
        echo "7 8 9    kill and revive redis-4, redis-5, redis-6, their replicas"
    fi
    echo "q        stop everything"
}

# Reads the keys from a terminal, or presses them in turn. Does not return.
show_page() {
    local name node key pressed next=$((SECONDS + PRESSED_EVERY_SECONDS)) turn=0
    for name in "${instances[@]}"; do state[$name]=up; done
    read -r -a pressed <<<"$PRESSED"
    if [[ $engine == cluster ]]; then
        read -r -a pressed <<<"$PRESSED_ON_CLUSTER"
        for node in {1..6}; do
            name=redis-$node
            state[$name]=up
            ports[$name]=$(($(<"$folder/cluster/port") + node - 1))
            echo "$name: $(address "$name")"
        done
    fi
    [[ -t 0 ]] || keys=auto
    explain
    case $keys in
        auto)
            # Nothing ever comes from it.
            mkfifo "$folder/keys"
            exec <>"$folder/keys"
            ;;
        *)
            terminal=$(stty -g)
            stty -icanon -echo
            ;;
    esac
    start posts post_gently
    while true; do
        key=
        read -r -n 1 -t "$LOOK_EVERY_SECONDS" key || (($? > 128)) || exit 0
        if [[ $keys == auto ]] && ((SECONDS >= next)) && [[ ${state[*]} != *returning* ]]; then
            key=${pressed[turn++ % ${#pressed[@]}]}
            next=$((SECONDS + PRESSED_EVERY_SECONDS))
        fi
        press "$key"
        look_around
    done
}
