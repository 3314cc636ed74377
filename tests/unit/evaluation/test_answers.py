"""Answers survive kills and torn lines, and two runs never write into one file."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from edgetool.errors import ResourceUnavailable
from edgetool.evaluation.answers import Answers, key_of


def test_an_answer_is_there_again_bit_for_bit(tmp_path: Path) -> None:
    rng = random.Random(0)
    values = [rng.uniform(-1e3, 0) for _ in range(200)] + [float("-inf"), 5e-324, -0.1]
    with Answers.open(tmp_path / "deep" / "a.jsonl") as answers:
        for index, value in enumerate(values):
            answers.put(str(index), [value, True])
        answers.put("text", 'line\nbreak, "quotes", ü, 𝄞, \ud800')
    with Answers.open(tmp_path / "deep" / "a.jsonl") as again:
        assert [again.get(str(index)) for index in range(len(values))] == [[value, True] for value in values]
        assert again.get("text") == 'line\nbreak, "quotes", ü, 𝄞, \ud800'
        assert again.get("never asked") is None
        assert len(again) == len(values) + 1


def test_a_file_cut_anywhere_keeps_every_whole_line_and_takes_new_ones(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with Answers.open(path) as answers:
        for index in range(3):
            answers.put(f"k{index}", {"text": "ü" * index})
    data = path.read_bytes()
    ends = [index + 1 for index, byte in enumerate(data) if byte == ord("\n")]
    for cut in {0, 1, len(data), *(end + step for end in ends for step in (-1, 0, 1, 5))} & set(range(len(data) + 1)):
        path.write_bytes(data[:cut])
        whole = data[:cut].count(b"\n")
        with Answers.open(path) as answers:
            assert len(answers) == whole
            answers.put("new", "after the crash")
        lines = [json.loads(line) for line in path.read_bytes().splitlines()]
        assert [key for key, _ in lines] == [f"k{index}" for index in range(whole)] + ["new"]


@pytest.mark.parametrize(
    "damage", [b"\x00\x00\x00\n", b"{}\n", b"[1, 2]\n", b'["a"]\n', b"\xff\xfe\n", b"\n", b"null\n"]
)
def test_a_damaged_line_in_the_middle_costs_no_other_answer(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'["first",1]\n' + damage + b'["last",2]\n')
    with Answers.open(path) as answers:
        assert (answers.get("first"), answers.get("last"), len(answers)) == (1, 2, 2)


def test_an_answer_that_was_put_survives_sigkill_without_a_flush(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    program = (
        "import os, signal, sys, pathlib\n"
        "from edgetool.evaluation.answers import Answers\n"
        "answers = Answers.open(pathlib.Path(sys.argv[1]))\n"
        "for index in range(1000): answers.put(str(index), index)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    child = subprocess.run([sys.executable, "-c", program, str(path)], check=False)
    assert child.returncode == -signal.SIGKILL
    with Answers.open(path) as answers:
        assert [answers.get(str(index)) for index in range(1000)] == list(range(1000))


def test_a_second_run_is_refused_while_the_first_holds_the_file_and_served_after(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    first = Answers.open(path)
    with pytest.raises(ResourceUnavailable, match="another evaluation of the same model") as refused:
        Answers.open(path)
    assert refused.value.exit_code == 6
    first.put("k", 1)
    first.close()
    with Answers.open(path) as second:
        assert second.get("k") == 1


def test_a_run_that_waits_takes_over_what_the_first_has_answered(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    first = Answers.open(path)
    found: list[object] = []

    def wait() -> None:
        with Answers.open(path, wait_s=60) as second:
            found.append(second.get("k"))

    waiting = threading.Thread(target=wait)
    waiting.start()
    first.put("k", "done")
    first.close()
    waiting.join(60)
    assert found == ["done"]


def test_writing_what_is_known_writes_nothing_and_a_new_value_replaces_the_old(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with Answers.open(path) as answers:
        answers.put("k", 1)
        answers.put("k", 1)
        size = path.stat().st_size
        answers.put("k", 2)
        assert path.stat().st_size == 2 * size
    with Answers.open(path) as answers:
        assert answers.get("k") == 2


def test_a_full_disk_is_one_clear_error_and_the_file_stays_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    program = (
        "import pathlib, resource, signal, sys\n"
        "from edgetool.errors import EdgetoolError\n"
        "from edgetool.evaluation.answers import Answers\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "answers = Answers.open(pathlib.Path(sys.argv[1]))\n"
        "answers.put('small', 1)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try:\n"
        "    answers.put('large', 'x' * 5000)\n"
        "except EdgetoolError as error:\n"
        "    print(error.type_name)\n"
        "answers.put('after', 2)\n"
    )
    child = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True)
    assert child.stdout.split() == ["ResourceUnavailable"]
    assert path.read_bytes() == b'["small",1]\n["after",2]\n'


def test_a_key_is_one_question_whatever_the_container_and_the_order_of_keys() -> None:
    same = key_of("generate_until", ("text", {"a": 1, "b": [2]}))
    assert same == key_of("generate_until", ["text", {"b": (2,), "a": 1}])
    others = {
        key_of("loglikelihood", ("text", {"a": 1, "b": [2]})),
        key_of("generate_until", ("text", {"a": 1, "b": [3]})),
        key_of("generate_until", "text", {"a": 1, "b": [2]}),
        key_of("generate_until", ("tex", "t", {"a": 1, "b": [2]})),
    }
    assert len({same, *others}) == 5


def test_none_is_no_answer(tmp_path: Path) -> None:
    with Answers.open(tmp_path / "a.jsonl") as answers, pytest.raises(ValueError, match="absence"):
        answers.put("k", None)
    assert (tmp_path / "a.jsonl").stat().st_size == 0
