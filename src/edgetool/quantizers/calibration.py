"""Calibration text: where it comes from, and how it becomes equal windows of tokens."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgetool.errors import BadInput, MissingDependency, ResourceUnavailable

_ENCODING = "utf-8-sig"
"""UTF-8, with or without the mark in front that Excel and PowerShell write."""
_TEXT_COLUMNS = ("text", "content", "prompt", "question", "instruction")


@dataclass(frozen=True)
class Calibration:
    """token_ids: int64 [samples, seqlen]. source: what was asked for; sha256: of the token ids, little endian int64."""

    token_ids: Tensor
    source: str
    sha256: str


def calibration_from(
    texts: Iterator[str], tokenizer: Any, *, source: str, samples: int, seqlen: int, seed: int
) -> Calibration:
    """Join texts, cut them into windows of `seqlen` tokens, and draw `samples` of them.

    Windows are drawn without replacement over all of the text, so that a long source is sampled from end to end.
    Raises BadInput if there are fewer windows than samples.
    """
    separator = tokenizer.eos_token_id
    enough = max(samples * seqlen * 8, 4 * seqlen)
    ids: list[int] = []
    for text in texts:
        if not text.strip():
            continue
        if ids and separator is not None:
            ids.append(int(separator))
        try:
            ids.extend(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        except TypeError as error:  # half of a surrogate pair: JSON can name it, UTF-8 cannot hold it
            raise BadInput(f"calibration text {source}: {text[:40]!r}... holds no valid Unicode") from error
        if len(ids) >= enough:
            break
    tokens = torch.tensor(ids, dtype=torch.int64)
    cut = _windows(tokens, seqlen)
    for part in (2, 4):  # our own text is short: rather than refuse, let windows overlap
        if source == "builtin" and len(cut) < samples:
            cut = torch.cat([_windows(tokens[shift:], seqlen) for shift in range(0, seqlen, max(1, seqlen // part))])
    windows = len(cut)
    if windows < samples:
        raise BadInput(
            f"calibration text {source} gives {len(ids)} tokens: {samples} samples of {seqlen} need {samples * seqlen}",
            hint=f"give more text, or --calib-samples {windows}"
            if windows
            else "give more text, or a smaller --calib-seqlen",
        )
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(windows, generator=generator)[:samples]
    return from_tokens(cut[chosen], source)


def _windows(tokens: Tensor, seqlen: int) -> Tensor:
    """int64 [len(tokens) // seqlen, seqlen]: windows that do not overlap."""
    count = len(tokens) // seqlen
    return tokens[: count * seqlen].view(count, seqlen)


def from_tokens(token_ids: Tensor, source: str) -> Calibration:
    """Wrap windows of tokens, int64 [samples, seqlen]."""
    digest = hashlib.sha256(token_ids.numpy().astype("<i8").tobytes()).hexdigest()
    return Calibration(token_ids, source, digest)


def texts_of(source: str, column: str | None, *, offline: bool) -> Iterator[str]:
    """The texts of a calibration source: `builtin`, a file, or `hf:dataset`. Raises BadInput for what has none."""
    if source == "builtin":
        yield from builtin_texts()
    elif source.startswith("hf:"):
        yield from _hub_texts(source.removeprefix("hf:"), column, offline)
    else:
        yield from _file_texts(Path(source).expanduser(), column)


def builtin_texts() -> Iterator[str]:
    """Text that every installation has: plays, word problems, and Python's own language reference, in turn.

    Several kinds, because a Gram matrix of one kind of text fits other kinds badly (docs/benchmarks.md).
    """
    import pydoc_data.topics

    kinds = (
        _cut(_packaged("plays.txt"), 3000),
        _cut(_packaged("word_problems.txt"), 2500),
        (topic[:3000] for topic in pydoc_data.topics.topics.values()),
    )
    for pieces in zip_longest(*kinds):
        yield from (piece for piece in pieces if piece)


def _packaged(name: str) -> str:
    return files("edgetool.data").joinpath(name).read_text(encoding="utf-8")


def _cut(text: str, characters: int) -> Iterator[str]:
    """Paragraphs joined to pieces of about this length."""
    piece = ""
    for paragraph in text.split("\n\n"):
        piece = f"{piece}\n\n{paragraph}" if piece else paragraph
        if len(piece) >= characters:
            yield piece
            piece = ""
    if piece:
        yield piece


def _file_texts(path: Path, column: str | None) -> Iterator[str]:
    if not path.is_file():
        raise BadInput(f"calibration file {path} does not exist", "use --calib builtin, self, a file or hf:dataset")
    if path.stat().st_size == 0:
        raise BadInput(f"calibration file {path} is empty")
    kind = path.suffix.lower()
    try:
        if kind == ".txt":
            yield from path.read_text(encoding=_ENCODING).split("\n\n\n")
        elif kind == ".jsonl":
            yield from _records(_json_lines(path), column, path)
        elif kind == ".json":
            document = _json(path.read_text(encoding=_ENCODING), f"calibration file {path}")
            if not isinstance(document, list):
                raise BadInput(f"calibration file {path}: must hold a list of texts or of objects")
            yield from _records(((number, item) for number, item in enumerate(document, 1)), column, path)
        elif kind == ".csv":
            csv.field_size_limit(1 << 30)  # the module's own limit is shorter than many a document
            with path.open(encoding=_ENCODING, newline="") as stream:
                yield from _records(enumerate(csv.DictReader(stream), 1), column, path)
        elif kind == ".parquet":
            yield from _records(_parquet_rows(path, column), column, path)
        else:
            raise BadInput(
                f"calibration file {path}: {kind or 'no'} ending; must be .txt, .jsonl, .json, .csv or .parquet"
            )
    except UnicodeDecodeError as error:
        raise BadInput(f"calibration file {path} is not UTF-8 text (byte {error.start})") from error
    except csv.Error as error:
        raise BadInput(f"calibration file {path}: not CSV: {error}") from error


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open(encoding=_ENCODING) as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            yield number, _json(line, f"calibration file {path}, line {number}")


def _json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{place}: not JSON: {error}") from error


def _parquet_rows(path: Path, column: str | None) -> Iterator[tuple[int, Any]]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise MissingDependency("reading parquet needs pyarrow", "pip install 'edgetool[parquet]'") from error
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise BadInput(f"calibration file {path}: not parquet: {error}") from error
    names = file.schema_arrow.names
    wanted = column or next((name for name in (*_TEXT_COLUMNS, "messages") if name in names), None)
    if wanted not in names:
        raise _no_column(path, column, names)
    number = 0
    for batch in file.iter_batches(batch_size=1024, columns=[wanted]):
        for text in batch.column(0).to_pylist():
            number += 1
            yield number, {wanted: text}


def _records(items: Iterator[tuple[int, Any]], column: str | None, path: Path | str) -> Iterator[str]:
    """Texts of records: plain strings, or objects with a text column or a chat under `messages`."""
    for number, item in items:
        if isinstance(item, str) and column is None:
            yield item
            continue
        if not isinstance(item, dict):
            raise BadInput(f"calibration file {path}, record {number}: neither a text nor an object")
        name = column or next((key for key in _TEXT_COLUMNS if isinstance(item.get(key), str)), None)
        if name is None and isinstance(item.get("messages"), list):
            yield "\n".join(str(turn.get("content") or "") for turn in item["messages"] if isinstance(turn, dict))
            continue
        name = name or next((key for key in _TEXT_COLUMNS if key in item), None)
        if name is None or name not in item:
            raise _no_column(path, column, list(item))
        if not isinstance(item[name], str):
            raise BadInput(f"calibration file {path}, record {number}: column {name!r} holds no text")
        yield item[name]


def _no_column(path: Path | str, column: str | None, names: list[str]) -> BadInput:
    asked = f"no column {column!r}" if column else f"none of the usual text columns ({', '.join(_TEXT_COLUMNS)})"
    return BadInput(
        f"calibration file {path}: {asked}; it has {', '.join(map(repr, names))}", "name it by --calib-column"
    )


def _hub_texts(name: str, column: str | None, offline: bool) -> Iterator[str]:
    if offline:
        raise ResourceUnavailable(
            f"calibration set hf:{name} needs the hub, and --offline is set", "use --calib builtin"
        )
    try:
        import datasets
    except ImportError as error:
        raise MissingDependency("hf: calibration sets need the package datasets", "pip install datasets") from error
    try:
        rows = datasets.load_dataset(name, split="train", streaming=True)
        yield from _records(enumerate(rows, 1), column, f"hf:{name}")
    except (OSError, ValueError, ConnectionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ResourceUnavailable(
            f"calibration set hf:{name} cannot be had: {reason}", "use --calib builtin"
        ) from error
