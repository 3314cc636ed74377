"""`--record FILE`: one line of JSON for each request, without what was asked and answered unless that is wanted."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, TextIO

from edgetool.errors import BadInput


class Recorder:
    """Appends records to a file that only its owner can read. A disk that is full ends the recording, not the server.

    Attributes:
        contents: whether records are to hold prompts and answers.
        failure: why recording has ended, or None.
    """

    def __init__(self, path: Path, *, contents: bool) -> None:
        """Raises BadInput where the file cannot be written."""
        self.contents = contents
        self.failure: str | None = None
        try:
            handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise BadInput(
                f"cannot write the record {path}: {error.strerror}", "choose another --record FILE"
            ) from error
        self._file: TextIO = os.fdopen(handle, "a", encoding="utf-8", buffering=1)

    def add(self, record: dict[str, Any]) -> None:
        """One line: fields that are None are left out."""
        if self.failure is not None:
            return
        try:
            self._file.write(json.dumps({key: value for key, value in record.items() if value is not None}) + "\n")
        except (OSError, ValueError) as error:
            self.failure = str(error)

    def close(self) -> None:
        """Close the file."""
        try:
            self._file.close()
        except OSError as error:
            self.failure = str(error)
