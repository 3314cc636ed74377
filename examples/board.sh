#!/usr/bin/env bash
# Quantise a model, compile it for a VCU128 board, prove the image weight by weight, serve it with the simulator and ask
# it something; its answer alone is on stdout. What is made already and still fits is not made again.
#
#   board.sh [MODEL [DIRECTORY]]
#
#   QUESTION  what to ask              [What is the capital of France?]
set -euo pipefail

model=${1:-demo}
directory=${2:-board}
mkdir -p "$directory"
export EDGETOOL_API_KEY=${EDGETOOL_API_KEY:-$(python3 -c 'import secrets; print(secrets.token_urlsafe())')}

[[ -e $directory/quantised ]] || edgetool quantize "$model" -o "$directory/quantised" --group-size 64 --resume >&2
edgetool compile-vcu128 "$directory/quantised" -o "$directory/image" --lm-head rtn4 --resume >&2
edgetool compile-vcu128 "$directory/image" --verify "$directory/quantised" >&2

# The server says that it is ready with one JSON document; until then, and after, its words are in server.log.
edgetool serve-fpga --image "$directory/image" --numerics fast --port 0 --json --quiet \
    >"$directory/server.json" 2>"$directory/server.log" &
server=$!
trap 'kill -TERM "$server" 2>/dev/null || true; wait "$server" || true' EXIT
until [[ -s $directory/server.json ]]; do
    if ! kill -0 "$server" 2>/dev/null; then
        cat "$directory/server.log" >&2
        exit 7
    fi
    sleep 0.2
done
url=$(python3 -c 'import json, sys; print(json.load(open(sys.argv[1]))["url"])' "$directory/server.json")

edgetool chat "$url" --message "${QUESTION:-What is the capital of France?}" --max-tokens 32 --temperature 0
