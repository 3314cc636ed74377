"""Every format into every other: the scalar oracle's bytes, or refused for the reason that this file knows.

Which conversions are lossless, and what comes out of them, is decided here from plain integers by rules of its own.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from edgetool.cli import app
from edgetool.converter.plan import make_plan
from edgetool.converter.source import CheckpointSource
from edgetool.converter.write import converted
from edgetool.errors import BadInput
from edgetool.progress import NullProgress
from tests.fakes.packed_checkpoints import (
    DTYPES,
    GOLDEN,
    GOLDEN_FORMATS,
    PACKED,
    Layer,
    bfloat16,
    golden_checkpoint,
    make_checkpoint,
    other_tensors,
    quantization_config_of,
    random_layer,
    random_layers,
    read_checkpoint,
    read_safetensors,
    write_safetensors,
)

FLOATS = ("fp16", "bf16")
GROUPS = (32, 64, 128, -1)


# --- the rules


def refusals(layer: Layer, target: str) -> list[str]:
    """Words of each reason why `target` cannot hold `layer`; any of them may be given."""
    out_features, in_features = layer.codes.shape
    if target in FLOATS:
        return []
    reasons = []
    if in_features % layer.group_size:
        reasons.append(f"group_size {layer.group_size} does not divide in_features {in_features}")
    if target == "awq":
        if layer.bits != 4:
            reasons.append(f"4-bit codes only; these have {layer.bits}")
        if layer.act_order:
            reasons.append("no g_idx")
        if out_features % 8:
            reasons.append(f"out_features {out_features} is not a multiple of 8")
    if target in ("gptq", "gptq_v2"):
        multiple = {2: 16, 3: 32, 4: 8, 8: 4}[layer.bits]
        for name, count in (("in_features", in_features), ("out_features", out_features)):
            if count % multiple:
                reasons.append(f"{name} {count} is not a multiple of {multiple}")
        if target == "gptq" and moved(layer) is None:
            reasons.append("when their zero is moved to 1")
    return reasons


def moved(layer: Layer) -> Layer | None:
    """GPTQ version 1 has no zero of 0: those groups' codes and zeros go up by one, where no code is at the top."""
    codes, zeros = layer.codes.copy(), layer.zeros.copy()
    for row, group in np.argwhere(layer.zeros == 0).tolist():
        members = layer.g_idx == group
        if members.any() and codes[row, members].max() == (1 << layer.bits) - 1:
            return None
        codes[row, members] += 1
        zeros[row, group] = 1
    return replace(layer, codes=codes, zeros=zeros)


def expected(layers: dict[str, Layer], target: str) -> dict[str, np.ndarray]:
    """The output's tensors, packed by the oracle."""
    tensors: dict[str, np.ndarray] = {}
    sym = all(layer.sym for layer in layers.values())
    for module, layer in layers.items():
        if target == "fp16":
            tensors[f"{module}.weight"] = layer.weight().astype(np.float16)
        elif target == "bf16":
            tensors[f"{module}.weight"] = bfloat16(layer.weight())
        else:
            fitted = moved(layer) if target == "gptq" else layer
            assert fitted is not None
            tensors |= {f"{module}.{suffix}": array for suffix, array in fitted.tensors(target, sym).items()}
    return tensors


# --- one source, all targets


