"""Against torch's own bfloat16."""

import numpy as np
import torch

from edgetool.checkpoints.bfloat16 import bfloat16_to_float32, float32_to_bfloat16


def _torch_round(values: np.ndarray) -> np.ndarray:
    return torch.from_numpy(values.copy()).to(torch.bfloat16).view(torch.uint16).numpy()


def test_every_bit_pattern_widens_as_in_torch() -> None:
    bits = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)
    expected = torch.from_numpy(bits.copy()).view(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(bfloat16_to_float32(bits).view(np.uint32), expected.view(np.uint32))


def test_rounding_is_torchs_around_every_representable_value() -> None:
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    # exact, just above, just below a tie, the tie, just above it, just below the next value
    for lower in (0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        values = (upper | lower).view(np.float32)
        ours = float32_to_bfloat16(values)
        numbers = ~np.isnan(values)
        np.testing.assert_array_equal(ours[numbers], _torch_round(values)[numbers])
        # NaN payloads differ between torch builds; that they stay NaN with their sign is what counts
        assert np.isnan(bfloat16_to_float32(ours[~numbers])).all()
        np.testing.assert_array_equal(ours[~numbers] >> 15, (values[~numbers].view(np.uint32) >> 31).astype(np.uint16))


def test_truncation_would_be_caught() -> None:
    values = np.array([1.0 + 2**-8 + 2**-20], dtype=np.float32)  # just above the tie between 1 and 1 + 2**-7
    truncated = (values.view(np.uint32) >> 16).astype(np.uint16)
    assert float32_to_bfloat16(values)[0] != truncated[0]


def test_shapes_survive_and_the_input_is_left_alone() -> None:
    for shape in ((), (0, 3), (2, 3, 4)):
        values = np.full(shape, 1.1, dtype=np.float32)
        before = values.copy()
        assert float32_to_bfloat16(values).shape == shape
        np.testing.assert_array_equal(values, before)
    transposed = np.arange(6, dtype=np.float32).reshape(2, 3).T
    np.testing.assert_array_equal(bfloat16_to_float32(float32_to_bfloat16(transposed)), transposed)


def test_arrays_longer_than_one_block_are_converted_whole() -> None:
    values = np.random.default_rng(0).standard_normal((1 << 20) + 5, dtype=np.float32)
    np.testing.assert_array_equal(float32_to_bfloat16(values), _torch_round(values))
