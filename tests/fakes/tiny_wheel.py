"""A wheel that carries one data file, good enough for pip."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path


def write_tiny_wheel(path: Path, member: str, content: bytes) -> str:
    """Write the wheel `path` (name-version-py3-none-any.whl) with `content` as `member`; returns its sha256."""
    name, version, *_ = path.name.split("-")
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return hashlib.sha256(path.read_bytes()).hexdigest()
