"""`edgetool compile-vcu128` as its user meets it: results, refusals, tools for images, kills and resumes."""

from __future__ import annotations

import hashlib
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner

from tests.fakes.process_server import NO_SPACE, ProcessServer
from tests.fakes.quantized_models import Made, Shape, make_quantized

BOARD = Shape(layers=1, hidden=256, ffn=384, heads=2, kv_heads=1, head_dim=128, vocab=64)
Compile = Callable[..., Any]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_quantized(tmp_path_factory.mktemp("model") / "q", "llama")


@pytest.fixture(scope="module")
def image(model: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from edgetool.cli import app

    output = tmp_path_factory.mktemp("image") / "image"
    arguments = ["compile-vcu128", str(model.path), "-o", str(output), "--lm-head", "rtn4", "--max-context", "64"]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.stderr
    return output


@pytest.fixture
def compile(monkeypatch: pytest.MonkeyPatch) -> Compile:
    from edgetool.cli import app

    def invoke(*arguments: str | Path) -> Any:
        return CliRunner().invoke(app, ["compile-vcu128", *map(str, arguments)])

    return invoke


def document(result: Any, code: int = 0) -> dict[str, Any]:
    assert result.exit_code == code, result.stdout + result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    assert found["schema"] == "edgetool.compile-vcu128/1"
    assert found["ok"] is (code == 0)
    if code:
        assert "Traceback" not in result.stderr
        assert result.stderr.count("error: ") == 1
        assert found["exit_code"] == code
    return found


def digest(directory: Path) -> dict[str, str]:
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def test_the_document_has_what_scripts_need(compile: Compile, model: Made, tmp_path: Path) -> None:
    output = tmp_path / "image"
    found = document(
        compile(model.path, "-o", output, "--profile", "sim", "--max-context", 64, "--lm-head", "rtn4", "--json")
    )
    assert found["output"] == str(output)
    assert found["profile"] == "sim"
    assert len(found["hbm_bytes_per_pc"]) == 32
    assert found["max_context"] == 64
    low, high = found["estimate"]["decode_tokens_per_s"]
    assert 0 < low <= high
    assert found["estimate"]["prefill_tokens_per_s"] > 0
    manifest = json.loads((output / "manifest.json").read_text())
    assert found["kv_base"] == manifest["kv"]["base"]
    assert found["hbm_bytes_per_pc"] == manifest["memory"]["hbm_bytes_per_pc"]
    cache = 2 * 2 * 64 * 32 * 2 * 2 // 32  # layers, keys and values, tokens, head_dim, fp16, heads; over 32 PCs
    assert set(found["hbm_bytes_per_pc"]) == {found["kv_base"] + cache}
    assert {path.name for path in output.iterdir()} == {
        "manifest.json",
        "program.json",
        "hbm",
        "ddr.bin",
        "host",
        "tokenizer",
        "report.html",
        "edgetool.json",
    }
    record = json.loads((output / "edgetool.json").read_text())
    weights = hashlib.sha256((model.path / "model.safetensors").read_bytes()).hexdigest()
    assert record["schema"] == "edgetool.compile-vcu128-record/1"
    assert record["source"]["sha256"]["model.safetensors"] == weights
    assert record["source"]["spec"] == str(model.path)


def test_twice_gives_identical_bytes_and_the_second_time_nothing_is_done(
    compile: Compile, model: Made, image: Path, tmp_path: Path
) -> None:
    arguments = (model.path, "--lm-head", "rtn4", "--max-context", "64", "--json")
    document(compile(*arguments, "-o", tmp_path / "again", "--jobs", "3"))
    assert digest(image) == digest(tmp_path / "again")
    written = (tmp_path / "again" / "ddr.bin").stat().st_mtime_ns
    for extra in ((), ("--overwrite",), ("--resume",)):
        assert document(compile(*arguments, "-o", tmp_path / "again", *extra))["unchanged"] is True
    assert (tmp_path / "again" / "ddr.bin").stat().st_mtime_ns == written


def test_the_report_is_one_page_without_scripts_or_links(image: Path) -> None:
    import xml.etree.ElementTree as xml

    page = (image / "report.html").read_text()
    assert "<script" not in page and "http" not in page.replace("http://www.w3.org/2000/svg", "")
    svg = xml.fromstring(page[page.index("<svg") : page.index("</svg>") + 6])
    titles = [element.text for element in svg.iter("{http://www.w3.org/2000/svg}title")]
    assert any(str(title).startswith("layers.1.down: 0x") for title in titles)
    assert sum(element.tag.endswith("}use") for element in svg.iter()) == 32
    assert "estimate" in page and "no board was measured" in page


def test_a_plan_writes_nothing(compile: Compile, model: Made, tmp_path: Path) -> None:
    found = document(compile(model.path, "-o", tmp_path / "image", "--lm-head", "fp16", "--dry-run", "--json"))
    assert found["plan"]["writes"] == ["image"]
    assert found["plan"]["memory"]["weights_bytes_per_pc"] > 0
    assert list(tmp_path.iterdir()) == []
    said = compile(model.path, "-o", tmp_path / "image", "--lm-head", "rtn4", "--dry-run")
    assert said.exit_code == 0
    assert "plan (nothing was written)" in said.stdout and "estimate; no board was measured" in said.stdout


def test_people_get_tables(compile: Compile, model: Made, tmp_path: Path) -> None:
    result = compile(model.path, "-o", tmp_path / "image", "--lm-head", "rtn4", "--quiet")
    assert result.exit_code == 0
    assert "decode, tokens/s" in result.stdout and "kv base" in result.stdout
    assert result.stderr == ""


# --- refusals


def test_an_unquantised_checkpoint_is_answered_with_the_command_to_type(
    compile: Compile, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    path = tiny("llama")
    found = document(compile(path, "-o", tmp_path / "image", "--json"), 4)
    assert "is not quantised" in found["message"]
    assert f"edgetool quantize {path} -o quantized --group-size 64" in found["hint"]
    assert list(tmp_path.iterdir()) == []


def test_edgellm_names_everything_against_it(compile: Compile, tmp_path: Path) -> None:
    shape = Shape(layers=1, hidden=192, ffn=320, heads=3, kv_heads=1, head_dim=64, vocab=64)
    made = make_quantized(tmp_path / "q", shape=shape, group_size=64)
    found = document(compile(made.path, "-o", tmp_path / "image", "--profile", "edgellm", "--json"), 4)
    assert "group_size 64" in found["message"] and "head_dim 64" in found["message"]
    assert {path.name for path in tmp_path.iterdir()} == {"q"}


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--profile", "board"], 3, "must be edgellm or sim"),
        (["--lm-head", "int4"], 3, "must be rtn4 or fp16"),
        (["--int4", "gray"], 3, "must be twos or signmag"),
        (["--max-context", "0"], 3, "must be a number"),
        (["--group-size", "100"], 3, "must be -1, 32, 64 or 128"),
        (["--requant", "asym"], 3, "must be sym"),
        (["--emit", "edgellm-tree", "--lm-head", "rtn4"], 3, "belongs to profile edgellm"),
        (["--jobs", "0"], 3, "must be a number of at least 1"),
        ([], 4, "add --lm-head rtn4"),
        (["--lm-head", "rtn4", "--max-context", "400000000"], 4, "the largest context that fits is"),
        (["--lm-head", "rtn4", "--group-size", "64"], 4, "--requant sym"),
        (["--frobnicate"], 2, "No such option"),
    ],
)
def test_a_first_try_that_is_wrong_is_told_what_is_right(
    compile: Compile, model: Made, tmp_path: Path, arguments: list[str], code: int, words: str
) -> None:
    result = compile(model.path, "-o", tmp_path / "image", *arguments, "--json")
    assert result.exit_code == code
    found = json.loads(result.stdout)
    assert words in f"{found['message']} {found['hint']}"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "needs MODEL"),
        (["MODEL"], "needs --output"),
        (["IMAGE", "--extract", "lm_head"], "--extract needs --output"),
        (["--push", "IMAGE"], "--push needs --device"),
        (["--diff", "IMAGE", "IMAGE", "--push", "IMAGE"], "two commands"),
        (["--verify", "MODEL"], "needs the IMAGE"),
        (["--verify-run", "MODEL"], "needs the IMAGE"),
        (["--extract", "lm_head"], "needs the IMAGE"),
    ],
)
def test_what_is_missing_is_named(compile: Compile, model: Made, image: Path, arguments: list[str], words: str) -> None:
    places = {"MODEL": str(model.path), "IMAGE": str(image)}
    result = compile(*[places.get(one, one) for one in arguments], "--json")
    found = document(result, 2)
    assert words in found["message"] and found["hint"]
    if words == "needs the IMAGE":
        assert f" {arguments[0]} " in found["hint"]


