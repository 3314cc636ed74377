"""Stand-ins for the commands that `edgetool run` chains, so that its own logic is tested in no time.

As a script it is such a command: `python fake_steps.py quantize MODEL -o OUT --group-size 64 --json`. It writes what
a real one would, by the real OutputDirectory, and adds its arguments as a line to $FAKE_CALLS. What goes wrong is said
by $FAKE_STEPS, pairs such as `eval=bug,quantize=stop`: fail, bug, kill, garbage, stop (waits for SIGTERM and leaves
what --resume goes on with). The gate of eval holds for groups of at most $FAKE_GROUP.

`python fake_steps.py edgetool ARGUMENTS` is edgetool itself, whose steps are these.
"""

from __future__ import annotations

import http.server
import json
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

from edgetool.artifacts import MANIFEST_NAME, OutputDirectory

PROGRAM = [sys.executable, str(Path(__file__).absolute())]
MAP = '<svg id="x"><g id="pc"></g><use href="#pc"/></svg>'


def option(name: str, default: str = "") -> str:
    return sys.argv[sys.argv.index(name) + 1] if name in sys.argv else default


def say(**event: Any) -> None:
    sys.stderr.write(json.dumps({"elapsed_s": 0.1, **event}) + "\n")
    sys.stderr.flush()


def finish(code: int, document: dict[str, Any]) -> NoReturn:
    print(json.dumps({"schema": f"edgetool.{sys.argv[1]}/1", "ok": code == 0, **document}, indent=2), flush=True)
    sys.exit(code)


def failed(kind: str, code: int, message: str, **more: Any) -> NoReturn:
    finish(code, {"type": kind, "message": message, "hint": "what to do", "exit_code": code, **more})


def main() -> None:
    command, source = sys.argv[1], sys.argv[2]
    with Path(os.environ["FAKE_CALLS"]).open("a") as calls:
        calls.write(" ".join(sys.argv[1:]) + "\n")
    trouble = dict(pair.split("=") for pair in os.environ.get("FAKE_STEPS", "").split(",") if pair).get(command)
    say(event="start", task="work", done=0, total=2, unit="layer", note=None)
    say(event="note", message=f"{command} at work")
    sys.stderr.write("a library talks\n")
    if "--dry-run" in sys.argv:
        finish(0, {"plan": {"memory": {"needed_bytes": 1000}, "disk": {"needed_bytes": 500, "output_bytes": 100}}})
    if trouble == "fail":
        failed("BadInput", 4, "what was wrong")
    if trouble == "bug":
        traceback.print_stack()
        failed("Bug", 1, "ValueError: a bug")
    if trouble == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if trouble == "garbage":
        print("{ no document")
        sys.exit(0)
    if command.startswith("serve"):
        serve(trouble)
    out = OutputDirectory(Path(option("-o")), "--overwrite" in sys.argv, "--resume" in sys.argv)
    with out:
        if trouble == "stop" and not out.resuming:
            wait_for_stop(out)
        write(command, source, out)


def wait_for_stop(out: OutputDirectory) -> NoReturn:
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    (out.partial / "half").write_text("done so far")
    while not stop.wait(0.05):
        pass
    out.close()
    failed("Stopped", 75, "stopped after 1 of 2 layers")


def write(command: str, source: str, out: OutputDirectory) -> None:
    known = Path(source) / "weights"
    before = known.read_text() if known.is_file() else source
    text = before if command == "eval" else f"{before}|{command} {option('--group-size')} {option('--method')}"
    resumed = out.resuming and (out.partial / "half").is_file()
    (out.partial / "half").unlink(missing_ok=True)
    (out.partial / "weights").write_text(text)
    (out.partial / "report.html").write_text(f"<html>{MAP}</html>")
    manifest = {"schema": "fake/1", "seconds": time.time()}  # never twice the same, as in real outputs
    (out.partial / MANIFEST_NAME).write_text(json.dumps(manifest))
    out.publish()
    say(event="warning", message="something to know")
    if command == "compile-vcu128":
        estimate = {"decode_tokens_per_s": [50.5, 60.5], "prefill_tokens_per_s": 700.0}
        sizes = {"max_context": 512, "largest_context": 4096, "weight_read_bytes_per_token": 8_000_000}
        finish(0, {"profile": "sim", "hbm_bytes_per_pc": [5_000_000], "estimate": estimate, **sizes})
    if command != "eval":
        finish(0, {"output": option("-o"), "output_bytes": 100, "source_bytes": 400, "bits": 4, "resumed": resumed})
    group = int(text.split("|quantize ")[1].split(" ")[0])
    holds = group <= int(os.environ.get("FAKE_GROUP", "128"))
    tasks = {
        "perplexity": {
            "metric": "perplexity of a token",
            "n": 640,
            "original": 20.0,
            "quantized": 20.0 + group / 64,
            "ratio": 1.0 + group / 1280,
            "ratio_ci95": [1.0, 1.25],
        }
    }
    gate = {"expression": option("--gate"), "passed": holds, "reason": f"ratio of group {group}", "verdicts": []}
    if holds:
        finish(0, {"tasks": tasks, "gate": gate})
    failed("VerificationFailed", 8, "the gate does not hold", tasks=tasks, gate=gate)


class Answering(http.server.BaseHTTPRequestHandler):
    """One chat completion for whoever has the key."""

    text = "Paris <b>"
    ends = False
    hangs = False

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.hangs:
            with Path(os.environ["FAKE_CALLS"]).open("a") as calls:
                calls.write("asked\n")
            threading.Event().wait()
        right = self.headers["Authorization"] == f"Bearer {os.environ['EDGETOOL_API_KEY']}"
        answer = {
            "choices": [{"message": {"role": "assistant", "content": self.text}}],
            "usage": {"completion_tokens": body["max_tokens"]},
        }
        self.send_response(200 if right else 401)
        self.end_headers()
        self.wfile.write(json.dumps(answer if right else {"error": "no key"}).encode())
        if self.ends:  # not before: whoever asks may take a while to come
            threading.Timer(0.2, lambda: os._exit(7)).start()

    def log_message(self, *_: Any) -> None:
        return None


def serve(trouble: str | None) -> NoReturn:
    Answering.text = "" if trouble == "mute" else Answering.text
    Answering.ends = trouble == "end"
    Answering.hangs = trouble == "hang"
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answering)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    url = f"http://127.0.0.1:{server.server_port}"
    document = {"url": url, "openai_base_url": f"{url}/v1", "model": "m", "pid": os.getpid(), "seconds_to_ready": 0.5}
    document["api_key"] = None if os.environ.get("EDGETOOL_API_KEY") else "made"
    print(json.dumps({"schema": "edgetool.serve/1", "ok": True, **document}, indent=2), flush=True)
    server.serve_forever()
    raise AssertionError


def edgetool() -> None:
    """edgetool itself, with these as its steps."""
    from edgetool.cli import app
    from edgetool.pipeline import child

    child.PROGRAM = PROGRAM
    app(sys.argv[2:], prog_name="edgetool")


if __name__ == "__main__":
    edgetool() if sys.argv[1] == "edgetool" else main()
