# The maps of a bench, filled with messages; sourced after scripts/system.sh. The script sets `folder`.

# entries FIRST COUNT BYTES: an export of COUNT messages of BYTES bytes, one for each millisecond.
entries() {
    awk -v first="$1" -v count="$2" -v bytes="$3" 'BEGIN {
        padding = ""
        while (length(padding) < bytes - 65) padding = padding "sixteen bytes..."
        padding = substr(padding, 1, bytes - 65)
        begin = 1700000000000
        for (n = first; n < first + count; n++) {
            high = int((begin + n) / 65536)
            low = (begin + n) % 65536
            printf "{\"uuid\":\"%08x-%04x-7%03x-%04x-%06x%06x\",\"msg\":\"message %07d, of the usual length, about sixty-five bytes of text%s\"}\n",
                high, low, rand() * 4096, 32768 + rand() * 16384, rand() * 16777216,
                rand() * 16777216, n, padding
        }
        printf "{\"count\":%d}\n", count
    }'
}

# fill MAP FIRST COUNT BYTES
fill() { entries "$2" "$3" "$4" | "$binaries/logging" import --map "$1" 2>>"$folder/import.log"; }

# start_map ENGINE: sets map.
start_map() {
    rm -rf "$folder/map"
    mkdir "$folder/map"
    case $1 in
        lmdb) map=lmdb:$folder/map ;;
        'one Redis server')
            redis_port=$(free_port)
            start redis redis-server scripts/redis.conf --cluster-enabled no --min-replicas-to-write 0 \
                --bind 127.0.0.1 --port "$redis_port" --dir "$folder/map"
            map=redis://127.0.0.1:$redis_port
            ;;
        cluster) map=$(scripts/cluster.sh start "$folder/cluster" $((10000 + RANDOM % 10000)) 2>"$folder/cluster.log") ;;
        *)
            echo "error: $1 is not an engine; write lmdb or cluster" >&2
            exit 2
            ;;
    esac
}

# seconds COMMAND…
seconds() {
    local begin=$EPOCHREALTIME
    "$@" >/dev/null
    awk "BEGIN { printf \"%.3f\", $EPOCHREALTIME - $begin }"
}
