import numpy as np
import pytest
import torch

from edgetool.checkpoints.tensor_file import TensorInfo, read_header, write_tensor_file
from edgetool.errors import BadInput
from edgetool.progress import NullProgress
from edgetool.quantizers.storage import check_weights, model_dtype, storage_chunks, stored_dtype_of, to_storage


def info(dtype, nbytes):
    return TensorInfo("x", dtype, (nbytes,), None, 0, nbytes)


@pytest.mark.parametrize(
    ("config", "dtypes", "expected"),
    [
        ({"dtype": "bfloat16"}, {"F16": 100}, "BF16"),
        ({"torch_dtype": "float16"}, {"BF16": 100}, "F16"),
        ({"text_config": {"dtype": "bfloat16"}}, {"F16": 100}, "BF16"),
        ({"dtype": "float32"}, {"F32": 100, "BF16": 2}, "BF16"),
        ({"dtype": "float32"}, {"F32": 100}, "F16"),
        ({}, {"F16": 60, "BF16": 70}, "BF16"),
        ({}, {"F16": 70, "BF16": 60}, "F16"),
        ({"text_config": None}, {}, "F16"),
        ({"dtype": {}, "torch_dtype": ["bfloat16"]}, {"F16": 1}, "F16"),
    ],
)
def test_the_dtype_is_what_config_json_says_or_most_weights_have(config, dtypes, expected):
    assert model_dtype(config, {dtype: info(dtype, size) for dtype, size in dtypes.items()}) == expected


@pytest.mark.parametrize("target", ["F16", "BF16"])
def test_wide_floats_become_the_target_and_everything_else_stays(target):
    assert [stored_dtype_of(dtype, target) for dtype in ("F32", "F64")] == [target, target]
    assert [stored_dtype_of(dtype, target) for dtype in ("F16", "BF16", "I64", "BOOL")] == [
        "F16",
        "BF16",
        "I64",
        "BOOL",
    ]


def test_float32_is_rounded_as_torch_rounds_it():
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 4, 1000)
    half = to_storage(values.numpy(), "F32", "F16", "x")
    assert half[0] == "F16" and np.array_equal(half[1], values.half().numpy())
    brain = to_storage(values.numpy(), "F32", "BF16", "x")
    assert brain[0] == "BF16" and np.array_equal(brain[1], values.bfloat16().view(torch.uint16).numpy())
    wide = to_storage(values.double().numpy(), "F64", "F16", "x")
    assert np.array_equal(wide[1], values.half().numpy())


@pytest.mark.parametrize(
    ("array", "dtype"),
    [
        (np.array([1.5, -2.0], np.float16), "F16"),
        (np.array([0x3F80, 0x7F7F], np.uint16), "BF16"),
        (np.array([1 << 40], np.int64), "I64"),
        (np.array([0x7F80], np.uint16), "U16"),
    ],
)
def test_what_has_16_bits_or_is_no_float_is_kept_to_the_bit(array, dtype):
    kept = array.copy()
    found = to_storage(array, dtype, "F16" if dtype == "BF16" else "BF16", "x")
    assert found[0] == dtype and np.array_equal(found[1], kept)


@pytest.mark.parametrize(
    ("value", "dtype", "target", "words"),
    [
        (65536.0, "F32", "F16", "model.norm.weight holds 65536, which does not fit float16"),
        (-1e6, "F64", "F16", "does not fit float16"),
        (3.4e38, "F32", "BF16", "does not fit bfloat16"),
        (1e300, "F64", "BF16", "does not fit bfloat16"),
    ],
)
def test_overflow_is_refused_with_its_value_and_never_becomes_infinity(value, dtype, target, words):
    array = np.array([0.0, value], np.float32 if dtype == "F32" else np.float64)
    with pytest.raises(BadInput, match=words):
        to_storage(array, dtype, target, "model.norm.weight")


@pytest.mark.parametrize(("value", "target"), [(65504.0, "F16"), (-65504.0, "F16"), (3.3895313892515355e38, "BF16")])
def test_the_largest_value_of_the_target_still_fits(value, target):
    kind, array = to_storage(np.array([value], np.float32), "F32", target, "x")
    wide = torch.from_numpy(array).view(torch.bfloat16 if kind == "BF16" else torch.float16).double()
    assert float(wide) == value


NOT_FINITE = {
    "F16": [np.array([b], np.uint16).view(np.float16) for b in (0x7C00, 0xFC00, 0x7E00, 0x7C01)],
    "BF16": [np.array([b], np.uint16) for b in (0x7F80, 0xFF80, 0x7FC0, 0x7F81)],
    "F32": [np.array([v], np.float32) for v in (np.nan, np.inf, -np.inf)],
    "F64": [np.array([v], np.float64) for v in (np.nan, np.inf)],
}


@pytest.mark.parametrize("dtype", NOT_FINITE)
@pytest.mark.parametrize("target", ["F16", "BF16"])
def test_nan_and_infinity_are_refused_in_every_dtype(dtype, target):
    for array in NOT_FINITE[dtype]:
        with pytest.raises(BadInput, match="x holds NaN or infinite values"):
            to_storage(np.concatenate([np.zeros(3, array.dtype), array]), dtype, target, "x")


def test_chunks_of_a_stored_tensor_are_the_whole_of_it(tmp_path):
    values = np.random.default_rng(0).normal(size=(1100, 4000)).astype(np.float32)  # 17.6 MB: two chunks
    write_tensor_file(tmp_path / "x.safetensors", {"x": ("F32", values)})
    chunks = list(storage_chunks(read_header(tmp_path / "x.safetensors")["x"], "F16"))
    assert len(chunks) > 1
    assert np.array_equal(
        np.concatenate([chunk.reshape(-1) for chunk in chunks]), values.astype(np.float16).reshape(-1)
    )


def test_weights_are_checked_before_the_work_and_linears_need_not_fit_16_bit(tmp_path):
    big, nan = np.array([[1e5]], np.float32), np.array([[np.nan]], np.float32)
    write_tensor_file(tmp_path / "a.safetensors", {"linear": ("F32", big), "norm": ("F32", big)})
    tensors = read_header(tmp_path / "a.safetensors")
    check_weights(tensors, "F16", {"linear", "norm"}, NullProgress())
    check_weights(tensors, "BF16", set(), NullProgress())
    with pytest.raises(BadInput, match="norm holds 100000"):
        check_weights(tensors, "F16", {"linear"}, NullProgress())
    write_tensor_file(tmp_path / "b.safetensors", {"linear": ("F32", nan)})
    with pytest.raises(BadInput, match="linear holds NaN"):
        check_weights(read_header(tmp_path / "b.safetensors"), "F16", {"linear"}, NullProgress())
