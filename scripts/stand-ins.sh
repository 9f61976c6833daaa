#!/usr/bin/env bash
# Images for machines that cannot pull any: under the tags that docker-compose.yml and the Dockerfile
# name, made from what this machine has.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
    cat <<'HELP'
usage: scripts/stand-ins.sh run|build

  run    what docker-compose.yml runs: the services from target/release as IMAGE, and Redis from the
         Debian packages redis-server, redis-tools and busybox-static
  build  what the Dockerfile begins from: a Debian with gcc, made by debootstrap, with this machine's
         Rust and the crates that Cargo.lock names; and the C runtime. Then the Dockerfile is built
         with  docker build --network none --tag message-log:0.1.0 .

Needs a Docker engine and, on Debian, the rights to install packages. Takes the real image where it is
there or can be pulled, except for the services. IMAGE, REDIS_IMAGE and REDIS_VERSION are as in
.env.example.
HELP
}

case ${1:-} in
    run | build) ;;
    --help | -h)
        usage
        exit 0
        ;;
    *)
        usage >&2
        exit 2
        ;;
esac

# setting NAME: from the environment, or as .env.example says.
setting() { echo "${!1:-$(sed -n "s/^$1=//p" .env.example)}"; }

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

# need COMMAND PACKAGE
need() {
    command -v "$1" >/dev/null || apt-get install -y -qq --no-install-recommends "$2"
}

# is_there IMAGE: or could be pulled.
is_there() {
    docker image inspect "$1" >/dev/null 2>&1 || docker pull --quiet "$1" 2>/dev/null
}

# copy_libraries ROOT PROGRAM…: what the programs load.
copy_libraries() {
    local root=$1 library
    shift
    for library in $(ldd "$@" | grep -o '/[^ ]* (0x' | cut -d ' ' -f 1 | sort -u); do
        mkdir -p "$root$(dirname "$library")"
        cp --dereference --no-clobber "$library" "$root$library"
    done
}

# import IMAGE FOLDER [SETTING…]: makes an image of a folder.
import() {
    local image=$1 root=$2 change changes=(--change "LABEL stand-in=true")
    shift 2
    for change in "$@"; do changes+=(--change "$change"); done
    tar --create --directory "$root" . | docker import "${changes[@]}" - "$image" >/dev/null
    echo "made $image"
}

make_services() {
    local root=$folder/services
    cargo build --release --locked
    mkdir -p "$root/usr/local/bin"
    cp target/release/{facade,logging,messages} "$root/usr/local/bin/"
    copy_libraries "$root" target/release/{facade,logging,messages}
    import "$(setting IMAGE)" "$root" "USER 65532:65532" "ENV PATH=/usr/local/bin" 'CMD ["facade"]'
}

make_redis() {
    local image root=$folder/redis program
    image=$(setting REDIS_IMAGE):$(setting REDIS_VERSION)
    if is_there "$image"; then return; fi
    need redis-server redis-server
    need redis-cli redis-tools
    need busybox busybox-static
    mkdir -p "$root"/{bin,data,usr/local/bin}
    for program in redis-server redis-cli; do
        cp "$(readlink -f "$(command -v $program)")" "$root/usr/local/bin/$program"
        copy_libraries "$root" "$root/usr/local/bin/$program"
    done
    cp "$(command -v busybox)" "$root/bin/busybox"
    for program in cut grep sed sh sleep timeout; do ln -s busybox "$root/bin/$program"; done
    chown 999:999 "$root/data"
    import "$image" "$root" "ENV PATH=/usr/local/bin:/bin" "WORKDIR /data" "VOLUME /data"
}

# default_of ARGUMENT: of the Dockerfile.
default_of() { sed -n "s/^ARG $1=//p" Dockerfile; }

make_rust() {
    local image root=$folder/rust
    image=$(default_of RUST_IMAGE)
    if is_there "$image"; then return; fi
    need debootstrap debootstrap
    debootstrap --variant=minbase --include=gcc,libc6-dev bookworm "$root" >"$folder/debootstrap.log"
    cp -a "$(rustc --print sysroot)" "$root/usr/local/rust"
    mkdir -p "$root/usr/local/cargo"
    # Cargo prints the setting that makes it take the crates from there.
    cargo vendor --locked --quiet "$root/usr/local/cargo/vendor" |
        sed "s|$root||" >"$root/usr/local/cargo/config.toml"
    import "$image" "$root" "ENV CARGO_HOME=/usr/local/cargo" \
        "ENV PATH=/usr/local/rust/bin:/usr/sbin:/usr/bin:/sbin:/bin"
}

make_runtime() {
    local image root=$folder/runtime
    image=$(default_of RUNTIME_IMAGE)
    if is_there "$image"; then return; fi
    cargo build --release --locked
    copy_libraries "$root" target/release/{facade,logging,messages}
    import "$image" "$root" "ENV PATH=/usr/local/bin:/usr/bin:/bin"
}

case $1 in
    run)
        make_services
        make_redis
        ;;
    build)
        make_rust
        make_runtime
        ;;
esac
