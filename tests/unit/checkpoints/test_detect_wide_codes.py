"""8-bit GPTQ codes scatter over so many steps that their mean says nothing about the version of the zeros."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgetool.checkpoints.canonical import QuantizedLinear
from edgetool.checkpoints.detect import detect
from edgetool.checkpoints.formats import FORMATS, Spec
from edgetool.checkpoints.tensor_file import read_header, read_tensor, write_tensor_file


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
def test_skewed_eight_bit_codes_are_no_disagreement(tmp_path: Path, sym: bool, version: str) -> None:
    rng = np.random.default_rng(0)
    codes = np.clip(rng.normal(126.0, 30.0, (64, 128)), 0, 255).astype(np.uint8)
    zeros = np.full((64, 2), 128, np.uint8) if sym else rng.integers(100, 156, (64, 2)).astype(np.uint8)
    linear = QuantizedLinear(codes, np.full((64, 2), 0.01, np.float16), zeros, None, 8, 64)
    spec = Spec(8, 64, sym)
    arrays = FORMATS[version].write(linear, spec)
    path = tmp_path / "model.safetensors"
    dtypes = {"qweight": "I32", "qzeros": "I32", "scales": "F16", "g_idx": "I32"}
    write_tensor_file(path, {f"a.q_proj.{key}": (dtypes[key], array) for key, array in arrays.items()})
    tensors = read_header(path)
    config = {"quantization_config": FORMATS[version].quantization_config(spec, [])}

    found = detect(tensors, lambda name: read_tensor(tensors[name]), config)

    assert found is not None
    assert (found.format, found.bits, found.sym, found.disagreements) == (version, 8, sym, ())
