#!/usr/bin/env bash
# What tokens and TLS cost a POST.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/system.sh
source bench/maps.sh
source bench/cost.sh

rounds=${1:-10}
duration=${2:-4}

if [[ $rounds == --help || $rounds == -h ]]; then
    cat <<'HELP'
usage: bench/door.sh [ROUNDS] [SECONDS]

Three facades on the same instances and an LMDB map: plain, with a token file, with TLS. wrk posts with 256
connections for SECONDS (4) to each in turn, ROUNDS times (10); the CPU time of the facade and the logging
instances (user and system, from /proc) is divided by the POSTs. Prints medians, and the medians of the
ratios to the plain facade of the same round.
HELP
    exit 0
fi

for program in wrk openssl; do
    command -v "$program" >/dev/null || { echo "error: please install $program" >&2; exit 1; }
done
build_quietly

folder=$(mktemp -d)
stop_all() {
    stop TERM "${!pids[@]}"
    rm -rf "$folder"
}
at_end stop_all

start_map lmdb
start_system "$map"
token=$(openssl rand -hex 32)
echo "$token" >"$folder/tokens"
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost \
    -keyout "$folder/key.pem" -out "$folder/cert.pem" 2>/dev/null
urls=()
for name in "${instances[@]}"; do urls+=("http://$(address "$name")"); done
logging=$(IFS=,; echo "${urls[*]}")
for name in token tls; do
    ports[$name]=$(free_port)
    case $name in
        token) flags=(--token-file "$folder/tokens") ;;
        tls) flags=(--tls-cert "$folder/cert.pem" --tls-key "$folder/key.pem") ;;
    esac
    start "$name" "$binaries/facade" --listen "$(address "$name")" --logging "$logging" \
        --messages "http://$(address messages)" "${flags[@]}"
done
curl --silent --output /dev/null --insecure --retry 100 --retry-delay 1 --retry-connrefused \
    "http://$(address token)/livez" --next --silent --output /dev/null --insecure --retry 100 --retry-delay 1 \
    --retry-connrefused "https://$(address tls)/livez"

wrk_options=(-H "authorization: Bearer $token")
describe_run "bench/door.sh $rounds $duration"
plain=() token_cost=() tls_cost=() token_ratio=() tls_ratio=()
for ((round = 0; round < rounds; round++)); do
    plain+=("$(cost_of_post "http://$facade" facade "${instances[@]}")")
    token_cost+=("$(cost_of_post "http://$(address token)" token "${instances[@]}")")
    tls_cost+=("$(cost_of_post "https://$(address tls)" tls "${instances[@]}")")
    token_ratio+=("$(precise_ratio "${token_cost[-1]}" "${plain[-1]}")")
    tls_ratio+=("$(precise_ratio "${tls_cost[-1]}" "${plain[-1]}")")
done
require_no_failures
echo "| facade | CPU time of a POST, us | ratio |"
echo "|---|---|---|"
echo "| plain | $(median "${plain[@]}") | 1 |"
echo "| with a token | $(median "${token_cost[@]}") | $(median "${token_ratio[@]}") |"
echo "| with TLS | $(median "${tls_cost[@]}") | $(median "${tls_ratio[@]}") |"
