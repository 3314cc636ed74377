"""Verification of outputs that are right, wrong in one bit, wrong in their names, or cannot be read."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgetool.converter.compare import Order
from edgetool.converter.verify import Meant, Verified, open_side, verify
from edgetool.errors import BadInput, Stopped, VerificationFailed
from tests.fakes.packed_checkpoints import (
    PACKED,
    Layer,
    bfloat16,
    make_checkpoint,
    other_tensors,
    random_layers,
    read_safetensors,
    write_safetensors,
)

FLOATS = ("fp16", "bf16")
DOWN, UP = "model.layers.1.mlp.down_proj", "model.layers.0.mlp.up_proj"
NORM = "model.layers.1.input_layernorm.weight"
MODULES, OTHERS = 14, 8  # two layers of seven linears; embedding, lm_head, five norms, a bias

Layers = Mapping[str, Layer]


class Pair:
    """A source and an output, put together by the oracle: from the same integers, or from those of `made`."""

    def __init__(
        self, directory: Path, kind: str, target: str, layers: Layers, made: Layers | None = None, **output: Any
    ) -> None:
        self.kind, self.target, self.layers = kind, target, layers
        self.source = make_checkpoint(directory / "source", layers, kind)
        torch_dtype = "bfloat16" if target == "bf16" else "float16"
        options = {"torch_dtype": torch_dtype} | output
        self.output = make_checkpoint(directory / "output", made or layers, target, **options)

    def verify(
        self, sample: bool = False, threads: int = 1, stop: Callable[[], bool] = lambda: False, **meant: Any
    ) -> Verified:
        sizes = {name: (layer.bits, layer.group_size) for name, layer in self.layers.items()}
        source = open_side(self.source, self.kind, sizes)
        wanted = Meant(self.target, {} if self.target in FLOATS else sizes, **meant)
        return verify(source, self.output, wanted, sample=sample, threads=threads, stop_requested=stop)

    def fails(self, *words: str, **options: Any) -> VerificationFailed:
        with pytest.raises(VerificationFailed) as caught:
            self.verify(**options)
        for word in words:
            assert word in caught.value.message, caught.value.message
        return caught.value

    def edit_config(self, name: str = "config.json", **changes: Any) -> None:
        path = self.output / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    def edit(self, change: Callable[[dict[str, np.ndarray]], Any], side: str = "output") -> None:
        path = getattr(self, side) / "model.safetensors"
        tensors = read_safetensors(path)
        change(tensors)
        write_safetensors(path, tensors)


Make = Callable[..., Pair]


@pytest.fixture
def pair(tmp_path: Path) -> Make:
    count = iter(range(100))

    def make(kind: str, target: str, made: Layers | None = None, others: Any = None, **options: Any) -> Pair:
        directory = tmp_path / str(next(count))
        layers = options.pop("given", None) or random_layers(**options)
        return Pair(directory, kind, target, layers, made, **({} if others is None else {"others": others}))

    return make


@pytest.mark.parametrize("target", [*PACKED, *FLOATS])
@pytest.mark.parametrize("kind", PACKED)
def test_the_same_integers_in_any_two_formats_are_equal_tensor_by_tensor(pair: Make, kind: str, target: str) -> None:
    each = {"awq": 3, "fp16": 1, "bf16": 1}.get(target, 4)
    count = MODULES * each + OTHERS
    for threads in (1, 3):
        assert pair(kind, target).verify(threads=threads) == Verified(count, count)


@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("act_order", [False, True], ids=["plain", "act-order"])
@pytest.mark.parametrize("sym", [False, True], ids=["asym", "sym"])
def test_other_widths_activation_orders_and_symmetry_are_equal(
    pair: Make, bits: int, act_order: bool, sym: bool
) -> None:
    options: dict[str, Any] = {"bits": bits, "act_order": act_order, "sym": sym, "layers": 1}
    each = 3 + (not sym) + act_order
    count = 7 * each + OTHERS - 2
    assert pair("gptq", "compressed-tensors", **options).verify() == Verified(count, count)
    assert pair("compressed-tensors", "gptq_v2", **options).verify().equal == 7 * 4 + OTHERS - 2


# --- one wrong integer, one wrong bit


def with_code(layer: Layer) -> Layer:
    codes = layer.codes.copy()
    codes[21, 37] ^= 1
    return replace(layer, codes=codes)


def with_zero(layer: Layer) -> Layer:
    zeros = layer.zeros.copy()
    zeros[21, 1] ^= 2
    return replace(layer, zeros=zeros)


def with_scale(layer: Layer) -> Layer:
    scales = layer.scales.copy()
    scales[21, 1] *= 2
    return replace(layer, scales=scales)


def with_groups(layer: Layer) -> Layer:
    g_idx = layer.g_idx.copy()
    g_idx[[1, 40]] = g_idx[[40, 1]]
    return replace(layer, g_idx=g_idx)


@pytest.mark.parametrize(
    ("target", "change", "suffix", "place"),
    [
        ("gptq", with_code, "qweight", "code [21, 37] is"),
        ("gptq_v2", with_zero, "qzeros", "weight [21, "),
        ("gptq", with_scale, "scales", "weight [21, "),
        ("gptq", with_groups, "g_idx", "weight [0, 1] is"),
        ("awq", with_code, "qweight", "code [21, 37] is"),
        ("awq", with_zero, "qzeros", "weight [21, "),
        ("awq", with_scale, "scales", "weight [21, "),
        ("compressed-tensors", with_code, "weight_packed", "code [21, 37] is"),
        ("compressed-tensors", with_zero, "weight_zero_point", "weight [21, "),
        ("compressed-tensors", with_scale, "weight_scale", "weight [21, "),
        ("fp16", with_code, "weight", "weight [21, 37] is"),
        ("bf16", with_zero, "weight", "weight [21, "),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_one_wrong_integer_is_found_with_its_tensor_and_its_place(
    pair: Make, target: str, change: Callable[[Layer], Layer], suffix: str, place: str
) -> None:
    layers = random_layers()
    made = pair("gptq", target, given=layers, made=layers | {DOWN: change(layers[DOWN])})
    error = made.fails(f"{DOWN}.{suffix} {place}", ", must be ")
    tensors = len(read_safetensors(made.output / "model.safetensors"))
    assert error.exit_code == 8
    assert error.details == {"tensors_compared": tensors, "tensors_equal": tensors - 1}


@pytest.mark.parametrize("target", [*PACKED, "fp16"])
def test_no_single_flipped_bit_of_the_data_goes_unseen(pair: Make, target: str) -> None:
    made = pair("compressed-tensors", target, layers=1)
    path = made.output / "model.safetensors"
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    rng = np.random.default_rng(5)
    for place, bit in zip(rng.integers(start, len(whole), 40).tolist(), rng.integers(0, 8, 40).tolist(), strict=True):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << bit
        path.write_bytes(damaged)
        made.fails()
    path.write_bytes(whole)
    made.verify()


def test_zeros_of_two_linears_swapped_are_found(pair: Make) -> None:
    made = pair("awq", "gptq")
    names = [f"model.layers.0.mlp.{name}.qzeros" for name in ("gate_proj", "up_proj")]

    def swap(tensors: dict[str, np.ndarray]) -> None:
        tensors[names[0]], tensors[names[1]] = tensors[names[1]], tensors[names[0]]

    made.edit(swap)
    error = made.fails(names[0], "weight [")
    assert error.details["tensors_compared"] - error.details["tensors_equal"] == 2


def test_the_first_of_several_differences_is_named_whatever_the_threads(pair: Make) -> None:
    layers = random_layers()
    wrong = {name: with_code(layer) for name, layer in layers.items() if name.endswith(("o_proj", "q_proj"))}
    made = pair("gptq", "awq", given=layers, made=layers | wrong)
    for threads in (1, 4):
        error = made.fails("model.layers.0.self_attn.o_proj.qweight", threads=threads)
        assert error.details["tensors_compared"] - error.details["tensors_equal"] == 4


# --- what may differ: codes that moved with their zero, dtypes


def test_codes_that_moved_together_with_their_zero_are_equal_and_alone_are_not(pair: Make) -> None:
    layers = random_layers()
    layer = replace(layers[UP], codes=layers[UP].codes.copy(), zeros=layers[UP].zeros.copy())
    layer.codes[5, :32] = np.clip(layer.codes[5, :32], 1, 12)
    layer.zeros[5, 0] = 5
    moved = replace(layer, codes=layer.codes.copy(), zeros=layer.zeros.copy())
    moved.codes[5, :32] += 2
    moved.zeros[5, 0] += 2
    given = layers | {UP: layer}
    right = pair("awq", "gptq", given=given, made=given | {UP: moved})
    assert right.verify() == Verified(MODULES * 4 + OTHERS, MODULES * 4 + OTHERS)
    moved.codes[5, 7] += 1
    pair("awq", "gptq", given=given, made=given | {UP: moved}).fails(f"{UP}.qweight weight [5, 7] is")


def test_scales_may_get_another_dtype_but_not_another_value(pair: Make) -> None:
    layers = random_layers(layers=1)
    wide = {name: replace(layer, scales=layer.scales.astype(np.float32)) for name, layer in layers.items()}
    narrow = pair("compressed-tensors", "awq", given=wide, made=layers).verify()
    assert narrow.equal == 7 * 3 + OTHERS - 2
    scales = wide[UP.replace("layers.1", "layers.0")].scales
    scales[9, 0] = np.nextafter(scales[9, 0], np.float32(1))
    pair("compressed-tensors", "awq", given=wide, made=layers).fails(f"{UP}.scales weight [9, ")


def test_weights_in_16_bit_are_the_float32_product_rounded_once(pair: Make) -> None:
    """Rounding the scale's product twice, or to the wrong side, is one unit in the last place and is found."""

    def nudge(tensors: dict[str, np.ndarray]) -> None:
        tensors[f"{DOWN}.weight"].view(np.uint16)[3, 5] += 1

    for target in FLOATS:
        made = pair("gptq", target)
        made.verify()
        made.edit(nudge)
        made.fails(f"{DOWN}.weight weight [3, 5] is")


