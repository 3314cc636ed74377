"""What a checkpoint is, by its content: the same files give the same answers, wherever they lie."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path

from edgetool.artifacts import atomic_write, sha256_file
from edgetool.checkpoints.checkpoint import CONFIG_NAME, Checkpoint
from edgetool.errors import EdgetoolError
from edgetool.progress import Progress

_MEMO_NAME = "hashes.json"
_PROSE = {".md", ".png", ".jpg", ".gitattributes"}


def identity_of(checkpoint: Checkpoint, cache: Path, progress: Progress) -> str:
    """SHA-256 (64 hex digits) over names and contents of weights, configuration and tokenizer.

    Hashes of files are remembered in `cache` by path, size, times and inode, so that a second look costs no reading.
    """
    files = [checkpoint.directory / CONFIG_NAME, *checkpoint.weight_files, *checkpoint.side_files]
    wanted = sorted(
        {path for path in files if path.suffix.lower() not in _PROSE and "LICENSE" not in path.name.upper()}
    )
    memo = _Memo(cache / _MEMO_NAME)
    found: dict[str, str] = {}
    unknown_bytes = sum(path.stat().st_size for path in wanted if memo.get(path) is None)
    if unknown_bytes:
        with progress.task(f"hash {checkpoint.directory.name}", unknown_bytes, "B") as task:
            for path in wanted:
                if memo.get(path) is None:
                    memo.put(path, sha256_file(path))
                    task.advance(path.stat().st_size)
        memo.save()
    for path in wanted:
        sha256 = memo.get(path)
        found[path.name] = sha256_file(path) if sha256 is None else sha256
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


class _Memo:
    """Hashes by what stat says of a file. Losing it costs reading the files again, nothing else."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, str] = {}
        with contextlib.suppress(OSError, ValueError):
            known = json.loads(path.read_bytes())
            if isinstance(known, dict):
                self._known = {str(key): str(value) for key, value in known.items()}

    def get(self, path: Path) -> str | None:
        return self._known.get(_mark(path))

    def put(self, path: Path, sha256: str) -> None:
        self._known[_mark(path)] = sha256

    def save(self) -> None:
        with contextlib.suppress(OSError, EdgetoolError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(self._path, json.dumps(self._known, indent=0).encode())


def _mark(path: Path) -> str:
    status = path.stat()
    return f"{path.resolve()} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}"
