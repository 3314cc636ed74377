"""Runs a program in a sandbox of a given kind, as whoever runs this: `python sandboxed.py KIND PROGRAM LIMITS` (JSON).

Prints the outcome as one JSON document. Stands alone on the standard library, so that any Python can run it.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "src"))

from edgetool.errors import EdgetoolError
from edgetool.evaluation.sandbox import Limits, open_sandbox


def main() -> None:
    kind, program, limits = sys.argv[1], Path(sys.argv[2]), Limits(**json.loads(sys.argv[3]))
    with tempfile.NamedTemporaryFile("w", suffix=".py") as trial:
        Path(trial.name).chmod(0o644)
        try:
            sandbox = open_sandbox(Path(trial.name), kinds=[kind], limits=limits, unsafe=True)
            outcome = sandbox.run(program)
        except EdgetoolError as error:
            print(json.dumps({"refused": error.message}))
            return
    found = dataclasses.asdict(outcome) | {"output": outcome.output.decode(), "warnings": sandbox.warnings}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
