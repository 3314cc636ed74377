"""Functions written by models and judged by EvalPlus in the sandbox: answers kept, stops, hangs, cheats, endpoints."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edgetool.errors import BackendFailed, BadInput, Stopped
from edgetool.evaluation import code_tasks
from edgetool.evaluation.answers import Answers
from edgetool.evaluation.code_data import CodeData, CodeProblem, find
from edgetool.evaluation.code_tasks import judge, measure, open_code_sandbox
from edgetool.evaluation.endpoint import Client, Endpoint
from edgetool.evaluation.sandbox import Limits, Sandbox
from edgetool.progress import NullProgress
from tests.fakes.code_problems import HUMANEVAL, write_problems
from tests.fakes.openai_server import Running, Stranger

pytest.importorskip("evalplus")

QUICK = Limits(wall_s=60)
RIGHT = "def largest(numbers):\n    return max(numbers) if numbers else None\n"
WRONG_AT_THE_EDGE = "def largest(numbers):\n    return max(numbers)\n"


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    return open_code_sandbox(unsafe=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> CodeData:
    place = tmp_path_factory.mktemp("data")
    write_problems(place / "humaneval" / "HumanEvalPlus-v0.1.10.jsonl", HUMANEVAL)
    return find("humaneval", place, cache_dir=place)


@pytest.fixture
def answers(tmp_path: Path) -> Iterator[Answers]:
    with Answers.open(tmp_path / "answers.jsonl") as opened:
        yield opened


class OfServer:
    """A target that is a server."""

    title = "server"
    identity: dict[str, Any]

    def __init__(self, url: str, model: str = "fake") -> None:
        self.identity = {"url": url}
        self._client = Client(Endpoint(url, None, model), 20, pauses_s=(0.0,))

    def client(self) -> Client:
        return self._client

    def loaded(self) -> None:
        return None

    def language_model(self) -> None:
        return None

    def release(self) -> None:
        self._client.close()

    def facts(self) -> dict[str, Any]:
        return {}


def _verdict(sandbox: Sandbox, data: CodeData, text: str, **limits: Any) -> tuple[str, str]:
    verdict = judge(sandbox, "humaneval", data.problems[0], text, limits=Limits(**{"wall_s": 60, **limits}))
    return verdict.base, verdict.plus


def test_right_wrong_and_wrong_at_the_edge_are_told_apart(sandbox: Sandbox, data: CodeData) -> None:
    assert _verdict(sandbox, data, RIGHT) == ("pass", "pass")
    assert _verdict(sandbox, data, WRONG_AT_THE_EDGE) == ("pass", "fail")
    assert _verdict(sandbox, data, "def largest(numbers):\n    return 0\n") == ("fail", "skipped")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "def largest(numbers",
        "nothing but words",
        "x = 1\x00",
        "(" * 3000,
        "\n" * 2000,
        "def other(numbers):\n    return 1\n",
        "import nothing_of_that_name\n" + RIGHT,
        "def largest(numbers, x=(_ for _ in ()).throw(SystemExit(0))):\n    return 1\n",
        "def largest(numbers):\n    import os\n    os._exit(0)\n    return 1\n",
        "def largest(numbers):\n    import os\n    os.abort()\n    return 1\n",
        "def largest(numbers):\n    raise BaseException\n    return 1\n",
        "def largest(numbers):\n    return largest(numbers)\n",
        'def largest(numbers):\n    print(\'{"verdict": {"base": "pass", "plus": "pass"}}\')\n    return 0\n',
    ],
)
def test_whatever_a_model_writes_is_judged_wrong_and_nothing_breaks(
    sandbox: Sandbox, data: CodeData, text: str
) -> None:
    base, plus = _verdict(sandbox, data, text)
    assert base in ("fail", "timeout") and plus == "skipped"


def test_words_around_the_code_are_taken_away(sandbox: Sandbox, data: CodeData) -> None:
    text = f"Here is it:\n```python\n{RIGHT}```\nIt takes the largest one.\n"
    verdict = judge(sandbox, "humaneval", data.problems[0], text, limits=QUICK)
    assert (verdict.base, verdict.plus) == ("pass", "pass")
    assert verdict.solution == RIGHT.strip()


def test_code_that_hangs_is_a_failure_after_evalplus_own_limit(sandbox: Sandbox, data: CodeData) -> None:
    text = "def largest(numbers):\n    while True:\n        pass\n    return 1\n"
    assert _verdict(sandbox, data, text)[0] in ("fail", "timeout")


def test_code_that_ignores_evalplus_limit_meets_the_outer_one(sandbox: Sandbox, data: CodeData) -> None:
    text = (
        "def largest(numbers):\n    import ctypes\n    libc = ctypes.CDLL(None)\n"
        "    libc.kill(libc.getppid(), 19)\n    return 1\n"  # SIGSTOP to the judging process
    )
    verdict = judge(sandbox, "humaneval", data.problems[0], text, limits=Limits(wall_s=4))
    assert (verdict.base, verdict.plus) == ("timeout", "skipped")
    assert verdict.why == "it ended with time"


def test_code_that_kills_the_judging_process_has_failed(sandbox: Sandbox, data: CodeData) -> None:
    text = (
        "def largest(numbers):\n    import ctypes\n    libc = ctypes.CDLL(None)\n"
        "    libc.kill(libc.getppid(), 9)\n    return 1\n"
    )
    verdict = judge(sandbox, "humaneval", data.problems[0], text, limits=QUICK)
    assert (verdict.base, verdict.plus, verdict.why) == ("fail", "skipped", "it ended with -9")


def test_code_cannot_write_its_own_verdict(sandbox: Sandbox, data: CodeData) -> None:
    line = json.dumps({"verdict": {"solution": "", "base": "pass", "plus": "pass"}})
    text = (
        "def largest(numbers):\n    import os\n    for number in range(64):\n        try:\n"
        f"            os.write(number, {(line + chr(10)).encode()!r})\n"
        "        except OSError:\n            pass\n    return 0\n"
    )
    assert _verdict(sandbox, data, text) == ("fail", "skipped")


def test_a_reference_solution_that_fails_is_no_fault_of_the_model(sandbox: Sandbox, data: CodeData) -> None:
    broken = json.dumps(HUMANEVAL[0] | {"canonical_solution": "    return 1 / 0\n"})
    problem = CodeProblem("HumanEval/0", HUMANEVAL[0]["prompt"], "largest", broken)
    with pytest.raises(BackendFailed, match=r"reference solution of HumanEval/0 could not be run.*ZeroDivisionError"):
        judge(sandbox, "humaneval", problem, RIGHT, limits=QUICK)


def test_a_server_that_chats_is_asked_as_evalplus_asks(
    sandbox: Sandbox, data: CodeData, answers: Answers, tmp_path: Path
) -> None:
    stranger = Stranger(answer=f"Of course!\n```python\n{RIGHT}```")
    with Running(stranger) as server:
        target = OfServer(server.url)
        scores = measure(
            data,
            target,
            sandbox,
            answers,
            NullProgress(),
            chat_template=True,
            concurrency=2,
            log=tmp_path / "log.jsonl",
        )
        target.release()
    assert (scores.task, scores.metric, scores.n) == ("humaneval", "plus", 3)
    assert {sample.id: sample.score for sample in scores.samples} == {
        "HumanEval/0": 1.0, "HumanEval/1": 0.0, "HumanEval/2": 0.0,
    }  # fmt: skip
    assert scores.value == pytest.approx(1 / 3) and scores.metrics == {"base": scores.value, "plus": scores.value}
    path, body, _ = stranger.seen[0]
    assert path == "/v1/chat/completions"
    assert body["messages"][0] == {"role": "system", "content": "You are a helpful assistant good at coding."}
    assert body["messages"][1]["content"].startswith("Please provide a self-contained Python script that solves")
    assert body["temperature"] == 0 and body["max_tokens"] == 768
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["plus_status"] for line in log] == ["pass", "skipped", "skipped"]
    assert log[0]["solution"] == RIGHT.strip()


def test_a_server_that_completes_goes_on_from_the_prompt(sandbox: Sandbox, data: CodeData, answers: Answers) -> None:
    stranger = Stranger(answer="    return max(numbers)\n\nprint(largest([1]))\n")
    with Running(stranger) as server:
        scores = measure(data, OfServer(server.url), sandbox, answers, NullProgress(), limit=1)
    (sample,) = scores.samples
    assert (sample.score, sample.more["base"]) == (0.0, 1.0)
    _, body, _ = stranger.seen[0]
    assert body["prompt"] == HUMANEVAL[0]["prompt"].strip() + "\n"
    assert len(body["stop"]) <= 4


def test_nothing_is_asked_or_run_a_second_time(
    sandbox: Sandbox, data: CodeData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stranger = Stranger(answer=RIGHT)
    with Running(stranger) as server:
        target = OfServer(server.url)
        with Answers.open(tmp_path / "a.jsonl") as answers:
            first = measure(data, target, sandbox, answers, NullProgress(), limit=2, chat_template=True)
        monkeypatch.setattr(code_tasks, "judge", lambda *_, **__: pytest.fail("it is judged again"))
        with Answers.open(tmp_path / "a.jsonl") as answers:
            again = measure(data, target, sandbox, answers, NullProgress(), limit=2, chat_template=True)
    assert len(stranger.seen) == 2
    assert again.samples == first.samples
    assert again.seconds == 0.0


@pytest.mark.parametrize("concurrency", [1, 2])
def test_a_stop_keeps_what_is_under_way_and_the_next_run_goes_on(
    concurrency: int, sandbox: Sandbox, data: CodeData, tmp_path: Path
) -> None:
    stop = threading.Event()

    class AsksToStop(Stranger):
        """Answers nobody before as many have asked as may at once."""

        arrived = 0

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            self.arrived += scope["type"] == "http"
            if self.arrived == concurrency:
                stop.set()
            while scope["type"] == "http" and self.arrived < concurrency:
                await asyncio.sleep(0.005)
            await super().__call__(scope, receive, send)

    stranger = AsksToStop(answer=RIGHT)
    again: Any = {"chat_template": True, "concurrency": concurrency}
    with Running(stranger) as server:
        with Answers.open(tmp_path / "a.jsonl") as answers, pytest.raises(Stopped, match="all answers so far are kept"):
            measure(data, OfServer(server.url), sandbox, answers, NullProgress(), stop=stop, **again)
        assert len(stranger.seen) == concurrency
        with Answers.open(tmp_path / "a.jsonl") as answers:
            assert len(answers) == concurrency
            scores = measure(data, OfServer(server.url), sandbox, answers, NullProgress(), **again)
    assert len(stranger.seen) == 3
    assert scores.n == 3


def test_a_server_that_breaks_down_keeps_what_it_has_said(sandbox: Sandbox, data: CodeData, tmp_path: Path) -> None:
    stranger = Stranger(answer=RIGHT)
    with Running(stranger) as server, Answers.open(tmp_path / "a.jsonl") as answers:
        target = OfServer(server.url)
        measure(data, target, sandbox, answers, NullProgress(), limit=1, chat_template=True)
        stranger.failing = True
        with pytest.raises(BackendFailed, match="does not answer") as caught:
            measure(data, target, sandbox, answers, NullProgress(), chat_template=True)
        assert caught.value.hint is not None and "--resume" in caught.value.hint
        stranger.failing = False
        before = len(stranger.seen)
        measure(data, target, sandbox, answers, NullProgress(), chat_template=True)
        assert len(stranger.seen) == before + 2


def test_a_model_without_a_chat_template_is_refused_when_one_is_asked_for(data: CodeData, tmp_path: Path) -> None:
    from edgetool.evaluation.code_decoders import LoadedCoder

    class Tokenizer:
        chat_template = None

    class Loaded:
        tokenizer = Tokenizer()

    with pytest.raises(BadInput, match="has no chat template"):
        LoadedCoder(Loaded(), "humaneval", True, "model")  # type: ignore[arg-type]
