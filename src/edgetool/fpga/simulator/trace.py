"""Every operation of a run as a line of JSON: where it stood, how long it took, and what its values are like."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import TextIO

import torch
from torch import Tensor

from edgetool.artifacts import disk_errors
from edgetool.errors import BadInput
from edgetool.fpga.simulator.interfaces import BoundOp, Call


class JsonlTrace:
    """A Trace that writes to a file, a line an operation, in the order in which they ran.

    Lines have part, layer, number, op, in, out (where the operation has them), position and tokens of the call,
    seconds, shape of the result, and of its finite values min, max and rms; not_finite counts the others (scores that
    the mask leaves out among them).
    """

    def __init__(self, path: Path, *, overwrite: bool = False) -> None:
        self._path = path
        self._overwrite = overwrite
        self._file: TextIO | None = None

    def __enter__(self) -> JsonlTrace:
        """Raises BadInput where the file is there already (without `overwrite`) or cannot be written."""
        if not self._path.parent.is_dir():
            raise BadInput(f"{self._path.parent}: no such directory")
        try:
            with disk_errors(self._path):
                self._file = self._path.open("w" if self._overwrite else "x", encoding="utf-8")
        except FileExistsError:
            raise BadInput(f"{self._path}: exists already", "add --overwrite to replace it") from None
        except IsADirectoryError:
            raise BadInput(f"{self._path}: is a directory; a trace is a file") from None
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._file is not None:
            self._file.close()

    def step(self, op: BoundOp, call: Call, result: Tensor | None, seconds: float) -> None:
        assert self._file is not None, "a trace is used in a with block"
        ends = {key: op.fields[key] for key in ("in", "out", "weight") if key in op.fields}
        line = {"part": op.part, "layer": op.layer, "number": op.number, "op": op.kind, **ends}
        line |= {"position": call.position, "tokens": call.tokens, "seconds": round(seconds, 7)}
        with disk_errors(self._path):
            self._file.write(json.dumps(line | ({} if result is None else _values(result))) + "\n")


def _values(result: Tensor) -> dict[str, object]:
    values = result.double()
    finite = values[torch.isfinite(values)]
    shown: dict[str, object] = {"shape": list(result.shape), "not_finite": values.numel() - finite.numel()}
    if finite.numel():
        shown |= {"min": float(finite.min()), "max": float(finite.max()), "rms": float(finite.square().mean().sqrt())}
    return shown
