"""What README.md and docs/convert.md say is supported: each cell of their tables is run here, by the command line.

Models are random and tiny, of every family's own class in transformers: 2 query heads of 128 channels, one layer.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import httpx
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from tests.fakes.quantized_models import Shape, make_quantized
from tests.fakes.served import Served
from tests.fakes.tiny_models import make_tiny_model

ROOT = Path(__file__).parent.parent.parent

FAMILIES = {
    "llama": "Llama (SmolLM2 among them)",
    "mistral": "Mistral",
    "qwen2": "Qwen2, Qwen2.5",
    "qwen3": "Qwen3",
    "qwen2_vl": "Qwen2-VL, its language part",
    "qwen2_5_vl": "Qwen2.5-VL, its language part",
    "chatglm": "ChatGLM2, ChatGLM3",
}
SIM, BOARD = "compile, simulated board", "compile, EdgeLLM's board"
VLLM, OWN = "serve-gpu, vLLM on a CPU", "serve-gpu, transformers"
OPERATIONS = ("quantise", "convert", "GGUF", "eval", VLLM, OWN, SIM, BOARD)
NO = {
    ("GGUF", "qwen2_vl"): "model_type 'qwen2_vl' has no GGUF form here",
    ("GGUF", "qwen2_5_vl"): "model_type 'qwen2_5_vl' has no GGUF form here",
    ("GGUF", "chatglm"): "model_type 'chatglm' has no GGUF form here",
    ("quantise", "chatglm"): "architecture 'chatglm' is not supported",
    ("eval", "chatglm"): "transformers cannot use it",
    (VLLM, "qwen2_vl"): "qwen2_vl needs torchvision to load in vLLM",
    (VLLM, "qwen2_5_vl"): "qwen2_5_vl needs torchvision to load in vLLM",
    (VLLM, "chatglm"): "chatglm cannot be served by vLLM or transformers",
    (OWN, "chatglm"): "chatglm cannot be served by vLLM or transformers",
    (BOARD, "qwen3"): "query and key norms are not in the board's operations",
}
"""What is refused, and the words of the refusal. Every other cell is a yes."""

FORMATS = ("gptq", "gptq_v2", "awq", "compressed-tensors", "gguf", "fp16")
KINDS = {
    "4 bits, symmetric": (),
    "4 bits, zero points": ("--asym",),
    "8 bits": ("--bits", "8"),
    "activation order": ("--desc-act", "--method", "gptq", "--calib-samples", "2", "--calib-seqlen", "32"),
}
NO_FORM = {
    ("8 bits", "awq"): "AWQ's gemm layout has 4-bit codes only",
    ("activation order", "awq"): "awq has no g_idx",
    ("activation order", "gguf"): "its groups follow an activation order (g_idx)",
}
"""The same for what `convert` does with the kinds of GPTQ checkpoints."""

TEXT = "The quick brown fox jumps over the lazy dog. A checkpoint is a directory of files."
PROMPT = "A checkpoint is"


def test_the_readme_has_the_table_that_is_tested_here() -> None:
    rows = [["" if (o, f) in NO else "yes" for o in OPERATIONS] for f in FAMILIES]
    assert table(("", *OPERATIONS), FAMILIES.values(), rows) in (ROOT / "README.md").read_text()


def test_the_page_of_convert_has_the_table_that_is_tested_here() -> None:
    rows = [["" if (k, f) in NO_FORM else "yes" for f in FORMATS] for k in KINDS]
    assert table(("", *FORMATS), KINDS, rows) in (ROOT / "docs" / "convert.md").read_text()


def table(headers: Any, names: Any, rows: list[list[str]]) -> str:
    """A Markdown table as it is to stand in a page; paste it from the failure."""
    lines = [f"| {' | '.join(headers)} |", "|---" * len(headers) + "|"]
    lines += [f"| {' | '.join([name, *row])} |" for name, row in zip(names, rows, strict=True)]
    return "\n".join(line.replace("  ", " ") for line in lines) + "\n"


# --- by family

Model = Callable[[str], tuple[Path, Path]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """`model("qwen2")`: the checkpoint in 16 bit and, by `edgetool quantize`, in 4 bits; to be read only."""
    made: dict[str, tuple[Path, Path]] = {}

    def of(family: str) -> tuple[Path, Path]:
        if family not in made:
            top = tmp_path_factory.mktemp(family)
            made[family] = (top / "plain", top / "quantized")
            if family == "chatglm":  # no class of transformers: quantised by the tests' own writer
                shape = Shape(layers=1, hidden=256, ffn=256, heads=2, kv_heads=1, head_dim=128)
                make_quantized(top / "quantized", family, shape=shape, group_size=128)
                shutil.copytree(of("llama")[0], top / "plain")
                edit(top / "plain" / "config.json", model_type="chatglm")
            else:
                more: dict[str, Any] = {"head_dim": 128} if family == "qwen3" else {}
                if "vl" in family:
                    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [16, 24, 24]}
                    more["rope_parameters"] = rope
                sizes = {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 256}
                make_tiny_model(top / "plain", family, hidden_size=256, layers=1, **sizes, **more)
                succeeded("quantize", top / "plain", "-o", top / "quantized", *SMALL)
        return made[family]

    return of


SMALL = ("--calib-samples", "2", "--calib-seqlen", "32", "--threads", "1")


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def invoke(*arguments: str | Path) -> Any:
    from edgetool.cli import app

    return CliRunner().invoke(app, [*map(str, arguments), "--json"])


def succeeded(*arguments: str | Path) -> dict[str, Any]:
    result = invoke(*arguments)
    assert result.exit_code == 0, result.stdout + result.stderr
    document: dict[str, Any] = json.loads(result.stdout)
    return document


def refused(operation: str, family: str, *arguments: str | Path) -> bool:
    """Whether the table says no; if so the command must say so too, in the words of NO, and leave nothing."""
    if (operation, family) not in NO:
        return False
    result = invoke(*arguments)
    document = json.loads(result.stdout)
    assert (result.exit_code, document["ok"]) == (4, False), result.stderr
    assert NO[operation, family] in document["message"]
    return True


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {k: v for path in sorted(directory.glob("*.safetensors")) for k, v in load_file(path).items()}


def same_tensors(left: Path, right: Path) -> bool:
    one, other = tensors(left), tensors(right)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def of_transformers(directory: Path) -> Any:
    """The model in float32 by transformers alone."""
    import transformers as hf

    vision = "vl" in json.loads((directory / "config.json").read_text())["model_type"]
    auto = hf.AutoModelForImageTextToText if vision else hf.AutoModelForCausalLM
    return auto.from_pretrained(directory, dtype=torch.float32).eval()


def tokens(directory: Path, text: str) -> list[int]:
    import transformers

    return list(transformers.AutoTokenizer.from_pretrained(directory)(text)["input_ids"])


every_family = pytest.mark.parametrize("family", FAMILIES)


@every_family
def test_quantise(model: Model, tmp_path: Path, family: str) -> None:
    plain, _ = model(family)
    command = ("quantize", plain, "-o", tmp_path / "q", *SMALL)
    if refused("quantise", family, *command):
        assert not (tmp_path / "q").exists()
        return
    assert succeeded(*command)["quantized_modules"] == 7
    kept = {name: t for name, t in tensors(plain).items() if not name.endswith("_proj.weight") or "visual" in name}
    made = tensors(tmp_path / "q")
    assert all(torch.equal(made[name], tensor) for name, tensor in kept.items())
    assert len([name for name in made if name.endswith(".qweight")]) == 7


@every_family
def test_convert(model: Model, tmp_path: Path, family: str) -> None:
    _, quantized = model(family)
    document = succeeded("convert", quantized, "-o", tmp_path / "awq", "--to", "awq")
    assert document["tensors_compared"] == document["tensors_equal"] > 7
    assert not same_tensors(tmp_path / "awq", quantized)
    succeeded("convert", tmp_path / "awq", "-o", tmp_path / "back", "--to", "gptq")
    there, back = tensors(quantized), tensors(tmp_path / "back")
    assert all(torch.equal(tensor, there[name]) for name, tensor in back.items())
    assert there.keys() - back.keys() <= {name for name in there if name.endswith("g_idx")}


@every_family
def test_gguf(model: Model, tmp_path: Path, family: str) -> None:
    _, quantized = model(family)
    command = ("convert", quantized, "-o", tmp_path / "gguf", "--to", "gguf")
    if refused("GGUF", family, *command):
        return
    succeeded(*command)
    (path,) = (tmp_path / "gguf").glob("*.gguf")
    assert len([t for t in gguf.GGUFReader(path).tensors if t.tensor_type == gguf.GGMLQuantizationType.Q4_0]) == 7
    succeeded("convert", path, "-o", tmp_path / "there", "--to", "fp16")
    succeeded("convert", quantized, "-o", tmp_path / "here", "--to", "fp16")
    assert same_tensors(tmp_path / "here", tmp_path / "there")


@every_family
def test_eval(model: Model, tmp_path: Path, family: str) -> None:
    plain, quantized = model(family)
    (tmp_path / "text.txt").write_text(TEXT)
    sides = (quantized,) if family == "chatglm" else (quantized, "--against", plain)
    command = ("eval", *sides, "-o", tmp_path / "ev", "--tasks", "perplexity", "--text", tmp_path / "text.txt")
    command += ("--context", "64", "--dtype", "float32", "--threads", "1", "--offline")
    if refused("eval", family, *command):
        return
    found = succeeded(*command)["tasks"]["perplexity"]
    ids = torch.tensor([[0, *tokens(plain, TEXT)]])  # 0: the token that begins a text
    assert ids.shape[1] <= 65  # one window
    succeeded("convert", quantized, "-o", tmp_path / "dense", "--to", "fp16")
    for side, directory in (("original", plain), ("quantized", tmp_path / "dense")):
        with torch.no_grad():
            loss = of_transformers(directory)(input_ids=ids, labels=ids).loss
        assert found[side] == pytest.approx(math.exp(loss), rel=1e-4)  # float32 sums in another order


@every_family
def test_serve_gpu_plans_it(model: Model, family: str) -> None:
    _, quantized = model(family)
    for operation, engine in ((OWN, "transformers"), (VLLM, "vllm")):
        command = ("serve-gpu", quantized, "--engine", engine, "--device", "cpu", "--dry-run")
        if not refused(operation, family, *command):
            assert succeeded(*command)["plan"]


@every_family
def test_compile_for_the_simulated_board(model: Model, tmp_path: Path, family: str) -> None:
    _, quantized = model(family)
    image = tmp_path / "image"
    command = ("compile-vcu128", quantized, "-o", image, "--lm-head", "rtn4", "--max-context", "256")
    succeeded(*command, "--profile", "sim")
    verified = succeeded("compile-vcu128", image, "--verify", quantized)
    assert verified["tensors_compared"] == verified["tensors_equal"] > 7
    ran = succeeded("compile-vcu128", image, "--verify-run", quantized)["greedy"]
    assert ran["equal_of_these"] == ran["margin_allows"] > 0  # tokens that no rounding could change
    if family != "chatglm":  # its tokenizer is not among the tiny models
        said = succeeded("chat", "--image", image, "-m", "hi", "--max-tokens", "3", "--temperature", "0")
        assert 1 <= said["completion_tokens"] <= 3


@every_family
def test_compile_for_the_board(model: Model, tmp_path: Path, family: str) -> None:
    _, quantized = model(family)
    image = tmp_path / "image"
    command = ("compile-vcu128", quantized, "-o", image, "--lm-head", "rtn4", "--max-context", "256")
    if refused(BOARD, family, *command, "--profile", "edgellm"):
        return
    succeeded(*command, "--profile", "edgellm")
    verified = succeeded("compile-vcu128", image, "--verify", quantized)
    assert verified["tensors_compared"] == verified["tensors_equal"] > 7


def greedy(directory: Path, count: int) -> list[str]:
    """What a model says after PROMPT, by transformers in float32, computed anew for each token."""
    import transformers

    reader = of_transformers(directory)
    ids = tokens(directory, PROMPT)
    start = len(ids)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(reader(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return transformers.AutoTokenizer.from_pretrained(directory).decode(ids[start:], skip_special_tokens=True)


def asked(document: dict[str, Any], count: int) -> str:
    body = {"prompt": PROMPT, "max_tokens": count, "temperature": 0, "ignore_eos": True}
    headers = {"Authorization": "Bearer k"}
    answer = httpx.post(f"{document['openai_base_url']}/completions", json=body, headers=headers, timeout=120)
    return str(answer.raise_for_status().json()["choices"][0]["text"])


@pytest.mark.slow
@pytest.mark.parametrize("family", [family for family in FAMILIES if (OWN, family) not in NO])
def test_serve_gpu_answers_as_transformers_does(model: Model, tmp_path: Path, family: str) -> None:
    _, quantized = model(family)
    succeeded("convert", quantized, "-o", tmp_path / "dense", "--to", "fp16")
    expected = greedy(tmp_path / "dense", 8)
    options = ("--engine", "transformers", "--device", "cpu", "--dtype", "float32", "--max-model-len", "64")
    with Served(tmp_path / "served", str(quantized), *options, "--threads", "1") as served:
        document = served.ready()
        assert [asked(document, 8) for _ in range(2)] == [expected] * 2


# --- what is not in the table


@pytest.mark.parametrize(
    ("model_type", "more", "words"),
    [
        (
            "mixtral",
            {"num_local_experts": 4},
            "mixture-of-experts models cannot be quantised yet (model_type 'mixtral'",
        ),
        ("qwen3_moe", {"num_experts": 8}, "mixture-of-experts models cannot be quantised yet (model_type 'qwen3_moe'"),
        ("gemma2", {}, "architecture 'gemma2' is not supported"),
        ("phi3", {}, "architecture 'phi3' is not supported"),
    ],
)
def test_other_families_are_refused_by_name(
    model: Model, tmp_path: Path, model_type: str, more: dict[str, Any], words: str
) -> None:
    plain, quantized = (shutil.copytree(path, tmp_path / path.name) for path in model("llama"))
    for directory in (plain, quantized):
        edit(directory / "config.json", model_type=model_type, **more)
    for command, said in (
        (("quantize", plain), words),
        (("compile-vcu128", quantized, "--profile", "sim"), f"architecture '{model_type}' cannot be compiled"),
        (("convert", quantized, "--to", "gguf"), f"model_type '{model_type}' has no GGUF form here"),
    ):
        result = invoke(*command, "-o", tmp_path / "out")
        assert result.exit_code == 4
        assert said in json.loads(result.stdout)["message"]
    assert not (tmp_path / "out").exists()


# --- by format


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory, model: Model) -> dict[str, Path]:
    """A GPTQ checkpoint of each kind."""
    top = tmp_path_factory.mktemp("kinds")
    made = {}
    for number, (kind, options) in enumerate(KINDS.items()):
        made[kind] = top / str(number)
        method = () if "--method" in options else ("--method", "rtn")
        succeeded("quantize", model("llama")[0], "-o", made[kind], "--threads", "1", *method, *options)
    return made


@pytest.mark.parametrize("target", FORMATS)
@pytest.mark.parametrize("kind", KINDS)
def test_convert_to_every_format_and_back(sources: dict[str, Path], tmp_path: Path, kind: str, target: str) -> None:
    result = invoke("convert", sources[kind], "-o", tmp_path / "out", "--to", target)
    document = json.loads(result.stdout)
    if (kind, target) in NO_FORM:
        assert result.exit_code == 4 and not (tmp_path / "out").exists()
        assert NO_FORM[kind, target] in document["message"]
        return
    assert result.exit_code == 0, result.stderr
    assert document["tensors_compared"] == document["tensors_equal"] > 7
    dense = weights(sources[kind], tmp_path / "dense0")
    out = next((tmp_path / "out").glob("*.gguf"), tmp_path / "out")
    for name, array in weights(out, tmp_path / "dense1").items():
        np.testing.assert_array_equal(array, dense[name])


def weights(source: Path, scratch: Path) -> dict[str, np.ndarray]:
    """Every tensor as `--to fp16` gives it."""
    succeeded("convert", source, "-o", scratch, "--to", "fp16")
    return {name: tensor.numpy() for name, tensor in tensors(scratch).items()}


@pytest.mark.parametrize("target", ["gptq", "awq", "compressed-tensors"])
def test_a_model_in_16_bit_is_not_converted_but_pointed_to_quantize(model: Model, tmp_path: Path, target: str) -> None:
    result = invoke("convert", model("llama")[0], "-o", tmp_path / "out", "--to", target)
    document = json.loads(result.stdout)
    assert (result.exit_code, "edgetool quantize" in document["hint"]) == (4, True)
    assert f"so it has no {target} form without loss" in document["message"]
