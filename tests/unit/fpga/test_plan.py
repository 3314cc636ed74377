"""Addresses and sizes against published ones, and what must hold for any model."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgetool.errors import BadInput
from edgetool.fpga.estimate import decode_tokens_per_s, estimate, prefill_tokens_per_s
from edgetool.fpga.hardware import VCU128
from edgetool.fpga.model import Sizes
from edgetool.fpga.plan import matrix_layouts, plan_ddr, plan_hbm

CHATGLM = Sizes(layers=28, hidden=4096, ffn=13696, heads=32, kv_heads=2, head_dim=128, vocab=65024)
QWEN2_7B = Sizes(layers=28, hidden=3584, ffn=18944, heads=28, kv_heads=4, head_dim=128, vocab=152064)
QWEN3_8B = Sizes(layers=36, hidden=4096, ffn=12288, heads=32, kv_heads=8, head_dim=128, vocab=151936)
LLAMA31_8B = Sizes(layers=32, hidden=4096, ffn=14336, heads=32, kv_heads=8, head_dim=128, vocab=128256)
QWEN25_15B = Sizes(layers=28, hidden=1536, ffn=8960, heads=12, kv_heads=2, head_dim=128, vocab=151936)
QWEN25_14B = Sizes(layers=48, hidden=5120, ffn=13824, heads=40, kv_heads=8, head_dim=128, vocab=152064)


def plan(sizes: Sizes, context: int = 2048, group: int = 128):
    return plan_hbm(matrix_layouts(sizes, group), sizes, context)


def test_addresses_of_qwen2_7b_are_those_of_the_public_compiler() -> None:
    planned = plan(QWEN2_7B)
    at = planned.addresses
    layer = [at[f"layers.0.{role}"] for role in ("q", "k", "v", "o", "gate", "up", "down")] + [at["layers.1.q"]]
    strides = [end - start for start, end in itertools.pairwise(layer)]
    assert strides == [0x34000, 0x8000, 0x8000, 0x34000, 0x110000, 0x110000, 0x10C000]
    assert at["layers.0.q"] == 0
    assert at["layers.1.q"] == 0x3A4000
    assert at["lm_head"] == 0x65F0000
    assert planned.kv.base - at["lm_head"] == 0x86C000
    assert planned.kv.base == 0x6E5C000
    assert planned.bytes_per_pc == 119_390_208


def test_addresses_of_chatglm2_6b_are_those_of_the_public_compiler() -> None:
    planned = plan(CHATGLM)
    assert planned.addresses["layers.0.k"] == 0x44000
    assert planned.addresses["lm_head"] == 0x5A20000
    assert planned.kv.base == 0x5E38000


@pytest.mark.parametrize(
    ("sizes", "read_gb", "kv_kib", "hbm_gib", "largest", "bound"),
    [
        (CHATGLM, "3.083", 28, "3.00", "189k", 69.8),
        (QWEN2_7B, "3.660", 56, "3.56", "85k", 58.8),
        (QWEN3_8B, "3.902", 144, "3.99", "31k", 55.1),
        (LLAMA31_8B, "3.870", 128, "3.91", "35k", 55.6),
        (QWEN25_15B, "0.803", 28, "0.85", "269k", 268),
        (QWEN25_14B, "7.249", 192, "7.22", "6.3k", 29.7),
    ],
    ids=["chatglm", "qwen2-7b", "qwen3-8b", "llama-3.1-8b", "qwen2.5-1.5b", "qwen2.5-14b"],
)
def test_the_reference_table_comes_out(
    sizes: Sizes, read_gb: str, kv_kib: int, hbm_gib: str, largest: str, bound: float
) -> None:
    planned = plan(sizes)
    assert f"{planned.weight_read_bytes / 1e9:.3f}" == read_gb
    assert planned.kv_bytes_per_token == kv_kib * 1024
    assert f"{32 * planned.bytes_per_pc / 2**30:.2f}" == hbm_gib
    thousands = planned.largest_context / 1000
    assert largest == (f"{int(thousands)}k" if thousands >= 10 else f"{thousands:.1f}k")
    rate = 0.75 * VCU128.port_bytes_per_s / planned.weight_read_bytes
    assert round(rate, 1 if bound < 100 else 0) == bound


def test_port_rate_and_addresses_of_the_board() -> None:
    assert VCU128.port_bytes_per_s == 286.72e9
    assert VCU128.pc_address(31, 0x4000) == 0x1F0004000
    assert VCU128.pc_address(32) == VCU128.ddr_base == 0x200000000


def test_a_context_that_does_not_fit_is_refused_with_the_one_that_does() -> None:
    with pytest.raises(BadInput) as refused:
        plan(QWEN25_14B, 8192)
    largest = int(re.search(r"largest context that fits is ([\d,]+)", refused.value.message)[1].replace(",", ""))
    assert str(largest) in str(refused.value.hint)
    assert f"{VCU128.pc_bytes:,}" in refused.value.message
    assert plan(QWEN25_14B, largest).bytes_per_pc <= VCU128.pc_bytes
    with pytest.raises(BadInput, match="KV cache does not fit"):
        plan(QWEN25_14B, largest + 1)


def test_a_model_that_is_too_large_is_refused() -> None:
    with pytest.raises(BadInput, match="the model does not fit into HBM"):
        plan(Sizes(80, 8192, 29568, 64, 8, 128, 152064), 16)


@settings(max_examples=80, deadline=None)
@given(
    layers=st.integers(1, 5),
    hidden=st.integers(1, 40).map(lambda n: 32 * n),
    ffn=st.integers(1, 3000),
    kv_heads=st.integers(1, 4),
    repeat=st.integers(1, 4),
    head_dim=st.sampled_from([32, 64, 96, 128]),
    vocab=st.integers(1, 5000),
    group=st.sampled_from([32, 64, 128]),
    zeros=st.booleans(),
    context=st.integers(1, 5000),
)
def test_matrices_and_cache_are_aligned_ordered_apart_and_in_range(
    layers, hidden, ffn, kv_heads, repeat, head_dim, vocab, group, zeros, context
) -> None:
    sizes = Sizes(layers, hidden, ffn, kv_heads * repeat, kv_heads, head_dim, vocab)
    layouts = matrix_layouts(sizes, group, zeros=zeros)
    planned = plan_hbm(layouts, sizes, context)
    end = 0
    for name, layout in layouts:
        start = planned.addresses[name]
        assert start >= end and start % 0x4000 == 0
        assert start - end < 0x4000  # no more is left free than alignment needs
        end = start + layout.port_bytes
        assert 8 * layout.row_bytes % 256 == 0  # rows are whole beats
    assert end <= planned.kv.base
    regions = [
        (planned.kv.address(layer, values), planned.kv.region_bytes) for layer in range(layers) for values in (0, 1)
    ]
    at = planned.kv.base
    for start, size in regions:
        assert start == at and start % 32 == 0 and size % 32 == 0
        assert size * 32 == planned.kv.capacity_tokens * kv_heads * head_dim * 2
        at += size
    assert at == planned.bytes_per_pc <= VCU128.pc_bytes
    assert context <= planned.kv.capacity_tokens < context + 16
    assert context <= planned.largest_context


@settings(max_examples=40, deadline=None)
@given(
    shapes=st.lists(st.integers(0, 5000), min_size=1, max_size=20),
    channels=st.lists(st.integers(1, 9000), min_size=1, max_size=6),
)
def test_constants_and_buffers_in_ddr_lie_apart(shapes: list[int], channels: list[int]) -> None:
    constants = [(f"c{i}", "norm", None, "float16", (size,)) for i, size in enumerate(shapes)]
    planned = plan_ddr(constants, [(f"b{i}", count, "seq") for i, count in enumerate(channels)])
    end = VCU128.ddr_base
    for one in [*planned.constants, *planned.buffers]:
        assert one.addr >= end and one.addr % 64 == 0
        end = one.addr + one.bytes
    assert VCU128.ddr_base + planned.file_bytes >= planned.constants[-1].addr + planned.constants[-1].bytes
    assert end <= VCU128.ddr_end
    assert [one.bytes for one in planned.buffers] == [-(-n // 32) * 32 * 2 * planned.chunk_tokens for n in channels]


def test_chunks_shrink_until_the_activations_fit_into_ddr() -> None:
    small = plan_ddr([], [("scores", 32 * 2048, "seq")])
    one = [("one", "norm", None, "float16", (1,))]
    large = plan_ddr(one, [("scores", 32 * 131072, "seq")])
    assert small.chunk_tokens == 512
    assert large.chunk_tokens == 256  # 2 GiB; 512 tokens would be 4 GiB and the constants
    with pytest.raises(BadInput, match="DDR"):
        plan_ddr([], [("scores", 1 << 30, "seq")])


def test_the_estimate_is_the_formula_and_its_range_is_ordered() -> None:
    planned = plan(QWEN2_7B)
    rate = decode_tokens_per_s(planned.weight_read_bytes, 2048 * 57344, 28, 0.75)
    assert rate == pytest.approx(1 / ((3659563008 + 2048 * 57344) / (0.75 * 286.72e9) + 28 * 0.23e-3), rel=1e-12)
    assert 42.5 * 0.95 < rate < 69.4  # published for Qwen-7B: 42.5 to 69.4
    assert prefill_tokens_per_s(6_500_000_000) == pytest.approx(4096 * 140e6 / 6.5e9, rel=1e-12)
    found = estimate(planned.weight_read_bytes, planned.kv_bytes_per_token, 28, 6_500_000_000, 2048)
    low, high = found["decode_tokens_per_s"]
    assert low < rate < high
    assert "estimate" in found["label"]
    assert found["terms"]["weight_read_bytes"] == 3659563008
