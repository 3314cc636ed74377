"""Images changed on purpose, in a copy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from edgetool.fpga.image import Image


def with_constant(directory: Path, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Replace the first row of a constant in DDR by what `change` makes of it."""
    record = Image.open(directory).constants[name]
    data = np.fromfile(directory / "ddr.bin", dtype=np.uint8)
    start = record["addr"] - 0x2_0000_0000
    values = data[start : start + record["bytes"]].view(record["dtype"]).reshape(record["shape"])
    values[0] = change(values[0])
    data.tofile(directory / "ddr.bin")


def with_byte(directory: Path, pc: int, address: int, flip: int) -> None:
    """Flip bits of one byte of a pseudo-channel."""
    path = directory / "hbm" / f"pc{pc:02d}.bin"
    data = bytearray(path.read_bytes())
    data[address] ^= flip
    path.write_bytes(data)


def with_manifest(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = directory / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def with_program(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the program, and its hash with it."""
    import hashlib

    path = directory / "program.json"
    program = json.loads(path.read_text())
    change(program)
    path.write_text(json.dumps(program))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    with_manifest(directory, lambda manifest: manifest["program"].update(sha256=digest))
