#!/usr/bin/env bash
# Run any program of yours on GPUs and a port that edgetool leases to it, beside the servers and jobs of others. It
# finds its GPUs in CUDA_VISIBLE_DEVICES and its port in PORT; the lease ends with the last of its processes.
#
#   under-lease.sh [COMMAND...]
#
#   GPUS      how many                  [1, or 0 where there are none]
#   CLASS     of which class            [any]
#   WAIT      how long to wait for them [10m]
set -euo pipefail

command=("$@")
# shellcheck disable=SC2016 # expanded by the shell under the lease
[[ ${#command[@]} -gt 0 ]] || command=(bash -c 'echo "GPUs: ${CUDA_VISIBLE_DEVICES:-none}; port: $PORT"')
gpus=${GPUS:-$(edgetool gpus --json | python3 -c 'import json, sys; print(min(1, len(json.load(sys.stdin)["gpus"])))')}
options=(--count "$gpus" --ports 1 --wait "${WAIT:-10m}")
[[ -z ${CLASS:-} ]] || options+=(--class "$CLASS")

# shellcheck disable=SC2016
exec edgetool gpus run "${options[@]}" -- bash -c 'PORT=${EDGETOOL_PORTS%%,*} exec "$@"' under-lease "${command[@]}"