@dataclass(frozen=True)
class Case:
    kind: str
    bits: int
    group_size: int
    sym: bool
    act_order: bool
    lowest_zero: int = 1

    def __str__(self) -> str:
        group = "row" if self.group_size == -1 else self.group_size
        order, sym = "act-order" if self.act_order else "plain", "sym" if self.sym else "asym"
        return f"{self.kind}-{self.bits}-{group}-{sym}-{order}" + ("-zero" if self.lowest_zero == 0 else "")

    def shapes(self) -> list[tuple[int, int]]:
        """(out_features, in_features) that `kind` can store, odd ones too."""
        size = self.group_size
        if self.kind == "compressed-tensors":
            wide = {32: 96, 64: 192, 128: 384, -1: 100}[size]
            return [(40, wide), (7, wide), (32, wide), (72, 128 if size != -1 else 160)]
        wide = {32: 160, 64: 192, 128: 384, -1: 96}[size]
        if self.kind == "awq":
            return [(40, wide), (8, wide), (72, max(size, 32))]
        return [(32, wide), (96, max(size, 32))] + ([(40, wide), (72, 128)] if self.bits == 4 else [])

    def layers(self) -> dict[str, Layer]:
        return {f"layer.{number}": self._layer(number, *shape) for number, shape in enumerate(self.shapes())}

    def _layer(self, number: int, out_features: int, in_features: int) -> Layer:
        layer = random_layer(
            31 * number + self.bits,
            out_features,
            in_features,
            self.bits,
            self.group_size,
            sym=self.sym,
            act_order=self.act_order,
            lowest_zero=1 if self.kind == "gptq" else self.lowest_zero,
        )
        if self.lowest_zero == 0 and self.kind != "gptq" and not self.sym:
            zeros, codes = layer.zeros.copy(), layer.codes.copy()
            zeros[1, 0] = 0
            if number % 2:  # a group that can move beside one that cannot
                codes[1, layer.g_idx == 0] = np.minimum(codes[1, layer.g_idx == 0], (1 << self.bits) - 2)
                zeros[zeros == 0] = 1
                zeros[1, 0] = 0
            layer = replace(layer, zeros=zeros, codes=codes)
        return layer


CASES = [
    Case(kind, bits, group_size, sym, act_order, lowest_zero)
    for kind in PACKED
    for bits in ((4,) if kind == "awq" else (2, 3, 4, 8))
    for group_size in GROUPS
    for sym in (True, False)
    for act_order in ((False,) if kind == "awq" or group_size == -1 else (False, True))
    for lowest_zero in ((1, 0) if kind != "gptq" and not sym else (1,))
]


def stored(directory: Path, layers: dict[str, Layer], kind: str, others: dict[str, Any] | None = None) -> Path:
    """A checkpoint of nothing but `layers`."""
    directory.mkdir(parents=True)
    sym = all(layer.sym for layer in layers.values())
    tensors = {
        f"{module}.{suffix}": array
        for module, layer in layers.items()
        for suffix, array in layer.tensors(kind, sym).items()
    }
    (directory / "config.json").write_text(json.dumps({"quantization_config": quantization_config_of(layers, kind)}))
    write_safetensors(directory / "model.safetensors", tensors | (others or {}))
    return directory


def converted_tensors(source: CheckpointSource, target: str, **how: Any) -> dict[str, np.ndarray]:
    """What the converter would write, by name, in the dtypes and shapes that it announces."""
    plan = make_plan(source, target, progress=NullProgress(), **how)
    announced = {entry[0]: entry[1:] for unit in plan.units for entry in unit.entries}
    made = {}
    for unit in plan.units:
        for name, data in converted(source, plan, unit.name).items():
            array = data if isinstance(data, np.ndarray) else np.concatenate([piece.reshape(-1) for piece in data])
            dtype, shape = announced.pop(name)
            assert DTYPES[array.dtype.name] == dtype, name
            made[name] = array.reshape(shape)
            assert array.ndim == 1 or array.shape == shape, name
    assert announced == {}
    return made


def same(made: dict[str, np.ndarray], meant: dict[str, np.ndarray]) -> None:
    assert made.keys() == meant.keys()
    for name, array in meant.items():
        assert (made[name].dtype, made[name].shape) == (array.dtype, array.shape), name
        assert made[name].tobytes() == array.tobytes(), name


