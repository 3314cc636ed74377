"""What edgetool says, in the language of whoever reads it: English, or Simplified Chinese from one catalogue.

The code speaks English, in finished sentences. Those who show them to people (console.py, progress as bars and lines,
help, chat) ask here for the same in the reader's language; what programs read (JSON, logs, records) never comes by.
The catalogue (`zh_CN.json`) holds templates, `group_size {1} does not divide in_features {2}`, and is read only where
the language asks for it. A sentence that it does not know stays English.

Standard library only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgetool.messages.catalogue import Catalogue

ENGLISH = "en"
CHINESE = "zh_CN"

_active: Catalogue | None = None


def use(language: str) -> None:
    """Speak `language` from now on: `en` or `zh_CN`."""
    global _active
    if language != CHINESE:
        _active = None
    elif _active is None:
        from edgetool.messages.catalogue import chinese

        _active = chinese()


def language() -> str:
    """The language that is spoken."""
    return ENGLISH if _active is None else CHINESE


def translated(text: str) -> str:
    """A sentence, or several: errors, hints, notes, help. Values within are left as they are."""
    return text if _active is None else _active.sentence(text)


def label(text: str) -> str:
    """A title, a heading, the name of a row or a task, a cell: single words are translated, too."""
    return text if _active is None else _active.label(text)