def test_16_bit_weights_of_the_other_16_bit_dtype_are_wrong(pair: Make) -> None:
    made = pair("gptq", "fp16")
    made.edit(lambda tensors: tensors.update({f"{UP}.weight": bfloat16(made.layers[UP].weight())}))
    made.fails(f"{UP}.weight is BF16 [128, 64], must be F16 [128, 64]")


def test_a_weight_beyond_float16_is_never_right(pair: Make) -> None:
    layers = random_layers(layers=1)
    layers[UP].scales[4] = 60000
    pair("gptq", "fp16", given=layers).fails(f"{UP}.weight has infinite weights")


def test_weights_may_be_infinite_in_no_dtype_but_a_wide_one_holds_them(pair: Make) -> None:
    layers = random_layers(layers=1)
    layers[UP].scales[4] = 60000
    assert pair("gptq", "bf16", given=layers).verify().equal == 7 + OTHERS - 2


# --- tensors that are not quantised


@pytest.mark.parametrize("name", [NORM, "model.embed_tokens.weight", "lm_head.weight"])
@pytest.mark.parametrize("sample", [False, True])
def test_one_wrong_byte_of_another_tensor_is_found(pair: Make, name: str, sample: bool) -> None:
    made = pair("gptq", "awq")
    made.verify(sample=sample)

    def flip(tensors: dict[str, np.ndarray]) -> None:
        tensors[name].reshape(-1).view(np.uint16)[7] ^= 1

    made.edit(flip)
    error = made.fails(f"{name} value 7 is", sample=sample)
    assert error.details["tensors_compared"] - error.details["tensors_equal"] == 1


