"""`edgetool serve-fpga` in one run: what its gateway costs, and how fast its simulator is beside llama.cpp.

    python benchmarks/serve_fpga.py IMAGE --gguf MODEL.gguf [--llama-python PYTHON] [--json table.json]

Two tables: that of serve_fpga_gateway.py and that of serve_fpga_simulator.py, which say what they hold equal.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import serve_fpga_gateway as gateway
import serve_fpga_simulator as simulator


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    simulator.add_arguments(parser)
    gateway.add_arguments(parser)
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = options.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        found = {"gateway": gateway.measure(options, work), "simulator": simulator.measure(options, work)}
    gateway.show(found["gateway"])
    print()
    simulator.show(found["simulator"])
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
