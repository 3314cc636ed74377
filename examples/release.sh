#!/usr/bin/env bash
# Quantise a model, convert it to what vLLM reads best, measure the result against the original, and put it into
# service only where the gate holds: DIRECTORY/current always points at the last release that passed.
#
#   release.sh [MODEL [DIRECTORY]]
#
#   GATE      what has to hold          [ratio<=1.10: perplexity at most 10 % above the original's]
#   TASKS     what is measured          [perplexity]
#   SERVE     yes = restart the server  [no]
#   ENGINE    vllm or transformers      [vllm]
#
# Settings of every step can be given as usual: EDGETOOL_QUANTIZE_GROUP_SIZE=32, EDGETOOL_EVAL_LIMIT=200, ...
set -euo pipefail

model=${1:-demo}
directory=${2:-releases}
release=$directory/$(date +%Y%m%d-%H%M%S)
export EDGETOOL_QUANTIZE_GROUP_SIZE=${EDGETOOL_QUANTIZE_GROUP_SIZE:-64}

mkdir -p "$release"
edgetool quantize "$model" -o "$release/quantised"
edgetool convert "$release/quantised" --to compressed-tensors -o "$release/model"

# What is measured is what will be served. Exit 8 (the gate does not hold) ends the script here, like any failure.
edgetool eval "$release/model" --against "$model" --tasks "${TASKS:-perplexity}" --gate "${GATE:-ratio<=1.10}" \
    -o "$release/measured"

rm -rf -- "$release/quantised"
ln -sfn -- "$(basename -- "$release")/model" "$directory/current"
echo "released $release"

if [[ ${SERVE:-no} == yes ]]; then
    if [[ $(edgetool serve-gpu --list --json) == *'"name": "release"'* ]]; then
        edgetool serve-gpu --stop release
    fi
    edgetool serve-gpu "$directory/current" --engine "${ENGINE:-vllm}" --name release --detach
fi
