"""A real server of edgetool as a child process, and everything that belongs to it, found without edgetool's help."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import psutil

from tests import documents
from tests.fakes.worker_ports import worker_ports

MARK = "SERVED_BY_TEST"
"""Environment variable that every process below inherits."""


class Served:
    """Started at once; `ready()` waits for its document. As a context manager it leaves nothing behind.

    `command`: serve-gpu, serve-fpga or fpga-host.
    """

    def __init__(
        self,
        directory: Path,
        *arguments: str,
        key: str | None = "k",
        env: dict[str, str] | None = None,
        command: str = "serve-gpu",
    ):
        self.mark = uuid.uuid4().hex
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self.errors = directory / "stderr.txt"
        self.output = directory / "stdout.txt"
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("EDGETOOL_", "COV_"))}
        self.environment = {
            **kept,
            "XDG_STATE_HOME": str(directory / "state"),
            "EDGETOOL_LOCK_DIR": str(directory / "locks"),
            "EDGETOOL_SCHEDULER_PORT_RANGE": "{}-{}".format(*worker_ports(20_000, 500, 12)),
            "OMP_NUM_THREADS": "1",
            MARK: self.mark,
            **({"EDGETOOL_API_KEY": key} if key else {}),
            **(env or {}),
        }
        with self.output.open("wb") as out, self.errors.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "edgetool", command, *arguments, "--json"],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
            )

    def ready(self, limit_s: float = 600.0) -> dict[str, Any]:
        """Its document."""
        until = time.monotonic() + limit_s
        while time.monotonic() < until:
            text = self.output.read_text()
            if text.endswith("}\n"):
                documents.look(text)
                document: dict[str, Any] = json.loads(text)
                assert document["ok"], document
                return document
            assert self.process.poll() is None, self.said()
            time.sleep(0.05)
        raise AssertionError(f"not ready: {self.said()}")

    def wait_or_ready(self) -> dict[str, Any] | None:
        """Its document once it is ready, None when it ended instead."""
        while self.process.poll() is None:
            if self.output.read_text().endswith("}\n"):
                break
            time.sleep(0.05)
        documents.look(self.output.read_text())
        document: dict[str, Any] = json.loads(self.output.read_text())
        return document if document["ok"] else None

    def said(self) -> str:
        return self.output.read_text() + self.errors.read_text()

    def edgetool(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Another edgetool command in the same surroundings."""
        return subprocess.run(
            [sys.executable, "-m", "edgetool", *arguments],
            env={name: value for name, value in self.environment.items() if name != MARK},
            capture_output=True,
            text=True,
            timeout=120,
        )

    def processes(self) -> list[psutil.Process]:
        """All that run and carry the mark, or work under a lease that is in this server's own lock directory."""
        leases = {path.stem.removeprefix("lease-") for path in (self.directory / "locks").glob("lease-*.json")}
        found = []
        for process in psutil.process_iter():
            try:
                environment = process.environ()
                status = process.status()
            except psutil.Error:
                continue
            lease = environment.get("EDGETOOL_LEASE", "")
            if status != psutil.STATUS_ZOMBIE and (environment.get(MARK) == self.mark or lease in leases - {""}):
                found.append(process)
        return found

    def left(self, limit_s: float = 60.0) -> list[str]:
        """What still runs after at most `limit_s`, as command lines."""
        until = time.monotonic() + limit_s
        while (found := self.processes()) and time.monotonic() < until:
            time.sleep(0.05)
        return [" ".join(process.cmdline())[:120] for process in found]

    def wait(self, limit_s: float = 60.0) -> int:
        return self.process.wait(limit_s)

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(60)
        for process in self.processes():
            process.kill()


def is_free(port: int, limit_s: float = 60.0) -> bool:
    """Whether the port can be bound, by a server that lets connections linger as servers do.

    Schedulers of other tests try ports too, for a moment each.
    """
    deadline = time.monotonic() + limit_s
    while True:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
                return True
            except OSError:
                if time.monotonic() > deadline:
                    return False
        time.sleep(0.05)


def leases(served: Served) -> list[dict[str, Any]]:
    """The ports that `edgetool gpus` shows as leased."""
    done = served.edgetool("gpus", "--json")
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout)["ports"])
