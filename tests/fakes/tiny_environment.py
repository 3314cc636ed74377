"""An environment that installs in seconds and without a network, made from wheels that tests write.

As a script it is `edgetool` with one more environment, `tiny`, whose list is the file named by TINY_LIST; a second
installer waits for TINY_WAIT_S seconds instead of ten, and with TINY_VENV the empty environment is a copy of that one.
"""

from __future__ import annotations

import os
import sys
import tarfile
import zipfile
from io import BytesIO
from pathlib import Path

from edgetool.backends import environments, installer

_BACKEND = """
import pathlib, time, zipfile

def build_wheel(directory, config_settings=None, metadata_directory=None):
    pathlib.Path({started!r}).touch()
    while not pathlib.Path({go!r}).exists():
        time.sleep(0.05)
    name = "slow_tool-1.0-py3-none-any.whl"
    with zipfile.ZipFile(pathlib.Path(directory) / name, "w") as archive:
        for member, text in {members!r}.items():
            archive.writestr(member, text)
    return name
"""


def wheel_members(name: str, version: str, source: str) -> dict[str, str]:
    info = f"{name}-{version}.dist-info"
    members = {
        f"{name}.py": source,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{member},,\n" for member in [*members, f"{info}/RECORD"])
    return {**members, f"{info}/RECORD": record}


def write_wheel(directory: Path, name: str, version: str, source: str = "", filling_bytes: int = 0) -> None:
    """A wheel with one module, and with a file of `filling_bytes` if that is wanted."""
    directory.mkdir(exist_ok=True)
    with zipfile.ZipFile(directory / f"{name}-{version}-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as archive:
        for member, text in wheel_members(name, version, source).items():
            archive.writestr(member, text)
        if filling_bytes:
            archive.writestr(f"{name}_data.bin", bytes(filling_bytes))


def write_slow_sdist(directory: Path, started: Path, go: Path) -> None:
    """slow_tool 1.0: its build touches `started` and ends when `go` is there; it needs nothing to build."""
    directory.mkdir(exist_ok=True)
    files = {
        "pyproject.toml": '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n',
        "backend.py": _BACKEND.format(started=str(started), go=str(go), members=wheel_members("slow_tool", "1.0", "")),
        "PKG-INFO": "Metadata-Version: 2.1\nName: slow_tool\nVersion: 1.0\n",
    }
    with tarfile.open(directory / "slow_tool-1.0.tar.gz", "w:gz") as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(f"slow_tool-1.0/{name}")
            member.size = len(text)
            archive.addfile(member, BytesIO(text.encode()))


def recipe(requirements: Path, module: str = "tiny_tool") -> environments.Recipe:
    """The environment `tiny`."""
    return environments.Recipe(
        "tiny", "tests", module, ((3, 11), (3, 14)), cuda=None, disk_bytes=1, first=None, requirements=requirements
    )


if __name__ == "__main__":
    from edgetool.cli import app

    environments.RECIPES["tiny"] = recipe(Path(os.environ["TINY_LIST"]))
    if "TINY_VENV" in os.environ:
        template = os.environ["TINY_VENV"]
        installer.venv_command = lambda base, place: ["cp", "-a", template, place]
    installer._LOCK_WAIT_S = float(os.environ.get("TINY_WAIT_S", "10"))
    app(sys.argv[1:], prog_name="edgetool")
