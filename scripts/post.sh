#!/usr/bin/env bash
# The POST demo of the exercise: posts messages as forms and prints the status and body of each answer.
set -euo pipefail

url=${FACADE_URL:-http://localhost:8086}

if [[ ${1:-} == --help || ${1:-} == -h ]]; then
    cat <<HELP
usage: scripts/post.sh [N | MESSAGE…]

Posts msg1 to msgN (default: 10), or each MESSAGE, to the facade. Prints the status, the logging instance
that stored the message, and the body of each answer.

  FACADE_URL  the URL of the facade (now: $url)
  TOKEN       the token, if the facade asks for one

Exit code: 0 if every answer was a 200, 1 otherwise.
HELP
    exit 0
fi

# Not an argument of curl, which every user of this machine could read.
authorization() { if [[ -n ${TOKEN:-} ]]; then echo "header = \"authorization: Bearer $TOKEN\""; fi; }

messages=()
if (($# == 0)) || { (($# == 1)) && [[ $1 =~ ^[1-9][0-9]*$ ]]; }; then
    for ((n = 1; n <= ${1:-10}; n++)); do messages+=("msg$n"); done
else
    messages=("$@")
fi

failed=0
for message in "${messages[@]}"; do
    answer=$(curl --config <(authorization) --silent --show-error --max-time 30 --data-urlencode "msg=$message" \
        --write-out '\n%{http_code} %header{x-logging-instance}' "$url/") || exit 1
    status=${answer##*$'\n'}
    printf '%s %s\n' "$status" "${answer%$'\n'*}"
    [[ $status == 200* ]] || failed=1
done
exit "$failed"
