"""`edgetool run`: order, skipping, the ladder, failures, plan and report; its steps are stand-ins (fake_steps.py)."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from typer.testing import CliRunner

from edgetool.errors import ResourceUnavailable
from tests.fakes.recipe_run import Run, states_of


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    return Run(tmp_path, monkeypatch)


def test_steps_run_in_order_each_on_the_output_it_names(run: Run) -> None:
    document = json.loads(run().stdout)
    assert (document["schema"], document["ok"], document["rung"]) == ("edgetool.run/1", True, 0)
    assert set(states_of(document).values()) == {"done"}
    calls = run.calls()
    assert [call.split(" --json")[0] for call in calls] == [
        "quantize model -o out/quantize --group-size 128",
        "eval out/quantize -o out/eval --against model --tasks perplexity --gate ratio<=1.05",
        "compile-vcu128 out/quantize -o out/image",
        "serve-gpu out/quantize --port 0",
    ]
    assert all(call.endswith("--json --progress json") for call in calls)
    assert [" ".join(step["command"]) for step in document["steps"]] == [
        "edgetool " + call.split(" --json")[0] for call in calls
    ]
    served = document["steps"][3]["result"]["asked"]
    assert (served["question"], served["answer"], served["tokens"]) == ("What is <the> capital?", "Paris <b>", 5)


def test_a_second_run_changes_nothing_and_starts_nothing(run: Run) -> None:
    run()
    run.calls()
    before = {path: path.stat().st_mtime_ns for path in run.out.rglob("*")}
    assert set(run.states().values()) == {"unchanged"}
    assert run.calls() == []
    assert {path: path.stat().st_mtime_ns for path in run.out.rglob("*")} == before


def test_an_unchanged_run_needs_no_heavy_import(run: Run) -> None:
    run()
    script = (
        "import sys\nfrom edgetool.cli import app\ntry:\n    app(['run', 'r.toml', '--json'])\n"
        "except SystemExit as leaving:\n    assert not leaving.code\n"
        "heavy = [n for n in ['torch', 'transformers', 'numpy', 'httpx', 'edgetool.quantizers'] if n in sys.modules]\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert set(states_of(json.loads(result.stdout)).values()) == {"unchanged"}


CHANGES: dict[str, tuple[Callable[[Run], object], set[str]]] = {
    "a setting of a late step": (lambda run: run.edit("ask_tokens = 5", "max_model_len = 64"), {"serve"}),
    "a setting of the first step": (
        lambda run: run.edit("group_size = 128", "group_size = 32"),
        {"quantize", "eval", "image", "serve"},
    ),
    "the model": (
        lambda run: (run.directory / "model" / "weights").write_text("another"),
        {"quantize", "eval", "image", "serve"},
    ),
    "a file of an output": (lambda run: (run.out / "image" / "weights").write_text("tampered"), {"image"}),
    "an output is gone": (lambda run: (run.out / "eval").rename(run.directory / "moved"), {"eval"}),
    "a file more in an output": (lambda run: (run.out / "eval" / "more").write_text(""), {"eval"}),
    # made again, its content is the same, so what follows stays
    "the time of an output": (lambda run: os.utime(run.out / "quantize" / "weights"), {"quantize"}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_change_touches_runs_again_and_nothing_else(run: Run, change: str) -> None:
    run()
    run.calls()
    make, expected = CHANGES[change]
    make(run)
    assert {name for name, state in run.states().items() if state == "done"} == expected
    assert len(run.calls()) == len(expected)
    assert set(run.states().values()) == {"unchanged"}


def test_a_variable_of_the_environment_counts_like_a_setting(run: Run) -> None:
    run()
    run.monkeypatch.setenv("EDGETOOL_COMPILE_VCU128_MAX_CONTEXT", "64")
    assert {name for name, state in run.states().items() if state == "done"} == {"image"}


def test_a_configuration_file_holds_for_the_steps_too(run: Run) -> None:
    run()
    run.calls()
    (run.directory / "c.toml").write_text("[compile_vcu128]\nmax_context = 64\n")
    states = run.states("r.toml", "--config", "c.toml")
    assert {name for name, state in states.items() if state == "done"} == {"image"}
    assert run.calls() == [
        "compile-vcu128 out/quantize -o out/image --config c.toml --overwrite --json --progress json"
    ]


@pytest.mark.parametrize("variable", ["EDGETOOL_QUANTIZE_DRY_RUN", "EDGETOOL_EVAL_DRY_RUN"])
def test_a_variable_that_would_turn_a_step_into_something_else_is_refused(run: Run, variable: str) -> None:
    run.monkeypatch.setenv(variable, "0")
    assert set(run.states().values()) == {"done"}
    run.monkeypatch.setenv(variable, "1")
    run.calls()
    result = run()
    assert (result.exit_code, run.calls()) == (3, [])
    assert f"'dry_run' in environment variable {variable}" in json.loads(result.stdout)["message"]


def test_so_is_a_file(run: Run) -> None:
    (run.directory / "c.toml").write_text("[serve_gpu]\ndetach = true\n")
    result = run("r.toml", "--config", "c.toml")
    assert (result.exit_code, run.calls()) == (3, [])
    assert "'detach' in c.toml, [serve_gpu]" in json.loads(result.stdout)["message"]


def test_a_calibration_file_that_changes_is_another_input(run: Run) -> None:
    text = run.directory / "text.txt"
    text.write_text("one")
    run.edit("group_size = 128", 'group_size = 128\ncalib = "text.txt"')
    run()
    assert run.states()["quantize"] == "unchanged"
    text.write_text("two, and longer")
    assert run.states()["quantize"] == "done"


def test_bytes_that_changed_behind_the_back_of_the_clock_are_found_by_verify(run: Run) -> None:
    run()
    path = run.out / "image" / "weights"
    before = path.stat()
    path.write_bytes(bytes(reversed(path.read_bytes())))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert run.states()["image"] == "unchanged"
    assert run.states("r.toml", "--verify")["image"] == "done"


def test_the_ladder_is_climbed_until_the_gate_holds(run: Run) -> None:
    result = run(group=64)
    document = json.loads(result.stdout)
    assert result.exit_code == 0
    assert document["rung"] == 1
    assert [(one["rung"], one["passed"]) for one in document["attempts"]] == [(0, False), (1, True)]
    assert document["attempts"][0]["reason"] == "ratio of group 128"
    groups = [re.search(r"--group-size (\d+)", call) for call in run.calls() if call.startswith("quantize")]
    assert [match and match[1] for match in groups] == ["128", "64"]
    assert "next rung: group_size 64" in result.stderr


def test_a_rung_keeps_what_those_before_it_changed(run: Run) -> None:
    run(group=32)
    last = [call for call in run.calls() if call.startswith("quantize")][-1]
    assert "--group-size 64" in last and "--method awq" in last


def test_rungs_that_failed_are_not_tried_again(run: Run) -> None:
    run(group=64)
    run.calls()
    result = run(group=64)
    assert set(states_of(json.loads(result.stdout)).values()) == {"unchanged"}
    assert json.loads(result.stdout)["rung"] == 1
    assert run.calls() == []


def test_a_gate_that_holds_nowhere_ends_with_8_and_a_report_again_and_again(run: Run) -> None:
    for expected_calls in (6, 0):
        result = run(group=1)
        document = json.loads(result.stdout)
        assert result.exit_code == 8
        assert document["type"] == "VerificationFailed"
        assert "on none of 3 rungs" in document["message"] and "ratio of group 64" in document["message"]
        assert states_of(document)["eval"] == "failed" and states_of(document)["image"] == "waiting"
        assert len(document["attempts"]) == 3 and document["rung"] is None
        assert "ratio of group 128" in (run.out / "report.html").read_text()
        assert len(run.calls()) == expected_calls


def test_the_plan_is_of_the_rung_that_a_run_would_begin_with(run: Run) -> None:
    run(group=64)
    plan = json.loads(run("r.toml", "--dry-run").stdout)["plan"]
    assert {step["state"] for step in plan["steps"]} == {"unchanged"}
    assert plan["steps"][0]["command"][-2:] == ["--group-size", "64"]
    assert plan["ladder"] == [{"method": "awq"}]


def test_a_plan_of_rungs_that_have_all_failed_says_so(run: Run) -> None:
    run(group=1)
    ran = json.loads(run(group=1).stdout)
    planned = json.loads(run("r.toml", "--dry-run").stdout)
    assert (planned["message"], planned["exit_code"]) == (ran["message"], 8)
    run.edit("ratio<=1.05", "ratio<=1.5")
    assert json.loads(run("r.toml", "--dry-run").stdout)["ok"]


def test_another_gate_is_asked_anew(run: Run) -> None:
    run(group=1)
    run.edit("ratio<=1.05", "ratio<=1.5")
    assert run.states()["eval"] == "done"


@pytest.mark.parametrize(
    ("trouble", "code", "kind", "said"),
    [
        ("fail", 4, "BadInput", "step image: what was wrong"),
        ("bug", 7, "BackendFailed", "step image: ValueError: a bug"),
        ("kill", 7, "BackendFailed", "killed by SIGKILL"),
        ("garbage", 7, "BackendFailed", "ended without a result"),
    ],
)
def test_a_step_that_fails_ends_the_run_with_its_reason(
    run: Run, trouble: str, code: int, kind: str, said: str
) -> None:
    result = run(steps=f"compile-vcu128={trouble}")
    document = json.loads(result.stdout)
    assert (result.exit_code, document["type"], document["ok"]) == (code, kind, False)
    assert said in document["message"]
    assert "image.log" in f"{document['message']} {document['hint']}"
    assert states_of(document) == {"quantize": "done", "eval": "done", "image": "failed", "serve": "waiting"}
    assert run.states() == {"quantize": "unchanged", "eval": "unchanged", "image": "done", "serve": "done"}


def test_a_report_that_cannot_be_written_does_not_hide_why_the_run_failed(run: Run) -> None:
    def full(path: Path, _: bytes) -> None:
        raise ResourceUnavailable(f"disk full while writing {path}")

    run.monkeypatch.setattr("edgetool.pipeline.job.atomic_write", full)
    document = json.loads(run(steps="compile-vcu128=fail").stdout)
    assert (document["message"], document["report"]) == ("step image: what was wrong", None)


@pytest.mark.parametrize(("trouble", "said"), [("mute", "with nothing"), ("fail", "what was wrong")])
def test_a_server_that_does_not_answer_fails_its_step(run: Run, trouble: str, said: str) -> None:
    result = run(steps=f"serve-gpu={trouble}")
    document = json.loads(result.stdout)
    assert said in document["message"] and result.exit_code in (4, 7)
    assert document["message"].startswith("step serve: ")
    assert states_of(document)["serve"] == "failed"
    assert said in document["steps"][-1]["result"]["message"]
    assert said in (run.out / "report.html").read_text()


def test_keys_are_in_no_file_and_no_command_line(run: Run) -> None:
    run.monkeypatch.setenv("EDGETOOL_API_KEY", "sesame")
    result = run()
    assert result.exit_code == 0
    assert "sesame" not in result.output + "".join(run.calls())
    for path in run.out.rglob("*"):
        assert not path.is_file() or b"sesame" not in path.read_bytes(), path


def test_the_plan_shows_every_step_and_writes_nothing(run: Run) -> None:
    before = sorted(run.directory.rglob("*"))
    plan = json.loads(run("r.toml", "--dry-run").stdout)["plan"]
    assert [(step["name"], step["state"]) for step in plan["steps"]] == [
        ("quantize", "to run"),
        ("eval", "after quantize"),
        ("image", "after quantize"),
        ("serve", "after quantize"),
    ]
    assert (plan["memory_bytes"], plan["disk_bytes"]) == (1000, 500)
    assert plan["steps"][1]["input_bytes"] == 100
    assert plan["ladder"] == [{"group_size": 64}, {"method": "awq"}]
    run.calls()
    assert sorted(run.directory.rglob("*")) == before
    run()
    assert {step["state"] for step in json.loads(run("r.toml", "--dry-run").stdout)["plan"]["steps"]} == {"unchanged"}


class Page(HTMLParser):
    """Texts of a page, and that every tag is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "use"):
            self.open.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(str(value))
            if name in ("href", "src"):
                self.links.append(str(value))

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_report_has_each_number_under_the_command_it_came_from(run: Run) -> None:
    run(group=64)
    page = Page()
    page.feed((run.out / "report.html").read_text())
    assert page.open == []
    text = "\n".join(page.texts)
    for part in (
        "edgetool quantize model -o out/quantize --group-size 64",
        "ratio of group 128",
        "20",
        "21",
        "1 to 1.25",
        "50.5 to 60.5",
        "What is <the> capital?",
        "Paris <b>",
        "edgetool serve-gpu out/quantize",
        "[steps.quantize]",
        "something to know",
    ):
        assert part in text, part
    assert text.index("edgetool eval out/quantize") < text.index("1 to 1.25") < text.index("edgetool compile-vcu128")
    assert "pc-image" in page.ids and page.links == ["#pc-image"]


