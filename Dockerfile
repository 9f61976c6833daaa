# One small image with the three services; the command says which one runs:
#   docker run --rm message-log:0.1.0 logging --help

ARG RUST_IMAGE=rust:1.95-slim-bookworm
ARG RUNTIME_IMAGE=gcr.io/distroless/cc-debian12:nonroot

FROM ${RUST_IMAGE} AS build
WORKDIR /build

# The dependencies are a layer of their own, built with empty crates in our places: it is made again
# only when a manifest or the lock file changes.
COPY Cargo.toml Cargo.lock ./
COPY common/Cargo.toml common/
COPY common/testing/Cargo.toml common/testing/
COPY facade/Cargo.toml facade/
COPY logging/Cargo.toml logging/
COPY messages/Cargo.toml messages/
RUN for crate in common common/testing facade logging messages; do \
        mkdir "$crate/src" && touch "$crate/src/lib.rs"; \
    done \
    && for crate in facade logging messages; do \
        echo 'fn main() {}' >"$crate/src/main.rs"; \
    done \
    && cargo build --release --locked \
    && cargo clean --release --package common --package facade --package logging --package messages

COPY common/src common/src
COPY facade/src facade/src
COPY facade/assets facade/assets
COPY facade/templates facade/templates
COPY logging/src logging/src
COPY messages/src messages/src
RUN cargo build --release --locked

FROM ${RUNTIME_IMAGE}
LABEL org.opencontainers.image.title="message-log" \
    org.opencontainers.image.description="A message log over HTTP: facade, logging and messages" \
    org.opencontainers.image.licenses="MIT"
COPY --from=build /build/target/release/facade /build/target/release/logging \
    /build/target/release/messages /usr/local/bin/
USER 65532:65532
CMD ["facade", "--help"]
