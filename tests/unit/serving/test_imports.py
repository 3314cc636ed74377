"""What the process that watches over servers must not load: it is there as long as they are."""

from __future__ import annotations

import subprocess
import sys


def test_the_supervisor_and_the_load_client_need_no_torch_and_no_web_framework():
    script = (
        "import sys, edgetool.serving.service, edgetool.serving.detach, edgetool.loadtest.job\n"
        "print([name for name in ('torch', 'transformers', 'fastapi', 'uvicorn', 'openai') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n", done.stderr


def test_the_front_needs_no_torch():
    script = "import sys, edgetool.serving.front\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout == "False\n", done.stderr