def test_the_result_is_a_table_for_people(run: Run) -> None:
    from edgetool.cli import app

    result = CliRunner().invoke(app, ["run", "r.toml"])
    assert result.exit_code == 0
    for part in ("quantize", "done", "gate holds", "report: ", "to serve it: edgetool serve-gpu out/quantize"):
        assert part in result.stdout
    for line in ("quantize: running", "quantize: work: 0 of 2 layers", "quantize: quantize at work", "serve: done"):
        assert line in result.stderr
    assert "a library talks" not in result.stderr
    assert "a library talks" in (run.out / "logs" / "quantize.log").read_text()


def test_progress_as_json_names_the_step_of_each_event(run: Run) -> None:
    result = run("r.toml", "--progress", "json")
    events = [json.loads(line) for line in result.stderr.splitlines()]
    assert {event.get("state") for event in events if event["event"] == "step"} == {"running", "done"}
    assert {event["step"] for event in events if event["event"] == "progress"} == {"quantize", "eval", "image", "serve"}


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"schema": "edgetool.run-record/1", "steps": [], "begun": {}, "failed_gates": {}}',
        '{"schema": "edgetool.run-record/1", "steps": {"quantize": {}}, "begun": {}, "failed_gates": {}}',
    ],
)
def test_a_record_that_cannot_be_read_is_one_clear_error(run: Run, text: str) -> None:
    run.out.mkdir()
    (run.out / "edgetool.json").write_text(text)
    result = run()
    assert result.exit_code == 4
    assert "edgetool.json cannot be read" in json.loads(result.stdout)["message"]
    assert run.calls() == []


def test_a_model_with_a_dangling_link_is_left_to_the_command_that_reads_it(run: Run) -> None:
    (run.directory / "model" / "gone").symlink_to("nowhere")
    assert set(run.states().values()) == {"done"}
    assert set(run.states().values()) == {"unchanged"}
