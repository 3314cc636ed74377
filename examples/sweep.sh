#!/usr/bin/env bash
# Quantise with several group sizes, measure each against the original, and keep the best: DIRECTORY/best points at it.
# What is there already is not done again, so a sweep that was interrupted goes on. Prints the best one's directory.
#
#   sweep.sh [MODEL [DIRECTORY [GROUP_SIZE...]]]
set -euo pipefail

model=${1:-demo}
directory=${2:-sweep}
sizes=("${@:3}")
[[ ${#sizes[@]} -gt 0 ]] || sizes=(64 32)
mkdir -p "$directory"

for size in "${sizes[@]}"; do
    out=$directory/group-$size
    [[ -e $out ]] || edgetool quantize "$model" -o "$out" --group-size "$size" --resume >&2
    # a document is whole or absent: it gets its name when the command has ended well
    if [[ ! -e $out.json ]]; then
        edgetool eval "$out" --against "$model" --tasks perplexity -o "$out-measured" --overwrite --json \
            >"$out.json.part"
        mv -- "$out.json.part" "$out.json"
    fi
done

best=$(python3 - "$directory" "${sizes[@]}" <<'PYTHON'
import json, sys
from pathlib import Path

directory, sizes = Path(sys.argv[1]), sys.argv[2:]
measured = {size: json.loads((directory / f"group-{size}.json").read_text())["tasks"]["perplexity"] for size in sizes}
for size, one in sorted(measured.items(), key=lambda item: item[1]["ratio"]):
    total = sum(path.stat().st_size for path in (directory / f"group-{size}").glob("*.safetensors"))
    figures = f"perplexity {one['quantized']:.3f}, {one['ratio']:.4f} of the original's, {total / 1e6:.1f} MB"
    print(f"group {size:>4}: {figures}", file=sys.stderr)
print(min(measured, key=lambda size: measured[size]["ratio"]))
PYTHON
)
ln -sfn -- "group-$best" "$directory/best"
echo "$directory/group-$best"
