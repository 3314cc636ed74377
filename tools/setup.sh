#!/bin/sh
# Make .venv hold this project and the exact versions of constraints.txt. Run by make when either has changed.
set -eu
cd "$(dirname "$0")/.."

python=${PYTHON:-}
if [ -z "$python" ]; then
    for candidate in python3.11 python3.12 python3.13 python3; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            python=$candidate
            break
        fi
    done
fi
if [ -z "$python" ]; then
    echo "edgetool needs Python 3.11 or newer; name one with PYTHON=/path/to/python" >&2
    exit 5
fi

# A half-made environment (interrupted, or its Python removed since) is made again.
if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    echo "making .venv with $($python --version)"
    "$python" -m venv --clear .venv
fi

# PyPI's torch for Linux carries CUDA (several GB). Without an NVIDIA GPU the CPU build does, where its index answers.
set --
cpu_index=https://download.pytorch.org/whl/cpu
if [ "$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null 2>&1 \
    && ! .venv/bin/python -c 'import importlib.metadata as m; m.version("torch")' 2>/dev/null \
    && .venv/bin/python - "$cpu_index/torch/" 2>/dev/null <<'PYTHON'
import sys, urllib.request
urllib.request.urlopen(sys.argv[1], timeout=5).close()
PYTHON
then
    set -- --extra-index-url "$cpu_index"
fi

.venv/bin/python -m pip install --disable-pip-version-check "$@" -c constraints.txt -e '.[dev]'
