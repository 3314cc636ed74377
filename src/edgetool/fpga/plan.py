"""Where everything lies: weights and KV cache in HBM, constants and activations in DDR. Refuses what does not fit.

All PCs are laid out alike, so one plan of 256 MiB stands for all 32. In order: each layer's q, k, v, o, gate, up, down,
then lm_head, then the KV cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgetool.errors import BadInput
from edgetool.fpga.hardware import VCU128, Hardware, align_up
from edgetool.fpga.layout import MatrixLayout
from edgetool.fpga.model import ROLES, Sizes

CONTEXT_STEP_TOKENS = 16
"""The KV cache holds a multiple of this many tokens: 16 fp16 values of one channel fill a beat."""

LARGEST_CHUNK_TOKENS = 512
"""Tokens of a prompt that go through the layers at once; halved until the activations fit into DDR."""

_SMALLEST_CHUNK_TOKENS = 16


def matrix_layouts(
    sizes: Sizes, group: int, *, zeros: bool = False, lm_head_group: int | None = None, lm_head_zeros: bool = False
) -> list[tuple[str, MatrixLayout]]:
    """(name, layout) of all matrices in the order of HBM. lm_head_group: its own group (0: fp16), else `group`."""
    layouts = [
        (f"layers.{layer}.{role}", MatrixLayout(*sizes.shapes[role], group, zeros))
        for layer in range(sizes.layers)
        for role in ROLES
    ]
    head = group if lm_head_group is None else lm_head_group
    return [*layouts, ("lm_head", MatrixLayout(sizes.vocab, sizes.hidden, head, lm_head_zeros))]


@dataclass(frozen=True)
class KvPlan:
    """The KV cache of each PC: for each layer a region of keys, then one of values, at `base`."""

    base: int
    capacity_tokens: int
    region_bytes: int
    layers: int

    @property
    def bytes_per_pc_layer(self) -> int:
        return 2 * self.region_bytes

    @property
    def bytes_per_pc(self) -> int:
        return self.layers * self.bytes_per_pc_layer

    def address(self, layer: int, values: bool) -> int:
        """Of a layer's keys, or of its values."""
        return self.base + layer * self.bytes_per_pc_layer + (self.region_bytes if values else 0)

    def to_dict(self, max_context: int) -> dict[str, Any]:
        return {
            "base": self.base,
            "bytes_per_pc_layer": self.bytes_per_pc_layer,
            "bytes_per_pc_region": self.region_bytes,
            "max_ctx": max_context,
            "capacity_tokens": self.capacity_tokens,
        }


@dataclass(frozen=True)
class HbmPlan:
    """What each PC holds. addresses: byte offset in every PC of each matrix, in order."""

    addresses: dict[str, int]
    weights_bytes_per_pc: int
    kv: KvPlan
    max_context: int
    largest_context: int
    """Tokens for which the rest of HBM has room."""
    weight_read_bytes: int
    """Read from all PCs for one token."""
    kv_bytes_per_token: int
    """What one more token of context takes, and what decoding reads for it, in all PCs."""
    reserve_bytes_per_pc: int

    @property
    def bytes_per_pc(self) -> int:
        return self.weights_bytes_per_pc + self.kv.bytes_per_pc + self.reserve_bytes_per_pc


def kv_bytes_per_token(sizes: Sizes) -> int:
    """fp16 keys and values of all layers."""
    return sizes.layers * 2 * 2 * sizes.kv_heads * sizes.head_dim


