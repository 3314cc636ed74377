"""Process trees that are hard to end, for tests. As a script: `python family.py KIND [MARK]`.

Each prints `ready` when it is complete. All of them sleep for ten minutes when nobody ends them.

    plain      one process
    deep       a child in the same session, one in a session of its own, and one that was orphaned (double fork)
    stubborn   as deep, and nobody listens to SIGTERM
    faceless   as deep, and the orphan was started with an empty environment
    forking    a process that is replaced by a copy of itself a hundred times a second
    sharing    it has shared memory, whose name it writes to MARK, and nobody of it listens to SIGTERM
    orderly    on SIGTERM it writes `main` to MARK, then its child ends, which writes `child` when it gets a SIGTERM
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from multiprocessing import resource_tracker, shared_memory
from pathlib import Path
from typing import NoReturn

SLEEP = ["sleep", "600"]


def sleep_on() -> NoReturn:
    time.sleep(600)
    os._exit(0)


def fork_sleeper(*, session: bool = False, orphan: bool = False, empty: bool = False) -> None:
    done, tell = os.pipe()
    child = os.fork()
    if child == 0:
        if session:
            os.setsid()
        if orphan and os.fork():
            os._exit(0)
        os.write(tell, b".")
        os.set_inheritable(tell, False)
        if empty:
            os.execve("/bin/sleep", SLEEP, {})
        sleep_on()
    os.read(done, 1)
    if orphan:  # whoever counts the family then counts no process that is just ending
        os.waitpid(child, 0)


def forking() -> NoReturn:
    last = time.monotonic() + 600  # a test run that was killed must not leave this behind for ever
    while time.monotonic() < last:
        time.sleep(0.01)
        if os.fork():
            os._exit(0)
    os._exit(0)


def orderly(mark: Path) -> None:
    script = (
        "import signal, sys, time\n"
        f"signal.signal(signal.SIGTERM, lambda *_: (open({str(mark)!r}, 'a').write('child '), sys.exit(0)))\n"
        "print('child ready', flush=True)\n"
        "time.sleep(600)"
    )
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()

    def on_sigterm(*_: object) -> None:
        with mark.open("a") as stream:
            stream.write("main ")
        time.sleep(0.5)
        sys.exit(3)

    signal.signal(signal.SIGTERM, on_sigterm)


def share(mark: Path) -> shared_memory.SharedMemory:
    memory = shared_memory.SharedMemory(create=True, size=4096)
    # a moment passes between its start and when others can see what it is
    tracker = Path(f"/proc/{resource_tracker._resource_tracker._pid}/cmdline")
    while b"resource_tracker" not in tracker.read_bytes():
        time.sleep(0.001)
    mark.write_text(memory.name)
    return memory


def main() -> None:
    kind = sys.argv[1]
    if kind in {"stubborn", "sharing"}:  # before any of them is started, and before it is said that they are there
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if kind == "sharing":
        kept = share(Path(sys.argv[2]))
        fork_sleeper()
    if kind in {"deep", "stubborn", "faceless"}:
        fork_sleeper()
        fork_sleeper(session=True)
        fork_sleeper(session=True, orphan=True, empty=kind == "faceless")
    if kind == "orderly":
        orderly(Path(sys.argv[2]))
    if kind == "forking" and os.fork() == 0:
        os.setsid()
        forking()
    print("ready", flush=True)
    sleep_on()
    del kept  # its memory lives as long as it


if __name__ == "__main__":
    main()
