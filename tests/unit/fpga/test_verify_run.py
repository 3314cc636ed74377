"""--verify-run: an image that computes its checkpoint passes, and one that computes anything else does not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from edgetool.checkpoints.checkpoint import Checkpoint
from edgetool.errors import BadInput, VerificationFailed
from edgetool.fpga.image import Image
from edgetool.fpga.verify_run import OPERATION_LIMITS, RunSettings, verify_run
from edgetool.progress import NullProgress, RecordingProgress
from tests.fakes.quantized_models import Made, Shape, make_quantized
from tests.unit.fpga.test_checks import at, rewrite
from tests.unit.fpga.test_image import edit, edit_program
from tests.unit.fpga.test_images_run import CASES

Compiled = Callable[..., tuple[Made, Path]]
Numerics = Literal["et1", "fast"]


def check(image: Path, made: Made, numerics: Numerics = "et1", trace: Path | None = None) -> dict[str, Any]:
    return verify_run(
        image, Checkpoint.open(made.path), RunSettings(numerics, trace=trace, new_tokens=8), NullProgress()
    )


@pytest.fixture
def damaged(compiled: Compiled, tmp_path: Path) -> tuple[Made, Path]:
    """A checkpoint, and a copy of its image to damage."""
    made, original = compiled("llama")
    return made, Path(shutil.copytree(original, tmp_path / "image"))


@pytest.mark.parametrize(
    ("case", "numerics"),
    [
        ("llama", "et1"),
        ("llama", "fast"),
        ("chatglm in activation order", "fast"),
        ("llama, head of fp16", "et1"),
        ("llama, asymmetric awq", "et1"),
        ("qwen2, signmag", "et1"),
        ("qwen3", "et1"),
        ("qwen2_vl", "et1"),
        ("chatglm in activation order", "et1"),
        ("desc_act everywhere, orders apart", "et1"),
        ("llama3 rope", "et1"),
    ],
)
def test_a_fresh_image_computes_its_checkpoint(compiled: Compiled, case: str, numerics: Numerics) -> None:
    family, how, settings = CASES[case]
    made, image = compiled(family, settings, **how)
    found = check(image, made, numerics)
    assert found["numerics"] == numerics and found["sequences"] == 3
    # transformers has no ChatGLM, and no language model that is the text part of Qwen2-VL
    assert found["reference"] == ("program" if family in ("chatglm", "qwen2_vl") else "transformers")
    kinds = {record["op"]: record for record in found["operations"]}
    assert {"EMBED", "RMSNORM", "MVM", "ROPE", "QK", "SOFTMAX", "PV", "ACT", "ARGMAX"} <= set(kinds)
    assert kinds["MVM"]["compared"] == 3 * (2 * 7 + 1)
    assert max(record["largest_error"] for record in found["operations"]) <= OPERATION_LIMITS[numerics]
    assert kinds["MVM"]["largest_error"] > 0  # something was compared, and rounding was seen
    greedy = found["greedy"]
    assert greedy["equal_of_these"] == greedy["margin_allows"] <= greedy["tokens"]
    # three prompts of 24 tokens, 8 new ones behind each, and one that is chosen after the last
    assert greedy["tokens"] == 3 * 9 and found["tokens"] == 3 * 32
    assert found["bytes_per_token"]["context_tokens"] == 32


def test_et1_is_nearer_to_float32_than_fast(compiled: Compiled) -> None:
    made, image = compiled("llama")
    exact, fast = (check(image, made, name) for name in ("et1", "fast"))
    assert exact["logits"]["rms_difference"] < fast["logits"]["rms_difference"] < 0.05 * fast["logits"]["spread"]


@pytest.mark.parametrize("name", ["layers.0.q", "layers.1.down", "layers.1.up"])
def test_one_flipped_nibble_is_found_in_its_operation(damaged: tuple[Made, Path], name: str) -> None:
    made, image = damaged
    start = at(image, name) + 32

    def flip(raw: np.ndarray) -> None:
        raw[start] ^= 0x08

    rewrite(image, "hbm/pc02.bin", flip)
    kind, buffer = name.split(".")[2], {"down": "x", "up": "inner"}
    with pytest.raises(VerificationFailed, match=f"{name.rpartition('.')[0]}.MVM {buffer.get(kind, kind)}: off by"):
        check(image, made)


def test_one_wrong_scale_is_found(damaged: tuple[Made, Path]) -> None:
    made, image = damaged
    start = at(image, "layers.0.gate")

    def double(raw: np.ndarray) -> None:
        raw[start : start + 2].view("<f2")[0] *= 2

    rewrite(image, "hbm/pc09.bin", double)
    with pytest.raises(VerificationFailed, match=r"layers\.0\.MVM gate: off by") as found:
        check(image, made)
    assert found.value.details["greedy"]["tokens"] > 0  # the figures come along


def test_two_swapped_ports_and_the_wrong_encoding_are_found(damaged: tuple[Made, Path], tmp_path: Path) -> None:
    made, image = damaged
    encoded = Path(shutil.copytree(image, tmp_path / "encoded"))
    edit(encoded, lambda manifest: manifest.update(int4_encoding="signmag"))
    with pytest.raises(VerificationFailed, match="off by"):
        check(encoded, made)
    first, second = (np.fromfile(image / f"hbm/pc0{pc}.bin", np.uint8) for pc in (3, 4))
    rewrite(image, "hbm/pc03.bin", lambda raw: np.copyto(raw, second))
    rewrite(image, "hbm/pc04.bin", lambda raw: np.copyto(raw, first))
    with pytest.raises(VerificationFailed, match="off by"):
        check(image, made)


def test_a_program_for_another_model_is_found_by_the_logits(damaged: tuple[Made, Path]) -> None:
    """Each operation is right by itself; only the model as transformers knows it tells that they are not its own."""
    made, image = damaged

    def turn_neighbours(document: dict[str, Any]) -> None:
        for op in document["layer"]:
            if op["op"] == "ROPE":
                op["style"] = "interleaved"

    edit_program(image, turn_neighbours)
    with pytest.raises(VerificationFailed, match="not the same model"):
        check(image, made)


def test_another_models_checkpoint_is_refused_or_found(compiled: Compiled, tmp_path: Path) -> None:
    _, image = compiled("llama")
    with pytest.raises(VerificationFailed, match="off by"):
        check(image, make_quantized(tmp_path / "other", "llama", seed=5))
    with pytest.raises(BadInput, match=r"there is no model\.layers\.0\.self_attn\.q_proj; layers\.0\.q of the image"):
        check(image, make_quantized(tmp_path / "glm", "chatglm"))
    with pytest.raises(BadInput, match=r"q_proj is \[256, 256\]; layers\.0\.q of the image comes from 192 rows of 192"):
        check(image, make_quantized(tmp_path / "wide", "llama", shape=Shape(hidden=256, heads=8)))


def test_a_file_with_another_hash_is_not_run(damaged: tuple[Made, Path]) -> None:
    made, image = damaged
    raw = bytearray((image / "hbm/pc00.bin").read_bytes())
    raw[100] ^= 1
    (image / "hbm/pc00.bin").write_bytes(raw)
    with pytest.raises(VerificationFailed, match="SHA-256"):
        check(image, made)


def test_a_plan_of_bytes_that_is_not_kept_is_found(damaged: tuple[Made, Path]) -> None:
    made, image = damaged
    edit(image, lambda manifest: manifest["memory"].update(kv_bytes_per_token=1))
    with pytest.raises(VerificationFailed, match="the plan says"):
        check(image, made)


def test_the_trace_has_a_line_for_every_operation(compiled: Compiled, tmp_path: Path) -> None:
    made, image = compiled("llama")
    found = check(image, made, trace=tmp_path / "trace.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "trace.jsonl").read_text().splitlines()]
    program = Image.open(image).program
    order = [
        *(("prologue", 0, op["op"]) for op in program["prologue"]),
        *(("layer", layer, op["op"]) for layer in range(program["layers"]) for op in program["layer"]),
        *(("epilogue", 0, op["op"]) for op in program["epilogue"]),
    ]
    assert [(line["part"], line["layer"], line["op"]) for line in lines] == order * 3
    embed, scores = lines[0], next(line for line in lines if line["op"] == "QK")
    assert (embed["tokens"], embed["position"], embed["shape"]) == (32, 0, [32, 192])
    assert embed["min"] < 0 < embed["max"] and embed["rms"] > 0 and embed["not_finite"] == 0
    assert scores["shape"] == [6, 32, 32] and scores["not_finite"] == 6 * 32 * 31 // 2
    assert all(line["seconds"] >= 0 for line in lines)
    assert found["trace"] == str(tmp_path / "trace.jsonl")
    for place, words in (
        ("trace.jsonl", "exists already"),
        ("no/trace.jsonl", "no such directory"),
        (".", "exists already"),
    ):
        with pytest.raises(BadInput, match=words):
            check(image, made, trace=tmp_path / place)


def test_as_many_tokens_as_fit_are_compared(compiled: Compiled) -> None:
    made, image = compiled("llama")
    found = verify_run(image, Checkpoint.open(made.path), RunSettings("fast", new_tokens=1000), NullProgress())
    assert found["bytes_per_token"]["context_tokens"] == Image.open(image).program["max_context"] == 64


def test_a_model_that_transformers_does_not_know_is_warned_of(compiled: Compiled) -> None:
    made, image = compiled("chatglm")
    progress = RecordingProgress()
    verify_run(image, Checkpoint.open(made.path), RunSettings("fast", new_tokens=1), progress)
    warned = [text for kind, text, _ in progress.events if kind == "warn"]
    assert len(warned) == 1 and "the program itself is the reference" in warned[0]