def plan_hbm(
    layouts: Sequence[tuple[str, MatrixLayout]],
    sizes: Sizes,
    max_context: int,
    *,
    reserve_bytes_per_pc: int = 0,
    hardware: Hardware = VCU128,
) -> HbmPlan:
    """Give every matrix and the KV cache its place. Raises BadInput with the numbers where a PC is too small."""
    addresses: dict[str, int] = {}
    end = 0
    for name, layout in layouts:
        addresses[name] = end
        end += layout.port_stride
    per_token = kv_bytes_per_token(sizes)
    free = hardware.pc_bytes - end - reserve_bytes_per_pc
    per_token_pc = per_token // hardware.pseudo_channels
    largest = max(0, free // per_token_pc) // CONTEXT_STEP_TOKENS * CONTEXT_STEP_TOKENS
    capacity = align_up(max_context, CONTEXT_STEP_TOKENS)
    region = capacity * 2 * sizes.kv_heads * sizes.head_dim // hardware.pseudo_channels
    plan = HbmPlan(
        addresses=addresses,
        weights_bytes_per_pc=end,
        kv=KvPlan(end, capacity, region, sizes.layers),
        max_context=max_context,
        largest_context=largest,
        weight_read_bytes=sum(layout.read_bytes for _, layout in layouts),
        kv_bytes_per_token=per_token,
        reserve_bytes_per_pc=reserve_bytes_per_pc,
    )
    if plan.bytes_per_pc > hardware.pc_bytes:
        raise _too_large(plan, hardware)
    return plan


def _too_large(plan: HbmPlan, hardware: Hardware) -> BadInput:
    sums = (
        f"weights {plan.weights_bytes_per_pc:,} + KV cache {plan.kv.bytes_per_pc:,} for {plan.max_context:,} tokens"
        f" = {plan.bytes_per_pc:,} B on each of {hardware.pseudo_channels} pseudo-channels of {hardware.pc_bytes:,} B"
    )
    if plan.largest_context < CONTEXT_STEP_TOKENS:
        return BadInput(f"the model does not fit into HBM: {sums}", "use a smaller model")
    return BadInput(
        f"the KV cache does not fit into HBM: {sums}; the largest context that fits is {plan.largest_context:,} tokens",
        f"use --max-context {plan.largest_context} or less",
    )


@dataclass(frozen=True)
class Constant:
    """An array in ddr.bin. dtype: numpy's name. addr: DMA address. source: the checkpoint's tensor it comes from."""

    name: str
    role: str
    source: str | None
    dtype: str
    shape: tuple[int, ...]
    addr: int
    bytes: int


@dataclass(frozen=True)
class Buffer:
    """Activations in DDR behind the constants: fp16 [ceil(channels / 32), rows, 32]."""

    id: int
    name: str
    channels: int
    rows: str
    """`seq` (tokens of a chunk) or `last` (one token)."""
    addr: int
    bytes: int


@dataclass(frozen=True)
class DdrPlan:
    """Constants from ddr_base on (they are ddr.bin), then buffers."""

    constants: tuple[Constant, ...]
    buffers: tuple[Buffer, ...]
    file_bytes: int
    chunk_tokens: int
    bytes: int


def plan_ddr(
    constants: Iterable[tuple[str, str, str | None, str, tuple[int, ...]]],
    buffers: Sequence[tuple[str, int, str]],
    *,
    hardware: Hardware = VCU128,
) -> DdrPlan:
    """Give constants (name, role, source, dtype, shape) and buffers (name, channels, rows) their places.

    Raises BadInput where DDR is too small even for the smallest chunk of tokens.
    """
    placed: list[Constant] = []
    end = hardware.ddr_base
    for name, role, source, dtype, shape in constants:
        size = int(np.dtype(dtype).itemsize * np.prod(shape, dtype=np.int64))
        placed.append(Constant(name, role, source, dtype, shape, end, size))
        end = align_up(end + size, hardware.ddr_alignment_bytes)
    file_bytes = end - hardware.ddr_base
    chunk = LARGEST_CHUNK_TOKENS
    while True:
        arranged, last = _buffers(buffers, chunk, end, hardware)
        if last <= hardware.ddr_end:
            return DdrPlan(tuple(placed), tuple(arranged), file_bytes, chunk, last - hardware.ddr_base)
        if chunk <= _SMALLEST_CHUNK_TOKENS:
            raise BadInput(
                f"constants and activations take {last - hardware.ddr_base:,} B of DDR, which has"
                f" {hardware.ddr_bytes:,} B",
                "use a smaller --max-context",
            )
        chunk //= 2


def _buffers(
    wanted: Sequence[tuple[str, int, str]], chunk: int, start: int, hardware: Hardware
) -> tuple[list[Buffer], int]:
    placed, end = [], start
    for number, (name, channels, rows) in enumerate(wanted):
        lanes = hardware.out_channels_per_step
        size = align_up(channels, lanes) * (chunk if rows == "seq" else 1) * 2
        placed.append(Buffer(number, name, channels, rows, end, size))
        end = align_up(end + size, hardware.ddr_alignment_bytes)
    return placed, end
