#!/bin/sh
# Does a daemon answer as it should? Usage: smoke_test.sh [URL [MODEL]]     (http://127.0.0.1:8000, the first model listed)
# The key comes from VLLM_BOOTSTRAP_KEY or VLLM_ACCESS_KEY, else from .env; it is never an argument of a program.
# WAIT_S (600): how long to wait until it is ready. ANSWER_S (120): how long one answer may take. Needs curl.
# Exit codes: 0 all is well, 1 something is not, 2 usage.
set -eu
here=$(dirname "$0")
# shellcheck source=scripts/env_file.sh
. "$here/env_file.sh"
load_env "${ENV_FILE:-$here/../.env}" VLLM_ACCESS_KEY
url=${1:-http://127.0.0.1:8000}
url=${url%/}
model=${2:-}
key=${VLLM_BOOTSTRAP_KEY:-${VLLM_ACCESS_KEY:-}}
wait_s=${WAIT_S:-600}
answer_s=${ANSWER_S:-120}
case $url in http://* | https://*) ;; *) echo "not a URL: $url" >&2; exit 2 ;; esac
case $wait_s$answer_s in *[!0-9]*) echo "WAIT_S and ANSWER_S must be whole seconds" >&2; exit 2 ;; esac
command -v curl >/dev/null || { echo "curl is needed" >&2; exit 2; }

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT INT TERM
body=$folder/body

fail() {
    echo "FAILED: $*" >&2
    exit 1
}

# ask PATH [further options of curl]: the status, 000 when nobody answers; the body is in $body.
ask() {
    _path=$1
    shift
    if [ -n "$key" ]; then
        printf 'authorization: Bearer %s\n' "$key"
    fi | curl -sS -o "$body" -w '%{http_code}' -H @- "$@" "$url$_path" 2>"$folder/error" || true
}

# What went wrong, in one line: the error's message, the beginning of the body, or curl's own words.
why() {
    if [ "$1" = 000 ]; then
        tail -n 1 "$folder/error"
    elif grep -q '"message"' "$body"; then
        tr '\n' ' ' <"$body" | sed 's/.*"message": *"\(\([^"\\]\|\\.\)*\)".*/\1/'
    else
        head -c 300 "$body"
    fi
}

expect_200() {
    case $1 in
        200) ;;
        401) fail "$2: the key is not known there (401)$([ -n "$key" ] || echo '; none was given: set VLLM_BOOTSTRAP_KEY')" ;;
        403) fail "$2: the key may not do that (403): $(why "$1")" ;;
        000) fail "$2: nobody answers at $url: $(why "$1")" ;;
        *) fail "$2: status $1: $(why "$1")" ;;
    esac
}

now() { date +%s; }
until_s=$(($(now) + wait_s))

# wait_for PATH WORDS
wait_for() {
    while status=$(ask "$1" -m 10); [ "$status" != 200 ]; do
        [ "$(now)" -lt "$until_s" ] || fail "$2 within $wait_s s: $1 says $status: $(why "$status")"
        sleep 1
    done
}

wait_for /livez "not alive"
echo "alive"
wait_for /healthz "alive, but not ready"
echo "ready"

expect_200 "$(ask /version -m 10)" /version
echo "version: $(tr -d '\n' <"$body")"

expect_200 "$(ask /v1/models -m 10)" /v1/models
if [ -z "$model" ]; then
    model=$(grep -o '"id": *"[^"]*"' "$body" | head -n 1 | sed 's/.*"\([^"]*\)"$/\1/')
    [ -n "$model" ] || fail "/v1/models lists none: launch one, or name one: smoke_test.sh $url MODEL"
fi
case $model in *[\"\\]*) echo "not a model's name: $model" >&2; exit 2 ;; esac
echo "model: $model"

request="{\"model\": \"$model\", \"prompt\": \"Say hello.\", \"max_tokens\": 8}"
expect_200 "$(ask /v1/completions -m "$answer_s" -H 'content-type: application/json' -d "$request")" "completion"
grep -q '"text"' "$body" || fail "completion: an answer without text: $(head -c 300 "$body")"
echo "completion: answered"

request="{\"model\": \"$model\", \"messages\": [{\"role\": \"user\", \"content\": \"Say hello.\"}], \"max_tokens\": 8, \"stream\": true}"
expect_200 "$(ask /v1/chat/completions -N -m "$answer_s" -H 'content-type: application/json' -d "$request")" "chat"
grep -q '^data: {.*"delta"' "$body" || fail "chat: a stream without any piece: $(head -c 300 "$body")"
tail -n 3 "$body" | grep -q '^data: \[DONE\]' || fail "chat: the stream has no end: $(tail -c 300 "$body")"
echo "chat: $(grep -c '^data: {' "$body") pieces, and the end"
echo "All is well at $url."