def test_another_tensor_may_change_its_dtype_where_no_value_changes(pair: Make) -> None:
    layers = random_layers()
    others = other_tensors(layers, np.float32)
    made = pair("gptq", "fp16", given=layers, others=other_tensors(layers))
    made.edit(lambda tensors: tensors.update(others), "source")
    assert made.verify().equal == MODULES + OTHERS
    third = others | {NORM: others[NORM] + np.float32(1e-6)}  # rounds back to what is in the output
    made.edit(lambda tensors: tensors.update(third), "source")
    made.fails(f"{NORM} value 0 is", "which F16 does not hold")
    assert made.verify(rounding=True).equal == MODULES + OTHERS
    made.edit(lambda tensors: tensors.update({NORM: tensors[NORM] + np.float16(0.125)}))
    made.fails(f"{NORM} value 0 is", rounding=True)


def test_rounding_does_not_excuse_infinity(pair: Make) -> None:
    layers = random_layers(layers=1)
    others, wide = other_tensors(layers), other_tensors(layers, np.float32)
    name = "model.norm.weight"
    wide[name][3], others[name][3] = 1e6, np.inf
    made = pair("gptq", "fp16", given=layers, others=others)
    made.edit(lambda tensors: tensors.update(wide), "source")
    made.fails(f"{name} value 3 is 1000000.0, which F16 does not hold", rounding=True)


