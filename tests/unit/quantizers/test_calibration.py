import csv
import hashlib
import json
import struct
import sys

import pytest
import torch

from edgetool.checkpoints.checkpoint import Checkpoint
from edgetool.errors import BadInput, MissingDependency, ResourceUnavailable
from edgetool.models.streamed import load_tokenizer
from edgetool.quantizers.calibration import builtin_texts, calibration_from, texts_of
from tests.fakes.tiny_models import make_tiny_model

TEXTS = ["The first text, with an umlaut: ä.", "A second\none over two lines.", "And a third."]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(Checkpoint.open(make_tiny_model(tmp_path_factory.mktemp("model"), "llama", layers=1)))


def texts(path, column=None):
    return list(texts_of(str(path), column, offline=True))


def write_parquet(path, columns):
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(sys.modules["pyarrow"].table(columns), path)


def as_file(directory, kind, column="text"):
    path = directory / f"calibration.{kind}"
    if kind == "txt":
        path.write_text("\n\n\n".join(TEXTS), encoding="utf-8")
    elif kind == "jsonl":
        path.write_text("".join(json.dumps({column: text, "id": 7}) + "\n\n" for text in TEXTS), encoding="utf-8")
    elif kind == "json":
        path.write_text(json.dumps([{"id": 7, column: text} for text in TEXTS]), encoding="utf-8")
    elif kind == "csv":
        with path.open("w", encoding="utf-8", newline="") as stream:
            csv.writer(stream).writerows([["id", column], *([str(n), text] for n, text in enumerate(TEXTS))])
    else:
        write_parquet(path, {"id": [1, 2, 3], column: TEXTS})
    return path


@pytest.mark.parametrize("kind", ["txt", "jsonl", "json", "csv", "parquet"])
def test_every_kind_of_file_gives_its_texts_in_order(kind, tmp_path):
    assert texts(as_file(tmp_path, kind)) == TEXTS


@pytest.mark.parametrize("kind", ["txt", "jsonl", "json", "csv"])
def test_the_mark_that_windows_programs_write_in_front_is_no_text(kind, tmp_path):
    path = as_file(tmp_path, kind)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert texts(path) == TEXTS
    path = tmp_path / "first.csv"
    path.write_text("\ufefftext\nthe first column\n", encoding="utf-8")
    assert texts(path) == ["the first column"]


def test_half_a_surrogate_pair_is_refused_as_text(tmp_path, tokenizer):
    path = tmp_path / "half.jsonl"
    path.write_text('{"text": "a\\ud800"}\n')
    with pytest.raises(BadInput, match=r"half\.jsonl.* holds no valid Unicode"):
        calibration_from(iter(texts(path)), tokenizer, source=str(path), samples=1, seqlen=1, seed=0)


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_a_column_of_any_name_can_be_asked_for(kind, tmp_path):
    path = as_file(tmp_path, kind, "body")
    assert texts(path, "body") == TEXTS
    with pytest.raises(BadInput, match=r"no column 'story'; it has .*'body'") as refusal:
        texts(path, "story")
    assert "--calib-column" in refusal.value.hint
    with pytest.raises(BadInput, match=r"none of the usual text columns \(text, .*\); it has .*'body'"):
        texts(path)


@pytest.mark.parametrize("kind", ["jsonl", "json"])
def test_plain_strings_and_chats_are_texts_too(kind, tmp_path):
    turns = [
        {"role": "user", "content": "Why?"},
        {"role": "tool", "content": None},
        {"role": "assistant"},
        {"content": "So."},
    ]
    records = ["a string", {"messages": turns}]
    lines = "\n".join(map(json.dumps, records)) if kind == "jsonl" else json.dumps(records)
    path = tmp_path / f"x.{kind}"
    path.write_text(lines)
    assert texts(path) == ["a string", "Why?\n\n\nSo."]


def test_chats_in_parquet_are_texts_too(tmp_path):
    chats = [[{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]]
    write_parquet(tmp_path / "x.parquet", {"messages": chats})
    assert texts(tmp_path / "x.parquet") == ["Why?\nSo."]


def test_a_csv_field_may_be_as_long_as_a_book(tmp_path):
    book = "word " * 60_000  # longer than the csv module's own limit of 131,072
    path = tmp_path / "x.csv"
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([["text"], [book]])
    assert texts(path) == [book]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.jsonl", b"", r"x\.jsonl is empty"),
        ("x.txt", b"fine \xff no", r"x\.txt is not UTF-8 text \(byte 5\)"),
        ("x.jsonl", b'{"text": "\xc3\x28"}', r"x\.jsonl is not UTF-8"),
        ("x.csv", b"text\n\xfe\n", r"x\.csv is not UTF-8"),
        ("x.jsonl", b'{"text": "a"}\n{"text": \n', r"x\.jsonl, line 2: not JSON"),
        ("x.json", b"[1, 2", r"x\.json: not JSON"),
        ("x.json", b'{"text": "a"}', "must hold a list"),
        ("x.jsonl", b"[1]\n", "record 1: neither a text nor an object"),
        ("x.jsonl", b'{"text": "a"}\n7\n', "record 2: neither a text nor an object"),
        ("x.jsonl", b'{"text": "a"}\n{"text": 7}\n', "record 2: column 'text' holds no text"),
        ("x.csv", b"id,text\n1\n", "record 1: column 'text' holds no text"),
        ("x.json", b"[" * 200_000, r"x\.json: not JSON: maximum recursion"),
        ("x.jsonl", b'"a"\n' + b"[" * 200_000, r"x\.jsonl, line 2: not JSON: maximum recursion"),
        ("x.jsonl", b'{"n": ' + b"1" * 5000 + b"}\n", r"x\.jsonl, line 1: not JSON: Exceeds the limit"),
        ("x.parquet", b"PAR1 but not really", r"x\.parquet: not parquet"),
        ("x.md", b"text", r"\.md ending; must be \.txt, \.jsonl, \.json, \.csv or \.parquet"),
        ("x", b"text", "no ending"),
    ],
)
def test_a_damaged_or_unsuitable_file_is_named_with_what_is_wrong(name, content, words, tmp_path):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(BadInput, match=words):
        texts(path)


