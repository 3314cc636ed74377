"""A job that does not want to end: `python stubborn_job.py STORE OUTPUT` records itself and ignores SIGTERM.

One child runs another program in a session of its own, the other is a fork of this process; both ignore SIGTERM too.
Their process numbers are in OUTPUT.partial/pids once everything runs.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from edgetool.config import load
from edgetool.jobs.recording import recorded
from edgetool.progress import NullProgress


def main(store: str, output: str) -> None:
    values = {"model": "demo", "output": output}
    config = load("quantize", values, None, {"EDGETOOL_JOBS_DIRECTORY": store, "HOME": "/nowhere"})
    with recorded(config, "quantize", ("quantize", "demo", "-o", output), NullProgress()):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        partial = Path(output + ".partial")
        partial.mkdir()
        program = subprocess.Popen(["/bin/sh", "-c", "trap '' TERM; while :; do sleep 1; done"], start_new_session=True)
        fork = os.fork()
        if fork == 0:
            os.setsid()
            time.sleep(600)
            os._exit(0)
        (partial / "pids.tmp").write_text(f"{os.getpid()} {program.pid} {fork}")
        (partial / "pids.tmp").rename(partial / "pids")
        time.sleep(600)


if __name__ == "__main__":
    main(*sys.argv[1:])