def check(directory: Path, layers: dict[str, Layer], kind: str, target: str) -> str:
    """Hold a conversion of `layers` against the rules; what they said: "exact", "refused" or "both"."""
    reasons = {module: words for module, layer in layers.items() if (words := refusals(layer, target))}
    if reasons:
        source = opened(directory / f"all-{len(layers)}", layers, kind)
        with pytest.raises(BadInput) as caught:
            make_plan(source, target, progress=NullProgress())
        refused = {entry["module"]: entry["reason"] for entry in caught.value.details["refused"]}
        assert refused.keys() == reasons.keys()
        for module, words in reasons.items():
            assert any(reason in refused[module] for reason in words), refused[module]
        first = next(iter(reasons))
        assert caught.value.message.startswith(f"{first} has no lossless form in {target}: ")
    kept = {module: layer for module, layer in layers.items() if module not in reasons}
    if kept:
        source = opened(directory / "-".join(sorted(kept)), kept, kind)
        same(converted_tensors(source, target), expected(kept, target))
    return "refused" if not kept else "both" if reasons else "exact"


def opened(directory: Path, layers: dict[str, Layer], kind: str) -> CheckpointSource:
    """The version of GPTQ is told, not found: a few small random layers do not always betray it."""
    path = directory if directory.is_dir() else stored(directory, layers, kind)
    return CheckpointSource.open(path, kind)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_target_gets_the_oracles_bytes_or_refuses_what_the_rules_refuse(case: Case, tmp_path: Path) -> None:
    layers = case.layers()
    found = {target: check(tmp_path, layers, case.kind, target) for target in (*PACKED, *FLOATS)}
    assert {found[target] for target in (case.kind, *FLOATS)} == {"exact"}
    assert case.bits == 4 or found["awq"] == "refused"


# --- one thing at a time


def only(layer: Layer, tmp_path: Path, kind: str, target: str) -> str:
    return check(tmp_path / f"{kind}-{target}", {"layer": layer}, kind, target)


@pytest.mark.parametrize("target", [*PACKED, *FLOATS])
def test_a_short_last_group_has_values_and_no_packed_form(target: str, tmp_path: Path) -> None:
    layer = random_layer(1, 64, 160, 4, 128)  # groups of 128 and 32
    assert only(layer, tmp_path, "gptq", target) == ("exact" if target in FLOATS else "refused")


def scaled(dtype: str, *, spread: bool = False) -> Layer:
    """A layer with scales of `dtype` that are exact in float16 and bfloat16, or (spread) in `dtype` alone."""
    layer = random_layer(2, 64, 128, 4, 32)
    rng = np.random.default_rng(3)
    scales = (rng.integers(1, 128, layer.scales.shape) / 2048).astype(np.float32)
    if spread:
        scales[7, 2] *= {"F32": np.float32(1 + 2**-20), "BF16": np.float32(2**-30), "F16": np.float32(1 + 2**-10)}[
            dtype
        ]
    stored = {"F32": scales, "BF16": bfloat16(scales), "F16": scales.astype(np.float16)}[dtype]
    return replace(layer, scales=stored)


@pytest.mark.parametrize("target", PACKED)
@pytest.mark.parametrize("kind", PACKED)
def test_16_bit_scales_keep_their_dtype(kind: str, target: str, tmp_path: Path) -> None:
    for dtype in ("F16", "BF16"):
        for spread in (False, True):
            assert only(scaled(dtype, spread=spread), tmp_path / f"{dtype}-{spread}", kind, target) == "exact"


@pytest.mark.parametrize("target", ["gptq", "gptq_v2", "awq"])
def test_float32_scales_become_16_bit_where_that_is_exact_and_are_refused_where_not(
    target: str, tmp_path: Path
) -> None:
    kind = "compressed-tensors"
    for name, narrow in (("half", np.float32(1)), ("brain", np.float32(2.0**-30))):
        layer = scaled("F32")
        layer.scales[7, 2] *= narrow
        made = converted_tensors(opened(tmp_path / name, {"layer": layer}, kind), target)["layer.scales"]
        meant = layer.scales.T.astype(np.float16) if name == "half" else bfloat16(layer.scales.T)
        assert made.dtype == meant.dtype and np.array_equal(made, meant)
    source = opened(tmp_path / "neither", {"layer": scaled("F32", spread=True)}, kind)
    with pytest.raises(BadInput, match=r"layer has no lossless form .* scales are not exact in F16.* in BF16"):
        make_plan(source, target, progress=NullProgress())
    same(converted_tensors(source, kind), expected({"layer": scaled("F32", spread=True)}, kind))


