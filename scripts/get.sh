#!/usr/bin/env bash
# The exercise's GET demo: reads the log once and shows the status and body.
set -euo pipefail

url=${FACADE_URL:-http://localhost:8086}

if [[ ${1:-} == --help || ${1:-} == -h ]]; then
    cat <<HELP
usage: scripts/get.sh [QUERY]

Reads the log from the facade and prints the body, then the status. The QUERY is msg=HELLO unless
given, which the facade ignores as the exercise's client expects; try order=desc&limit=3.

  FACADE_URL  where the facade is (now: $url)

Exit code: 0 if the answer was a complete 200, otherwise curl's: 22 for an error, 18 for a body that
was cut off.
HELP
    exit 0
fi

exec curl --silent --show-error --fail-with-body --write-out '\n%{http_code}\n' \
    "$url/?${1:-msg=HELLO}"
