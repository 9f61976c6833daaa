# The CPU time of a POST; sourced after scripts/system.sh. The script sets `folder` and `duration`, in seconds.

# build_quietly: what it prints is shown only when it fails.
build_quietly() {
    local log
    log=$(mktemp)
    cargo build --release --locked --workspace --bins 2>"$log" || { cat "$log" >&2; exit 1; }
    rm -f "$log"
}

# ticks NAME…: the CPU time of these services so far, user and system, in clock ticks.
ticks() {
    local name sum=0 fields
    for name in "$@"; do
        read -ra fields <"/proc/${pids[$name]}/stat"
        ((sum += fields[13] + fields[14]))
    done
    echo "$sum"
}

# cost_of_post URL NAME…: microseconds of CPU time of these services per POST to the URL, by 256 connections of
# wrk, which takes further options from `wrk_options`.
cost_of_post() {
    local before posts
    before=$(ticks "${@:2}")
    posts=$(wrk -t2 -c256 -d"${duration}s" "${wrk_options[@]}" -s bench/post.lua "$1/" 2>"$folder/summary" |
        awk '/requests in/ { print $1 }')
    awk '$2 > 0' "$folder/summary" >>"$folder/failed"
    awk "BEGIN { printf \"%.2f\", ($(ticks "${@:2}") - $before) * 1000000 / $(getconf CLK_TCK) / $posts }"
}

# require_no_failures: ends the script when a POST failed, as refusals cost little.
require_no_failures() {
    [[ ! -s $folder/failed ]] || fail "POSTs failed (rate, failures, p99): $(cat "$folder/failed")"
}

wrk_options=()

# precise_ratio A B: A / B, with three digits.
precise_ratio() { awk "BEGIN { printf \"%.3f\", $1 / $2 }"; }
