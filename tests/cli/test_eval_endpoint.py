"""`edgetool eval --endpoint`: a server's scores are its model's, and what it answered survives its end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from edgetool.evaluation import endpoint
from tests.fakes import question_rows
from tests.fakes.openai_server import Running
from tests.fakes.scoring_server import ScoringServer
from tests.fakes.tiny_models import make_tiny_model


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model, data and text.txt."""
    top = tmp_path_factory.mktemp("eval")
    make_tiny_model(top / "model", "llama", hidden_size=32, layers=1, max_position_embeddings=8192)
    question_rows.write_data(top / "data", ("anatomy",))
    (top / "text.txt").write_text("The quick brown fox jumps over the lazy dog, again and again. " * 12)
    return top


def arguments(places: Path, tmp_path: Path, tasks: str, *options: str) -> list[str]:
    fixed = ["--tasks", tasks, "--data-dir", str(places / "data"), "-o", str(tmp_path / "out"), "--threads", "1"]
    fixed += ["--text", str(places / "text.txt"), "--context", "32", "--dtype", "float32", "--offline", "--json"]
    return ["eval", *fixed, *options]


@pytest.fixture
def evaluate(places: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    from edgetool.cli import app

    monkeypatch.setattr(endpoint, "PAUSES_S", (0.01,))

    def invoke(tasks: str, *options: str, env: dict[str, str] | None = None) -> Any:
        return CliRunner().invoke(app, arguments(places, tmp_path, tasks, *options), env=env)

    return invoke


def document(result: Any, code: int = 0) -> dict[str, Any]:
    assert result.exit_code == code, (result.stderr, result.exception)
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.mark.parametrize("knows_tokenizer", [True, False])
def test_an_endpoints_scores_are_those_of_its_model_in_this_process(
    evaluate: Callable[..., Any], places: Path, tmp_path: Path, knows_tokenizer: bool
) -> None:
    model = str(places / "model")
    tasks = "arc_easy,boolq,perplexity" if knows_tokenizer else "arc_easy,boolq,gsm8k_cot"
    here = document(evaluate(tasks, "--limit", "2", model, "-o", str(tmp_path / "here")))
    with Running(ScoringServer(places / "model", key="k")) as running:
        options = [tasks, "--limit", "2", "--endpoint", running.url, *([model] if knows_tokenizer else [])]
        there = document(evaluate(*options, env={"EDGETOOL_API_KEY": "k"}))
    for name in tasks.split(","):
        # float32 in both: batches round otherwise by 1e-6, which turns no choice here
        assert there["tasks"][name]["score"] == pytest.approx(here["tasks"][name]["score"], rel=1e-4)
        assert there["tasks"][name]["n"] == here["tasks"][name]["n"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"results.json", "report.html", "edgetool.json"}
    assert '"k"' not in (tmp_path / "out" / "edgetool.json").read_text()


def test_the_perplexity_of_an_endpoint_without_a_known_tokenizer_is_near_the_models(
    evaluate: Callable[..., Any], places: Path, tmp_path: Path
) -> None:
    here = document(evaluate("perplexity", str(places / "model"), "-o", str(tmp_path / "here")))
    with Running(ScoringServer(places / "model")) as running:
        there = document(evaluate("perplexity", "--endpoint", running.url))
    # other pieces of text, and so other contexts; a random model hardly knows the difference
    assert there["tasks"]["perplexity"]["score"] == pytest.approx(here["tasks"]["perplexity"]["score"], rel=0.1)


def test_an_endpoint_beside_an_original_in_this_process(evaluate: Callable[..., Any], places: Path) -> None:
    model = str(places / "model")
    with Running(ScoringServer(places / "model")) as running:
        options = ["--endpoint", running.url, model, "--against", model, "--gate", "drop<=0pt"]
        found = document(evaluate("arc_easy", *options))
    assert found["tasks"]["arc_easy"]["flips"] == {"lost": 0, "gained": 0}
    assert found["gate"]["passed"] is True


def test_a_run_goes_on_after_its_endpoint_went_down(evaluate: Callable[..., Any], places: Path, tmp_path: Path) -> None:
    asked = ("arc_easy,boolq", "--concurrency", "1", "--endpoint-model", "tiny")
    app = ScoringServer(places / "model", down_after=10)
    with Running(app) as running:
        options = (*asked, "--endpoint", running.url)
        failed = document(evaluate(*options), 7)
        assert "does not answer" in failed["message"]
        assert "--resume" in failed["hint"]
        app.down_after = None
        assert "unfinished run" in document(evaluate(*options), 4)["message"]
        before = len(app.seen)
        finished = document(evaluate(*options, "--resume"))
        again = len(app.seen) - before
        app.seen.clear()
        whole = document(evaluate(*options, "-o", str(tmp_path / "whole")))
    assert [task["score"] for task in finished["tasks"].values()] == [task["score"] for task in whole["tasks"].values()]
    assert again == len(app.seen) - 9  # ten came in before, of which one only asked what the server can do
    assert not (tmp_path / "out" / "answers.jsonl").exists()


def test_answers_of_an_endpoint_do_not_outlive_the_run(
    evaluate: Callable[..., Any], places: Path, tmp_path: Path
) -> None:
    app = ScoringServer(places / "model")
    with Running(app) as running:
        counts = []
        for name in ("one", "other"):
            app.seen.clear()
            document(evaluate("boolq", "--endpoint", running.url, "-o", str(tmp_path / name)))
            counts.append(len(app.seen))
    assert counts[0] == counts[1] > 5


def test_an_endpoint_that_cannot_score_is_refused_before_the_original_is_measured(
    evaluate: Callable[..., Any], places: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import edgetool.evaluation.loaded

    monkeypatch.setattr(edgetool.evaluation.loaded, "load_whole", None)
    against = ["--against", str(places / "model")]
    with Running(ScoringServer(places / "model", garbage="no_echo")) as running:
        found = document(evaluate("arc_easy", "--endpoint", running.url, *against), 4)
    assert "echo with logprobs" in found["message"]
    assert not list(tmp_path.glob("out*"))


def test_garbage_in_the_middle_is_one_clear_error_and_the_answers_before_it_stay(
    evaluate: Callable[..., Any], places: Path, tmp_path: Path
) -> None:
    app = ScoringServer(places / "model")
    answer = app.answer

    def worse(*given: Any) -> tuple[int, bytes]:
        app.garbage = "html" if len(app.seen) >= 8 else None
        return answer(*given)

    app.answer = worse  # type: ignore[method-assign]
    with Running(app) as running:
        found = document(evaluate("arc_easy", "--endpoint", running.url, "--concurrency", "1"), 7)
    assert "not as the OpenAI API does" in found["message"]
    assert len((tmp_path / "out.partial" / "answers.jsonl").read_text().splitlines()) == 7


def test_a_wrong_key_is_refused(evaluate: Callable[..., Any], places: Path, tmp_path: Path) -> None:
    with Running(ScoringServer(places / "model", key="right")) as running:
        for options in ((), ("--endpoint-model", "tiny")):
            found = document(
                evaluate("arc_easy", "--endpoint", running.url, *options, env={"EDGETOOL_API_KEY": "wrong"}), 3
            )
            assert "refuses the key" in found["message"]
    assert not list(tmp_path.glob("out*"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_keeps_its_answers_and_goes_on(places: Path, tmp_path: Path, number: signal.Signals) -> None:
    app = ScoringServer(places / "model")
    answer, reached, released = app.answer, threading.Event(), threading.Event()

    def slow(*given: Any) -> tuple[int, bytes]:
        if len(app.seen) == 9:
            reached.set()
            assert released.wait(120)
        return answer(*given)

    app.answer = slow  # type: ignore[method-assign]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("EDGETOOL_")}
    environment["XDG_CACHE_HOME"] = str(tmp_path / "cache")
    with Running(app) as running:
        command = [sys.executable, "-m", "edgetool"]
        command += arguments(places, tmp_path, "arc_easy", "--endpoint", running.url, "--concurrency", "1")
        with (tmp_path / "stderr").open("w") as errors:
            process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)
        # the server waits in its loop, so requests of this thread would too: only the process is looked at
        assert reached.wait(300)
        process.send_signal(number)
        while "stopping after the step at hand" not in (tmp_path / "stderr").read_text():
            assert process.poll() is None
            time.sleep(0.05)
        released.set()
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 75, (tmp_path / "stderr").read_text()
        assert "--resume" in json.loads(out)["hint"]
        kept = len((tmp_path / "out.partial" / "answers.jsonl").read_text().splitlines())
        before = len(app.seen)
        done = subprocess.run([*command, "--resume"], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert kept >= 8
    assert len(app.seen) - before == 24 - kept + 1  # six questions with four choices, and one that asks for scores


@pytest.mark.slow
def test_a_model_that_serve_gpu_serves_generates_what_it_generates_in_this_process(
    evaluate: Callable[..., Any], places: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    model = str(places / "model")
    settings = {"EDGETOOL_SERVE_GPU_ENGINE": "transformers", "EDGETOOL_SERVE_GPU_CHECK": "false"}
    settings |= {"EDGETOOL_LOCK_DIR": str(tmp_path / "locks")}
    asked = ("gsm8k_cot", "--limit", "1", "--log-samples", model, "--device", "cpu")
    here = document(evaluate(*asked, "-o", str(tmp_path / "here")))
    refused = document(evaluate("arc_easy", model, "--via", "serve-gpu", env=settings), 4)
    assert "no log-probabilities" in refused["message"]
    there = document(evaluate(*asked, "--via", "serve-gpu", env=settings))
    assert there["tasks"]["gsm8k_cot"]["score"] == here["tasks"]["gsm8k_cot"]["score"]
    said = [
        json.loads((tmp_path / name / "samples" / "gsm8k_cot.jsonl").read_text().splitlines()[0])["resps"]
        for name in ("here", "out")
    ]
    assert said[0] == said[1]
    assert not list((tmp_path / "state" / "edgetool" / "servers").glob("*.json"))  # nothing runs any more
