#!/bin/sh
# Builds the image. Usage: build_image.sh [further options of docker buildx build]
# From the environment, else from .env:
#   IMAGE_REPO (vllm-bootstrap), IMAGE_TAG (latest), TARGET_PLATFORM (linux/amd64), PUSH (0; 1 pushes it),
#   RUNTIME_IMAGE (the vLLM image to build on; default: the Dockerfile's), ENGINE_PYTHON, NEEDS_VLLM, WITH_SSHD, DAEMON_UID.
# BUILD_SHA and BUILD_TIME are the commit and the time unless they are set.
set -eu
cd "$(dirname "$0")/.."
# shellcheck source=scripts/env_file.sh
. scripts/env_file.sh
load_env "${ENV_FILE:-.env}" IMAGE_REPO IMAGE_TAG TARGET_PLATFORM PUSH RUNTIME_IMAGE ENGINE_PYTHON NEEDS_VLLM WITH_SSHD DAEMON_UID

sha=${BUILD_SHA:-$(git rev-parse --short HEAD 2>/dev/null || echo dev)}
time=${BUILD_TIME:-$(date -u +%Y-%m-%dT%H:%M:%SZ)}
image=${IMAGE_REPO:-vllm-bootstrap}:${IMAGE_TAG:-latest}
case ${PUSH:-0} in
    1 | true | yes) output=--push ;;
    0 | false | no) output=--load ;;
    *) echo "PUSH must be 0 or 1, not '$PUSH'" >&2; exit 2 ;;
esac

set -- --build-arg "BUILD_SHA=$sha" --build-arg "BUILD_TIME=$time" "$@"
[ -z "${RUNTIME_IMAGE:-}" ] || set -- --build-arg "VLLM_BASE_IMAGE=$RUNTIME_IMAGE" "$@"
for name in ENGINE_PYTHON NEEDS_VLLM WITH_SSHD DAEMON_UID; do
    eval "value=\${$name:-}"
    # shellcheck disable=SC2154  # set by eval
    [ -z "$value" ] || set -- --build-arg "$name=$value" "$@"
done
echo "Building $image for ${TARGET_PLATFORM:-linux/amd64} (commit $sha) ..." >&2
exec docker buildx build --platform "${TARGET_PLATFORM:-linux/amd64}" "$output" -t "$image" "$@" .
