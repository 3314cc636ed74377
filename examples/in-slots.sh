#!/usr/bin/env bash
# Run a long edgetool command on a machine that is only lent for a while (a preemptible instance, a nightly slot).
# After SECONDS it is asked to stop; it gives exit code 75, keeps everything that is finished, and goes on in the next
# slot. It survives being killed as well. Any other exit code is final, and becomes that of this script.
#
#   in-slots.sh [SECONDS [COMMAND...]]
#
#   SLOTS     most slots to take       [100]
#   PAUSE     seconds between two      [0]
set -euo pipefail

seconds=${1:-3600}
command=("${@:2}")
[[ ${#command[@]} -gt 0 ]] || command=(edgetool quantize demo -o quantised-demo --group-size 64)

for ((slot = 1; slot <= ${SLOTS:-100}; slot++)); do
    status=0
    timeout --preserve-status --signal=TERM --kill-after=120 "$seconds" "${command[@]}" || status=$?
    case $status in
        75 | 137 | 143) echo "slot $slot ended with exit $status; going on" >&2 ;; # stopped, or killed
        *) exit "$status" ;;
    esac
    [[ " ${command[*]} " == *" --resume "* ]] || command+=(--resume)
    sleep "${PAUSE:-0}"
done
echo "not finished after ${SLOTS:-100} slots" >&2
exit 75
