"""The catalogue of messages beside the code: what is missing, what is stale, what does not fit.

tools/messages.py             prints the missing entries as JSON, ready to be filled in
tools/messages.py --add FILE  adds the entries of FILE (JSON, or `-` for stdin) to the catalogue, and sorts it
tools/messages.py --prune     takes out entries that no code says any more
tools/messages.py --check     exit 1 where anything is missing, stale or wrong (part of `make check`)
tools/messages.py --where TEXT  says which lines of code say the entries that contain TEXT
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import message_names
from message_templates import HOLE, SOURCE, templates

CATALOGUE = SOURCE / "messages" / "zh_CN.json"


def read() -> dict[str, str]:
    """The catalogue: English template -> translation."""
    entries: dict[str, str] = json.loads(CATALOGUE.read_text(encoding="utf-8"))
    return entries


def write(entries: dict[str, str]) -> None:
    """Write the catalogue, sorted, so that two branches rarely change the same line."""
    ordered = dict(sorted(entries.items()))
    CATALOGUE.write_text(json.dumps(ordered, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


@functools.cache
def said() -> dict[str, list[str]]:
    """Everything that must have a translation, each with the places that it comes from."""
    return message_names.needed() | message_names.requirements() | templates()


def stale(entries: dict[str, str]) -> list[str]:
    """Entries that no code says any more."""
    known = said().keys() | message_names.possible()
    return [english for english in entries if english not in known]


def faults(entries: dict[str, str]) -> list[str]:
    """What is wrong with single entries: values that differ, an empty translation, English prose left in it."""
    found = []
    for english, chinese in entries.items():
        wanted, named = set(re.findall(r"\{\d+\}", english)), set(re.findall(r"\{\d+\}", chinese))
        if wanted != named:
            found.append(f"{english!r} has the values {sorted(wanted)}, and {chinese!r} {sorted(named)}")
        if not chinese.strip():
            found.append(f"{english!r} has no translation")
        if english != chinese and (prose := english_prose(chinese)):
            found.append(f"{chinese!r} still says {prose!r}")
    return found


def english_prose(chinese: str) -> str | None:
    """English left in a translation: three words of lower case in a row that no command, option or name explains."""
    text = re.sub(r"`[^`]*`|'[^']*'|\"[^\"]*\"|“[^”]*”", " ", HOLE.sub("{}", chinese))
    text = re.sub(r"\b(edgetool|pip|python|chmod|install|ray|hf|docker|nvidia-smi|kill)( [^\s，。；：）]+)+", " ", text)
    match = re.search(r"(?<![\w.=/-])[a-z]+(?: [a-z]+){2,}(?![\w=/-])", text)
    return match[0] if match else None


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--add", metavar="FILE")
    parser.add_argument("--prune", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--where", metavar="TEXT")
    given = parser.parse_args()
    wanted, entries = said(), read()
    if given.where is not None:
        print("\n".join(f"{english!r}: {', '.join(wanted[english])}" for english in wanted if given.where in english))
        return 0
    if given.add:
        text = sys.stdin.read() if given.add == "-" else Path(given.add).read_text(encoding="utf-8")
        write(entries | {english: chinese for english, chinese in json.loads(text).items() if chinese})
        return 0
    if given.prune:
        unused = set(stale(entries))
        write({english: chinese for english, chinese in entries.items() if english not in unused})
        return 0
    missing = {english: "" for english in wanted if english not in entries}
    if not given.check:
        print(json.dumps(missing, ensure_ascii=False, indent=1))
        return 0
    wrong = {"no translation": list(missing), "said no more": stale(entries), "wrong": faults(entries)}
    for title, found in wrong.items():
        for one in found:
            print(f"{title}: {one}", file=sys.stderr)
    if any(wrong.values()):
        print("see tools/messages.py --help", file=sys.stderr)
    return int(any(wrong.values()))


if __name__ == "__main__":
    sys.exit(main())
