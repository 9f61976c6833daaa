#!/usr/bin/env bash
# Makes images for machines that cannot pull any: with the tags of docker-compose.yml and the Dockerfile,
# from files of this machine.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/system.sh

usage() {
    cat <<'HELP'
usage: .ci/stand-ins.sh run|build|remove

  run     makes the images of docker-compose.yml: the services of the release build as IMAGE, and Redis
          from the Debian packages redis-server, redis-tools and busybox-static, unless the real image
          exists or can be pulled
  build   builds the Dockerfile as IMAGE without a network, on a Debian from debootstrap with gcc, with
          the Rust toolchain and the C runtime of this machine and the crates of Cargo.lock
  remove  removes all images that this script made

Needs a Docker engine and, on Debian, root to install packages. SKIP_BUILD=1 uses the
release build that is there, for example that of the tests. IMAGE, REDIS_IMAGE and REDIS_VERSION
come from the environment, by default from .env.example.
HELP
}

case ${1:-} in
    run | build | remove) ;;
    --help | -h)
        usage
        exit 0
        ;;
    *)
        usage >&2
        exit 2
        ;;
esac

# setting NAME: its value in the environment, or in .env.example.
setting() { echo "${!1:-$(sed -n "s/^$1=//p" .env.example)}"; }

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

# need COMMAND PACKAGE
need() {
    if command -v "$1" >/dev/null; then return; fi
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$2"
}

# is_real IMAGE: it exists and is not a stand-in, or can be pulled.
is_real() {
    local label
    if label=$(docker image inspect --format '{{index .Config.Labels "stand-in"}}' "$1" 2>/dev/null) &&
        [[ $label != true ]]; then
        return
    fi
    docker pull --quiet "$1" 2>/dev/null
}

# copy_libraries ROOT PROGRAM…: copies the libraries that the programs load.
copy_libraries() {
    local root=$1 library
    shift
    for library in $(ldd "$@" | grep -o '/[^ ]* (0x' | cut -d ' ' -f 1 | sort -u); do
        mkdir -p "$root$(dirname "$library")"
        cp --dereference --no-clobber "$library" "$root$library"
    done
}

# import IMAGE FOLDER [SETTING…]: makes an image of a folder and removes the image that it replaces.
import() {
    local image=$1 root=$2 change changes=(--change "LABEL stand-in=true")
    shift 2
    for change in "$@"; do changes+=(--change "$change"); done
    tar --create --directory "$root" . | docker import "${changes[@]}" - "$image" >/dev/null
    docker image prune --force --filter label=stand-in=true >/dev/null
    echo "made $image, a stand-in"
}

make_services() {
    local root=$folder/services
    build_services
    mkdir -p "$root/usr/local/bin"
    cp "$binaries"/{facade,logging,messages} "$root/usr/local/bin/"
    copy_libraries "$root" "$binaries"/{facade,logging,messages}
    import "$(setting IMAGE)" "$root" "USER 65532:65532" "ENV PATH=/usr/local/bin" 'CMD ["facade"]'
}

make_redis() {
    local image root=$folder/redis program
    image=$(setting REDIS_IMAGE):$(setting REDIS_VERSION)
    if is_real "$image"; then return; fi
    need redis-server redis-server
    need redis-cli redis-tools
    need busybox busybox-static
    mkdir -p "$root"/{bin,data,usr/local/bin}
    for program in redis-server redis-cli; do
        cp "$(readlink -f "$(command -v $program)")" "$root/usr/local/bin/$program"
        copy_libraries "$root" "$root/usr/local/bin/$program"
    done
    cp "$(command -v busybox)" "$root/bin/busybox"
    for program in cut date grep sed sh sleep tar timeout; do ln -s busybox "$root/bin/$program"; done
    chown 999:999 "$root/data"
    import "$image" "$root" "ENV PATH=/usr/local/bin:/bin" "WORKDIR /data" "VOLUME /data"
}

rust=message-log-rust:stand-in
runtime=message-log-runtime:stand-in

make_rust() {
    local root=$folder/rust
    need debootstrap debootstrap
    echo "making a Debian with gcc and Rust, which takes a few minutes"
    debootstrap --variant=minbase --include=gcc,libc6-dev bookworm "$root" >"$folder/debootstrap.log"
    mkdir -p "$root"/usr/local/{cargo,rust}
    cp -a "$(rustc --print sysroot)"/{bin,lib} "$root/usr/local/rust/"
    # Cargo prints the setting for the use of the vendored crates.
    cargo vendor --locked "$root/usr/local/cargo/vendor" 2>"$folder/vendor.log" |
        sed "s|$root||" >"$root/usr/local/cargo/config.toml"
    import "$rust" "$root" "ENV CARGO_HOME=/usr/local/cargo" \
        "ENV PATH=/usr/local/rust/bin:/usr/sbin:/usr/bin:/sbin:/bin"
}

make_runtime() {
    local root=$folder/runtime
    build_services
    copy_libraries "$root" "$binaries"/{facade,logging,messages}
    import "$runtime" "$root" "ENV PATH=/usr/local/bin:/usr/bin:/bin"
}

build_dockerfile() {
    local image
    image=$(setting IMAGE)
    docker build --network none --build-arg "RUST_IMAGE=$rust" --build-arg "RUNTIME_IMAGE=$runtime" \
        --tag "$image" .
    for service in facade logging messages; do docker run --rm "$image" "$service" --version; done
    docker image inspect --format "built $image, {{.Size}} bytes" "$image"
}

remove() {
    docker image ls --quiet --filter label=stand-in=true | sort --unique |
        xargs --no-run-if-empty docker image rm --force
}

case $1 in
    run)
        make_services
        make_redis
        ;;
    build)
        make_rust
        make_runtime
        build_dockerfile
        ;;
    remove) remove ;;
esac
