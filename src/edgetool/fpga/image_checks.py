"""Everything in a manifest that can be wrong by itself: versions, shapes, addresses, overlaps, paths that escape."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from edgetool.errors import BadInput
from edgetool.fpga.hardware import VCU128, align_up
from edgetool.fpga.image_format import FORMAT, VERSION, layout_of
from edgetool.fpga.layout import ENCODINGS

_CONSTANT_ROLES = ("norm", "bias", "order", "table")


def check_version(where: str, manifest: Mapping[str, Any]) -> None:
    if manifest.get("format") != FORMAT:
        raise BadInput(f"{where}: format is {manifest.get('format')!r}, not {FORMAT!r}")
    version = manifest.get("version")
    if not isinstance(version, list) or len(version) != 2 or not all(type(part) is int for part in version):
        raise BadInput(f"{where}: version is {version!r}; must be two whole numbers")
    if version[0] != VERSION[0]:
        raise BadInput(
            f"{where}: image version {version[0]}.{version[1]}; this edgetool reads version {VERSION[0]}",
            "compile the checkpoint again with this edgetool, or use the edgetool that wrote it",
        )


def check_manifest(where: str, manifest: Mapping[str, Any]) -> None:
    """Everything in the manifest that can be wrong by itself."""
    if manifest["int4_encoding"] not in ENCODINGS:
        raise BadInput(f"{where}: unknown int4_encoding {manifest['int4_encoding']!r}")
    hardware = manifest["hardware"]
    for key, value in VCU128.to_dict().items():
        if key in ("pseudo_channels", "pc_bytes", "ddr_base", "ddr_bytes", "axi_beat_bytes") and hardware[key] != value:
            raise BadInput(f"{where}: hardware.{key} is {hardware[key]!r}; this edgetool knows boards with {value}")
    segments = manifest["segments"]
    ports = sorted(one["pc"] for one in segments if one["space"] == "hbm")
    if ports != list(range(VCU128.pseudo_channels)):
        raise BadInput(f"{where}: HBM segments are of PCs {ports}; there must be one for each of 0 .. 31")
    files = [one["file"] for one in segments]
    if len(set(files)) != len(files):
        raise BadInput(f"{where}: two segments name one file")
    for segment in segments:
        _check_segment(where, segment)
    for space, name in (("ddr", "DDR"), ("host", "host")):
        if sum(one["space"] == space for one in segments) != 1:
            raise BadInput(f"{where}: there must be exactly one {name} segment")
    _check_model(f"{where}: model", manifest["model"])
    digest, profile = manifest["program"]["sha256"], manifest["profile"]
    if not isinstance(digest, str) or not isinstance(profile, str):
        raise BadInput(f"{where}: profile is {profile!r}, and the program's sha256 {digest!r}")
    if not isinstance(manifest["tokenizer"], dict):
        raise BadInput(f"{where}: tokenizer must be a table of files and their sha256")
    _check_tensors(where, manifest)
    _check_constants(where, manifest)


def _check_model(label: str, model: Mapping[str, Any]) -> None:
    if not isinstance(model["family"], str):
        raise BadInput(f"{label}: family is {model['family']!r}")
    ends, begin = model.get("eos_token_ids"), model.get("bos_token_id")
    if not isinstance(ends or [], list) or not all(type(one) is int for one in [*(ends or []), begin or 0]):
        raise BadInput(f"{label}: eos_token_ids {ends!r} and bos_token_id {begin!r} must be whole numbers")


def _check_segment(where: str, segment: Mapping[str, Any]) -> None:
    label = f"{where}: segment {segment['file']!r}"
    check_path(label, segment["file"])
    start, size = _natural(label, segment, "addr"), _natural(label, segment, "bytes")
    space = segment["space"]
    if space not in ("hbm", "ddr", "host"):
        raise BadInput(f"{label}: unknown space {space!r}")
    if space == "hbm" and (start != 0 or size > VCU128.pc_bytes):
        raise BadInput(
            f"{label}: bytes {start} .. {start + size} are outside a PC of {VCU128.pc_bytes} B, or start after 0"
        )
    if space == "ddr" and (start != VCU128.ddr_base or start + size > VCU128.ddr_end):
        raise BadInput(f"{label}: {start:#x} .. {start + size:#x} is outside DDR")
    digest = segment["sha256"]
    if not isinstance(digest, str) or len(digest) != 64:
        raise BadInput(f"{label}: sha256 is {digest!r}")


def _check_tensors(where: str, manifest: Mapping[str, Any]) -> None:
    size = min(one["bytes"] for one in manifest["segments"] if one["space"] == "hbm")
    names: set[str] = set()
    spans: list[tuple[int, int, str]] = []
    for record in manifest["tensors"]:
        label = f"{where}: tensor {record['name']!r}"
        if record["name"] in names:
            raise BadInput(f"{label} is there twice")
        names.add(record["name"])
        if not isinstance(record["role"], str):
            raise BadInput(f"{label}: role is {record['role']!r}")
        _check_rows(label, record["source"])
        for key in ("N", "K"):
            if _natural(label, record, key) < 1:
                raise BadInput(f"{label}: {key} is {record[key]}")
        if record["group"] not in (0, 32, 64, 128) or not isinstance(record["zeros"], bool):
            raise BadInput(f"{label}: group {record['group']!r} with zeros {record['zeros']!r}")
        if (record["dtype"], record["group"] == 0) not in (("int4", False), ("fp16", True)):
            raise BadInput(f"{label}: dtype {record['dtype']!r} with group {record['group']}")
        layout = layout_of(record)
        said = (record["Np"], record["Kp"], record["bytes_per_pc"])
        right = (layout.padded_n, layout.padded_k, layout.port_bytes)
        if said != right:
            raise BadInput(f"{label}: Np, Kp, bytes_per_pc are {said}; its N, K and group give {right}")
        start = _natural(label, record, "addr")
        if start % VCU128.hbm_alignment_bytes:
            raise BadInput(f"{label}: address {start:#x} is not a multiple of {VCU128.hbm_alignment_bytes:#x}")
        if start + layout.port_bytes > size:
            raise BadInput(f"{label}: ends at {start + layout.port_bytes:#x}, beyond its segment ({size:#x})")
        spans.append((start, start + layout.port_stride, label))
    kv = manifest["kv"]
    layers = _natural(f"{where}: model", manifest["model"], "layers")
    start = _natural(f"{where}: kv", kv, "base")
    end = start + layers * _natural(f"{where}: kv", kv, "bytes_per_pc_layer")
    if end > VCU128.pc_bytes:
        raise BadInput(f"{where}: the KV cache ends at {end:#x}, beyond a PC of {VCU128.pc_bytes:#x} B")
    if _natural(f"{where}: kv", kv, "max_ctx") > _natural(f"{where}: kv", kv, "capacity_tokens"):
        raise BadInput(f"{where}: kv.max_ctx {kv['max_ctx']} is over its capacity {kv['capacity_tokens']}")
    _refuse_overlap([*spans, (start, end, f"{where}: the KV cache")])


def _check_rows(label: str, source: Mapping[str, Any]) -> None:
    first, last = source["rows"]
    whole = type(first) is int and type(last) is int and 0 <= first < last
    if not isinstance(source["module"], str) or not isinstance(source["as"], str) or not whole:
        raise BadInput(f"{label}: source is {dict(source)!r}; must be module, rows and as")


def _check_constants(where: str, manifest: Mapping[str, Any]) -> None:
    (ddr,) = [one for one in manifest["segments"] if one["space"] == "ddr"]
    spans = []
    names: set[str] = set()
    matrices = {record["name"] for record in manifest["tensors"]}
    for record in manifest["constants"]:
        label = f"{where}: constant {record['name']!r}"
        if record["name"] in names:
            raise BadInput(f"{label} is there twice")
        names.add(record["name"])
        if record["role"] not in _CONSTANT_ROLES:
            raise BadInput(f"{label}: unknown role {record['role']!r}")
        if record["role"] == "bias" and record["name"].removesuffix(".bias") not in matrices:
            raise BadInput(f"{label} is the bias of no tensor")
        _check_source(label, record["source"], needed=record["role"] == "norm")
        if record["dtype"] not in ("float16", "int32", "uint32"):
            raise BadInput(f"{label}: unknown dtype {record['dtype']!r}")
        size = int(np.dtype(record["dtype"]).itemsize)
        for length in record["shape"]:
            if type(length) is not int or length < 0:
                raise BadInput(f"{label}: shape {record['shape']!r}")
            size *= length
        start = _natural(label, record, "addr")
        if _natural(label, record, "bytes") != size:
            raise BadInput(f"{label}: {record['bytes']} bytes; its dtype and shape give {size}")
        if start < ddr["addr"] or start + size > ddr["addr"] + ddr["bytes"]:
            raise BadInput(f"{label}: {start:#x} .. {start + size:#x} is outside its segment")
        spans.append((start, align_up(start + size, VCU128.ddr_alignment_bytes), label))
    _refuse_overlap(spans)
    embedding = manifest["embedding"]
    rows, width = embedding["shape"]
    _check_source(f"{where}: embedding", embedding["source"], needed=True)
    (host,) = [one for one in manifest["segments"] if one["space"] == "host"]
    if embedding["file"] != host["file"] or host["bytes"] != 2 * rows * width:
        raise BadInput(f"{where}: embedding {embedding['shape']} does not fit segment {host['file']!r}")


def _check_source(label: str, name: Any, *, needed: bool) -> None:
    if not isinstance(name, str) and (needed or name is not None):
        raise BadInput(f"{label}: source is {name!r}; must be the name of a tensor{'' if needed else ' or null'}")


def _refuse_overlap(spans: list[tuple[int, int, str]]) -> None:
    last_end, last_label = 0, ""
    for start, end, label in sorted(spans):
        if start < last_end:
            raise BadInput(f"{label} overlaps {last_label.rpartition(': ')[2]}")
        last_end, last_label = end, label


def _natural(label: str, record: Mapping[str, Any], key: str) -> int:
    value = record[key]
    if type(value) is not int or not 0 <= value < 1 << 62:
        raise BadInput(f"{label}: {key} is {value!r}; must be a whole number of at least 0")
    return value


def check_path(label: str, name: Any) -> None:
    """A relative path below the image, spelled plainly: nothing outside may be read, hashed or written to a board."""
    if not isinstance(name, str) or not name or "\\" in name or "\0" in name:
        raise BadInput(f"{label}: {name!r} is no file name")
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or str(path) != name:
        raise BadInput(f"{label}: {name!r} leads out of the image")
