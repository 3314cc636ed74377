#!/usr/bin/env bash
# Measure a quantised model against its original every night, keep a line of JSON for each night, and tell a regression
# (exit 8) from a night that could not be measured (exit 1).
#
#   nightly-gate.sh [QUANTISED [ORIGINAL [DIRECTORY]]]
#
#   GATE      what has to hold          [ratio<=1.10]
#   TASKS     what is measured          [perplexity]
#   ATTEMPTS  tries before giving up    [3]
set -euo pipefail

original=${2:-demo}
directory=${3:-nightly}
quantised=${1:-$directory/quantised}
mkdir -p "$directory"
if [[ $# -eq 0 && ! -e $quantised ]]; then
    edgetool quantize "$original" -o "$quantised" --group-size 64 >&2
fi

# Prints one value of the JSON document in a file: value FILE gate.passed
value() {
    python3 -c 'import functools, json, sys
found = functools.reduce(lambda part, key: part[key], sys.argv[2].split("."), json.load(open(sys.argv[1])))
print(found if isinstance(found, str) else json.dumps(found))' "$@"
}

document=$directory/last.json
for ((attempt = 1; attempt <= ${ATTEMPTS:-3}; attempt++)); do
    status=0
    # Answers are kept: a night that was interrupted goes on where it was, and the original is measured only once.
    edgetool eval "$quantised" --against "$original" --tasks "${TASKS:-perplexity}" --gate "${GATE:-ratio<=1.10}" \
        -o "$directory/measured" --overwrite --json --quiet >"$document" || status=$?
    case $status in
        0 | 8) break ;;                     # measured: passed or not
        6 | 75 | 137 | 143) sleep 1 ;;      # no GPU or memory just now, stopped, killed: once more
        *)
            echo "not measured (exit $status): $(value "$document" message)" >&2
            exit 1
            ;;
    esac
done
if [[ $status -ne 0 && $status -ne 8 ]]; then
    echo "not measured after ${ATTEMPTS:-3} attempts (exit $status)" >&2
    exit 1
fi

reason=$(value "$document" gate.reason)
python3 -c 'import json, sys
date, status, reason = sys.argv[1:]
print(json.dumps({"date": date, "passed": status == "0", "reason": reason}))' \
    "$(date +%Y-%m-%d)" "$status" "$reason" >>"$directory/history.jsonl"
echo "$reason"
exit "$status"