def test_nan_and_integers_are_copied(pair: Make) -> None:
    layers = random_layers(layers=1)
    others = other_tensors(layers)
    others["model.norm.weight"][5] = np.nan
    others["position_ids"] = np.arange(9, dtype=np.int64).reshape(1, 9)
    for target in ("awq", "fp16"):
        made = pair("gptq", target, given=layers, others=others)
        made.edit(lambda tensors: tensors.update(others), "source")
        made.verify()
        made.edit(lambda tensors: tensors.update({"position_ids": np.arange(9, dtype=np.int32).reshape(1, 9)}))
        made.fails("position_ids is I32, must be I64")


# --- names


def removed(name: str) -> Callable[[dict[str, np.ndarray]], Any]:
    return lambda tensors: tensors.pop(name)


def renamed(name: str, to: str) -> Callable[[dict[str, np.ndarray]], Any]:
    return lambda tensors: tensors.update({to: tensors.pop(name)})


def added(name: str) -> Callable[[dict[str, np.ndarray]], Any]:
    return lambda tensors: tensors.update({name: np.zeros(4, np.float16)})


def unpacked(tensors: dict[str, np.ndarray]) -> None:
    for suffix in ("qweight", "qzeros", "scales"):
        del tensors[f"{DOWN}.{suffix}"]
    tensors[f"{DOWN}.weight"] = np.zeros((64, 128), np.float16)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (removed(NORM), (NORM, "is missing in the output")),
        (renamed(NORM, "model.norm.bias"), (NORM, "is missing in the output")),
        (added("model.extra.weight"), ("model.extra.weight should not be in the output",)),
        (added(f"{DOWN}.g_idx"), (f"{DOWN}.g_idx should not be in the output",)),
        (added(f"{DOWN}.weight"), (f"{DOWN}.weight should not be in the output",)),
        (unpacked, (f"{DOWN} is not quantised in the output",)),
        (removed(f"{DOWN}.scales"), (DOWN, "scales")),
        (removed(f"{DOWN}.qzeros"), (DOWN, "qzeros")),
        (removed(f"{DOWN}.qweight"), (DOWN,)),
    ],
)
def test_what_is_missing_or_too_much_is_named(
    pair: Make, change: Callable[[dict[str, np.ndarray]], Any], words: tuple[str, ...]
) -> None:
    made = pair("gptq", "awq")
    made.edit(change)
    made.fails(*words)


def test_a_linear_that_is_missing_in_16_bit_is_named(pair: Make) -> None:
    made = pair("gptq", "fp16")
    made.edit(removed(f"{DOWN}.weight"))
    made.fails(f"{DOWN}.weight is missing in the output")


# --- what the output says of itself


def test_a_config_that_says_something_else_than_the_tensors_is_wrong(pair: Make) -> None:
    def claims(**changes: Any) -> Callable[[Pair], None]:
        def edit(made: Pair) -> None:
            config = json.loads((made.output / "config.json").read_text())
            claim = config["quantization_config"] | changes
            made.edit_config(quantization_config=claim)
            made.edit_config("quantize_config.json", **claim)

        return edit

    for change, words in (
        (claims(bits=8), ("bits 8", "4")),
        (claims(group_size=128), ("group_size 128", "32")),
        (claims(sym=True), ("sym True",)),
        (claims(desc_act=True), ("desc_act True",)),
        (claims(checkpoint_format="gptq_v2"), ("gptq_v2",)),
        (lambda made: made.edit_config(quantization_config=None), ("no quantization_config",)),
        (lambda made: made.edit_config("quantize_config.json", bits=8), ("quantize_config.json",)),
        (lambda made: (made.output / "quantize_config.json").unlink(), ("quantize_config.json",)),
        (lambda made: (made.output / "config.json").write_text("{"), ("config.json", "not valid JSON")),
    ):
        made = pair("awq", "gptq", layers=1)
        made.verify()
        change(made)
        made.fails(*words)


def test_a_16_bit_output_claims_neither_a_quantisation_nor_another_dtype(pair: Make) -> None:
    made = pair("gptq", "bf16", layers=1)
    made.verify()
    made.edit_config(torch_dtype="float16")
    made.fails("torch_dtype float16, not bfloat16")
    made.edit_config(torch_dtype="bfloat16", quantization_config={"quant_method": "gptq", "bits": 4})
    made.fails("quantization_config")


def test_an_output_in_another_format_than_was_asked_for_is_wrong(pair: Make) -> None:
    made = pair("gptq", "awq", layers=1)
    made.target = "compressed-tensors"
    made.fails("the output's tensors are awq, not compressed-tensors")


# --- damage


def test_an_output_that_cannot_be_read_failed_and_a_source_is_bad_input(pair: Make) -> None:
    for side, error in (("output", VerificationFailed), ("source", BadInput)):
        made = pair("gptq", "awq", layers=1)
        path = getattr(made, side) / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-3])
        with pytest.raises(error, match=r"model\.safetensors.*truncated"):
            made.verify()


