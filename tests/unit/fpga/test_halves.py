"""What goes into fp16 exactly, what is counted, what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from edgetool.checkpoints.bfloat16 import float32_to_bfloat16
from edgetool.errors import BadInput
from edgetool.fpga.halves import Losses, to_half


def test_fp16_passes_unchanged_and_loses_nothing() -> None:
    losses = Losses()
    values = np.array([1, -0.0, 65504, 6e-8], dtype=np.float16)
    assert np.array_equal(to_half(values, "F16", "x", losses).view(np.uint16), values.view(np.uint16))
    assert losses.to_list() == []


def test_bfloat16_in_range_is_exact_and_what_is_too_small_is_counted() -> None:
    losses = Losses()
    wide = np.array([1.0, -3.5, 1e-7, 1e-12, 0.0], dtype=np.float32)
    half = to_half(float32_to_bfloat16(wide), "BF16", "model.norm.weight", losses)
    assert half[:2].tolist() == [1.0, -3.5] and half[3] == 0
    (record,) = losses.to_list()
    assert record["tensor"] == "model.norm.weight"
    assert (record["values"], record["changed"], record["became_zero"]) == (5, 2, 1)
    assert record["largest_relative_change"] == 1.0


def test_losses_of_pieces_add_up() -> None:
    losses = Losses()
    for _ in range(3):
        to_half(np.array([1 / 3], dtype=np.float32), "F32", "x", losses)
    assert losses.to_list()[0]["changed"] == 3


@pytest.mark.parametrize(
    ("values", "dtype", "words"),
    [
        (np.array([1, np.nan], np.float16), "F16", "1 of 2 values are NaN or infinite"),
        (np.array([np.inf, -np.inf], np.float32), "F32", "2 of 2 values are NaN or infinite"),
        (np.array([0x7F80, 0x3F80], np.uint16), "BF16", "1 of 2 values are NaN or infinite"),
        (np.array([70000, 1, -80000], np.float32), "F32", "2 values are beyond fp16's largest, 65504"),
    ],
)
def test_what_fp16_has_no_value_for_is_refused_with_name_and_count(values: np.ndarray, dtype: str, words: str) -> None:
    with pytest.raises(BadInput, match=words) as refused:
        to_half(values, dtype, "model.layers.3.scales", Losses())
    assert "model.layers.3.scales" in refused.value.message
