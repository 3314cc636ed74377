"""manifest.json: what an image says of itself, made from a plan. docs/image-format.md describes every key."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from edgetool.fpga.compiler import Draft
from edgetool.fpga.hardware import VCU128
from edgetool.fpga.image_format import DDR_NAME, EMBEDDING_NAME, FORMAT, PROGRAM_NAME, VERSION, hbm_name
from edgetool.fpga.program import NUMERICS
from edgetool.fpga.weights import HalfMatrix, Matrix, PackedMatrix


def segments_of(draft: Draft) -> list[dict[str, Any]]:
    """Every binary file with its place, without hashes: the 32 PCs, DDR, and the embedding on the host."""
    size = draft.hbm.weights_bytes_per_pc
    segments: list[dict[str, Any]] = [
        {"space": "hbm", "pc": pc, "addr": 0, "bytes": size, "file": hbm_name(pc)}
        for pc in range(VCU128.pseudo_channels)
    ]
    segments.append(
        {"space": "ddr", "pc": None, "addr": VCU128.ddr_base, "bytes": draft.ddr.file_bytes, "file": DDR_NAME}
    )
    sizes = draft.model.sizes
    embedding = 2 * sizes.vocab * sizes.hidden
    segments.append({"space": "host", "pc": None, "addr": 0, "bytes": embedding, "file": EMBEDDING_NAME})
    return segments


def tensor_record(matrix: Matrix, draft: Draft) -> dict[str, Any]:
    """One matrix in HBM."""
    linear, layout = matrix.linear, matrix.layout
    record: dict[str, Any] = {
        "name": linear.name,
        "role": linear.role,
        "N": layout.n,
        "K": layout.k,
        "Np": layout.padded_n,
        "Kp": layout.padded_k,
        "group": layout.group,
        "dtype": "fp16" if isinstance(matrix, HalfMatrix) else "int4",
        "zeros": layout.zeros,
        "addr": draft.hbm.addresses[linear.name],
        "bytes_per_pc": layout.port_bytes,
        "source": {
            "module": linear.module,
            "rows": [linear.start, linear.start + linear.n],
            "as": "stored" if isinstance(matrix, PackedMatrix) else "fp16" if layout.group == 0 else "rounded",
        },
    }
    perm = {
        "columns": draft.orders.columns_from.get(linear.name),
        "rows": draft.orders.rows_from.get(linear.name),
    }
    if any(perm.values()):
        record["perm"] = perm
    return record


def manifest_of(draft: Draft, source: Mapping[str, str], segments: list[dict[str, Any]], tokenizer: Mapping[str, str],
                program_sha256: str) -> dict[str, Any]:  # fmt: skip
    """The whole document. source: input file -> sha256. segments: with their hashes. tokenizer: file -> sha256."""
    hbm, ddr = draft.hbm, draft.ddr
    return {
        "format": FORMAT,
        "version": list(VERSION),
        "profile": draft.settings.profile,
        "int4_encoding": draft.settings.int4,
        "numerics": NUMERICS,
        "hardware": VCU128.to_dict(),
        "model": draft.model.to_dict(),
        "source": {"sha256": dict(sorted(source.items())), "format": draft.found.format},
        "segments": segments,
        "tensors": [tensor_record(matrix, draft) for matrix in draft.matrices],
        "constants": [
            {
                "name": constant.name,
                "role": constant.role,
                "source": constant.source,
                "dtype": constant.dtype,
                "shape": list(constant.shape),
                "addr": constant.addr,
                "bytes": constant.bytes,
            }
            for constant in ddr.constants
        ],
        "embedding": {
            "file": EMBEDDING_NAME,
            "source": draft.model.embedding,
            "dtype": "float16",
            "shape": [draft.model.sizes.vocab, draft.model.sizes.hidden],
        },
        "kv": hbm.kv.to_dict(draft.max_context),
        "program": {"file": PROGRAM_NAME, "sha256": program_sha256},
        "tokenizer": dict(sorted(tokenizer.items())),
        "memory": memory_of(draft),
        "estimate": draft.estimate,
    }


def memory_of(draft: Draft) -> dict[str, Any]:
    """What is used of HBM and DDR."""
    hbm, ddr = draft.hbm, draft.ddr
    return {
        "hbm_bytes_per_pc": [hbm.bytes_per_pc] * VCU128.pseudo_channels,
        "weights_bytes_per_pc": hbm.weights_bytes_per_pc,
        "kv_bytes_per_pc": hbm.kv.bytes_per_pc,
        "free_bytes_per_pc": VCU128.pc_bytes - hbm.bytes_per_pc,
        "largest_context": hbm.largest_context,
        "read_bytes_by_role": _read_bytes(draft),
        "weight_read_bytes_per_token": hbm.weight_read_bytes,
        "kv_bytes_per_token": hbm.kv_bytes_per_token,
        "ddr_constants_bytes": ddr.file_bytes,
        "ddr_bytes": ddr.bytes,
        "host_bytes": 2 * draft.model.sizes.vocab * draft.model.sizes.hidden,
    }


def _read_bytes(draft: Draft) -> dict[str, int]:
    """Role -> bytes that all its matrices together take to be read once, for one token."""
    sums: dict[str, int] = {}
    for matrix in draft.matrices:
        sums[matrix.linear.role] = sums.get(matrix.linear.role, 0) + matrix.layout.read_bytes
    return sums


def json_bytes(document: Mapping[str, Any]) -> bytes:
    """The one spelling of a document, so that equal content is equal bytes."""
    return json.dumps(document, indent=1, sort_keys=True, ensure_ascii=True, allow_nan=False).encode() + b"\n"
