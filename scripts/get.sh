#!/usr/bin/env bash
# The GET demo of the exercise: reads the log once and prints the body and the status.
set -euo pipefail

url=${FACADE_URL:-http://localhost:8086}

if [[ ${1:-} == --help || ${1:-} == -h ]]; then
    cat <<HELP
usage: scripts/get.sh [QUERY]

Reads the log from the facade and prints the body, then the status. The default QUERY, msg=HELLO, is that
of the exercise's client, and the facade ignores it; try order=desc&limit=3.

  FACADE_URL  the URL of the facade (now: $url)
  TOKEN       the token, if the facade asks for one

Exit code: 0 if the answer was a complete 200, otherwise that of curl: 22 for an error, 18 for a body
that was aborted.
HELP
    exit 0
fi

# Not an argument of curl, which every user of this machine could read.
authorization() { if [[ -n ${TOKEN:-} ]]; then echo "header = \"authorization: Bearer $TOKEN\""; fi; }

exec curl --config <(authorization) --silent --show-error --fail-with-body --write-out '\n%{http_code}\n' \
    "$url/?${1:-msg=HELLO}"
