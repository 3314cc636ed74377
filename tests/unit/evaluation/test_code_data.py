"""EvalPlus's problems: which file is taken, and what is wrong with a damaged one."""

from __future__ import annotations

import gzip
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from edgetool.errors import BadInput, ResourceUnavailable
from edgetool.evaluation.code_data import PUBLISHED, find, releases_address
from tests.fakes.code_problems import HUMANEVAL, MBPP, write_problems


@pytest.fixture(autouse=True)
def _no_override(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HUMANEVAL_OVERRIDE_PATH", raising=False)
    monkeypatch.delenv("MBPP_OVERRIDE_PATH", raising=False)


def test_a_data_directory_gives_the_problems_in_order(tmp_path: Path) -> None:
    write_problems(tmp_path / "humaneval" / "HumanEvalPlus-v0.1.10.jsonl", HUMANEVAL)
    data = find("humaneval", tmp_path, cache_dir=tmp_path / "cache")
    assert [problem.task_id for problem in data.problems] == ["HumanEval/0", "HumanEval/1", "HumanEval/2"]
    assert [json.loads(problem.row) for problem in data.problems] == HUMANEVAL
    assert data.version == "v0.1.10"


def test_packed_and_plain_files_are_the_same_data(tmp_path: Path) -> None:
    plain = write_problems(tmp_path / "a" / "humaneval" / "HumanEvalPlus-v0.1.10.jsonl", HUMANEVAL)
    packed = tmp_path / "b" / "humaneval" / "HumanEvalPlus-v0.1.10.jsonl.gz"
    packed.parent.mkdir(parents=True)
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    one, other = (find("humaneval", tmp_path / name, cache_dir=tmp_path) for name in "ab")
    assert one.problems == other.problems
    assert one.sha256() == other.sha256()


def test_the_hash_is_of_the_rows_that_are_used(tmp_path: Path) -> None:
    write_problems(tmp_path / "1" / "humaneval" / "HumanEvalPlus-v0.1.10.jsonl", HUMANEVAL)
    changed = [*HUMANEVAL[:2], HUMANEVAL[2] | {"prompt": "def other():\n"}]
    write_problems(tmp_path / "2" / "humaneval" / "HumanEvalPlus-v0.1.10.jsonl", changed)
    one, other = (find("humaneval", tmp_path / name, cache_dir=tmp_path) for name in "12")
    assert one.sha256(2) == other.sha256(2)
    assert one.sha256() != other.sha256()


def test_a_limit_takes_the_first_and_names_take_those(tmp_path: Path) -> None:
    write_problems(tmp_path / "humaneval" / "HumanEvalPlus-v0.1.10.jsonl", HUMANEVAL)
    data = find("humaneval", tmp_path, cache_dir=tmp_path)
    assert [problem.task_id for problem in data.chosen(2)] == ["HumanEval/0", "HumanEval/1"]
    assert [p.task_id for p in data.chosen(1, only=["HumanEval/2", "HumanEval/0"])] == ["HumanEval/0", "HumanEval/2"]


def test_another_version_works_and_is_said(tmp_path: Path) -> None:
    write_problems(tmp_path / "mbpp" / "MbppPlus-v0.1.0.jsonl", MBPP)
    data = find("mbpp", tmp_path, cache_dir=tmp_path)
    assert data.version == "v0.1.0"
    assert len(data.notes) == 1
    assert "MbppPlus-v0.1.0.jsonl has 2 problems; EvalPlus 0.3.1 measures MbppPlus v0.2.0 with 378" in data.notes[0]


def test_the_version_that_evalplus_measures_is_preferred_and_smaller_sets_are_left_alone(tmp_path: Path) -> None:
    for name in (
        "MbppPlus-v0.1.0.jsonl",
        "MbppPlus-v0.2.0.jsonl",
        "MbppPlus-v0.3.0.jsonl",
        "MbppPlus-NoExtreme-v0.2.0.jsonl",
    ):
        write_problems(tmp_path / "mbpp" / name, MBPP)
    assert find("mbpp", tmp_path, cache_dir=tmp_path).path.name == "MbppPlus-v0.2.0.jsonl"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2 is not JSON"),
        ("[1]", "line 2 is not a JSON object"),
        (json.dumps({k: v for k, v in HUMANEVAL[1].items() if k != "entry_point"}), "line 2 has no field entry_point"),
        (json.dumps(HUMANEVAL[1] | {"prompt": 3}), "line 2 has a int in field prompt"),
        (json.dumps(HUMANEVAL[1] | {"plus_input": {"a": 1}}), "line 2 has a dict in field plus_input"),
        (json.dumps(HUMANEVAL[1] | {"atol": True}), "line 2 has a bool in field atol"),
        (json.dumps(HUMANEVAL[1] | {"task_id": "../x"}), "line 2 has the task_id '../x'"),
        (json.dumps(HUMANEVAL[0]), "line 2 has HumanEval/0 a second time"),
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, line: str, words: str) -> None:
    path = write_problems(tmp_path / "humaneval" / "HumanEvalPlus-v0.1.10.jsonl", HUMANEVAL[:1])
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(BadInput) as caught:
        find("humaneval", tmp_path, cache_dir=tmp_path)
    assert words in caught.value.message and str(path) in caught.value.message


