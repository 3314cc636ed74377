"""Questions are checked for all tasks at once, before anything runs, and a wrong row is named with its line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from edgetool.errors import BadInput
from edgetool.evaluation.data import TaskData, examine, local_dataset, refuse
from edgetool.evaluation.tasks import MMLU_SUBJECTS, find_tasks
from tests.fakes import question_rows as rows


def looked_at(directory: Path | None, *names: str, **options: Any) -> tuple[dict[str, TaskData], list[str]]:
    found, problems = examine(find_tasks(names), directory, **options)
    return found, [problem.message for problem in problems]


def one_problem(directory: Path, name: str, **options: Any) -> str:
    found, problems = looked_at(directory, name, **options)
    assert not found
    assert len(problems) == 1, problems
    return problems[0]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return rows.write_data(tmp_path / "data", ["anatomy", "virology"])


def test_a_data_directory_is_counted_as_it_is(directory: Path) -> None:
    names = ("arc_easy", "gsm8k_cot", "gsm8k_platinum_cot", "hellaswag", "boolq", "openbookqa", "gpqa", "mmlu_anatomy")
    found, problems = looked_at(directory, *names, "perplexity", "humaneval")
    assert problems == []
    assert {name: one.questions() for name, one in found.items()} == {
        "arc_easy": 6, "gsm8k_cot": 4, "gsm8k_platinum_cot": 4, "hellaswag": 5, "boolq": 5, "openbookqa": 6, "gpqa": 6,
        "mmlu_anatomy": 3,
    }  # fmt: skip
    assert found["arc_easy"].questions(limit=2) == 2
    assert found["arc_easy"].questions(limit=100) == 6
    assert found["arc_easy"].source == str(directory / "arc_easy")
    assert found["gsm8k_platinum_cot"].notes == ("gsm8k_platinum_cot: test_first27.jsonl is a part of test, 4 rows",)


def test_a_limit_holds_for_each_subject_of_mmlu(tmp_path: Path) -> None:
    found, problems = looked_at(rows.write_data(tmp_path / "all", MMLU_SUBJECTS), "mmlu")
    assert problems == []
    assert found["mmlu"].questions() == 57 * 3
    assert found["mmlu"].questions(limit=2) == 57 * 2


def test_everything_that_is_missing_is_said_at_once(directory: Path) -> None:
    (directory / "arc_easy" / "test.jsonl").write_text("")
    (directory / "boolq" / "validation.jsonl").unlink()
    (directory / "gpqa" / "gpqa_main.csv").unlink()
    (directory / "gpqa").rmdir()
    _, problems = examine(find_tasks(["arc_easy", "hellaswag", "boolq", "gpqa", "mmlu"]), directory)
    with pytest.raises(BadInput) as refused:
        refuse(problems)
    message = refused.value.message
    assert refused.value.exit_code == 4
    assert f"arc_easy: {directory}/arc_easy/test.jsonl is empty" in message
    assert f"boolq: there is no {directory}/boolq/validation.jsonl" in message
    assert "gpqa: its data is gated" in message
    assert "hellaswag" not in message
    # 55 subjects with two files each
    assert f"and {110 + 3 - 8} more" in message
    assert len(refused.value.details["problems"]) == 113


def test_gpqa_without_files_says_how_to_get_them(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    _, problems = examine(find_tasks(["gpqa_diamond_zeroshot"]), tmp_path / "data")
    assert "gated" in problems[0].message
    assert "https://huggingface.co/datasets/Idavidrein/gpqa" in problems[0].hint
    assert f"put gpqa_diamond.csv of it into {tmp_path}/data/gpqa" in problems[0].hint


def test_a_data_directory_that_does_not_exist_is_no_reason_to_ask_the_hub(tmp_path: Path) -> None:
    assert one_problem(tmp_path / "none", "arc_easy") == f"arc_easy: there is no data directory {tmp_path}/none"


def test_without_a_data_directory_the_hub_has_the_questions() -> None:
    found, problems = looked_at(None, "arc_easy", "mmlu", "gpqa", offline=True)
    assert problems == []
    assert found["arc_easy"].source == "hub: allenai/ai2_arc"
    assert found["mmlu"].questions() is None


Change = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    ("task", "file", "change", "said"),
    [
        ("arc_easy", "test", lambda row: row.pop("answerKey"), "has no field 'answerKey'"),
        ("arc_easy", "test", lambda row: row.update(answerKey="E"), "is 'E', which is none of the labels A, B, C, D"),
        ("arc_easy", "test", lambda row: row.update(question=7), "field 'question' is 7, a text is wanted"),
        ("arc_easy", "test", lambda row: row.update(choices=["a", "b"]), "field 'choices' is ['a', 'b']"),
        ("arc_easy", "test", lambda row: row["choices"]["text"].pop(), "has 3 texts and 4 labels"),
        ("arc_easy", "test", lambda row: row["choices"]["text"].__setitem__(1, ""), "has an empty text"),
        ("openbookqa", "test", lambda row: row.pop("question_stem"), "has no field 'question_stem'"),
        ("gsm8k_cot", "test", lambda row: row.update(answer="she has none ####"), "without a number behind ####"),
        ("hellaswag", "validation", lambda row: row.update(label="4"), "field 'label' is 4, a number from 0 to 3"),
        ("hellaswag", "validation", lambda row: row.update(label=""), "field 'label' is '', a number from 0 to 3"),
        ("hellaswag", "validation", lambda row: row.update(label="1" * 5000), "field 'label' is '111"),
        ("hellaswag", "validation", lambda row: row.pop("endings"), "field 'endings' is None, a list of texts"),
        ("boolq", "validation", lambda row: row.update(answer="yes"), "field 'answer' is 'yes', true or false"),
        ("boolq", "validation", lambda row: row.update(label=True), "field 'label' is True, a number from 0 to 1"),
        ("mmlu_anatomy", "test/anatomy", lambda row: row.update(answer=4), "field 'answer' is 4, a number from 0 to 3"),
        ("mmlu_anatomy", "dev/anatomy", lambda row: row["choices"].pop(), "has 3 texts, 4 are wanted"),
        ("arc_easy", "test", lambda row: row.update(question="half \ud800"), "has half of a surrogate pair"),
    ],
)  # fmt: skip
def test_a_wrong_row_is_named_with_its_line(directory: Path, task: str, file: str, change: Change, said: str) -> None:
    (path,) = directory.glob(f"{find_tasks([task])[0].dataset}/{file}.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    change(lines[1])
    path.write_text(f"{json.dumps(lines[0])}\n\n{json.dumps(lines[1])}\n")  # the blank line counts
    problem = one_problem(directory, task)
    assert problem.startswith(f"{task}: {path} line 3 ")
    assert said in problem


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"question": ', "is not JSON"),
        (b"[1, 2]", "is not a JSON object"),
        (b"null", "is not a JSON object"),
        (b"\xff\xfe", "is not UTF-8 text"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"question": NaN}', "has no field"),
    ],
)
def test_a_line_that_is_no_row_is_named(directory: Path, line: bytes, said: str) -> None:
    path = directory / "gsm8k" / "test.jsonl"
    path.write_bytes(path.read_bytes() + line + b"\n")
    problem = one_problem(directory, "gsm8k_cot")
    assert problem.startswith(f"gsm8k_cot: {path} line 5 ")
    assert said in problem


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Question,Correct Answer\nonly one column\n", "line 2 has another number of columns than the 2"),
        ('Question,Correct Answer\n"open,x\n', "is not CSV"),
        ("Question,Correct Answer\nq,a\n", "line 2 has no field 'Incorrect Answer 1'"),
        ("", "is empty"),
    ],
)
def test_a_damaged_csv_is_named(directory: Path, text: str, said: str) -> None:
    (directory / "gpqa" / "gpqa_main.csv").write_text(text)
    assert said in one_problem(directory, "gpqa")


def test_several_parts_of_a_split_are_no_choice_to_make_silently(directory: Path) -> None:
    rows.write_rows(directory / "gsm8k_platinum" / "test_second.jsonl", rows.worked())
    assert "several parts of test: test_first27.jsonl, test_second.jsonl" in one_problem(
        directory, "gsm8k_platinum_cot"
    )
    rows.write_rows(directory / "gsm8k_platinum" / "test.jsonl", rows.worked()[:1])
    found, _ = looked_at(directory, "gsm8k_platinum_cot")
    assert found["gsm8k_platinum_cot"].questions() == 1
    assert found["gsm8k_platinum_cot"].notes == ()


def test_examples_come_from_a_split_of_their_own_or_not_at_all(directory: Path) -> None:
    said = one_problem(directory, "arc_easy", num_fewshot=2)
    assert f"takes its examples from {directory}/arc_easy/train.jsonl, which is not there" in said
    rows.write_rows(directory / "arc_easy" / "train.jsonl", rows.lettered()[:2])
    assert looked_at(directory, "arc_easy", num_fewshot=2)[1] == []
    assert "asks for 3 examples" in one_problem(directory, "arc_easy", num_fewshot=3)
    assert looked_at(directory, "mmlu_anatomy", num_fewshot=2)[1] == []
    assert "dev/anatomy.jsonl has 2" in one_problem(directory, "mmlu_anatomy", num_fewshot=3)
    assert looked_at(directory, "gsm8k_cot", num_fewshot=8)[1] == []
    assert "it has 8 examples, --num-fewshot asks for 9" in one_problem(directory, "gsm8k_cot", num_fewshot=9)
    assert "asked without examples" in one_problem(directory, "gpqa", num_fewshot=1)


def test_the_same_rows_are_written_once_and_other_rows_elsewhere(directory: Path, tmp_path: Path) -> None:
    first = local_dataset(looked_at(directory, "boolq")[0]["boolq"], tmp_path / "cache")
    assert local_dataset(looked_at(directory, "boolq")[0]["boolq"], tmp_path / "cache") == first
    # boolq's own files say true or false, the stock task wants a number
    assert pyarrow.parquet.read_table(first / "boolq.validation.parquet")["label"].to_pylist() == [0, 0, 0, 1, 1]
    rows.write_rows(directory / "boolq" / "validation.jsonl", [{**row, "answer": True} for row in rows.boolq()])
    other = local_dataset(looked_at(directory, "boolq")[0]["boolq"], tmp_path / "cache")
    assert other != first
    assert sorted(path.name for path in first.parent.iterdir()) == sorted([first.name, other.name])


def test_texts_stay_texts_whatever_they_look_like(tmp_path: Path) -> None:
    texts = ["2020-01-01", "2021-02-02T10:00:00Z", "12:30", "7"]
    written = [{**row, "choices": {"text": texts, "label": list("ABCD")}} for row in rows.lettered()]
    rows.write_rows(tmp_path / "data" / "arc_easy" / "test.jsonl", written)
    place = local_dataset(looked_at(tmp_path / "data", "arc_easy")[0]["arc_easy"], tmp_path / "cache")
    kept = pyarrow.parquet.read_table(place / "ARC-Easy.test.parquet").to_pylist()
    assert kept == written


@pytest.mark.parametrize("damage", [b"", b"\0" * 1000, b"PAR1 and then nothing"])
def test_a_dataset_that_a_crash_has_torn_is_written_again(directory: Path, tmp_path: Path, damage: bytes) -> None:
    data = looked_at(directory, "boolq")[0]["boolq"]
    place = local_dataset(data, tmp_path / "cache")
    whole = (place / "boolq.validation.parquet").read_bytes()
    (place / "boolq.validation.parquet").write_bytes(damage)
    assert local_dataset(data, tmp_path / "cache") == place
    assert (place / "boolq.validation.parquet").read_bytes() == whole


def test_a_data_directory_that_is_a_file_or_holds_directories_for_files_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "there is no data directory" in one_problem(tmp_path / "file", "arc_easy")
    (tmp_path / "data" / "arc_easy" / "test.jsonl").mkdir(parents=True)
    assert "there is no" in one_problem(tmp_path / "data", "arc_easy")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_said(directory: Path) -> None:
    (directory / "boolq" / "validation.jsonl").chmod(0)
    assert "cannot be read: Permission denied" in one_problem(directory, "boolq")


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        (403, "GatedRepo", ["gpqa: Idavidrein/gpqa is gated, and this user may not read it"]),
        (401, "RepoNotFound", ["gpqa: Idavidrein/gpqa is gated, and this user may not read it"]),
        (200, "", []),
        (500, "", []),  # the hub is ill: whether the cache has it shows when it is loaded
    ],
)
def test_a_hub_that_refuses_gated_data_is_heard_before_anything_runs(status: int, code: str, said: list[str]) -> None:
    asked: list[tuple[str, str | None]] = []

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append((self.path, self.headers.get("Authorization")))
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_: object) -> None:
            return None

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        program = (
            "import json\n"
            "from edgetool.evaluation.data import examine\n"
            "from edgetool.evaluation.tasks import find_tasks\n"
            "_, problems = examine(find_tasks(['arc_easy', 'gpqa']), None, token='hf_secret')\n"
            "print(json.dumps([problem.message for problem in problems]))\n"
        )
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "NO_PROXY": "127.0.0.1"}
        run = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120
        )
        server.shutdown()
    assert json.loads(run.stdout) == said, run.stderr
    of_data = {(path, key) for path, key in asked if path.startswith("/api/datasets")}  # the library asks other things
    assert of_data == {("/api/datasets/Idavidrein/gpqa/auth-check", "Bearer hf_secret")}
    assert "hf_secret" not in run.stdout + run.stderr
