"""ROUGE-L against a longest common subsequence written out here, in English and Chinese, and rows that are wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgetool.errors import BadInput
from edgetool.evaluation.answers import Answers
from edgetool.evaluation.rouge import Scorer, describe, find, measure
from edgetool.progress import NullProgress
from tests.fakes.tiny_models import make_tiny_model

pytest.importorskip("rouge_score")

WORDS = ["the", "cat", "sat", "mat", "on", "2"]


def _longest_common(one: list[str], other: list[str]) -> int:
    if not one or not other:
        return 0
    if one[-1] == other[-1]:
        return 1 + _longest_common(one[:-1], other[:-1])
    return max(_longest_common(one[:-1], other), _longest_common(one, other[:-1]))


def _expected(reference: list[str], said: list[str]) -> tuple[float, float, float]:
    common = _longest_common(reference, said)
    precision, recall = common / max(1, len(said)), common / max(1, len(reference))
    return precision, recall, 2 * precision * recall / (precision + recall) if common else 0.0


@settings(deadline=None)  # the first call imports nltk
@given(st.lists(st.sampled_from(WORDS), max_size=7), st.lists(st.sampled_from(WORDS), max_size=7))
def test_it_is_the_longest_common_subsequence(reference: list[str], said: list[str]) -> None:
    found = Scorer(Path("unused")).rouge_l(" ".join(reference), " ".join(said))
    assert found == pytest.approx(_expected(reference, said))


def test_chinese_is_compared_word_by_word(tmp_path: Path) -> None:
    # jieba's own example: 我 / 来到 / 北京 / 清华大学
    reference = "我来到北京清华大学。"
    scorer = Scorer(tmp_path)
    assert scorer.rouge_l(reference, "我来到北京清华大学") == (1.0, 1.0, 1.0)
    assert scorer.rouge_l(reference, "我来到北京") == pytest.approx(_expected(list("abcd"), list("abc")))
    assert scorer.rouge_l(reference, "北京!") == pytest.approx((1.0, 0.25, 0.4))
    assert scorer.rouge_l(reference, "nothing of it") == (0.0, 0.0, 0.0)


def test_what_jieba_leaves_behind_lies_in_our_cache_and_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "tmp"
    elsewhere.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(elsewhere))
    Scorer(tmp_path / "cache").rouge_l("北京", "北京")
    assert [path.name for path in (tmp_path / "cache" / "eval").iterdir()] == ["jieba.cache"]
    assert list(elsewhere.iterdir()) == []


def test_rows_are_read_with_their_ids(tmp_path: Path) -> None:
    path = tmp_path / "rouge" / "mine.jsonl"
    path.parent.mkdir()
    rows = [{"prompt": "a", "reference": "b", "id": "x"}, {"prompt": "c", "reference": "d"}]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    data = find(None, tmp_path)
    assert [(row.id, row.prompt, row.reference) for row in data.rows] == [("x", "a", "b"), ("rouge:1", "c", "d")]
    assert data == find(path, None)
    assert [row.id for row in data.chosen(1)] == ["x"]
    assert [row.id for row in data.chosen(only=["rouge:1"])] == ["rouge:1"]
    assert data.sha256(1) != data.sha256()
    assert describe(data)["data_sha256"] == data.sha256()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        ("{}\n", "line 1 has no text in field prompt"),
        ('{"prompt": "a", "reference": " "}\n', "line 1 has no text in field reference"),
        ('{"prompt": "a \\ud83d", "reference": "b"}\n', "line 1 has half of a surrogate pair"),
        ('{"prompt": "a", "reference": "b \\ud83d"}\n', "line 1 has half of a surrogate pair"),
        ('{"prompt": "a", "reference": "b"}\n{"prompt": 1', "line 2 is not JSON"),
        ('{"prompt": "a", "reference": "b", "id": 1}\n' * 2, "line 2 has the id '1' a second time"),
    ],
)
def test_a_wrong_file_is_refused_with_the_line(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(text)
    with pytest.raises(BadInput, match=words):
        find(path, None)


def test_no_file_and_several_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no file is given"):
        find(None, None)
    with pytest.raises(BadInput, match=r"has 0 \.jsonl files"):
        find(None, tmp_path)
    (tmp_path / "rouge").mkdir()
    for name in "ab":
        (tmp_path / "rouge" / f"{name}.jsonl").write_text("")
    with pytest.raises(BadInput, match=r"has 2 \.jsonl files"):
        find(None, tmp_path)
    with pytest.raises(BadInput, match="cannot be read: No such file"):
        find(tmp_path / "absent.jsonl", None)


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from lm_eval.models.huggingface import HFLM

    directory = make_tiny_model(tmp_path_factory.mktemp("models") / "tiny", "llama", dtype="float32")
    return HFLM(pretrained=str(directory), device="cpu", dtype="float32", batch_size=2)


@pytest.mark.parametrize("chat", [False, True])
def test_a_model_is_asked_once_and_its_throughput_is_told(
    lm: Any, chat: bool, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr("edgetool.evaluation.rouge.MAX_NEW_TOKENS", 6)
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps({"prompt": p, "reference": "the cat sat"}) + "\n" for p in ("A", "Bcd", "E f")))
    data = find(path, None)
    arguments: Any = {"title": "tiny", "cache_dir": tmp_path, "chat_template": chat, "log": tmp_path / "log.jsonl"}
    with Answers.open(tmp_path / "answers.jsonl") as answers:
        first = measure(data, lm, answers, NullProgress(), **arguments)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in log] == ["A", "Bcd", "E f"]
    tokens = sum(len(lm.tokenizer(line["text"], add_special_tokens=False)["input_ids"]) for line in log)
    assert first.generated_tokens == tokens > 0
    assert first.seconds > 0
    assert first.value == pytest.approx(sum(line["rougeL"] for line in log) / 3)
    assert len(lm.tokenizer(log[0]["text"])["input_ids"]) <= 8  # six tokens, cut anew

    with Answers.open(tmp_path / "answers.jsonl") as answers:
        again = measure(data, lm, answers, NullProgress(), **arguments)
    assert again.samples == first.samples
    assert (again.seconds, again.generated_tokens) == (0.0, 0)


def test_an_answer_equal_to_the_reference_scores_one(lm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgetool.evaluation.rouge.MAX_NEW_TOKENS", 12)
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps({"prompt": "def gather", "reference": "x"}) + "\n")
    with Answers.open(tmp_path / "answers.jsonl") as answers:
        measure(find(path, None), lm, answers, NullProgress(), title="t", cache_dir=tmp_path, log=tmp_path / "log")
        said = json.loads((tmp_path / "log").read_text())["text"]
        path.write_text(json.dumps({"prompt": "def gather", "reference": said}) + "\n")
        scores = measure(find(path, None), lm, answers, NullProgress(), title="t", cache_dir=tmp_path)
    assert any(letter.isascii() and letter.isalnum() for letter in said), "no word to compare"
    assert (scores.value, scores.n, scores.stderr) == (1.0, 1, None)
