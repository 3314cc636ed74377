"""The pipes of a program in the sandbox: what goes in, what comes out, and what its launcher says."""

from __future__ import annotations

import json
import os
import select
import subprocess
import time

_ERROR_BYTES = 4096


class Talk:
    """Of one run. output: at most what was allowed; `flooded` where there was more. errors: the end of stderr.

    failed: why the launcher could not start the program. began: time.monotonic() of its start. ended: its wait status.
    """

    def __init__(self, process: subprocess.Popen[bytes], status: int, stdin: bytes, most_bytes: int) -> None:
        assert process.stdin and process.stdout and process.stderr
        self.output = bytearray()
        self.errors = b""
        self.flooded = False
        self.failed: str | None = None
        self.ended: int | None = None
        self.began: float | None = None
        self._most_bytes = most_bytes
        self._said = b""
        self._stdin = memoryview(stdin)
        self._writing = process.stdin
        self._files = {process.stdout.fileno(): self._out, process.stderr.fileno(): self._err, status: self._listen}
        self._status = status
        self._process = process
        os.set_blocking(self._writing.fileno(), False)
        if not stdin:
            self._writing.close()

    def open(self, timeout_s: float) -> bool:
        """Move what is ready within `timeout_s`; False once nothing can come any more."""
        waiting = [] if self._writing.closed else [self._writing.fileno()]
        readable, writable, _ = select.select(list(self._files), waiting, [], timeout_s)
        for descriptor in readable:
            data = os.read(descriptor, 1 << 16)
            if data:
                self._files[descriptor](data)
            else:
                del self._files[descriptor]
        if writable:
            try:
                self._stdin = self._stdin[os.write(self._writing.fileno(), self._stdin[: 1 << 16]) :]
            except BrokenPipeError:
                self._stdin = self._stdin[:0]
            if not self._stdin:
                self._writing.close()
        # what is left in the pipes after the end was said is still read, unless somebody keeps them open
        return bool(self._files) and not (self.ended is not None and not readable)

    def _out(self, data: bytes) -> None:
        room = self._most_bytes - len(self.output)
        self.output += data[:room]
        self.flooded = self.flooded or len(data) > room

    def _err(self, data: bytes) -> None:
        self.errors = (self.errors + data)[-_ERROR_BYTES:]

    def _listen(self, data: bytes) -> None:
        *lines, self._said = (self._said + data).split(b"\n")
        for message in map(json.loads, lines):
            if "started" in message:
                self.began = time.monotonic()
            self.failed = message.get("failed", self.failed)
            self.ended = message.get("ended", self.ended)

    def close(self) -> None:
        """Give the descriptors back."""
        os.close(self._status)
        for stream in (self._writing, self._process.stdout, self._process.stderr):
            if stream is not None:
                stream.close()
