"""A source some of whose linears are rounded again."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
import pytest

from edgetool.checkpoints.formats import Spec
from edgetool.converter.fit import Refused
from edgetool.converter.requantized import RequantizedSource, spec_after
from edgetool.converter.source import CheckpointSource
from tests.fakes.packed_checkpoints import make_checkpoint, random_layers

UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"


@pytest.fixture
def source(tmp_path: Path) -> CheckpointSource:
    return CheckpointSource.open(make_checkpoint(tmp_path / "c", random_layers(layers=1), "gptq"))


def rounded(source: CheckpointSource, *modules: str, spec: Spec | None = None) -> RequantizedSource:
    return RequantizedSource(source, modules, spec or Spec(4, 32, sym=True), lowest_zero=1)


def test_only_the_chosen_linears_are_rounded_and_their_error_is_that_of_the_values(source: CheckpointSource) -> None:
    made = rounded(source, UP)
    assert np.array_equal(made.linear(DOWN).codes, source.linear(DOWN).codes)
    weight = made.linear(UP).dequantize()
    assert np.array_equal(weight, made.weight(UP))
    assert made.linear(UP).sym and not source.linear(UP).sym
    off = weight.astype(np.float64) - source.weight(UP)
    error = made.errors[UP]
    assert made.errors.keys() == made.crc32.keys() == {UP}
    assert error.weights == weight.size
    assert error.max == pytest.approx(np.abs(off).max(), rel=1e-6)  # it is taken in float32
    assert error.squares == pytest.approx(np.square(off).sum(), rel=1e-5)
    assert made.crc32[UP] == zlib.crc32(weight.tobytes())


@pytest.mark.parametrize("spec", [Spec(4, 32, sym=True), Spec(8, 64, sym=False), Spec(4, -1, sym=True)])
def test_planning_sees_the_shape_that_the_linear_will_have(source: CheckpointSource, spec: Spec) -> None:
    made = rounded(source, UP, DOWN, spec=spec)
    for module in (UP, DOWN):
        rest, linear = made.rest(module), made.linear(module)
        for part in ("codes", "scales", "zeros"):
            assert getattr(rest, part).shape == getattr(linear, part).shape
        assert (rest.bits, rest.group_size, rest.g_idx) == (linear.bits, linear.group_size, None)
        assert (rest.sym, rest.scale_dtype) == (spec.sym, linear.scale_dtype)
        assert linear.zeros.min() >= 1
        layout = made.layouts[module]
        assert (layout.bits, layout.group_size, layout.g_idx_trivial) == (rest.bits, rest.group_size, True)


def test_a_group_size_that_does_not_fit_is_refused_before_anything_is_rounded(source: CheckpointSource) -> None:
    with pytest.raises(Refused) as refused:
        rounded(source, UP, spec=Spec(4, 128, sym=True)).rest(UP)
    assert refused.value.reason == "group_size 128 does not divide its in_features 64"


def test_what_was_found_out_survives_as_json(source: CheckpointSource) -> None:
    first, second = rounded(source, UP, DOWN), rounded(source, UP, DOWN)
    for module in (UP, DOWN):
        first.linear(module)
    assert first.state([UP]).keys() == {UP}
    second.restore(json.loads(json.dumps(first.state([UP]))))
    second.linear(DOWN)
    assert (second.errors, second.crc32, second.report()) == (first.errors, first.crc32, first.report())


@pytest.mark.parametrize(
    ("target", "bits", "asked", "expected"),
    [
        ("awq", 8, {}, Spec(4, 32, False)),
        ("gptq", 8, {}, Spec(8, 32, False)),
        ("gptq", 4, {"group_size": 64}, Spec(4, 64, False)),
        ("gptq", 4, {"sym": True}, Spec(4, 32, True)),
        ("gguf", 4, {}, Spec(4, 32, True)),
    ],
)
def test_the_grid_is_the_sources_as_far_as_the_target_has_it(
    target: str, bits: int, asked: dict[str, int], expected: Spec, tmp_path: Path
) -> None:
    source = CheckpointSource.open(make_checkpoint(tmp_path / "c", random_layers(layers=1, bits=bits), "gptq_v2"))
    assert spec_after(source, target, **({"group_size": None, "sym": False} | asked)) == expected
