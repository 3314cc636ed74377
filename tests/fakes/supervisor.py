"""A process that supervises a tree of tests/fakes/family.py, as edgetool does: the one that tests kill.

`python supervisor.py LOG KIND [wait]` prints a line of JSON: the numbers of the guard and of the main process, and the
token. With `wait` it looks at the tree for ever, without it it sleeps (and so cannot notice anything).
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from edgetool.process.child import Child

FAMILY = Path(__file__).with_name("family.py")


def main() -> None:
    log, kind = Path(sys.argv[1]), sys.argv[2]
    print(json.dumps({"token_of": os.getpid()}), flush=True)
    seen: list[str] = []
    child = Child.start([sys.executable, FAMILY, kind], log=log, grace_if_orphaned_s=1.0)
    child.wait_ready(lambda: "ready" in seen, 60, seen.append)
    print(json.dumps({"guard": child._guard.pid, "main": child.pid, "token": child.token}), flush=True)
    if "wait" in sys.argv:
        print(json.dumps({"code": child.wait()}), flush=True)
    time.sleep(600)


if __name__ == "__main__":
    main()
