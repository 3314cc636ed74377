"""What the rows of each benchmark look like, and what is wrong with one that looks otherwise. Standard library only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]


class WrongRow(ValueError):
    """What is wrong with a row, without where it is."""


@dataclass(frozen=True)
class Dataset:
    """A benchmark's data, on the hub and as files.

    hub: its name there. folder: where it lies in a data directory. questions: the split that is measured.
    examples: the split of the examples before a question ("" where the task has them itself). examples_needed: whether
    the task cannot be loaded without them. ids: the field that names a row ("" where rows have no name).
    read: upstream's fields of a row, in the form in which the stock task wants them; raises WrongRow.
    gated: what a user has to do before the hub gives it ("" where nothing).
    """

    hub: str
    folder: str
    questions: str
    examples: str
    read: Callable[[Row], Row]
    examples_needed: bool = False
    ids: str = ""
    gated: str = ""


def _text(row: Row, field: str) -> str:
    if field not in row:
        raise WrongRow(f"has no field {field!r}")
    value = row[field]
    if not isinstance(value, str):
        raise WrongRow(f"field {field!r} is {_shown(value)}, a text is wanted")
    return value


def _texts(value: object, field: str, count: int | None = None) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise WrongRow(f"field {field!r} is {_shown(value)}, a list of texts is wanted")
    if len(value) < 2 or (count is not None and len(value) != count):
        raise WrongRow(f"field {field!r} has {len(value)} texts, {count or 'two or more'} are wanted")
    if any(item == "" for item in value):
        raise WrongRow(f"field {field!r} has an empty text")
    return value


def _number(value: object, field: str, below: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < below:
        raise WrongRow(f"field {field!r} is {_shown(value)}, a number from 0 to {below - 1} is wanted")
    return value


def _shown(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def _lettered(question: str) -> Callable[[Row], Row]:
    def read(row: Row) -> Row:
        given = row.get("choices")
        if not isinstance(given, dict):
            raise WrongRow(f"field 'choices' is {_shown(given)}, {{'text': [...], 'label': [...]}} is wanted")
        texts, labels = _texts(given.get("text"), "choices.text"), _texts(given.get("label"), "choices.label")
        if len(texts) != len(labels):
            raise WrongRow(f"field 'choices' has {len(texts)} texts and {len(labels)} labels")
        answer = _text(row, "answerKey")
        if answer.strip() not in labels:
            raise WrongRow(f"field 'answerKey' is {_shown(answer)}, which is none of the labels {', '.join(labels)}")
        return {
            "id": _text(row, "id"),
            question: _text(row, question),
            "choices": {"text": texts, "label": labels},
            "answerKey": answer,
        }

    return read


def _worked(row: Row) -> Row:
    answer = _text(row, "answer")
    if not answer.split("####")[-1].strip():
        raise WrongRow("field 'answer' ends without a number behind ####")
    return {"question": _text(row, "question"), "answer": answer}


def _hellaswag(row: Row) -> Row:
    endings = _texts(row.get("endings"), "endings")
    label = row.get("label")
    if isinstance(label, str) and label.isdecimal() and len(label) < 10:  # int() refuses thousands of digits
        label = int(label)
    gold = _number(label, "label", len(endings))
    texts = {field: _text(row, field) for field in ("activity_label", "ctx_a", "ctx_b", "ctx")}
    return {**texts, "endings": endings, "label": str(gold)}


def _mmlu(row: Row) -> Row:
    choices = _texts(row.get("choices"), "choices", 4)
    question, subject = _text(row, "question"), _text(row, "subject")
    return {
        "question": question,
        "subject": subject,
        "choices": choices,
        "answer": _number(row.get("answer"), "answer", 4),
    }


def _boolq(row: Row) -> Row:
    # boolq's own files say `answer`, true or false; the SuperGLUE form that the stock task reads says `label`, 1 or 0

    if "label" in row:
        label = _number(row["label"], "label", 2)
    elif isinstance(row.get("answer"), bool):
        label = int(row["answer"])
    else:
        raise WrongRow(f"field 'answer' is {_shown(row.get('answer'))}, true or false is wanted")
    return {"question": _text(row, "question"), "passage": _text(row, "passage"), "label": label}


def _gpqa(row: Row) -> Row:
    wanted = ("Question", "Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
    kept = {field: _text(row, field) for field in wanted}
    return kept | {"Record ID": _text(row, "Record ID")} if "Record ID" in row else kept


def _plain(hub: str, folder: str, questions: str, read: Callable[[Row], Row], ids: str = "") -> Dataset:
    return Dataset(hub, folder, questions, "train", read, ids=ids)


DATASETS: Mapping[str, Dataset] = {
    "arc_easy": _plain("allenai/ai2_arc", "arc_easy", "test", _lettered("question"), "id"),
    "arc_challenge": _plain("allenai/ai2_arc", "arc_challenge", "test", _lettered("question"), "id"),
    "openbookqa": _plain("allenai/openbookqa", "openbookqa", "test", _lettered("question_stem"), "id"),
    "hellaswag": _plain("Rowan/hellaswag", "hellaswag", "validation", _hellaswag),
    "boolq": _plain("aps/super_glue", "boolq", "validation", _boolq),
    "gsm8k": Dataset("openai/gsm8k", "gsm8k", "test", "", _worked),
    "gsm8k_platinum": Dataset("madrylab/gsm8k-platinum", "gsm8k_platinum", "test", "", _worked),
    "mmlu": Dataset("cais/mmlu", "mmlu", "test", "dev", _mmlu, examples_needed=True),
    "gpqa": Dataset(
        "Idavidrein/gpqa",
        "gpqa",
        "train",
        "train",
        _gpqa,
        ids="Record ID",
        gated="accept its terms at https://huggingface.co/datasets/Idavidrein/gpqa, then: hf auth login",
    ),
}
"""By the name in EvalTask.dataset."""