@pytest.mark.parametrize("kind", ["gptq", "gptq_v2", "compressed-tensors"])
def test_whole_groups_in_another_order_need_no_g_idx(kind: str, tmp_path: Path) -> None:
    """g_idx is not trivial, but its groups are of neighbouring channels: renumbered, AWQ holds them."""
    layer = random_layer(4, 64, 128, 4, 32)
    numbers = np.array([2, 0, 3, 1])
    turned = replace(
        layer,
        g_idx=numbers[layer.g_idx].astype(np.int32),
        zeros=layer.zeros[:, np.argsort(numbers)],
        scales=layer.scales[:, np.argsort(numbers)],
    )
    assert turned.act_order and np.array_equal(turned.weight(), layer.weight())
    source = opened(tmp_path / "turned", {"layer": turned}, kind)
    for target in ("awq", "compressed-tensors"):
        same(converted_tensors(source, target), expected({"layer": layer}, target))
    for target in ("gptq", "gptq_v2"):
        made = converted_tensors(source, target)
        assert any(
            all(made[name].tobytes() == array.tobytes() for name, array in expected({"layer": form}, target).items())
            for form in (layer, turned)
        )


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("target", ["gptq", "gptq_v2", "compressed-tensors"])
def test_sym_moves_every_zero_to_the_middle_or_refuses(target: str, bits: int, tmp_path: Path) -> None:
    middle, top = 1 << (bits - 1), (1 << bits) - 1
    layer = random_layer(5, 64, 128, bits, 32)
    offset = layer.zeros[:, layer.g_idx].astype(int) - middle
    room = np.clip(layer.codes.astype(int), np.maximum(offset, 0), top + np.minimum(offset, 0)).astype(np.uint8)
    fits = replace(layer, codes=room)
    meant = replace(fits, codes=(room - offset).astype(np.uint8), zeros=np.full_like(layer.zeros, middle))
    assert meant.codes.max() <= top and np.array_equal(meant.weight(), fits.weight())
    source = opened(tmp_path / "fits", {"layer": fits}, "gptq_v2")
    same(converted_tensors(source, target, sym=True), expected({"layer": meant}, target))
    stuck = opened(tmp_path / "stuck", {"layer": layer}, "gptq_v2")
    with pytest.raises(BadInput, match="zero is moved to the middle"):
        make_plan(stuck, target, sym=True, progress=NullProgress())


@pytest.mark.parametrize("target", PACKED)
@pytest.mark.parametrize("other", [{"bits": 8}, {"group_size": 64}], ids=["bits", "group-size"])
def test_linears_that_differ_go_into_16_bit_only(target: str, other: dict[str, int], tmp_path: Path) -> None:
    layers = {f"layer.{number}": random_layer(number, 64, 128) for number in range(3)}
    layers["layer.1"] = random_layer(9, 64, 128, **other)
    source = opened(tmp_path / "mixed", layers, "gptq")
    with pytest.raises(BadInput, match=r"layer\.1 has no lossless form") as caught:
        make_plan(source, target, progress=NullProgress())
    assert [entry["module"] for entry in caught.value.details["refused"]] == ["layer.1"]
    for float_name in FLOATS:
        same(converted_tensors(source, float_name), expected(layers, float_name))


# --- nothing quantised


