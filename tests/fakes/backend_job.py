"""A backend for tests of backends/child.py: does what `job["do"]` says. Runs in any Python from 3.8."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def run(job, report):
    todo = job["do"]
    print("the backend talks on stdout", flush=True)
    os.system("echo and a child of it on stderr >&2")
    if todo == "describe":
        names = ("EDGETOOL_QUANTIZE_BITS", "PYTHONPATH", "FROM_CALLER", "HOME")
        return {
            "python": sys.executable,
            "arguments": " ".join(sys.argv),
            "modules": [name for name in ("edgetool", "edgetool.errors") if name in sys.modules],
            "environment": {name: os.environ.get(name) for name in names},
            "cwd": str(Path.cwd()),
            "stdin": sys.stdin.read(),
            "job": job,
            "descriptor": os.get_inheritable(int(sys.argv[2])),
        }
    if todo == "progress":
        report.note("a note")
        with report.task("layers", 3, "layer") as task:
            for layer in range(3):
                task.advance(1, f"layer {layer}")
            report.warn("a warning")
        return {"text": "ж" * job["length"]}
    if todo == "refuse":
        report.refuse(job["type"], "what was wrong", "what to do")
    if todo == "raise":
        raise ValueError("a value that a library did not like")
    if todo == "memory":
        raise MemoryError("cannot allocate 3 TiB")
    if todo == "exit":
        sys.exit(3)
    if todo == "vanish":
        os._exit(4)
    if todo == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if todo == "die after":
        import atexit

        atexit.register(os.kill, os.getpid(), signal.SIGSEGV)
        return {"kept": True}
    if todo in {"sleep", "stubborn"}:
        if todo == "stubborn":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        subprocess.Popen(["sleep", "600"], start_new_session=True)
        try:
            report.note("asleep")
            time.sleep(600)
        finally:
            Path(job["mark"]).write_text("unwound")
    return {"unfit": {1, 2}, "numbers": job}
