"""Files of rows, JSON lines or CSV, read strictly: what is wrong is named with its line. Standard library only."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class WrongLine(ValueError):
    """What is wrong with line `line` (from 1) of a file."""

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(reason)
        self.line = line


def numbered_rows(path: Path, data: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number (from 1) and row of each line that is not blank; `data` is what `path` has in it.

    Raises WrongLine.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise WrongLine(data.count(b"\n", 0, error.start) + 1, "is not UTF-8 text") from error
    if path.suffix == ".csv":
        yield from _csv_rows(text)
        return
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else type(error).__name__
            raise WrongLine(number, f"is not JSON ({reason})") from error
        if not isinstance(row, dict):
            raise WrongLine(number, "is not a JSON object")
        yield number, row


def _csv_rows(text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            if None in row.values() or None in row:
                raise WrongLine(reader.line_num, f"has another number of columns than the {len(row)} of the first line")
            yield reader.line_num, row
    except csv.Error as error:
        raise WrongLine(reader.line_num, f"is not CSV ({error})") from error