def test_scales_that_are_no_numbers_are_found_on_either_side(pair: Make) -> None:
    for side, error in (("output", VerificationFailed), ("source", BadInput)):
        made = pair("gptq", "awq", layers=1)

        def spoil(tensors: dict[str, np.ndarray]) -> None:
            tensors[f"{UP}.scales"][0, 3] = np.nan

        made.edit(spoil, side)
        with pytest.raises(error, match=rf"{UP}\.scales holds NaN"):
            made.verify()


# --- sampling, reordering, requantising


def test_a_sample_takes_the_first_the_last_and_some_between_and_counts_only_those(pair: Make) -> None:
    made = pair("gptq", "awq", layers=6)
    names, others = sorted(made.layers), len(other_tensors(made.layers))
    found = made.verify(sample=True)
    taken = (found.compared - others) // 3
    assert found.compared == found.equal
    assert len(names) // 8 <= taken < len(names) // 4
    path = made.output / "model.safetensors"
    whole = read_safetensors(path)
    wrong = {name: with_flipped_bit(array) for name, array in whole.items() if name.endswith(".qweight")}

    def seen(*modules: str) -> int:
        write_safetensors(path, whole | {f"{name}.qweight": wrong[f"{name}.qweight"] for name in modules})
        try:
            made.verify(sample=True)
        except VerificationFailed as error:
            return int(error.details["tensors_compared"] - error.details["tensors_equal"])
        return 0

    assert seen(*names) == taken
    assert seen(names[0]) == seen(names[-1]) == 1
    assert seen(names[1]) == 0
    assert seen(*names[1:-1]) == taken - 2


def with_flipped_bit(words: np.ndarray) -> np.ndarray:
    flipped = words.copy()
    flipped[-1, -1] ^= 1 << 13
    return flipped


@pytest.mark.parametrize("target", [*PACKED, *FLOATS])
def test_channels_that_were_reordered_are_compared_in_the_new_order(pair: Make, target: str) -> None:
    layers = random_layers(layers=1, act_order=True)
    down, up, gate = (f"model.layers.0.mlp.{name}_proj" for name in ("down", "up", "gate"))
    inputs = np.argsort(layers[down].g_idx, kind="stable")
    folded = dict(layers)
    folded[down] = replace(layers[down], codes=layers[down].codes[:, inputs], g_idx=layers[down].g_idx[inputs])
    order = {down: Order(columns=inputs)}
    for name in (up, gate):
        layer = layers[name]
        folded[name] = replace(layer, codes=layer.codes[inputs], zeros=layer.zeros[inputs], scales=layer.scales[inputs])
        order[name] = Order(rows=inputs)
    if target == "awq":  # which has no g_idx: the others must not have had one
        even = np.arange(64) // 32
        for both in (layers, folded):
            for name in both.keys() - {down}:
                both[name] = replace(both[name], g_idx=even.astype(np.int32))
    bias = np.arange(128, dtype=np.float16)
    others = other_tensors(layers) | {f"{up}.bias": bias[inputs]}
    made = pair("gptq", target, given=layers, made=folded, others=others)
    made.edit(lambda tensors: tensors.update({f"{up}.bias": bias}), "source")
    order[f"{up}.bias"] = Order(rows=inputs)
    made.verify(order=order)
    made.fails(order=order | {f"{up}.bias": Order()})
    made.fails(order=order | {gate: Order(rows=np.roll(inputs, 1))})
    made.fails(order={f"{up}.bias": order[f"{up}.bias"]})


def test_linears_that_were_rounded_again_hold_the_weights_that_were_meant(pair: Make) -> None:
    layers = random_layers(layers=1)
    made = layers | {UP: with_code(with_scale(layers[UP]))}
    meant = {UP: zlib.crc32(made[UP].weight().tobytes())}
    for target in PACKED:
        assert pair("gptq", target, given=layers, made=made).verify(crc32=meant).equal > 0
        pair("gptq", target, given=layers).fails(UP, "does not hold the weights that were meant", crc32=meant)


def test_a_stop_is_heard_between_two_tensors(pair: Make) -> None:
    made = pair("gptq", "awq")
    asked = iter([False, False, True])
    with pytest.raises(Stopped, match="not yet verified"):
        made.verify(stop=lambda: next(asked))
    assert next(asked, "nothing more was asked") == "nothing more was asked"
