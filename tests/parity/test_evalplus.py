"""Texts and verdicts equal those of EvalPlus's own programs on the same problems, model and samples."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgetool.evaluation.answers import Answers
from edgetool.evaluation.code_data import find
from edgetool.evaluation.code_tasks import judge, measure, open_code_sandbox
from edgetool.evaluation.sandbox import Limits
from edgetool.progress import NullProgress
from tests.fakes.code_problems import HUMANEVAL, MBPP, write_problems
from tests.fakes.tiny_models import make_tiny_model

pytest.importorskip("evalplus")
NEW_TOKENS = 24

HUMANEVAL_TEXTS = {
    "HumanEval/0": [
        "def largest(numbers):\n    return max(numbers) if numbers else None\n",
        "def largest(numbers):\n    return max(numbers)\n",
        "def largest(numbers):\n    return sorted(numbers)[0]\n",
        "I cannot do that.",
        "def largest(numbers):\n    print(numbers)\n    raise SystemExit\n    return 1\n",
        "```python\nimport heapq\n\n\ndef unused():\n    return 1\n\n\ndef largest(numbers):\n"
        "    return next(iter(heapq.nlargest(1, numbers)), None)\n```\nThat is it.",
    ],
    "HumanEval/1": [
        "def half(value):\n    return value / 2\n",
        "def half(value):\n    return value // 2\n",
        "def half(value):\n    return value / 2 + 1e-9\n",
        "def half(value):\n    while True:\n        pass\n    return 0\n",
    ],
    "HumanEval/2": [
        HUMANEVAL[2]["prompt"] + HUMANEVAL[2]["canonical_solution"],
        "def shout_twice(text):\n    return text\n",
    ],
}
MBPP_TEXTS = {
    "Mbpp/2": [
        "def similar_elements(a, b):\n    return list(set(a) & set(b))[::-1]\n",
        "def similar_elements(a, b):\n    return a + b\n",  # wrong, and only for tuples no error
        "def similar_elements(a, b):\n    return None\n",
    ],
    "Mbpp/3": ["def count_words(text):\n    return len(text.split(' '))\n", "def count_words(text):\n    return '2'\n"],
}


@pytest.mark.slow  # EvalPlus itself waits for 20 s at its end
@pytest.mark.parametrize(
    ("dataset", "rows", "texts"), [("humaneval", HUMANEVAL, HUMANEVAL_TEXTS), ("mbpp", MBPP, MBPP_TEXTS)]
)
def test_verdicts_equal_those_of_evalplus_evaluate(
    dataset: Any, rows: list[dict[str, Any]], texts: dict[str, list[str]], tmp_path: Path
) -> None:
    stem = {"humaneval": "HumanEvalPlus-v0.1.10", "mbpp": "MbppPlus-v0.2.0"}[dataset]
    path = write_problems(tmp_path / dataset / f"{stem}.jsonl", rows)
    problems = {problem.task_id: problem for problem in find(dataset, tmp_path, cache_dir=tmp_path).problems}
    sandbox = open_code_sandbox(unsafe=True)
    pairs = [(name, text) for name, written in texts.items() for text in written]
    ours = [judge(sandbox, dataset, problems[name], text, limits=Limits(wall_s=120)) for name, text in pairs]

    # evaluate judges what it is given; codegen gives it what sanitize leaves
    samples = tmp_path / "samples.jsonl"
    sanitized = _upstream_sanitized(pairs, problems, tmp_path)
    samples.write_text(
        "".join(
            json.dumps({"task_id": name, "solution": s}) + "\n" for (name, _), s in zip(pairs, sanitized, strict=True)
        )
    )
    done = subprocess.run(
        [sys.executable, "-m", "evalplus.evaluate", "--dataset", dataset, "--samples", str(samples), "--parallel", "2"],
        env=os.environ | {f"{dataset.upper()}_OVERRIDE_PATH": str(path), "XDG_CACHE_HOME": str(tmp_path)},
        stdin=subprocess.DEVNULL, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    theirs = json.loads((tmp_path / "samples_eval_results.json").read_text())["eval"]
    in_order = {name: iter(found) for name, found in theirs.items()}
    for (name, text), verdict, solution in zip(pairs, ours, sanitized, strict=True):
        upstream = next(in_order[name])
        assert verdict.solution == solution == upstream["solution"]
        assert verdict.base == upstream["base_status"], text
        assert verdict.passes_plus == (upstream["base_status"] == upstream["plus_status"] == "pass"), text
        if verdict.plus != "skipped":
            assert verdict.plus == upstream["plus_status"], text


def _upstream_sanitized(pairs: list[tuple[str, str]], problems: dict[str, Any], place: Path) -> list[str]:
    """As `evalplus.sanitize` does it, in a process of its own that knows nothing of edgetool."""
    program = "import json, sys; from evalplus.sanitize import sanitize; " \
        "print(json.dumps([sanitize(*one) for one in json.load(sys.stdin)]))"  # fmt: skip
    given_texts = json.dumps([(text, problems[name].entry_point) for name, text in pairs])
    done = subprocess.run(
        [sys.executable, "-c", program], input=given_texts, capture_output=True, text=True, check=True, cwd=place
    )
    return [str(one) for one in json.loads(done.stdout.splitlines()[-1])]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.sampled_from(["def f():", "    return 1", "", "  ", "x = (", ")", "words and words", "```", "y = 2"]),
        max_size=9,
    )
)
def test_the_quick_search_for_code_finds_what_evalplus_finds(lines: list[str]) -> None:
    from evalplus.sanitize import code_extract

    from edgetool.evaluation.code_runner import longest_code

    assert longest_code("\n".join(lines)) == code_extract("\n".join(lines))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny", "llama", dtype="float32", seed=3)


@pytest.mark.parametrize("chat", [False, True])
def test_texts_equal_those_of_evalplus_codegen(
    chat: bool, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import evalplus.data.humaneval
    from evalplus.codegen import run_codegen
    from evalplus.provider.base import DecoderBase

    from edgetool.evaluation import code_decoders

    path = write_problems(tmp_path / "humaneval" / "HumanEvalPlus-v0.1.10.jsonl", HUMANEVAL)
    monkeypatch.setattr(evalplus.data.humaneval, "HUMANEVAL_OVERRIDE_PATH", str(path))
    # neither side offers the length of an answer as an option
    defaults = tuple(NEW_TOKENS if value == 768 else value for value in DecoderBase.__init__.__defaults__)
    monkeypatch.setattr(DecoderBase.__init__, "__defaults__", defaults)
    monkeypatch.setattr(code_decoders, "MAX_NEW_TOKENS", NEW_TOKENS)

    theirs = {}
    for number in range(len(HUMANEVAL)):  # a fresh model for each: see code_decoders
        from evalplus.provider import utility

        del utility.EOS[6:]  # and a fresh list of stop texts, to which a decoder adds
        written = run_codegen(
            str(model), "humaneval", root=str(tmp_path / str(number)), greedy=True, bs=1, backend="hf", dtype="float32",
            id_range=[number, number + 1], force_base_prompt=not chat,
        )  # fmt: skip
        raw = json.loads(Path(written.replace(".jsonl", ".raw.jsonl")).read_text())
        theirs[raw["task_id"]] = (raw["solution"], json.loads(Path(written).read_text())["solution"])
    del utility.EOS[6:]

    data = find("humaneval", tmp_path, cache_dir=tmp_path)
    target = _InMemory(model)
    attention = target.loaded().model.config._attn_implementation
    with Answers.open(tmp_path / "answers.jsonl") as answers:
        scores = measure(
            data,
            target,
            open_code_sandbox(unsafe=True),
            answers,
            NullProgress(),
            chat_template=chat,
            log=tmp_path / "log.jsonl",
        )
    ours = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert {line["id"]: (line["text"], line["solution"]) for line in ours} == theirs
    assert scores.value == 0.0 and scores.generated_tokens
    assert target.loaded().model.config._attn_implementation == attention
    assert "_get_stopping_criteria" not in vars(target.loaded().model)


class _InMemory:
    """A target whose model is in memory, loaded as edgetool loads it."""

    title = "model"
    identity: dict[str, Any]

    def __init__(self, directory: Path) -> None:
        import torch

        from edgetool.checkpoints.checkpoint import Checkpoint
        from edgetool.evaluation.loaded import load

        self.identity = {}
        self._loaded = load(Checkpoint.open(directory), torch.device("cpu"), torch.float32, NullProgress())

    def loaded(self) -> Any:
        return self._loaded

    def client(self) -> None:
        return None

    def language_model(self) -> None:
        return None

    def release(self) -> None:
        return None

    def facts(self) -> dict[str, Any]:
        return {}
