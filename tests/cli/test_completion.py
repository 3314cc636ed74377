"""The Tab key in real shells: what each makes of a line, at a terminal."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgetool.config import load
from edgetool.jobs.store import JobStore
from edgetool.serving.registry import Registry
from tests.fakes.typing_shell import TypingShell

SHELLS = [
    "bash",
    pytest.param("zsh", marks=pytest.mark.skipif(not shutil.which("zsh"), reason="zsh is not installed")),
    pytest.param("fish", marks=pytest.mark.skipif(not shutil.which("fish"), reason="fish is not installed")),
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("shells")
    for name in ("my models", "images"):
        (directory / name).mkdir()
    for name in ("weights.gguf", "weights.txt", "recipe.toml"):
        (directory / name).touch()
    return directory


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A job that has ended, one that runs, and a server: as edgetool records them."""
    home = tmp_path_factory.mktemp("state")
    variables = {"EDGETOOL_JOBS_DIRECTORY": str(home / "jobs"), "EDGETOOL_SERVE_GPU_STATE_DIR": str(home / "servers")}
    jobs = JobStore(load("jobs", {}, None, variables).jobs.directory)
    jobs.finish(jobs.start(["quantize", "demo"], "one", [], None).id, "done", 0)
    jobs.start(["eval", "demo"], "two", [], None)
    servers = Registry(load("serve_gpu", {}, None, variables).serve_gpu.state_dir)
    record = servers.claim("smollm", exact=True, model="demo", engine="transformers", device="cpu")
    servers.ready(record, [{"url": "http://127.0.0.1:45677"}], [])
    return variables


@pytest.fixture(scope="module", params=SHELLS)
def shell(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    directory: Path,
    state: dict[str, str],
) -> Iterator[TypingShell]:
    shell = TypingShell(request.param, tmp_path_factory.mktemp("home") / "of shell", directory, state)
    yield shell
    shell.close()


@pytest.mark.parametrize(
    ("typed", "understood"),
    [
        ("edgetool quan\tdemo", ["quantize", "demo"]),
        ("edgetool gpus re\t", ["gpus", "reap"]),
        ("edgetool quantize demo --meth\taw\t", ["quantize", "demo", "--method", "awq"]),
        ("edgetool quantize demo --format=co\t", ["quantize", "demo", "--format=compressed-tensors"]),
        ("edgetool eval demo --tasks arc_easy,perp\t", ["eval", "demo", "--tasks", "arc_easy,perplexity"]),
        ("edgetool quantize h\torg/name", ["quantize", "hf:org/name"]),
        ("edgetool quantize wei\t-o im\t", ["quantize", "weights.gguf", "-o", "images"]),
        ("edgetool quantize my\t", ["quantize", "my models"]),
        ("edgetool quantize demo --output=im\t", ["quantize", "demo", "--output=images"]),
        ("edgetool eval --config re\t", ["eval", "--config", "recipe.toml"]),
        ("edgetool bench --plot weights.t\t", ["bench", "--plot", "weights.txt"]),
        ("edgetool jobs cancel \t", ["jobs", "cancel", "2"]),
        ("edgetool serve-gpu --stop s\t", ["serve-gpu", "--stop", "smollm"]),
        ("edgetool chat htt\t", ["chat", "http://127.0.0.1:45677"]),
        ("edgetool gpus run --count 1 -- ls rec\t", ["gpus", "run", "--count", "1", "--", "ls", "recipe.toml"]),
    ],
)
def test_tab_completes_what_only_one_thing_can_be(shell: TypingShell, typed: str, understood: list[str]) -> None:
    # zsh takes the slash after a directory back at Enter
    assert [word.rstrip("/") for word in shell.words(typed)] == understood


@pytest.mark.parametrize(
    "words",
    [["quantize", "demo", "--bits", "x"], ["no-such-command", "wei"], ["quantize", "h"], ["run", "weights.t"]],
)
def test_tab_leaves_alone_what_nothing_fits(shell: TypingShell, words: list[str], directory: Path) -> None:
    (directory / "hello.txt").touch()  # begins like hf: and is no model
    settled = ["quantize", "hf:"] if words == ["quantize", "h"] else words
    assert shell.words(f"edgetool {' '.join(words)}\t") == settled


def test_tab_runs_nothing_of_the_line(shell: TypingShell, directory: Path) -> None:
    shell.shows("edgetool quantize $(touch hit) --meth\t", "--method")
    assert shell.words("edgetool inspect demo") == ["inspect", "demo"]
    assert not (directory / "hit").exists()


def test_tab_lists_what_several_things_can_be(shell: TypingShell) -> None:
    shell.shows("edgetool quantize demo --method \t\t", "gptq", "awq", "rtn")


def test_zsh_finds_the_script_in_its_fpath(
    tmp_path: Path, directory: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    if not shutil.which("zsh"):
        pytest.skip("zsh is not installed")
    loading = "mkdir ~/fp && edgetool completion zsh >~/fp/_edgetool && fpath=(~/fp $fpath) && autoload -Uz compinit"
    shell = TypingShell("zsh", tmp_path / "home", directory, {}, f"{loading} && compinit -D -u")
    try:
        assert shell.words("edgetool insp\tdemo") == ["inspect", "demo"]
        assert shell.words("edgetool insp\tdemo") == ["inspect", "demo"]
    finally:
        shell.close()


def ask(*words: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "edgetool", "_complete", *words],
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["powershell", "--", "quantize", ""],
        ["zsh"],
        ["bash", "--", "edgetool quantize"],
        ["fish", "--", "\udcff", "--", "\x00"[:0], "--="],
    ],
)
def test_a_question_that_makes_no_sense_is_answered_with_silence(words: list[str]) -> None:
    answer = ask(*words)
    assert (answer.returncode, answer.stderr) == (0, "")


def test_a_broken_setting_and_a_broken_store_are_no_reason_to_disturb_a_line(tmp_path: Path) -> None:
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "jobs.sqlite").write_bytes(b"no database" * 500)
    for variables in ({"EDGETOOL_JOBS_DIRECTORY": str(tmp_path / "jobs")}, {"EDGETOOL_JOBS_LIMITT": "3"}):
        answer = ask("fish", "--", "jobs", "logs", "", env=variables)
        assert (answer.returncode, answer.stdout, answer.stderr) == (0, "", "")


def test_looking_for_jobs_and_servers_makes_no_directory(tmp_path: Path) -> None:
    for words in (["jobs", "logs", ""], ["serve-gpu", "--stop", ""], ["chat", ""]):
        assert ask("fish", "--", *words, env={"XDG_STATE_HOME": str(tmp_path / "state")}).stdout == "- space 0\n"
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize(
    ("words", "allowed"),
    [(["quantize", "--me"], []), (["quantize", "--method", ""], ["pydantic"]), (["eval", "--tasks", ""], ["pydantic"])],
)
def test_an_answer_imports_little(words: list[str], allowed: list[str]) -> None:
    script = (
        "import sys, json\n"
        f"sys.argv = ['edgetool', '_complete', 'fish', '--', *{words!r}]\n"
        "from edgetool.__main__ import main\n"
        "main()\n"
        "heavy = ['torch', 'transformers', 'numpy', 'rich', 'yaml', 'httpx', 'typer._adapters', 'pydantic']\n"
        "print(json.dumps([name for name in heavy if name in sys.modules]), file=sys.stderr)\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert json.loads(result.stderr) == allowed
    assert len(result.stdout.splitlines()) > 1
