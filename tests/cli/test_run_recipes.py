"""Recipes and options of `edgetool run` that cannot be run, and how they are changed; its steps are stand-ins."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.fakes.recipe_run import RECIPE, Run


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    return Run(tmp_path, monkeypatch)


WRONG = {
    'command = "quantize"': ('command = "quantise"', "command 'quantise'", "did you mean 'quantize'?"),
    'command = "eval"': ('command = ["eval"]', "command ['eval'] of [steps.eval]", "did you mean 'eval'?"),
    "group_size = 128": ("group_siz = 128", "unknown key 'group_siz' in [steps.quantize] of r.toml", "'group_size'"),
    'tasks = "perplexity"': ('tasks = "perplexity"\nspeed = 3', "unknown key 'speed'", "did you mean"),
    'from = "quantize"\nagainst': ('from = "image"\nagainst', "from 'image' of [steps.eval]", "one of model, quantize"),
    "ask_tokens = 5": ("ask_tokens = 0", "ask_tokens", ""),
    "[steps.image]": ("[steps.model]", "a step cannot be called 'model'", ""),
    "{ group_size = 64 }": ("{ groups = 64 }", "unknown key 'groups' in ladder", "'group_size'"),
    'output = "out"\nladder': ('output = "out"\nladders', "unknown key 'ladders' in [run]", "'ladder'"),
    "[run]": ("[runs]", "unknown key 'runs' in r.toml", "'run'"),
    'gate = "ratio<=1.05"': ("", "climbed when a gate fails", "gate ="),
    "ask = ": ("port = 1\ndetach = true\nask = ", "'detach' in [steps.serve]", "leave it out"),
    'command = "compile-vcu128"\nfrom = "quantize"': (
        'command = "compile-vcu128"',
        "does not say what it works on",
        "add from",
    ),
    "[steps.quantize]": ("[[steps.quantize]]", "must be a table", ""),
    'model = "model"': ("model = 3", "model in [run]", ""),
    "RECIPE": ("= nonsense", "is not TOML", "--show-recipe"),
}


@pytest.mark.parametrize("old", WRONG)
def test_a_recipe_that_cannot_be_run_is_refused_before_anything_runs(run: Run, old: str) -> None:
    new, said, hint = WRONG[old]
    if old == "RECIPE":
        (run.directory / "r.toml").write_text(new)
    else:
        run.edit(old, new)
    result = run()
    document = json.loads(result.stdout)
    assert result.exit_code == 3, document
    assert said in document["message"], document["message"]
    assert hint in (document["hint"] or "")
    assert run.calls() == [] and not run.out.exists()


@pytest.mark.parametrize(
    ("old", "new"), [("group_size = 128", "group_size = 100"), ("{ group_size = 64 }", "{ group_size = 100 }")]
)
def test_a_value_that_cannot_be_used_names_the_step(run: Run, old: str, new: str) -> None:
    run.edit(old, new)
    result = run()
    assert result.exit_code == 3
    assert "group_size 100 (given by [steps.quantize] of r.toml)" in json.loads(result.stdout)["message"]
    assert run.calls() == []


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("missing.toml",), 3, "cannot read the recipe missing.toml"),
        (("demo",), 2, "'demo' is no recipe"),
        (("demo", "--preset", "smok", "-o", "x"), 3, "smoke"),
        (("demo", "--preset", "smoke"), 2, "run needs --output"),
        (("r.toml", "--preset", "smoke", "-o", "x"), 2, "r.toml is a recipe, and --preset names another"),
        (("r.toml", "--show-recipe", "--set", "quantize.bits=3"), 3, "without --set"),
        (("r.toml", "-o", "model"), 4, "was not written by edgetool run"),
        (("r.toml", "-o", "r.toml"), 4, "was not written by edgetool run"),
    ],
)
def test_what_cannot_be_run_says_what_to_type(run: Run, arguments: tuple[str, ...], code: int, said: str) -> None:
    result = run(*arguments)
    document = json.loads(result.stdout)
    assert (result.exit_code, run.calls()) == (code, [])
    assert said in document["message"] and document["hint"]
    assert sorted(path.name for path in (run.directory / "model").iterdir()) == ["weights"]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("ratio<=1.05", "ratio<1.05", "step eval: gate, character 1: ratio is followed by <=, not by <"),
        ('tasks = "perplexity"', 'tasks = "perplexityy"', "step eval: no task is called 'perplexityy'"),
        ('against = { from = "model" }\n', "", "step eval: gate 'ratio<=1.05' compares with the original"),
    ],
)
@pytest.mark.parametrize("arguments", [("r.toml",), ("r.toml", "--dry-run")])
def test_what_a_late_step_cannot_measure_is_said_before_anything_runs(
    run: Run, old: str, new: str, said: str, arguments: tuple[str, ...]
) -> None:
    run.edit(old, new)
    result = run(*arguments)
    document = json.loads(result.stdout)
    assert (result.exit_code, document["type"]) == (3, "ConfigError")
    assert document["message"].startswith(said)
    assert [call for call in run.calls() if "--dry-run" not in call] == []


def test_a_recipe_may_be_written_by_any_editor_and_have_capitals_in_its_ending(run: Run) -> None:
    recipe = (run.directory / "r.toml").read_text()
    (run.directory / "R.TOML").write_text(recipe, encoding="utf-8-sig")
    result = run("R.TOML")
    assert result.exit_code == 0, result.stdout


def test_a_place_that_cannot_be_made_is_one_clear_error(run: Run) -> None:
    result = run("r.toml", "-o", "/proc/nowhere")  # its makers get ENOENT, whoever they are
    assert (result.exit_code, run.calls()) == (4, [])
    assert "cannot write /proc/nowhere" in json.loads(result.stdout)["message"]


def test_without_a_recipe_help_is_near(run: Run) -> None:
    from edgetool.cli import app

    result = CliRunner().invoke(app, ["run"])
    assert result.exit_code == 2
    assert "edgetool run demo --preset smoke -o runs/smoke" in result.stderr


def test_a_directory_that_looks_like_an_option_is_none(run: Run) -> None:
    assert set(run.states("r.toml", "-o", "./-q").values()) == {"done"}
    assert {"./-q/quantize", "./-q/eval"} <= set(" ".join(run.calls()).split())


def test_an_output_of_no_letters_is_none(run: Run) -> None:
    run.edit('output = "out"', 'output = ""')
    result = run()
    assert (result.exit_code, run.calls()) == (2, [])
    assert json.loads(result.stdout)["message"] == "run needs --output"


def test_serve_needs_a_step_that_serves(run: Run) -> None:
    recipe = RECIPE[: RECIPE.index("[steps.serve]")]
    (run.directory / "r.toml").write_text(recipe)
    assert run("r.toml", "--serve").exit_code == 2


@pytest.mark.parametrize("preset", ["gpu"])
def test_a_preset_shown_is_a_recipe_that_runs(run: Run, preset: str) -> None:
    from edgetool.cli import app

    shown = CliRunner().invoke(app, ["run", "model", "--preset", preset, "--show-recipe"])
    assert shown.exit_code == 0
    (run.directory / "mine.toml").write_text(shown.stdout)
    states = run.states("mine.toml", "--model", "model", "-o", "mine")
    assert set(states.values()) == {"done"}
    assert set(run.states("model", "--preset", preset, "-o", "other").values()) == {"done"}


def test_settings_of_a_recipe_are_changed_on_the_command_line(run: Run) -> None:
    changes = ("--set", "quantize.group_size=32", "--set", "quantize.method=awq", "--set", 'eval.gate="ratio<=1.5"')
    document = json.loads(run("r.toml", *changes).stdout)
    assert "--group-size 32 --method awq" in run.calls()[0]
    assert document["recipe"].startswith("r.toml, quantize.group_size=32")
    assert set(run.states("r.toml", *changes).values()) == {"unchanged"}


@pytest.mark.parametrize("source", ["variable", "file"])
def test_settings_are_changed_by_a_variable_or_a_file_too(run: Run, source: str) -> None:
    arguments = ["r.toml", "--dry-run"]
    if source == "variable":
        run.monkeypatch.setenv("EDGETOOL_RUN_SET", "quantize.group_size=32 eval.limit=3")
    else:
        (run.directory / "c.toml").write_text('[run]\nset = ["quantize.group_size=32", "eval.limit=3"]\n')
        arguments += ["--config", "c.toml"]
    steps = json.loads(run(*arguments).stdout)["plan"]["steps"]
    assert "--group-size 32" in " ".join(steps[0]["command"])
    assert "--limit 3" in " ".join(steps[1]["command"])
    assert "--limit 4" in " ".join(
        json.loads(run(*arguments, "--set", "eval.limit=4").stdout)["plan"]["steps"][1]["command"]
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("group_size=64", "cannot be read"),
        ("quantise.bits=4", "no step 'quantise'"),
        ("quantize.bit=4", "unknown key 'bit'"),
        ("quantize.output=x", "set by the run itself"),
        ("quantize.bits=five", "bits 'five'"),
    ],
)
def test_a_change_that_fits_no_step_is_refused(run: Run, change: str, said: str) -> None:
    result = run("r.toml", "--set", change)
    assert result.exit_code == 3
    assert said in json.loads(result.stdout)["message"]
    assert json.loads(result.stdout)["hint"]
