"""Real edgetool processes that can be stopped at an exact step, without importing torch anew for each.

As a script it imports what `edgetool quantize` needs once, then forks a child for every line of JSON on stdin. The
child is edgetool itself: own process id, own signals, own exit code. Steps are the calls that change the disk (STEPS);
each is written to a trace, and one of them can be made to fail or to bring a signal.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STEPS = ("fsync", "mkdir", "pwrite", "rename", "replace", "unlink")


@dataclass(frozen=True)
class Ended:
    """How a child ended: `code` is its exit code, or minus the signal that killed it."""

    code: int
    stdout: str
    stderr: str
    trace: list[str]

    def document(self) -> Any:
        from tests import documents  # not above: as a script this stands alone

        documents.look(self.stdout)
        return json.loads(self.stdout)


class ProcessServer:
    """`start(...)` and `wait(...)`, or both at once by `run(...)`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._count = 0
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("EDGETOOL_", "HF_"))}
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            env=environment
            | {
                "OMP_NUM_THREADS": "1",
                "TOKENIZERS_PARALLELISM": "false",
                "NO_COLOR": "1",
                "EDGETOOL_JOBS_RECORD": "0",  # its steps would be counted among those of the run
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._read() == "ready"

    def start(
        self,
        *arguments: str,
        at: int = 0,
        signals: tuple[signal.Signals, ...] = (),
        error: int = 0,
        file_limit_bytes: int = 0,
        every_thread: bool = False,
    ) -> tuple[int, Path]:
        """Start `edgetool ARGUMENTS`; returns its process id and where it writes.

        at: the step (counted from 1) at which `signals` arrive, one a step, or which fails by errno `error`. A write
            that is killed or fails has got half of its bytes to the disk.
        every_thread: steps of all threads count, not only the main one's.
        """
        self._count += 1
        place = self.directory / str(self._count)
        place.mkdir(parents=True)
        order = {
            "arguments": arguments,
            "place": str(place),
            "at": at,
            "signals": [int(number) for number in signals],
            "error": error,
            "file_limit_bytes": file_limit_bytes,
            "every_thread": every_thread,
        }
        return int(self._ask(order)), place

    def wait(self, started: tuple[int, Path]) -> Ended:
        pid, place = started
        status = int(self._ask({"wait": pid}))
        texts = [(place / name).read_text() for name in ("stdout", "stderr", "trace")]
        return Ended(os.waitstatus_to_exitcode(status), texts[0], texts[1], texts[2].splitlines())

    def run(self, *arguments: str, **how: Any) -> Ended:
        return self.wait(self.start(*arguments, **how))

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)

    def _ask(self, order: dict[str, Any]) -> str:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


def serve() -> None:
    """The server's loop; ends with its stdin."""
    import torch
    import transformers.models.auto.modeling_auto
    import transformers.models.llama.modeling_llama  # noqa: F401

    import edgetool.cli
    import edgetool.quantizers.job  # noqa: F401

    torch.set_num_threads(1)  # no pool of threads exists yet that a fork would lose
    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            print(os.waitpid(order["wait"], 0)[1], flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            _child(order)
        print(pid, flush=True)


def _child(order: dict[str, Any]) -> None:
    place = Path(order["place"])
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        opened = os.open(place / name, os.O_WRONLY | os.O_CREAT, 0o644)
        os.dup2(opened, descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    _trace(os.open(place / "trace", os.O_WRONLY | os.O_CREAT, 0o644), order)
    if order["file_limit_bytes"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["file_limit_bytes"],) * 2)
    code: Any = 70
    try:
        from edgetool.cli import app

        app(order["arguments"], prog_name="edgetool")
    except SystemExit as leaving:
        code = leaving.code or 0
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _trace(log: int, order: dict[str, Any]) -> None:
    """Put a counting function in the place of each of STEPS."""
    count = 0
    pending = list(order["signals"])
    real = {name: getattr(os, name) for name in STEPS}

    def counted(name: str) -> Any:
        def call(*arguments: Any, **keywords: Any) -> Any:
            nonlocal count
            if threading.current_thread() is not threading.main_thread() and not order["every_thread"]:
                return real[name](*arguments, **keywords)
            count += 1
            what = arguments[0]
            path = Path(f"/proc/self/fd/{what}").readlink() if isinstance(what, int) else Path(what)
            os.write(log, f"{name} {path.name}\n".encode())
            here = order["at"] and count >= order["at"]
            if name == "pwrite" and count == order["at"]:
                descriptor, data, offset = arguments
                real[name](descriptor, bytes(data)[: len(data) // 2], offset)
            if here and pending:
                os.kill(os.getpid(), pending.pop(0))
            if count == order["at"] and order["error"]:
                raise OSError(order["error"], os.strerror(order["error"]))
            return real[name](*arguments, **keywords)

        return call

    for name in STEPS:
        setattr(os, name, counted(name))


NO_SPACE = errno.ENOSPC

if __name__ == "__main__":
    serve()