def test_an_empty_a_torn_and_a_missing_file_are_one_clear_error_each(tmp_path: Path) -> None:
    place = tmp_path / "humaneval"
    with pytest.raises(BadInput, match=r"has no HumanEvalPlus-<version>\.jsonl"):
        find("humaneval", tmp_path, cache_dir=tmp_path)
    path = write_problems(place / "HumanEvalPlus-v0.1.10.jsonl", [])
    with pytest.raises(BadInput, match="is empty"):
        find("humaneval", tmp_path, cache_dir=tmp_path)
    path.unlink()
    (place / "HumanEvalPlus-v0.1.10.jsonl.gz").write_bytes(gzip.compress(b"{}" * 100)[:-9])
    with pytest.raises(BadInput, match="cannot be read"):
        find("humaneval", tmp_path, cache_dir=tmp_path)


def test_evalplus_own_variable_is_heeded_without_a_data_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_problems(tmp_path / "mine.jsonl", HUMANEVAL[:1])
    monkeypatch.setenv("HUMANEVAL_OVERRIDE_PATH", str(path))
    assert find("humaneval", None, cache_dir=tmp_path, offline=True).path == path
    monkeypatch.setenv("HUMANEVAL_OVERRIDE_PATH", str(tmp_path / "absent.jsonl"))
    with pytest.raises(BadInput, match="HUMANEVAL_OVERRIDE_PATH names"):
        find("humaneval", None, cache_dir=tmp_path)


def test_offline_and_not_in_the_cache_is_refused_with_the_place_to_put_it(tmp_path: Path) -> None:
    with pytest.raises(ResourceUnavailable) as caught:
        find("mbpp", None, cache_dir=tmp_path, offline=True)
    assert caught.value.hint is not None
    assert str(tmp_path / "eval" / "data" / "MbppPlus-v0.2.0.jsonl.gz") in caught.value.hint
    assert (
        "https://github.com/evalplus/mbppplus_release/releases/download/v0.2.0/MbppPlus.jsonl.gz" in caught.value.hint
    )


def test_the_address_is_the_one_that_evalplus_fetches() -> None:
    utils = pytest.importorskip("evalplus.data.utils")
    for published in PUBLISHED.values():
        address, _ = utils.get_dataset_metadata(published.stem, published.version, False)
        assert releases_address(published) == address


def test_it_is_fetched_once_and_what_is_no_data_is_not_kept(tmp_path: Path) -> None:
    rows = write_problems(tmp_path / "rows.jsonl", MBPP).read_bytes()
    seen: list[str] = []
    answers: dict[str, Any] = {"body": b"<html>not found</html>"}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answers["body"])

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    releases = f"http://127.0.0.1:{server.server_port}/{{0}}/{{1}}/{{2}}.jsonl.gz"
    try:
        with pytest.raises(ResourceUnavailable, match="cannot be fetched"):
            find("mbpp", None, cache_dir=tmp_path / "cache", releases=releases)
        answers["body"] = gzip.compress(rows)
        for _ in range(2):
            data = find("mbpp", None, cache_dir=tmp_path / "cache", releases=releases)
            assert len(data.problems) == 2
    finally:
        server.shutdown()
        server.server_close()
    assert seen == ["/mbppplus/v0.2.0/MbppPlus.jsonl.gz"] * 2


@pytest.mark.parametrize(("dataset", "count"), [("humaneval", 164), ("mbpp", 399)])
def test_the_published_files_are_read(dataset: Any, count: int, tmp_path: Path) -> None:
    directory = Path(os.environ.get("EDGETOOL_DATA_DIR") or Path(__file__).parents[3].parent / "shared" / "data")
    if not (directory / dataset).is_dir():
        pytest.skip("the published files are not here")
    data = find(dataset, directory, cache_dir=tmp_path)
    assert len(data.problems) == count
