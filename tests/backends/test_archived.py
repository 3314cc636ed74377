"""auto-gptq and autoawq: what edgetool tells them is what their packages take."""

from __future__ import annotations

import ast
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

from edgetool.backends.environments import RECIPES
from edgetool.backends.jobs import auto_gptq, autoawq

JOB: dict[str, Any] = {
    "method": "gptq",
    "bits": 4,
    "group_size": 32,
    "sym": True,
    "desc_act": True,
    "damp": 0.05,
    "lm_head": False,
    "device": "cuda:0",
    "threads": None,
    "seed": 0,
}


pytestmark = pytest.mark.backends


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Package -> its unpacked files, of the pinned versions, without what they depend on (several GB of CUDA)."""
    found = {}
    for name in ("auto-gptq", "autoawq"):
        place = tmp_path_factory.mktemp(name)
        pin = f"{name}=={RECIPES[name].pins()[name]}"
        pip = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--no-build-isolation",
            "-d",
            place,
            pin,
        ]
        done = subprocess.run(pip, capture_output=True, text=True)
        files = [path for path in place.iterdir() if path.is_file()]
        if not files:
            pytest.skip(f"{pin} cannot be fetched: {done.stderr.splitlines()[-1:]}")
        if files[0].suffix == ".whl":
            zipfile.ZipFile(files[0]).extractall(place)
        else:
            with tarfile.open(files[0]) as archive:
                archive.extractall(place, filter="data")
        found[name] = place
    return found


def definition(root: Path, ending: str, name: str) -> Any:
    (path,) = [path for path in root.rglob("*.py") if path.as_posix().endswith(ending)]
    return next(node for node in ast.walk(ast.parse(path.read_text())) if getattr(node, "name", None) == name)


def parameters(function: ast.FunctionDef) -> set[str]:
    return {argument.arg for argument in [*function.args.args, *function.args.kwonlyargs]}


def keywords(script: Path, method: str) -> set[str]:
    """The keyword arguments with which a script calls a method."""
    calls = [node for node in ast.walk(ast.parse(script.read_text())) if isinstance(node, ast.Call)]
    (call,) = [node for node in calls if isinstance(node.func, ast.Attribute) and node.func.attr == method]
    return {str(keyword.arg) for keyword in call.keywords}


def test_auto_gptq_takes_what_it_is_told(sources: dict[str, Path]) -> None:
    root, base = sources["auto-gptq"], "auto_gptq/modeling/_base.py"
    config = definition(root, base, "BaseQuantizeConfig")
    fields = {node.target.id for node in config.body if isinstance(node, ast.AnnAssign)}
    told = auto_gptq.config_arguments(JOB)
    assert set(told) <= fields
    assert (told["bits"], told["group_size"], told["sym"], told["desc_act"], told["damp_percent"]) == (
        4, 32, True, True, 0.05,
    )  # fmt: skip
    assert "damp_percent" not in auto_gptq.config_arguments({**JOB, "damp": None})
    script = Path(str(auto_gptq.__file__))
    assert keywords(script, "quantize") <= parameters(definition(root, base, "quantize"))
    saves = definition(root, base, "save_quantized")
    assert keywords(script, "save_quantized") <= parameters(saves)


def test_autoawq_takes_what_it_is_told(sources: dict[str, Path]) -> None:
    root = sources["autoawq"]
    config = definition(root, "awq/models/_config.py", "AwqConfig")
    fields = {node.target.id for node in config.body if isinstance(node, ast.AnnAssign)}
    aliases = {"w_bit", "q_group_size", "zero_point", "version"}
    assert aliases <= fields
    told = autoawq.quant_config({**JOB, "sym": False})
    assert set(told) <= aliases
    assert told == {"w_bit": 4, "q_group_size": 32, "zero_point": True, "version": "GEMM"}
    script = Path(str(autoawq.__file__))
    base = "awq/models/base.py"
    assert keywords(script, "quantize") <= parameters(definition(root, base, "quantize"))
    assert keywords(script, "save_quantized") <= parameters(definition(root, base, "save_quantized"))
    assert "elif isinstance(data[0][0], int)" in next(root.rglob("calib_data.py")).read_text()  # token ids are taken