def plain_checkpoint(directory: Path, dtype: str, values: np.ndarray) -> CheckpointSource:
    directory.mkdir()
    array = {"F16": lambda: values.astype(np.float16), "BF16": lambda: bfloat16(values), "F32": lambda: values}[dtype]()
    (directory / "config.json").write_text("{}")
    write_safetensors(directory / "model.safetensors", {"model.norm.weight": array, "ids": np.arange(3)})
    return CheckpointSource.open(directory)


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
def test_16_bit_to_16_bit_is_exact_or_refused_and_never_becomes_packed(dtype: str, tmp_path: Path) -> None:
    exact = np.array([0.0, -0.0, 1.5, -(2.0**-14), 3.140625, 65280], dtype=np.float32)
    source = plain_checkpoint(tmp_path / "exact", dtype, exact)
    ids = np.arange(3)
    same(converted_tensors(source, "fp16"), {"model.norm.weight": exact.astype(np.float16), "ids": ids})
    same(converted_tensors(source, "bf16"), {"model.norm.weight": bfloat16(exact), "ids": ids})
    for target in PACKED:
        with pytest.raises(BadInput, match=r"nothing in this .* model is quantised") as caught:
            make_plan(source, target, progress=NullProgress())
        assert "edgetool quantize" in (caught.value.hint or "")


def test_values_that_the_other_16_bit_dtype_has_not_are_counted_and_named(tmp_path: Path) -> None:
    fine = np.array([1 + 2**-10, 1.0, 1 - 2**-11], dtype=np.float32)  # in float16, not in bfloat16
    half = plain_checkpoint(tmp_path / "half", "F16", fine)
    with pytest.raises(BadInput, match=r"model\.norm\.weight .* 2 of its 3 F16 values"):
        make_plan(half, "bf16", progress=NullProgress())
    made = converted_tensors(half, "bf16", rounding=True)
    assert np.array_equal(made["model.norm.weight"], bfloat16(fine))
    wide = plain_checkpoint(tmp_path / "wide", "BF16", np.array([1.0, 2.0**17, -(2.0**-40)], dtype=np.float32))
    for rounding in (False, True):
        with pytest.raises(BadInput, match=r"model\.norm\.weight .* 1 of 3 values are beyond"):
            make_plan(wide, "fp16", rounding=rounding, progress=NullProgress())


def test_weights_beyond_float16_are_refused_when_they_are_met(tmp_path: Path) -> None:
    layer = random_layer(6, 32, 64)
    layer.scales[3, 1] = np.float16(60000)
    source = opened(tmp_path / "large", {"layer": layer}, "gptq")
    with pytest.raises(BadInput, match=r"layer.* do not fit fp16"):
        converted_tensors(source, "fp16")
    same(converted_tensors(source, "bf16"), expected({"layer": layer}, "bf16"))


# --- any integers


@given(data=st.data())
@settings(max_examples=120, deadline=None)
def test_any_linear_in_any_format_is_converted_by_the_rules(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    kind, target = data.draw(st.sampled_from(PACKED)), data.draw(st.sampled_from((*PACKED, *FLOATS)))
    bits = 4 if kind == "awq" else data.draw(st.sampled_from([2, 3, 4, 8]))
    step = {"awq": 8, "compressed-tensors": 1}.get(kind, {2: 16, 3: 32, 4: 8, 8: 4}[bits])
    out_features = data.draw(st.integers(2, 6)) * step
    size = data.draw(st.sampled_from([32, 48, 96]))  # fewer channels fill as many words with 3 bits as with 4
    n_groups = data.draw(st.integers(1, 3))
    scatter = kind != "awq" and n_groups > 1 and data.draw(st.booleans())
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    top = (1 << bits) - 1
    spread = data.draw(st.sampled_from([0, 1, 1 << bits]))  # how far codes lie from their zero
    zeros = rng.integers(1 if kind == "gptq" else 0, top + 1, (out_features, n_groups))
    if data.draw(st.booleans()):
        zeros[:] = 1 << (bits - 1)
    g_idx = np.arange(size * n_groups) // size
    g_idx = rng.permutation(g_idx) if scatter else g_idx
    codes = zeros[:, g_idx] + rng.integers(-spread, spread + 1, (out_features, size * n_groups))
    layer = Layer(
        codes=np.clip(codes, 0, top).astype(np.uint8),
        zeros=zeros.astype(np.uint8),
        scales=rng.normal(0, 0.02, zeros.shape).astype(np.float16),
        g_idx=g_idx.astype(np.int32),
        bits=bits,
    )
    if kind != "compressed-tensors" and layer.codes.shape[1] % step:
        return
    only(layer, tmp_path_factory.mktemp("any"), kind, target)


# --- the command itself


def convert(source: Path, output: Path, *options: str) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["convert", str(source), "-o", str(output), *options, "--json"])
    assert result.exit_code == 0, result.stdout + result.stderr
    document: dict[str, Any] = json.loads(result.stdout)
    return document


