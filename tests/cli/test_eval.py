"""`edgetool eval` on tiny models: what it prints and leaves, what it does not ask twice, and what it refuses."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from edgetool.errors import ResourceUnavailable
from edgetool.evaluation.answers import Answers
from edgetool.evaluation.tasks import MMLU_SUBJECTS
from tests.fakes import code_problems, question_rows
from tests.fakes.tiny_models import make_tiny_model

Eval = Callable[..., Any]
WORDS = "The quick brown fox jumps over the lazy dog, again and again. A checkpoint is a directory of files. "


@pytest.fixture(scope="session")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """original, quantized (another seed: a stranger to the original), broken (its weights are zero), data, text.txt."""
    top = tmp_path_factory.mktemp("eval")
    make_tiny_model(top / "original", "llama", hidden_size=32, layers=1, max_position_embeddings=8192)
    make_tiny_model(top / "quantized", "llama", hidden_size=32, layers=1, max_position_embeddings=8192, seed=5)
    question_rows.write_data(top / "data", MMLU_SUBJECTS)
    code_problems.write_problems(top / "data" / "humaneval" / "HumanEvalPlus-v0.1.10.jsonl", code_problems.HUMANEVAL)
    (top / "text.txt").write_text(WORDS * 12)
    return top


@pytest.fixture
def evaluate(places: Path, tmp_path: Path) -> Eval:
    """`evaluate("arc_easy", "--limit", "4")` measures quantized against original; keywords replace MODEL and so on."""
    from edgetool.cli import app

    def invoke(tasks: str, *options: str, model: str | None = "quantized", against: str | None = "original") -> Any:
        sides = [*([str(places / model)] if model else []), *(["--against", str(places / against)] if against else [])]
        fixed = ["--tasks", tasks, "--data-dir", str(places / "data"), "-o", str(tmp_path / "out"), "--threads", "1"]
        fixed += ["--text", str(places / "text.txt"), "--context", "32", "--dtype", "float32", "--offline", "--json"]
        return CliRunner().invoke(app, ["eval", *sides, *fixed, *options])

    return invoke


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever reads weights fails."""
    import edgetool.evaluation.loaded

    def refuse(*_: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(edgetool.evaluation.loaded, "load_whole", refuse)


def document(result: Any, code: int = 0) -> dict[str, Any]:
    assert result.exit_code == code, (result.stderr, result.exception)
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_two_models_are_measured_on_the_same_questions(evaluate: Eval, tmp_path: Path) -> None:
    found = document(evaluate("arc_easy,perplexity", "--limit", "5"))
    assert (found["schema"], found["ok"], found["reused"]) == ("edgetool.eval/1", True, False)
    assert len(found["profile"]["hash"]) == 64
    arc = found["tasks"]["arc_easy"]
    assert {"metric", "n", "original", "quantized", "difference", "ci95", "flips"} <= set(arc)
    assert arc["n"] == 5
    assert arc["difference"] == pytest.approx(arc["quantized"] - arc["original"])
    assert arc["ci95"][0] <= arc["difference"] <= arc["ci95"][1]
    assert arc["flips"]["gained"] - arc["flips"]["lost"] == round(5 * arc["difference"])
    text = found["tasks"]["perplexity"]
    assert text["ratio"] == pytest.approx(text["quantized"] / text["original"])
    assert text["kl_divergence"] > 0
    assert 0 <= text["top1_agreement"] <= 1
    assert (text["context"], text["stride"]) == (32, 16)
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {"results.json", "report.html", "edgetool.json"}
    assert {path.name for path in tmp_path.iterdir()} <= {"out", "cache"}
    outcomes = json.loads((out / "results.json").read_text())["outcomes"]["arc_easy"]
    assert sum(outcomes["original"]) / 5 == pytest.approx(arc["original"])
    manifest = json.loads((out / "edgetool.json").read_text())
    assert manifest["sides"]["original"]["model"] == "original"
    assert manifest["tools"]["lm_eval"]


def test_a_finished_run_is_answered_from_its_output(evaluate: Eval, no_weights_later: Callable[[], None]) -> None:
    first = document(evaluate("arc_easy,perplexity", "--limit", "4"))
    no_weights_later()
    again = document(evaluate("arc_easy,perplexity", "--limit", "4"))
    assert again["reused"] is True
    assert {**again, "reused": False} == first


@pytest.fixture
def no_weights_later(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From the call on, whoever reads weights fails."""

    def arm() -> None:
        import edgetool.evaluation.loaded

        def refuse(*_: Any) -> None:
            raise AssertionError("weights were read")

        monkeypatch.setattr(edgetool.evaluation.loaded, "load_whole", refuse)

    return arm


def test_what_was_answered_is_not_asked_again_by_another_run(
    evaluate: Eval, no_weights_later: Callable[[], None], tmp_path: Path
) -> None:
    first = document(evaluate("arc_easy,perplexity", "--limit", "5"))
    no_weights_later()
    elsewhere = document(evaluate("arc_easy,perplexity", "--limit", "5", "-o", str(tmp_path / "elsewhere")))
    fewer = document(evaluate("arc_easy", "--limit", "3", "--overwrite"))
    assert elsewhere["tasks"]["perplexity"]["kl_divergence"] == first["tasks"]["perplexity"]["kl_divergence"]
    assert elsewhere["tasks"]["arc_easy"]["ci95"] == first["tasks"]["arc_easy"]["ci95"]
    assert fewer["tasks"]["arc_easy"]["n"] == 3
    with pytest.raises(AssertionError, match="weights were read"):  # the check itself would notice
        raise evaluate("arc_easy", "--limit", "6", "--overwrite").exception


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--limit", "3"), "another profile"),
        (("--limit", "4", "--gate", "drop<=90pt"), "another gate"),
    ],
)
def test_an_output_of_another_run_is_refused(evaluate: Eval, options: tuple[str, ...], said: str) -> None:
    document(evaluate("arc_easy", "--limit", "4"))
    found = document(evaluate("arc_easy", *options), 4)
    assert said in found["message"]
    assert "--overwrite" in found["hint"]
    other = document(evaluate("arc_easy", "--limit", "4", model="original", against="quantized"), 4)
    assert "other models" in other["message"]


def test_a_model_against_itself_does_not_differ(evaluate: Eval) -> None:
    found = document(evaluate("arc_easy,perplexity", "--gate", "drop<=0pt; ratio<=1", model="original"))
    assert found["tasks"]["arc_easy"]["flips"] == {"lost": 0, "gained": 0}
    # the kept distributions are float16: 11 bits of a log-probability of about 6, so 1e-3 nats a token at most
    assert found["tasks"]["perplexity"]["kl_divergence"] < 1e-3
    assert found["tasks"]["perplexity"]["ratio"] == 1.0
    assert found["gate"]["passed"] is True


def test_a_run_waits_for_another_that_asks_the_same_model_the_same(
    evaluate: Eval, no_weights_later: Callable[[], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document(evaluate("arc_easy", "--limit", "2", against=None))
    (answers,) = (tmp_path / "cache" / "edgetool" / "eval" / "answers").glob("*.jsonl")
    asked = answers.read_bytes()
    with answers.open("r+b") as other:  # the other run, which has one answer, and all when it is waited for
        fcntl.flock(other, fcntl.LOCK_EX)
        os.truncate(answers, asked.index(b"\n") + 1)
        take = Answers.open

        def refused_at_first(path: Path, wait_s: float = 0) -> Answers:
            try:
                return take(path, wait_s=wait_s)
            except ResourceUnavailable:
                other.seek(0)
                other.write(asked)
                other.flush()
                fcntl.flock(other, fcntl.LOCK_UN)
                raise

        monkeypatch.setattr(Answers, "open", refused_at_first)
        no_weights_later()
        result = evaluate("arc_easy", "--limit", "2", "--overwrite", against=None)
    assert document(result)["tasks"]["arc_easy"]["n"] == 2
    assert "waiting for its answers" in result.stderr


def test_a_gate_that_does_not_hold_exits_8_and_the_results_are_there(evaluate: Eval, tmp_path: Path) -> None:
    for _ in range(2):  # the second is answered from the output, and fails as well
        found = document(evaluate("perplexity", "--limit", "4", "--gate", "ratio<=0.9"), 8)
        assert (found["ok"], found["type"]) == (False, "VerificationFailed")
        assert found["gate"]["passed"] is False
        assert "ratio" in found["message"]
        assert found["tasks"]["perplexity"]["ratio"] > 0.9
        assert json.loads((tmp_path / "out" / "results.json").read_text())["gate"]["passed"] is False


def test_frameworks_mix_in_one_run(evaluate: Eval, places: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "Say hello.", "reference": "hello"}\n')
    found = document(
        evaluate(
            "arc_easy,humaneval,rouge", "--limit", "1", "--rouge-data", str(tmp_path / "rows.jsonl"), "--log-samples"
        )
    )
    assert {name: task["n"] for name, task in found["tasks"].items()} == {"arc_easy": 1, "humaneval": 1, "rouge": 1}
    code = found["tasks"]["humaneval"]
    assert (code["original"], code["quantized"], code["difference"]) == (0.0, 0.0, 0.0)  # random models write no Python
    assert set(code["sides"]["model"]["metrics"]) == {"base", "plus"}
    assert found["tasks"]["rouge"]["sides"]["model"]["generated_tokens"] > 0
    for task in ("humaneval", "rouge"):
        assert len((tmp_path / "out" / "samples" / "quantized" / f"{task}.jsonl").read_text().splitlines()) == 1


def test_people_see_the_table_and_then_that_the_gate_does_not_hold(places: Path, tmp_path: Path) -> None:
    from edgetool.cli import app

    sides = [str(places / "quantized"), "--against", str(places / "original")]
    options = ["--tasks", "arc_easy", "--data-dir", str(places / "data"), "-o", str(tmp_path / "out"), "--offline"]
    result = CliRunner().invoke(app, ["eval", *sides, *options, "--limit", "4", "--gate", "recovery>=1.99"])
    assert result.exit_code == 8
    rows = [line.split() for line in result.stdout.splitlines()]
    assert ["quantized", "beside", "original"] in rows
    assert any(row[:3] == ["arc_easy", "acc", "4"] for row in rows)
    assert "does not hold" in result.stderr


def test_one_model_alone_has_a_score_and_no_difference(evaluate: Eval) -> None:
    found = document(evaluate("arc_easy,perplexity", "--limit", "4", against=None))
    assert found["against"] is None
    assert found["tasks"]["arc_easy"]["original"] is None
    assert 0 <= found["tasks"]["arc_easy"]["score"] <= 1
    assert found["tasks"]["perplexity"]["score"] > 1


def test_finished_runs_can_be_compared_with_each_other(evaluate: Eval, places: Path, tmp_path: Path) -> None:
    from edgetool.cli import app

    both = document(evaluate("arc_easy,perplexity", "--limit", "5"))
    for name in ("original", "quantized"):
        document(evaluate("arc_easy,perplexity", "--limit", "5", "-o", str(tmp_path / name), model=name, against=None))
    compare = ["eval", "--compare", str(tmp_path / "original"), str(tmp_path / "quantized" / "results.json"), "--json"]
    found = document(CliRunner().invoke(app, [*compare, "-o", str(tmp_path / "compared")]))
    for key in ("original", "quantized", "difference", "ci95", "flips"):
        assert found["tasks"]["arc_easy"][key] == both["tasks"]["arc_easy"][key]
    assert found["tasks"]["perplexity"]["ratio"] == both["tasks"]["perplexity"]["ratio"]
    assert (tmp_path / "compared" / "report.html").is_file()
    assert document(CliRunner().invoke(app, [*compare, "--gate", "ratio<=0.1"]), 8)["gate"]["passed"] is False
    document(evaluate("arc_easy", "--limit", "4", "-o", str(tmp_path / "fewer"), model="quantized", against=None))
    for place in (
        tmp_path / "original",
        tmp_path / "original" / "deeper",
        tmp_path / "quantized",
    ):  # what is compared is not replaced
        lost = document(CliRunner().invoke(app, [*compare, "-o", str(place), "--overwrite"]), 4)
        assert "must not lie in one another" in lost["message"]
    other = ["eval", "--compare", str(tmp_path / "original"), str(tmp_path / "fewer"), "--json"]
    assert "limit" in document(CliRunner().invoke(app, other), 4)["message"]


def test_the_gate_can_be_decided_before_all_questions_are_asked(evaluate: Eval, monkeypatch: Any) -> None:
    import edgetool.evaluation.sequential as sequential

    monkeypatch.setattr(sequential, "looks", lambda population: [*range(2, population), population])
    found = document(evaluate("arc_easy", "--gate", "drop<=100pt", "--sequential"))
    arc = found["tasks"]["arc_easy"]
    assert arc["sequential"]["questions"] == arc["n"] < arc["sequential"]["of"] == 6
    assert found["gate"]["passed"] is True


def test_samples_are_written_where_they_are_asked_for(evaluate: Eval, tmp_path: Path) -> None:
    document(evaluate("arc_easy", "--limit", "3", "--log-samples"))
    for side in ("original", "quantized"):
        lines = (tmp_path / "out" / "samples" / side / "arc_easy.jsonl").read_text().splitlines()
        assert [json.loads(line)["id"] for line in lines] == ["row-0", "row-1", "row-2"]
        assert "What do bees make?" in json.loads(lines[0])["arguments"][0][0]


def test_a_dry_run_writes_nothing(evaluate: Eval, no_weights: None, tmp_path: Path) -> None:
    plan = document(evaluate("arc_easy,mmlu,perplexity", "--limit", "2", "--dry-run"))["plan"]
    assert {row["task"]: row["questions"] for row in plan["tasks"]} == {"arc_easy": 2, "mmlu": 114, "perplexity": None}
    assert [side["side"] for side in plan["sides"]] == ["original", "quantized"]
    assert all(side["needed_bytes"] > 0 for side in plan["sides"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("tasks", "options", "code", "said"),
    [
        ("arc_eazy", (), 3, "arc_easy"),
        ("perplexity,gsm8k", (), 3, "gsm8k_cot"),
        ("arc_easy", ("--gate", "drop<=1"), 3, "percentage points"),
        ("arc_easy", ("--gate", "ratio<=1.1"), 3, "perplexity"),
        ("arc_easy", ("--stride", "64"), 3, "stride 64"),
        ("arc_easy", ("--sequential",), 3, "--gate"),
        ("arc_easy", ("--via", "serve-gpu", "--endpoint", "http://127.0.0.1:1"), 3, "leave one"),
        ("arc_easy", ("--batch-size", "many"), 3, "a number, or auto"),
        ("arc_easy", ("--device", "cuda:7"), 6, "CUDA"),
        ("arc_easy", ("--endpoint", "http://127.0.0.1:9", "--limit", "1"), 6, "nothing answers"),
        ("perplexity", ("--text", "nowhere.txt"), 4, "nowhere.txt"),
        ("perplexity", ("--context", "9000"), 4, "8192"),
    ],
)
def test_what_cannot_be_done_is_refused_and_leaves_nothing(
    evaluate: Eval, no_weights: None, tmp_path: Path, tasks: str, options: tuple[str, ...], code: int, said: str
) -> None:
    result = evaluate(tasks, *options)
    found = document(result, code)
    assert said in f"{found['message']} {found['hint']}"
    assert not list(tmp_path.glob("out*"))


def test_a_command_without_a_model_or_tasks_is_a_usage_error(evaluate: Eval) -> None:
    assert document(evaluate("arc_easy", model=None), 2)["hint"] == "edgetool eval --help"
    assert document(evaluate(""), 2)["type"] == "UsageError"


@pytest.mark.parametrize(
    ("tasks", "package"), [("arc_easy", "lm_eval"), ("humaneval", "evalplus"), ("rouge", "rouge_score")]
)
def test_a_package_that_is_not_installed_is_named_with_the_line_that_installs_it(
    evaluate: Eval, monkeypatch: pytest.MonkeyPatch, tasks: str, package: str
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    found = document(evaluate(tasks), 5)
    assert package in found["message"]
    assert found["hint"] == "pip install 'edgetool[eval]'"


def test_all_missing_data_is_named_at_once_before_anything_runs(
    evaluate: Eval, no_weights: None, places: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(places / "data" / "boolq", data / "boolq")
    (data / "hellaswag").mkdir()
    (data / "hellaswag" / "validation.jsonl").write_text("")
    (data / "openbookqa").mkdir()
    (data / "openbookqa" / "test.jsonl").write_text('{"id": "1"}\n{"id":\n')
    found = document(evaluate("boolq,gpqa,hellaswag,openbookqa,humaneval,arc_easy", "--data-dir", str(data)), 4)
    for said in ("gpqa: its data is gated", "hellaswag", "is empty", "openbookqa", "line 1", "humaneval", "arc_easy"):
        assert said in found["message"]
    assert "boolq:" not in found["message"]
    assert len(found["problems"]) == 5
    assert not list(tmp_path.glob("out*"))


def test_gpqa_without_its_data_says_how_to_get_it(evaluate: Eval, no_weights: None, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    found = document(evaluate("arc_easy,gpqa", "--data-dir", str(tmp_path / "data")), 4)
    assert "gated" in found["message"]
    assert "https://huggingface.co/datasets/Idavidrein/gpqa" in found["hint"]


def test_a_template_that_is_asked_for_has_to_be_there_and_the_same(
    evaluate: Eval, places: Path, tmp_path: Path
) -> None:
    bare = shutil.copytree(places / "original", tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    said = document(evaluate("arc_easy", "--chat-template", against=None, model=str(bare)), 4)
    assert "no chat template" in said["message"]
    other = shutil.copytree(places / "original", tmp_path / "other")
    (other / "chat_template.jinja").write_text("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    said = document(evaluate("arc_easy", "--chat-template", model=str(other)), 4)
    assert "different chat templates" in said["message"]
    assert document(evaluate("arc_easy", "--chat-template", "--limit", "2"))["profile"]["chat_template"]


def test_an_output_within_a_model_is_refused(evaluate: Eval, places: Path) -> None:
    found = document(evaluate("arc_easy", "-o", str(places / "original" / "ev")), 4)
    assert "must not lie in one another" in found["message"]
    assert not (places / "original" / "ev.partial").exists()


def test_the_data_directory_may_be_named_by_the_environment(places: Path, tmp_path: Path) -> None:
    from edgetool.cli import app

    (tmp_path / "eval.toml").write_text('[eval]\ndata_dir = "from-a-file"\ntasks = ["arc_easy", "mmlu"]\n')
    shown = ["eval", "--show-config", "--json", "--config", str(tmp_path / "eval.toml")]
    runner = CliRunner()

    def data_dir(*options: str, **env: str) -> str:
        found = document(runner.invoke(app, [*shown, *options], env=env))["config"]["eval"]
        assert found["tasks"] == ["arc_easy", "mmlu"]
        return str(found["data_dir"])

    assert data_dir() == "from-a-file"
    assert data_dir(EDGETOOL_DATA_DIR="shared") == "shared"
    assert data_dir(EDGETOOL_DATA_DIR="shared", EDGETOOL_EVAL_DATA_DIR="own") == "own"
    assert data_dir("--data-dir", "given", EDGETOOL_DATA_DIR="shared") == "given"
