"""Precedence, unknown names, refused values, --show-config and secrets, through the command line."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

QUANTIZE = ("quantize", "demo", "-o", "out")
TOML = '[quantize]\nbits = 3\ngroup_size = 32\nseed = 7\n[common]\nprogress = "quiet"\n'
YAML = "quantize: {bits: 3, group_size: 32, seed: 7}\ncommon:\n  progress: quiet\n"


def resolved(edgetool: Callable[..., Any], *arguments: str, env: dict[str, str] | None = None) -> dict[str, Any]:
    result = edgetool(*QUANTIZE, *arguments, "--show-config", "--json", env=env)
    assert result.exit_code == 0, result.stderr
    document: dict[str, Any] = json.loads(result.stdout)
    return document


@pytest.mark.parametrize(("name", "text"), [("a.toml", TOML), ("a.yaml", YAML), ("a.yml", YAML)])
def test_each_key_takes_the_strongest_source(
    edgetool: Callable[..., Any], tmp_path: Path, name: str, text: str
) -> None:
    (tmp_path / name).write_text(text)
    env = {"EDGETOOL_QUANTIZE_BITS": "2", "EDGETOOL_QUANTIZE_GROUP_SIZE": "64"}
    document = resolved(edgetool, "--bits", "8", "--config", str(tmp_path / name), env=env)
    settings = document["config"]["quantize"]
    assert settings["bits"] == 8  # option over variable and file
    assert settings["group_size"] == 64  # variable over file
    assert settings["seed"] == 7  # file over default
    assert settings["damp"] == 0.01  # default
    assert document["config"]["common"]["progress"] == "quiet"
    origins = document["origins"]
    assert "command line" in origins["quantize.bits"]
    assert "EDGETOOL_QUANTIZE_GROUP_SIZE" in origins["quantize.group_size"]
    assert name in origins["quantize.seed"]
    assert "quantize.damp" not in origins


def test_an_option_that_says_no_beats_a_file_that_says_yes(edgetool: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("[quantize]\nsym = true\ndesc_act = true\n")
    settings = resolved(edgetool, "--asym", "--no-desc-act", "--config", str(tmp_path / "a.toml"))["config"]["quantize"]
    assert (settings["sym"], settings["desc_act"]) == (False, False)


@pytest.mark.parametrize("name", ["a.toml", "a.yaml"])
def test_the_mark_that_editors_put_before_a_text_is_none_of_it(
    edgetool: Callable[..., Any], tmp_path: Path, name: str
) -> None:
    (tmp_path / name).write_text(TOML if name == "a.toml" else YAML, encoding="utf-8-sig")
    assert resolved(edgetool, "--config", str(tmp_path / name))["config"]["quantize"]["bits"] == 3


@pytest.mark.parametrize(
    "arguments",
    [
        ("inspect", "x" * 300),
        ("convert", str(Path(__file__)), "-o", "x" * 250, "--to", "awq"),  # and .partial behind it
        ("compile-vcu128", "x" * 300, "-o", "out"),
        ("convert", "x" * 300, "-o", "out", "--to", "awq"),
        ("eval", "x" * 300, "-o", "out", "--tasks", "arc_easy"),
        ("run", "demo", "--preset", "smoke", "-o", "x" * 300),
        ("serve-fpga", "--image", "x" * 300),
    ],
)
def test_a_name_longer_than_file_systems_know_is_bad_input(
    edgetool: Callable[..., Any], arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = edgetool(*arguments)
    assert result.exit_code == 4, result.stderr
    assert "is too long: a name may have 255 bytes" in result.stderr
    assert "x" * 100 not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_show_config_can_be_read_back(edgetool: Callable[..., Any], tmp_path: Path) -> None:
    shown = edgetool(*QUANTIZE, "--bits", "3", "--max-shard-size", "2GiB", "--show-config").stdout
    (tmp_path / "again.toml").write_text(shown)
    assert tomllib.loads(shown)["quantize"]["max_shard_size_bytes"] == 2 * 1024**3
    before = resolved(edgetool, "--bits", "3", "--max-shard-size", "2GiB")["config"]
    again = edgetool("quantize", "--config", str(tmp_path / "again.toml"), "--show-config", "--json")
    assert json.loads(again.stdout)["config"]["quantize"] == before["quantize"]


def test_show_config_needs_no_model(edgetool: Callable[..., Any]) -> None:
    assert edgetool("quantize", "--show-config").exit_code == 0


def test_secrets_are_shown_nowhere(edgetool: Callable[..., Any], tmp_path: Path) -> None:
    secret = "hf_hunter2"
    env = {"EDGETOOL_HUB_TOKEN": secret}
    for extra in (("--show-config",), ("--show-config", "--json"), ("--json",), ()):
        assert secret not in edgetool(*QUANTIZE, *extra, env=env).output
    (tmp_path / "a.toml").write_text(f'[common]\nhub_token = ["{secret}"]\n')
    refused = edgetool(*QUANTIZE, "--config", str(tmp_path / "a.toml"), "--json")
    assert refused.exit_code == 3
    assert secret not in refused.output


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[quantize]\ngroup_sise = 64\n", "group_size"),
        ("[quantise]\nbits = 4\n", "quantize"),
        ("bits = 4\n", "[quantize]"),
        ("[quantize]\ncache_dir = 'x'\n", "section [common]"),
    ],
)
def test_an_unknown_key_in_a_file_names_the_nearest(
    edgetool: Callable[..., Any], tmp_path: Path, text: str, named: str
) -> None:
    (tmp_path / "a.toml").write_text(text)
    result = edgetool(*QUANTIZE, "--config", str(tmp_path / "a.toml"), "--json")
    document = json.loads(result.stdout)
    assert result.exit_code == 3
    assert "unknown key" in document["message"]
    assert named in document["hint"]


@pytest.mark.parametrize(
    ("variable", "nearest"),
    [("EDGETOOL_QUANTIZE_GROUPSIZE", "EDGETOOL_QUANTIZE_GROUP_SIZE"), ("EDGETOOL_CACHEDIR", "EDGETOOL_CACHE_DIR")],
)
def test_an_unknown_variable_names_the_nearest(edgetool: Callable[..., Any], variable: str, nearest: str) -> None:
    result = edgetool(*QUANTIZE, env={variable: "1"})
    assert result.exit_code == 3
    assert variable in result.stderr and f"{nearest}?" in result.stderr


def test_variables_of_others_and_empty_ones_are_left_alone(edgetool: Callable[..., Any]) -> None:
    env = {"EDGETOOL_DATA_DIR": "x", "EDGETOOL_SOMETHING_ELSE": "x", "EDGETOOL_QUANTIZE_BITS": ""}
    assert resolved(edgetool, env=env)["config"]["quantize"]["bits"] == 4


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--bits", "5"), "bits 5 (given by --bits) cannot be used: must be 2, 3, 4 or 8"),
        (("--group-size", "48"), "group_size 48 (given by --group-size) cannot be used: must be -1, 32, 64 or 128"),
        (("--method", "magic"), "method 'magic' (given by --method) cannot be used: must be gptq, awq or rtn"),
        (("--device", "tpu"), "device 'tpu' (given by --device) cannot be used: must be auto, cpu, cuda or cuda:N"),
        (("--damp", "1.5"), "damp 1.5 (given by --damp) cannot be used: must be between 0 and 1"),
        (("--progress", "loud"), "must be auto, bar, plain, json or quiet"),
        (("--max-shard-size", "5 parsecs"), "must be a size such as 5GB or 512MiB"),
        (("--calib-samples", "0"), "must be a number of at least 1"),
        (("--method", "awq", "--format", "awq", "--bits", "8"), "format awq holds 4-bit weights only, and bits is 8"),
        (("--method", "rtn", "--desc-act"), "desc_act belongs to method gptq, and method is rtn"),
        (("--format", "awq", "--desc-act"), "format awq cannot store desc_act"),
        (("--config", "nowhere.toml"), "cannot read the configuration file nowhere.toml"),
        (("--config", "recipe.ini"), "must end in .toml, .yaml or .yml"),
    ],
)
def test_a_value_that_cannot_be_used_is_one_sentence(
    edgetool: Callable[..., Any], arguments: tuple[str, ...], sentence: str
) -> None:
    result = edgetool(*QUANTIZE, *arguments, "--json")
    assert result.exit_code == 3
    message = json.loads(result.stdout)["message"]
    assert sentence in message
    assert "\n" not in message and "pydantic" not in message


@pytest.mark.parametrize(
    ("name", "text"), [("a.toml", "[quantize\n"), ("a.yaml", "quantize: [\n"), ("a.yaml", "- 1\n"), ("a.toml", "\xff")]
)
def test_a_damaged_file_is_a_configuration_error(
    edgetool: Callable[..., Any], tmp_path: Path, name: str, text: str
) -> None:
    (tmp_path / name).write_bytes(text.encode("latin-1"))
    result = edgetool(*QUANTIZE, "--config", str(tmp_path / name))
    assert result.exit_code == 3
    assert name in result.stderr


def test_a_wrong_type_in_a_file_names_the_file(edgetool: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("quantize: {seed: true}\n")
    result = edgetool(*QUANTIZE, "--config", str(tmp_path / "a.yaml"))
    assert result.exit_code == 3
    assert "seed True (given by" in result.stderr and "a.yaml" in result.stderr


def test_the_hub_libraries_own_switch_means_offline(edgetool: Callable[..., Any]) -> None:
    assert resolved(edgetool, env={"HF_HUB_OFFLINE": "1"})["config"]["common"]["offline"] is True
    both = resolved(edgetool, env={"HF_HUB_OFFLINE": "1", "EDGETOOL_OFFLINE": "0"})
    assert both["config"]["common"]["offline"] is False


def test_json_can_be_asked_for_by_variable_and_holds_for_early_failures(edgetool: Callable[..., Any]) -> None:
    result = edgetool("quantize", "--bitz", env={"EDGETOOL_JSON": "1"})
    assert json.loads(result.stdout)["exit_code"] == 2


@pytest.mark.parametrize(
    ("arguments", "layout"),
    [
        ((), "gptq"),
        (("--method", "rtn"), "gptq"),
        (("--method", "awq"), "awq"),
        (("--method", "awq", "--bits", "8"), "gptq"),
        (("--method", "awq", "--format", "gptq"), "gptq"),
    ],
)
def test_the_default_format_follows_the_method(
    edgetool: Callable[..., Any], arguments: tuple[str, ...], layout: str
) -> None:
    assert resolved(edgetool, *arguments)["config"]["quantize"]["format"] == layout


def test_a_section_that_nothing_sets_is_what_validation_makes_of_nothing() -> None:
    """Such sections are not validated, for speed: that must not show."""
    from edgetool.config import SECTIONS

    for section in SECTIONS.values():
        assert section.model_construct().model_dump() == section.model_validate({}).model_dump()


@pytest.mark.parametrize(
    ("arguments", "help_of"),
    [
        (("jobs", "clean", "--older-than", "7x"), "edgetool jobs clean"),
        (("gpus", "run", "--min-free", "99x", "--", "true"), "edgetool gpus run"),
        (("jobs", "--limit", "0"), "edgetool jobs"),
        (("quantize", "demo", "-o", "out", "--bits", "5"), "edgetool quantize"),
    ],
)
def test_the_help_that_is_named_has_the_option(
    edgetool: Callable[..., Any], arguments: tuple[str, ...], help_of: str
) -> None:
    result = edgetool(*arguments, "--json") if "--" not in arguments else edgetool(*arguments)
    assert f"hint: {help_of} --help" in result.stderr
    option = next(argument for argument in arguments if argument.startswith("--"))
    assert option in edgetool(*help_of.split()[1:], "--help").stdout


def test_of_a_variable_the_help_of_the_section_is_named(edgetool: Callable[..., Any]) -> None:
    result = edgetool("jobs", "clean", env={"EDGETOOL_JOBS_LIMIT": "0"})
    assert "hint: edgetool jobs --help" in result.stderr


def test_backends_are_compared_each_once(edgetool: Callable[..., Any]) -> None:
    result = edgetool(*QUANTIZE, "--compare", "native,gptqmodel,native")
    assert result.exit_code == 3
    assert "compare 'native,gptqmodel,native' (given by --compare) cannot be used" in result.stderr