OPTIONS: dict[str, dict[str, Any]] = {
    "sym": {"sym": True},
    "act-order": {"group_size": 64, "act_order": True},
    "8-bit-rows": {"bits": 8, "group_size": -1},
    "3-bit-act-order": {"bits": 3, "act_order": True},
}
COMMANDS = [
    (kind, target, name)
    for kind in PACKED
    for target in (*PACKED, *FLOATS)
    for name in OPTIONS
    if name == "sym" or "awq" not in (kind, target)  # which has neither other widths nor an activation order
]


@pytest.mark.parametrize(("kind", "target", "name"), COMMANDS)
def test_a_whole_checkpoint_becomes_the_oracles_tensor_by_tensor(
    kind: str, target: str, name: str, tmp_path: Path
) -> None:
    options = OPTIONS[name]
    layers = random_layers(layers=1, seed=40, **options)
    others = other_tensors(layers)
    source = make_checkpoint(tmp_path / "source", layers, kind, shards=2)
    document = convert(source, tmp_path / "out", "--to", target, "--from", kind, "--max-shard-size", "20kB")
    made = read_checkpoint(tmp_path / "out")
    carried = others if target != "bf16" else {name: bfloat16(array) for name, array in others.items()}
    same(made, expected(layers, target) | carried)
    assert (document["source_format"], document["format"], document["quantized_modules"]) == (kind, target, len(layers))
    assert document["tensors_compared"] == document["tensors_equal"] == len(made)
    assert (document["refused"], document["disagreements"]) == ([], [])


@pytest.mark.parametrize("target", PACKED)
@pytest.mark.parametrize("tool", sorted(GOLDEN_FORMATS))
def test_other_tools_tensors_keep_their_weights_through_every_format(tool: str, target: str, tmp_path: Path) -> None:
    source = golden_checkpoint(tmp_path / "source", tool)
    if tool.startswith("llmcompressor") and target != "compressed-tensors":
        # its scales are float32, and none of them happens to be a 16-bit number
        result = CliRunner().invoke(app, ["convert", str(source), "-o", str(tmp_path / "packed"), "--to", target])
        assert result.exit_code == 4 and "F32 scales are not exact in F16" in result.stderr
        return
    document = convert(source, tmp_path / "packed", "--to", target)
    assert (document["source_format"], document["disagreements"]) == (GOLDEN_FORMATS[tool], [])
    convert(tmp_path / "packed", tmp_path / "fp16", "--to", "fp16")
    weights = read_checkpoint(tmp_path / "fp16")
    expected_weights = read_safetensors(GOLDEN / f"{tool}.safetensors")
    side = json.loads((GOLDEN / f"{tool}.json").read_text())
    assert hashlib.sha256(weights["k_proj.weight"].tobytes()).hexdigest() == side["expected_k_proj_sha256"]
    assert weights["down_proj.weight"].tobytes() == expected_weights["expected.down_proj"].tobytes()