def test_a_column_that_holds_no_text_is_named(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"n": 7}\n')
    with pytest.raises(BadInput, match="record 1: column 'n' holds no text"):
        texts(path, "n")


def test_a_file_that_is_not_there_is_an_error_that_says_what_may_be_given(tmp_path):
    with pytest.raises(BadInput, match=r"none\.txt does not exist") as refusal:
        texts(tmp_path / "none.txt")
    assert "builtin" in refusal.value.hint


def test_hub_sets_need_the_network_and_their_package(monkeypatch):
    with pytest.raises(ResourceUnavailable, match="hf:org/set needs the hub, and --offline"):
        list(texts_of("hf:org/set", None, offline=True))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingDependency, match="datasets"):
        list(texts_of("hf:org/set", None, offline=False))


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "x.parquet").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(MissingDependency, match="pyarrow") as refusal:
        texts(tmp_path / "x.parquet")
    assert "edgetool[parquet]" in refusal.value.hint


def stream_of(tokenizer, parts):
    """All tokens of all texts, an end-of-text token between two."""
    ids = []
    for part in parts:
        ids += ([tokenizer.eos_token_id] if ids else []) + tokenizer(part, add_special_tokens=False)["input_ids"]
    return ids


def test_windows_are_whole_pieces_of_the_joined_text_and_none_comes_twice(tokenizer):
    parts = [f"Text number {n} speaks of {n * n} things. " * 3 for n in range(30)]
    found = calibration_from(iter([*parts, "  \n"]), tokenizer, source="x.txt", samples=12, seqlen=17, seed=3)
    stream = stream_of(tokenizer, parts)
    pieces = [tuple(stream[start : start + 17]) for start in range(0, len(stream) - 16, 17)]
    drawn = [tuple(row) for row in found.token_ids.tolist()]
    assert found.token_ids.shape == (12, 17) and found.token_ids.dtype == torch.int64
    assert set(drawn) <= set(pieces)
    assert len({pieces.index(piece) for piece in drawn}) == 12
    raw = b"".join(struct.pack("<q", token) for row in drawn for token in row)
    assert found.sha256 == hashlib.sha256(raw).hexdigest()


def test_the_seed_alone_decides_which_windows_are_drawn(tokenizer):
    def draw(seed):
        torch.rand(seed + 3)  # the global generator must not matter
        parts = [f"Sentence {n}, and some more of it." for n in range(100)]
        return calibration_from(iter(parts), tokenizer, source="x", samples=8, seqlen=16, seed=seed)

    assert torch.equal(draw(0).token_ids, draw(0).token_ids)
    assert draw(0).sha256 == draw(0).sha256 != draw(1).sha256


@pytest.mark.parametrize("source", ["x.txt", "builtin"])
def test_too_little_text_says_how_much_there_is_and_how_much_is_needed(source, tokenizer):
    count = len(stream_of(tokenizer, TEXTS))
    with pytest.raises(BadInput, match=rf"{source} gives {count} tokens: 500 samples of 16 need 8000") as refusal:
        calibration_from(iter(TEXTS), tokenizer, source=source, samples=500, seqlen=16, seed=0)
    if source != "builtin":
        assert f"--calib-samples {count // 16}" in refusal.value.hint
    with pytest.raises(BadInput) as refusal:
        calibration_from(iter(TEXTS), tokenizer, source=source, samples=1, seqlen=5000, seed=0)
    assert "--calib-seqlen" in refusal.value.hint
    with pytest.raises(BadInput, match="gives 0 tokens"):
        calibration_from(iter(["", " \n"]), tokenizer, source=source, samples=1, seqlen=2, seed=0)


@pytest.mark.parametrize("seqlen", [1, 2, 3, 16])
def test_only_the_builtin_text_may_give_overlapping_windows(seqlen, tokenizer):
    count = len(stream_of(tokenizer, TEXTS)) // seqlen + 1  # one more than fit without overlap
    if seqlen > 1:
        found = calibration_from(iter(TEXTS), tokenizer, source="builtin", samples=count, seqlen=seqlen, seed=0)
        stream = stream_of(tokenizer, TEXTS)
        everywhere = {tuple(stream[at : at + seqlen]) for at in range(len(stream))}
        assert {tuple(row) for row in found.token_ids.tolist()} <= everywhere
    with pytest.raises(BadInput):
        calibration_from(iter(TEXTS), tokenizer, source="x.txt", samples=count, seqlen=seqlen, seed=0)


def test_the_builtin_text_is_there_is_long_and_is_the_same_every_time():
    first, second = list(builtin_texts()), list(texts_of("builtin", None, offline=True))
    assert first == second
    assert all(text.strip() for text in first[:10])
    # 128 windows of 2048 tokens at some 4 characters a token, with the overlap that the builtin text may have
    assert sum(map(len, first)) > 128 * 2048 * 4 / 4
