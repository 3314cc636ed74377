"""A tool's output is believed tensor by tensor, or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from edgetool.checkpoints.checkpoint import Checkpoint
from edgetool.checkpoints.formats import Spec
from edgetool.config import CommonConfig, QuantizeConfig
from edgetool.errors import VerificationFailed
from edgetool.models.architectures import map_layers
from edgetool.peers.check import check_output, weight_error
from edgetool.progress import NullProgress
from edgetool.quantizers.job import run_quantize
from tests.fakes.tiny_models import make_tiny_model

SPEC = Spec(4, 32, True, False)
DOWN = "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny model, and that model rounded to 4 bits, as a tool would write it."""
    place = tmp_path_factory.mktemp("peers")
    model = make_tiny_model(place / "model", "llama", layers=1)
    settings = QuantizeConfig(model=str(model), output=place / "out", method="rtn", group_size=32)
    run_quantize(settings, CommonConfig(cache_dir=place / "cache"), NullProgress())
    return model, place / "out"


@pytest.fixture
def changed(made: tuple[Path, Path], tmp_path: Path) -> Callable[..., Checkpoint]:
    """The output with tensors changed by a function, and keys of config.json's quantisation replaced."""

    def change(edit: Callable[[dict[str, Any]], None] = lambda tensors: None, **claims: Any) -> Checkpoint:
        shutil.copytree(made[1], tmp_path / "out")
        (file,) = (tmp_path / "out").glob("*.safetensors")
        tensors = load_file(file)
        edit(tensors)
        save_file(tensors, file)
        path = tmp_path / "out" / "config.json"
        config = json.loads(path.read_text())
        config["quantization_config"] |= claims
        path.write_text(json.dumps(config))
        (tmp_path / "out" / "quantize_config.json").unlink(missing_ok=True)
        return Checkpoint.open(tmp_path / "out")

    return change


def check(made: tuple[Path, Path], output: Checkpoint, *, scaled: bool = False) -> list[dict[str, Any]]:
    source = Checkpoint.open(made[0])
    names = [name.removesuffix(".weight") for name in map_layers(source.config, source.tensors).quantizable()]
    return check_output(output, source, names, SPEC, "gptq", scaled=scaled, progress=NullProgress())


def test_a_faithful_output_passes_with_the_error_of_every_linear(made: tuple[Path, Path]) -> None:
    reports = check(made, Checkpoint.open(made[1]))
    assert len(reports) == 7
    assert all(0.01 < report["weight_error"] < 0.2 for report in reports)  # 4 bits of a normal distribution
    assert all("weight_error" not in report for report in check(made, Checkpoint.open(made[1]), scaled=True))


def zero_scales(tensors: dict[str, Any]) -> None:
    tensors[f"{DOWN}.scales"][:] = 0


def wrong_nibbles(tensors: dict[str, Any]) -> None:
    words = tensors[f"{DOWN}.qweight"].view(np.uint32)
    tensors[f"{DOWN}.qweight"] = ((words >> 4) | (words << 28)).view(np.int32)


def nan_scale(tensors: dict[str, Any]) -> None:
    tensors[f"{DOWN}.scales"][0, 0] = np.nan


def other_norm(tensors: dict[str, Any]) -> None:
    tensors["model.norm.weight"][3] += 0.25


def lost_norm(tensors: dict[str, Any]) -> None:
    del tensors["model.layers.0.input_layernorm.weight"]


def more(tensors: dict[str, Any]) -> None:
    tensors["model.layers.0.mlp.extra.weight"] = np.zeros((2, 2), np.float16)


def dense(tensors: dict[str, Any]) -> None:
    for suffix in ("qweight", "qzeros", "scales", "g_idx"):
        del tensors[f"{DOWN}.{suffix}"]
    tensors[f"{DOWN}.weight"] = np.zeros((64, 128), np.float16)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (zero_scales, f"{DOWN}: its weights are off by 1.00"),
        (wrong_nibbles, f"{DOWN}: its weights are off by 1."),
        (nan_scale, f"1 scales are NaN or infinite ({DOWN})"),
        (other_norm, "model.norm.weight is not quantised, and is not the model's either"),
        (lost_norm, "model.layers.0.input_layernorm.weight is missing"),
        (more, "model.layers.0.mlp.extra.weight is in what the backend wrote and not in the model"),
        (dense, f"{DOWN} was not quantised"),
    ],
)
def test_a_spoilt_output_is_refused_naming_the_tensor(
    made: tuple[Path, Path], changed: Callable[..., Checkpoint], edit: Callable[..., None], message: str
) -> None:
    with pytest.raises(VerificationFailed) as refused:
        check(made, changed(edit))
    assert message in refused.value.message


def test_an_output_of_another_kind_than_asked_for_is_refused(made: tuple[Path, Path]) -> None:
    source = Checkpoint.open(made[0])
    names = [name.removesuffix(".weight") for name in map_layers(source.config, source.tensors).quantizable()]
    with pytest.raises(VerificationFailed, match="asked for gptq, 4 bits, group 64, symmetric; the backend wrote gptq"):
        check_output(
            Checkpoint.open(made[1]),
            source,
            names,
            Spec(4, 64, True, False),
            "gptq",
            scaled=False,
            progress=NullProgress(),
        )


def test_the_error_of_a_weight_is_the_share_of_its_size() -> None:
    weight = np.array([[3.0, 4.0]], np.float32)
    assert weight_error(weight, weight) == 0
    assert weight_error(np.array([[3.0, 3.0]], np.float32), weight) == pytest.approx(0.2)  # |1| / |(3, 4)|
    assert weight_error(np.zeros((1, 2), np.float32), weight) == 1
    assert weight_error(weight, np.zeros((1, 2), np.float32)) == 1
