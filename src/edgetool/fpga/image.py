"""An image opened for reading: every claim of its manifest is checked before anything is believed.

Shared by inspect, diff, extract, verify, push and the simulator; the compiler's code is not used here, only its records
(hardware, layout, names). docs/image-format.md is normative.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetool.artifacts import sha256_file
from edgetool.checkpoints.checkpoint import read_json_object
from edgetool.errors import BadInput, VerificationFailed
from edgetool.fpga.image_checks import check_manifest, check_path, check_version
from edgetool.fpga.image_format import MANIFEST_NAME, PROGRAM_NAME
from edgetool.fpga.program import check_program

Array = npt.NDArray[Any]

_AGAIN = "compile it again, or fetch it again: the image is damaged"


@dataclass(frozen=True)
class Image:
    """A checked image. `manifest` and `program` are the documents as they are."""

    directory: Path
    manifest: Mapping[str, Any]
    program: Mapping[str, Any]

    @classmethod
    def open(cls, directory: Path, *, hashes: bool = False, jobs: int = 1) -> Image:
        """Read and check manifest, program and the sizes of all files; with `hashes` every byte too.

        Raises BadInput for what is missing, does not fit together or is of an unknown version, VerificationFailed for a
        file whose SHA-256 is another.
        """
        if not directory.is_dir():
            raise BadInput(f"{directory}: " + ("not a directory" if directory.exists() else "no such directory"))
        if not (directory / MANIFEST_NAME).is_file():
            raise BadInput(
                f"{directory}: no {MANIFEST_NAME}: not a compiled image",
                f"edgetool compile-vcu128 CHECKPOINT -o {directory}",
            )
        manifest = read_json_object(directory / MANIFEST_NAME)
        where = str(directory / MANIFEST_NAME)
        check_version(where, manifest)
        try:
            check_manifest(where, manifest)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            what = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) and error.args else str(error)
            raise BadInput(f"{where}: {what}", _AGAIN) from None
        for name, size in _files(manifest).items():
            _check_file(directory, name, size)
        image = cls(directory, manifest, _program(directory, manifest))
        if hashes:
            image.check_hashes(jobs)
        return image

    @property
    def encoding(self) -> str:
        return str(self.manifest["int4_encoding"])

    @property
    def tensors(self) -> dict[str, Mapping[str, Any]]:
        """Name -> record of every matrix in HBM."""
        return {record["name"]: record for record in self.manifest["tensors"]}

    @property
    def constants(self) -> dict[str, Mapping[str, Any]]:
        """Name -> record of every array in DDR."""
        return {record["name"]: record for record in self.manifest["constants"]}

    def check_hashes(self, jobs: int = 1) -> int:
        """Compare the SHA-256 of every file with the manifest; returns how many. Raises VerificationFailed."""
        expected = {segment["file"]: segment["sha256"] for segment in self.manifest["segments"]}
        expected[PROGRAM_NAME] = self.manifest["program"]["sha256"]
        expected |= {f"tokenizer/{name}": digest for name, digest in self.manifest["tokenizer"].items()}
        with ThreadPoolExecutor(max(1, jobs)) as pool:
            found = dict(
                zip(expected, pool.map(lambda name: sha256_file(self.directory / name), expected), strict=True)
            )
        for name, digest in expected.items():
            if found[name] != digest:
                raise VerificationFailed(f"{self.directory / name}: SHA-256 is {found[name]}, must be {digest}", _AGAIN)
        return len(expected)

    def port(self, pc: int) -> Array:
        """The bytes of a pseudo-channel, mapped read-only: uint8 [bytes]."""
        segment = next(one for one in self.manifest["segments"] if one["space"] == "hbm" and one["pc"] == pc)
        return np.memmap(self.directory / segment["file"], dtype=np.uint8, mode="r", shape=(segment["bytes"],))

    def constant(self, name: str) -> Array:
        """An array of DDR, in the dtype and shape of its record."""
        if name not in self.constants:
            raise BadInput(f"{self.directory}: no constant {name!r} in this image")
        record = self.constants[name]
        segment = next(one for one in self.manifest["segments"] if one["space"] == "ddr")
        with (self.directory / segment["file"]).open("rb") as file:
            file.seek(record["addr"] - segment["addr"])
            raw = file.read(record["bytes"])
        return np.frombuffer(raw, dtype=np.dtype(record["dtype"]).newbyteorder("<")).reshape(record["shape"])

    def tensor(self, name: str) -> Mapping[str, Any]:
        """The record of a matrix by its name, or by the module of the checkpoint where that is one matrix only.

        Raises BadInput naming what there is.
        """
        if name in self.tensors:
            return self.tensors[name]
        module = name.removesuffix(".weight")
        found: list[Mapping[str, Any]]
        found = [one for one in self.manifest["tensors"] if one["source"]["module"] == module]
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(record["name"] for record in found)
            raise BadInput(f"{name!r} is several matrices of the image: {names}", "name one of them")
        near = get_close_matches(name, list(self.tensors), 1)
        hint = f"did you mean {near[0]}?" if near else "edgetool compile-vcu128 --inspect IMAGE lists all"
        raise BadInput(f"no tensor {name!r} in {self.directory}", hint)


def _files(manifest: Mapping[str, Any]) -> dict[str, int | None]:
    """File -> bytes (None: any) of everything the manifest names."""
    files: dict[str, int | None] = {segment["file"]: segment["bytes"] for segment in manifest["segments"]}
    try:
        if manifest["program"]["file"] != PROGRAM_NAME:
            raise BadInput(f"{MANIFEST_NAME}: program is {manifest['program']['file']!r}, not {PROGRAM_NAME!r}")
        files[PROGRAM_NAME] = None
        for name in manifest["tokenizer"]:
            check_path("tokenizer", name)
            files[f"tokenizer/{name}"] = None
    except (KeyError, TypeError) as error:
        raise BadInput(f"{MANIFEST_NAME}: {error} is missing or of a wrong kind", _AGAIN) from None
    return files


def _check_file(directory: Path, name: str, size: int | None) -> None:
    path = directory / name
    if not path.is_file():
        raise BadInput(f"{path}: missing", _AGAIN)
    if not path.resolve().is_relative_to(directory.resolve()):
        raise BadInput(f"{path}: is a link that leads out of the image")
    if size is not None and path.stat().st_size != size:
        raise BadInput(f"{path}: {path.stat().st_size} bytes; the manifest says {size}", _AGAIN)


def _program(directory: Path, manifest: Mapping[str, Any]) -> Mapping[str, Any]:
    raw = (directory / PROGRAM_NAME).read_bytes()
    digest = hashlib.sha256(raw).hexdigest()
    if digest != manifest["program"]["sha256"]:
        said = manifest["program"]["sha256"]
        raise VerificationFailed(f"{directory / PROGRAM_NAME}: SHA-256 is {digest}, must be {said}", _AGAIN)
    try:
        document = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{directory / PROGRAM_NAME}: not valid JSON: {error}", _AGAIN) from None
    weights = {record["name"] for record in manifest["tensors"]}
    constants = {record["name"] for record in manifest["constants"]}
    if not isinstance(document, dict):
        raise BadInput(f"{directory / PROGRAM_NAME}: must hold a JSON object", _AGAIN)
    check_program(document, weights, constants)
    return document
