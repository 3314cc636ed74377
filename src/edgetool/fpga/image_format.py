"""Names and numbers that make a directory an image; docs/image-format.md is normative. Shared by writer and readers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgetool.fpga.layout import MatrixLayout

FORMAT = "edgetool-vcu128"
VERSION = (1, 0)
MANIFEST_NAME = "manifest.json"
PROGRAM_NAME = "program.json"
DDR_NAME = "ddr.bin"
EMBEDDING_NAME = "host/embed.f16.bin"
TOKENIZER_DIRECTORY = "tokenizer"
REPORT_NAME = "report.html"


def hbm_name(pc: int) -> str:
    """The file of one pseudo-channel."""
    return f"hbm/pc{pc:02d}.bin"


def layout_of(record: Mapping[str, Any]) -> MatrixLayout:
    """The layout of a tensor of a manifest."""
    return MatrixLayout(record["N"], record["K"], record["group"], record["zeros"])
