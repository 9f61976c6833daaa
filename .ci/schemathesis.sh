#!/usr/bin/env bash
# Holds the facade to its description: Schemathesis makes requests from /openapi.json, sends them to a
# system of this script's own, and checks the answers. Takes about a minute.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/system.sh

version=4.32.5
tools=${CARGO_TARGET_DIR:-target}/schemathesis-$version

if ! [[ -x $tools/bin/schemathesis ]]; then
    if ! python3 -c 'import ensurepip' 2>/dev/null; then
        apt-get update -qq
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends python3-venv
    fi
    rm -rf "$tools"
    python3 -m venv "$tools"
    "$tools/bin/pip" install --quiet --disable-pip-version-check "schemathesis==$version"
fi
build_services
folder=$(mktemp -d)
stop_all() {
    stop TERM "${!pids[@]}"
    rm -rf "$folder"
}
at_end stop_all
start_system "lmdb:$folder/map"

HYPOTHESIS_STORAGE_DIRECTORY=$folder/examples timeout 300 "$tools/bin/schemathesis" \
    --config-file .ci/schemathesis.toml run --checks all "http://$facade/openapi.json"
