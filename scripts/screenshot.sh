#!/usr/bin/env bash
# Makes docs/console.webp: the console on a Redis Cluster, while an instance is away. Needs chromium.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/system.sh

build_services
folder=$(mktemp -d)
stop_all() {
    stop KILL "${!pids[@]}"
    scripts/cluster.sh wipe "$folder/cluster" || true
    rm -rf "$folder"
}
at_end stop_all

map=$(scripts/cluster.sh start "$folder/cluster" $((10000 + RANDOM % 10000)))
start_system "$map"
url=http://$facade
seq --format='"message %.0f"' 12345 |
    curl --silent --fail -H 'content-type: application/x-ndjson' --data-binary @- "$url"

# The browser's clock runs ahead of the machine's: minutes of polling take a fraction of that.
start browser chromium --headless=new --no-sandbox --disable-gpu --hide-scrollbars --disable-background-networking \
    --user-data-dir="$folder/profile" --window-size=1200,960 --virtual-time-budget=200000 \
    --screenshot=docs/console.webp "$url/console"
browser=${pids[browser]}
for ((n = 1; n <= 200; n++)); do
    if ! kill -0 "$browser" 2>/dev/null; then break; fi
    if ((n == 100)); then stop KILL logging-2; fi
    curl --silent --fail --output /dev/null --data-urlencode "msg=hello number $n" "$url"
    if ((n % 3 == 0)); then curl --silent --fail --output /dev/null "$url/?limit=5"; fi
done
wait "$browser"
unset 'pids[browser]'
ls -l docs/console.webp
