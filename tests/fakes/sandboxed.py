"""Runs programs in a sandbox of a given kind, as whoever runs this: `python sandboxed.py KIND`.

Reads lines of JSON, {"program": path, "limits": {...}}, and answers each with the outcome as a line of JSON. Stands
alone on the standard library, so that any Python can run it.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "src"))

from edgetool.errors import EdgetoolError
from edgetool.evaluation.sandbox import Limits
from edgetool.evaluation.sandbox_choice import open_sandbox


def main() -> None:
    with tempfile.NamedTemporaryFile("w", suffix=".py") as trial:
        Path(trial.name).chmod(0o644)
        try:
            sandbox = open_sandbox(Path(trial.name), kinds=[sys.argv[1]], unsafe=True)
        except EdgetoolError as error:
            print(json.dumps({"refused": error.message}), flush=True)
            return
    for line in sys.stdin:
        order = json.loads(line)
        outcome = sandbox.run(Path(order["program"]), limits=Limits(**order["limits"]))
        found = dataclasses.asdict(outcome) | {"output": outcome.output.decode(), "warnings": sandbox.warnings}
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
