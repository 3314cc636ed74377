import json

import pytest

from edgetool.errors import BadInput
from edgetool.quantizers.ledger import Ledger

IDENTITY = {"source": {"model.safetensors": "ab12"}, "recipe": {"bits": 4, "damp": 0.01}, "format": "gptq"}
RECORDS = [{"layer": 0, "modules": [{"relative_error": 0.1234567890123}]}, {"layer": 1, "modules": []}]


def written(path, records=RECORDS):
    ledger = Ledger.open(path, IDENTITY)
    for record in records:
        ledger.append(record)
    return ledger


def test_what_was_appended_is_there_when_the_run_is_taken_up_again(tmp_path):
    path = tmp_path / "ledger.jsonl"
    written(path)
    again = Ledger.open(path, IDENTITY)
    assert again.layers == RECORDS
    assert not again.assembled
    again.append({"assembled": True})
    assert Ledger.open(path, IDENTITY).assembled
    assert Ledger.open(path, IDENTITY).layers == RECORDS


def test_the_file_is_plain_json_lines_beginning_with_the_identity(tmp_path):
    path = tmp_path / "ledger.jsonl"
    written(path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [{"identity": IDENTITY}, *RECORDS]


@pytest.mark.parametrize("cut", [1, 5, 26])
def test_a_torn_last_line_counts_as_not_written(cut, tmp_path):
    path = tmp_path / "ledger.jsonl"
    written(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    again = Ledger.open(path, IDENTITY)
    assert again.layers == RECORDS[:1]
    again.append(RECORDS[1])
    assert path.read_bytes() == whole
    assert Ledger.open(path, IDENTITY).layers == RECORDS


def test_garbage_after_a_crash_hides_nothing_before_it(tmp_path):
    """A file system may leave zeros where the last block was not written."""
    path = tmp_path / "ledger.jsonl"
    written(path)
    whole = path.read_bytes()
    for garbage in (b"\0" * 40, b"\0" * 40 + b"\n", b"[1]\n", b"\xff\xfe\n"):
        path.write_bytes(whole + garbage)
        assert Ledger.open(path, IDENTITY).layers == RECORDS
        assert path.read_bytes() == whole


def test_a_ledger_whose_first_line_is_torn_starts_anew(tmp_path):
    path = tmp_path / "ledger.jsonl"
    for content in (b"", b'{"identity": {"sou'):
        path.write_bytes(content)
        assert Ledger.open(path, IDENTITY).layers == []
        assert json.loads(path.read_text()) == {"identity": IDENTITY}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "awq"}, "another format: 'gptq', now 'awq'"),
        ({"recipe": {"bits": 8, "damp": 0.01}}, "another recipe.*4.*8"),
        ({"source": {"model.safetensors": "cd34"}}, "another source.*ab12.*cd34"),
    ],
)
def test_a_run_with_other_inputs_or_options_is_refused_naming_the_difference(change, message, tmp_path):
    path = tmp_path / "ledger.jsonl"
    written(path)
    before = path.read_bytes()
    with pytest.raises(BadInput, match=message) as refusal:
        Ledger.open(path, IDENTITY | change)
    assert "--overwrite" in refusal.value.hint
    assert path.read_bytes() == before
