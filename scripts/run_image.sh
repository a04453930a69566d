#!/bin/sh
# Runs the image with one model on all GPUs. Usage: run_image.sh [further options of docker run]
# From the environment, else from .env (NAME=value lines, never executed); every other setting in .env reaches the daemon:
#   VLLM_ACCESS_KEY (needed, unless GENERATE_KEY=1 leaves that to the daemon), MODEL_ID (Qwen/Qwen2.5-3B-Instruct),
#   HF_TOKEN, PUBLIC_KEY, IMAGE_REPO (vllm-bootstrap), IMAGE_TAG (latest), NAME (vllm-bootstrap), PORT (8000),
#   BIND_ADDRESS (127.0.0.1), GPUS (all; none: no GPU, the simulator), SHM_SIZE (16g), MODELS_DIR, TARGET_PLATFORM.
# No secret is an argument of docker: they go by the environment and by --env-file.
set -eu
cd "$(dirname "$0")/.."
# shellcheck source=scripts/env_file.sh
. scripts/env_file.sh
ENV_FILE=${ENV_FILE:-.env}
load_env "$ENV_FILE" VLLM_ACCESS_KEY MODEL_ID HF_TOKEN PUBLIC_KEY SSH_PORT IMAGE_REPO IMAGE_TAG NAME PORT BIND_ADDRESS \
    GPUS SHM_SIZE MODELS_DIR TARGET_PLATFORM

if [ -z "${VLLM_ACCESS_KEY:-}" ] && [ "${GENERATE_KEY:-0}" != 1 ]; then
    echo "VLLM_ACCESS_KEY is set neither in the environment nor in $ENV_FILE. Make a key (openssl rand -hex 32), or set" >&2
    echo "GENERATE_KEY=1: then the daemon makes one, and its log names the file that holds it." >&2
    exit 2
fi
export MODEL_ID="${MODEL_ID:-Qwen/Qwen2.5-3B-Instruct}"
name=${NAME:-vllm-bootstrap}
image=${IMAGE_REPO:-vllm-bootstrap}:${IMAGE_TAG:-latest}

# What .env says of the host's side must not reach the daemon as its own address and folders.
set -- -e HOST=0.0.0.0 -e PORT=8000 -e HF_HOME=/cache -e MODEL_ID "$@"
for secret in VLLM_ACCESS_KEY HF_TOKEN PUBLIC_KEY SSH_PORT; do
    eval "value=\${$secret:-}"
    # shellcheck disable=SC2154  # set by eval
    [ -z "$value" ] || set -- -e "$secret" "$@" # the name only: docker takes the value from its environment
done
[ ! -f "$ENV_FILE" ] || set -- --env-file "$ENV_FILE" "$@"
[ -z "${MODELS_DIR:-}" ] || set -- -v "$MODELS_DIR:/models:ro" "$@"
[ -z "${TARGET_PLATFORM:-}" ] || set -- --platform "$TARGET_PLATFORM" "$@"
case ${GPUS:-all} in
    none) set -- -e USE_MOCK_MODEL=true "$@" ;;
    *) set -- --gpus "${GPUS:-all}" "$@" ;;
esac

echo "Starting $image as '$name' with $MODEL_ID on ${BIND_ADDRESS:-127.0.0.1}:${PORT:-8000} ..." >&2
docker run -d --name "$name" --restart unless-stopped --stop-timeout 15 --shm-size "${SHM_SIZE:-16g}" \
    -p "${BIND_ADDRESS:-127.0.0.1}:${PORT:-8000}:8000" \
    -v "$name-cache:/cache" -v "$name-state:/var/lib/vllm-bootstrap" "$@" "$image"
echo "Its log: docker logs -f $name" >&2
echo "Is it ready: scripts/smoke_test.sh http://127.0.0.1:${PORT:-8000} $MODEL_ID" >&2