def test_output_and_model_may_not_lie_in_one_another(compile: Compile, model: Made) -> None:
    found = document(compile(model.path, "-o", model.path / "image", "--lm-head", "rtn4", "--json"), 4)
    assert "must not lie in one another" in found["message"]
    assert not (model.path / "image").exists()


def test_another_output_is_not_replaced_unasked(compile: Compile, model: Made, tmp_path: Path) -> None:
    (tmp_path / "image").mkdir()
    (tmp_path / "image" / "thesis.txt").write_text("years of work")
    found = document(compile(model.path, "-o", tmp_path / "image", "--lm-head", "rtn4", "--json"), 4)
    assert "exists already" in found["message"]
    assert (tmp_path / "image" / "thesis.txt").read_text() == "years of work"


def test_settings_come_from_a_file_and_from_the_environment(
    compile: Compile, model: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[compile_vcu128]\nlm_head = "rtn4"\nmax_context = 64\n')
    monkeypatch.setenv("EDGETOOL_COMPILE_VCU128_MAX_CONTEXT", "32")
    found = document(compile(model.path, "-o", tmp_path / "image", "--config", recipe, "--dry-run", "--json"))
    assert found["plan"]["max_context"] == 32
    shown = compile(model.path, "--config", recipe, "--show-config")
    assert 'lm_head = "rtn4"' in shown.stdout and "max_context = 32" in shown.stdout
    monkeypatch.setenv("EDGETOOL_COMPILE_VCU128_PROFIL", "sim")
    assert "EDGETOOL_COMPILE_VCU128_PROFILE?" in document(compile(model.path, "--json"), 3)["hint"]


# --- tools for images


def test_inspect_lists_and_checks(compile: Compile, image: Path) -> None:
    found = document(compile("--inspect", image, "--json"))
    assert len(found["segments"]) == 34 and len(found["tensors"]) == 15
    assert found["hashes_checked"] == 37
    said = compile("--inspect", image, "--quiet")
    assert "layers.1.down" in said.stdout and "hbm/pc31.bin" in said.stdout


@pytest.mark.parametrize("command", ["inspect", "verify", "push"])
def test_a_flipped_nibble_ends_with_exit_code_8(
    compile: Compile, model: Made, image: Path, tmp_path: Path, command: str
) -> None:
    import shutil

    copy = Path(shutil.copytree(image, tmp_path / "copy"))
    with (copy / "hbm/pc11.bin").open("r+b") as file:
        file.seek(64)
        byte = file.read(1)[0]
        file.seek(64)
        file.write(bytes([byte ^ 0x01]))
    (tmp_path / "board").touch()
    arguments = {
        "inspect": ["--inspect", copy],
        "verify": [copy, "--verify", model.path],
        "push": ["--push", copy, "--device", tmp_path / "board"],
    }[command]
    found = document(compile(*arguments, "--json"), 8)
    assert "pc11.bin" in found["message"]


def test_a_manifest_that_claims_another_encoding_is_found(compile: Compile, image: Path, tmp_path: Path) -> None:
    import shutil

    copy = Path(shutil.copytree(image, tmp_path / "copy"))
    text = (copy / "manifest.json").read_text()
    (copy / "manifest.json").write_text(text.replace('"twos"', '"signmag"'))
    found = document(compile("--inspect", copy, "--json"), 8)
    assert "manifest.json" in found["message"]


def test_verify_compares_with_the_checkpoint(compile: Compile, model: Made, image: Path) -> None:
    for spelling in ([image, "--verify", model.path], ["--inspect", image, "--verify", model.path]):
        found = document(compile(*spelling, "--json"))
        # the checkpoint has no biases: those of the image are compared with 0
        assert found["tensors_equal"] == found["tensors_compared"] == 15 + 5 + 15 + 1


def test_verify_run_compares_with_float32_and_traces(
    compile: Compile, model: Made, image: Path, tmp_path: Path
) -> None:
    trace = tmp_path / "trace.jsonl"
    line = (str(image), "--verify-run", str(model.path), "--trace", str(trace))
    found = json.loads(compile(*line, "--json").stdout)
    assert found["schema"] == "edgetool.compile-vcu128/1" and found["ok"]
    assert (found["numerics"], found["reference"], found["trace"]) == ("et1", "transformers", str(trace))
    assert found["greedy"]["equal_of_these"] == found["greedy"]["margin_allows"]
    assert len(trace.read_text().splitlines()) % found["sequences"] == 0
    again = compile(*line, "--json")
    assert again.exit_code == 4 and "exists already" in json.loads(again.stdout)["message"]
    shown = compile(*line, "--numerics", "fast", "--overwrite")
    assert shown.exit_code == 0 and "equal of these" in shown.stdout and "MVM" in shown.stdout
    alone = compile(str(image), "--trace", str(trace), "--json")
    assert alone.exit_code == 2 and "--verify-run" in json.loads(alone.stdout)["hint"]


def test_extract_gives_the_checkpoints_weight(compile: Compile, model: Made, image: Path, tmp_path: Path) -> None:
    target = tmp_path / "up.safetensors"
    found = document(compile(image, "--extract", "model.layers.0.mlp.up_proj", "-o", target, "--json"))
    assert found["tensor"] == "layers.0.up"
    (weight,) = load_file(target).values()
    assert (weight == model.weight("model.layers.0.mlp.up_proj")).all()
    wrong = document(compile(image, "--extract", "layers.0.upp", "-o", tmp_path / "x", "--json"), 4)
    assert wrong["hint"] == "did you mean layers.0.up?"


def test_diff_and_push_work_from_the_command_line(compile: Compile, image: Path, tmp_path: Path) -> None:
    assert document(compile("--diff", image, image, "--json"))["identical"] is True
    (tmp_path / "board").touch()
    found = document(compile("--push", image, "--device", tmp_path / "board", "--json"))
    assert found["bytes_verified"] == found["bytes_written"] > 0
    assert document(compile("--push", image, "--device", "/dev/xdma9_h2c_0", "--json"), 6)["hint"]


def test_a_checkpoint_is_no_image(compile: Compile, model: Made) -> None:
    found = document(compile("--inspect", model.path, "--json"), 4)
    assert "not a compiled image" in found["message"]


def test_the_tree_of_the_board_appears_with_its_profile(compile: Compile, tmp_path: Path) -> None:
    made = make_quantized(tmp_path / "q", "qwen2", shape=BOARD, group_size=128)
    arguments = (made.path, "--profile", "edgellm", "--lm-head", "rtn4", "--json")
    document(compile(*arguments, "-o", tmp_path / "tree", "--emit", "edgellm-tree"))
    assert {path.name for path in (tmp_path / "tree").iterdir()} == {"BLOCK00", "OutLayer", "edgetool.json"}
    document(compile(*arguments, "-o", tmp_path / "both"))
    names = {path.name for path in (tmp_path / "both").iterdir()}
    assert {"BLOCK00", "OutLayer", "hbm", "manifest.json"} <= names
    assert document(compile("--inspect", tmp_path / "both", "--json"))["profile"] == "edgellm"


# --- real processes: killed, stopped, starved of disk


def test_a_run_killed_at_any_step_goes_on_to_the_same_bytes(
    processes: ProcessServer, model: Made, image: Path, tmp_path: Path
) -> None:
    arguments = ("compile-vcu128", str(model.path), "--lm-head", "rtn4", "--max-context", "64", "--jobs", "1")
    whole = processes.run(*arguments, "-o", str(tmp_path / "whole"))
    assert whole.code == 0, whole.stderr
    expected = digest(image)
    assert digest(tmp_path / "whole") == expected
    steps = len(whole.trace)
    for at in sorted({1, 2, 3, *range(4, steps, max(1, steps // 6)), steps - 1, steps}):
        output = tmp_path / f"out-{at}"
        killed = processes.run(*arguments, "-o", str(output), at=at, signals=(signal.SIGKILL,))
        assert killed.code == -signal.SIGKILL
        published = output.exists()
        assert not published or digest(output) == expected
        again = processes.run(*arguments, "-o", str(output), "--resume", "--json")
        assert again.code == 0, again.stderr
        assert digest(output) == expected
        left = {path.name for path in tmp_path.iterdir() if path.name.startswith((f".out-{at}.", f"out-{at}."))}
        # a lock file without a holder stops nobody; it goes with the next run that has something to write
        assert left <= ({f".out-{at}.lock"} if published else set())


def test_a_full_disk_is_one_error_and_leaves_nothing_worthless(
    processes: ProcessServer, model: Made, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    arguments = ("compile-vcu128", str(model.path), "-o", str(output), "--lm-head", "rtn4", "--json")
    full = processes.run(*arguments, at=3, error=NO_SPACE)
    assert full.code == 6, full.stdout + full.stderr
    assert "disk full" in full.document()["message"]
    assert not output.exists()
    small = processes.run(*arguments, "--resume", file_limit_bytes=20_000)
    assert small.code == 6, small.stdout + small.stderr
    assert not output.exists()


def test_ctrl_c_stops_with_what_goes_on(processes: ProcessServer, model: Made, tmp_path: Path) -> None:
    output = tmp_path / "out"
    arguments = ("compile-vcu128", str(model.path), "-o", str(output), "--lm-head", "rtn4")
    traced = processes.run(*arguments[:3], str(tmp_path / "whole"), *arguments[4:])
    packing = traced.trace.index("mkdir hbm") + 1
    stopped = processes.run(*arguments, at=packing, signals=(signal.SIGINT,))
    assert stopped.code == 75, stopped.stderr
    assert "--resume" in stopped.stderr
    assert not output.exists()
    assert processes.run(*arguments, "--resume").code == 0
    assert digest(output) == digest(tmp_path / "whole")
