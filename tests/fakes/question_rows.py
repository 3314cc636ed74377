"""A few rows of each benchmark, written for these tests in upstream's fields, laid out as a data directory."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

THINGS = (
    ("What do bees make?", ["honey", "wax paper", "bricks", "salt"], 0),
    ("Which of these floats on water?", ["a nail", "a cork", "a stone", "a coin"], 1),
    ("What falls from clouds?", ["sand", "oil", "rain", "dust and ashes"], 2),
    ("Where do fish live?", ["in trees", "in the sky", "under beds", "in water"], 3),
    ("What keeps a house warm?", ["a stove", "a mirror", "an open window in winter", "a lamp"], 0),
    ("Which animal lays eggs?", ["a horse", "a hen", "a cat", "a whale"], 1),
)
LETTERS = ("A", "B", "C", "D")


def lettered(question: str = "question") -> list[dict[str, Any]]:
    """Rows as ARC and OpenBookQA have them."""
    return [
        {
            "id": f"row-{number}",
            question: text,
            "choices": {"text": choices, "label": list(LETTERS)},
            "answerKey": LETTERS[answer],
        }
        for number, (text, choices, answer) in enumerate(THINGS)
    ]


def worked() -> list[dict[str, Any]]:
    """Rows as GSM8K has them."""
    return [
        {
            "question": f"Ann has {number} pears and gets 3 more. How many has she?",
            "answer": f"{number}+3=<<{number}+3={number + 3}>>{number + 3}\n#### {number + 3}",
        }
        for number in range(2, 6)
    ]


def hellaswag() -> list[dict[str, Any]]:
    return [
        {
            "activity_label": "Cooking",
            "ctx_a": f"A man peels {number} eggs.",
            "ctx_b": "he",
            "ctx": f"A man peels {number} eggs. he",
            "endings": ["then boils them.", "salts [title] them.", "flies away.", "sings."],
            "label": str(number % 4),
        }
        for number in range(5)
    ]


def mmlu(subject: str, count: int) -> list[dict[str, Any]]:
    return [
        {"question": f"{subject}: {text}", "subject": subject, "choices": choices, "answer": answer}
        for text, choices, answer in THINGS[:count]
    ]


def boolq() -> list[dict[str, Any]]:
    return [
        {"question": f"is {number} more than 2", "passage": "Numbers are ordered. 3 follows 2.", "answer": number > 2}
        for number in range(5)
    ]


def gpqa() -> list[dict[str, Any]]:
    return [
        {"Question": text, "Correct Answer": choices[answer], "Record ID": f"rec{number}"}
        | {f"Incorrect Answer {n}": other for n, other in enumerate((c for c in choices if c != choices[answer]), 1)}
        for number, (text, choices, answer) in enumerate(THINGS)
    ]


def write_rows(path: Path, rows: Iterable[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_data(directory: Path, subjects: Iterable[str] = ()) -> Path:
    """A data directory with a few rows of everything; of MMLU only `subjects` (the group needs all of them)."""
    for name in ("arc_easy", "arc_challenge"):
        write_rows(directory / name / "test.jsonl", lettered())
    write_rows(directory / "openbookqa" / "test.jsonl", lettered("question_stem"))
    write_rows(directory / "gsm8k" / "test.jsonl", worked())
    write_rows(directory / "gsm8k_platinum" / "test_first27.jsonl", worked())
    write_rows(directory / "hellaswag" / "validation.jsonl", hellaswag())
    write_rows(directory / "boolq" / "validation.jsonl", boolq())
    for subject in subjects:
        write_rows(directory / "mmlu" / "test" / f"{subject}.jsonl", mmlu(subject, 3))
        write_rows(directory / "mmlu" / "dev" / f"{subject}.jsonl", mmlu(subject, 2))
    rows = gpqa()
    (directory / "gpqa").mkdir()
    with (directory / "gpqa" / "gpqa_main.csv").open("w", newline="") as stream:
        table = csv.DictWriter(stream, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    return directory
