"""The program in the sandbox: one problem of EvalPlus, one answer to it, and EvalPlus's own verdict.

Reads a job as JSON from stdin: {"dataset", "row" (the problem as JSON text), "text" (what the model wrote, with the
prompt where it completes one), "path" (more directories to import from)}. Nothing to read is the trial: can it run?
Writes lines of JSON to stdout: {"stage": "reference" or "answer"}, whose code runs from then on, and at the end
{"verdict": {"solution", "base", "plus"}}: the text after EvalPlus's sanitising, and "pass", "fail" or "timeout" for
both sets of tests. The second set is "skipped" where the first is not passed: its reference solutions take minutes for
some problems, and the answer is wrong already.

It imports nothing of edgetool, which is not to be seen from here. What the answer's code does to the processes that
EvalPlus starts for it does not reach this one's descriptors.
"""

import ctypes
import functools
import itertools
import json
import multiprocessing.heap
import os
import resource
import signal
import sys
import types
from typing import Any

_TRIAL: dict[str, Any] = {
    "dataset": "humaneval",
    "row": json.dumps({
        "task_id": "HumanEval/0", "entry_point": "same",
        "prompt": "def same(x):\n", "canonical_solution": "    return x\n",
        "base_input": [[1]], "plus_input": [[2]], "atol": 0,
    }),
    "text": "def same(x):\n    return x\n",
    "path": [],
}  # fmt: skip
_PR_SET_DUMPABLE = 4
_SANITIZE_S = 60.0


def _answer_channel() -> int:
    """A private copy of stdout that no child inherits; stdin, stdout and stderr become /dev/null."""
    channel = os.dup(1)
    os.register_at_fork(after_in_child=lambda: os.close(channel))
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1):
        os.dup2(null, descriptor)
    return channel


def _say(channel: int, **message: object) -> None:
    data = json.dumps(message).encode() + b"\n"
    while data:
        data = data[os.write(channel, data) :]


def _prepare() -> None:
    # evalplus imports `datasets` for a benchmark that is not run here; that would take seconds and much memory
    stub = types.ModuleType("datasets")
    stub.load_dataset = None  # type: ignore[attr-defined]
    sys.modules["datasets"] = stub
    import evalplus.eval
    import evalplus.sanitize

    evalplus.sanitize.code_extract = longest_code
    # Locks of shared memory need a /dev/shm that is not there in every sandbox; there is one writer and one reader.
    multiprocessing.heap.Arena._dir_candidates = []  # type: ignore[attr-defined]
    evalplus.eval.Value = functools.partial(multiprocessing.Value, lock=False)
    evalplus.eval.Array = functools.partial(multiprocessing.Array, lock=False)
    # EvalPlus sets limits of memory itself, which fails where they are lower already
    names = (resource.RLIMIT_AS, resource.RLIMIT_DATA, resource.RLIMIT_STACK)
    hard = [limit for name in names if (limit := resource.getrlimit(name)[1]) != resource.RLIM_INFINITY]
    os.environ["EVALPLUS_MAX_MEMORY_BYTES"] = str(min([4 << 30, *hard]))


def _expected(dataset: str, problem: dict[str, Any], kind: str) -> Any:
    """Outputs of the reference solution, and the seconds it took, as EvalPlus computes them."""
    from evalplus.eval._special_oracle import MBPP_OUTPUT_NOT_NONE_TASKS
    from evalplus.gen.util import trusted_exec

    return trusted_exec(
        problem["prompt"] + problem["canonical_solution"],
        problem[f"{kind}_input"],
        problem["entry_point"],
        record_time=True,
        output_not_none=dataset == "mbpp" and problem["entry_point"] in MBPP_OUTPUT_NOT_NONE_TASKS,
    )


def longest_code(text: str) -> str:
    """What EvalPlus's `code_extract` finds: the first of the ranges of lines with most lines of Python in them.

    It parses all ranges; this parses those only that would be longer than the best so far. For an answer that is a
    thousand empty lines that is the difference between minutes and nothing.
    """
    from evalplus.syncheck import syntax_check

    lines = text.split("\n")
    filled = list(itertools.accumulate((bool(line.strip()) for line in lines), initial=0))
    best, start, end = 0, 0, 0
    for first in range(len(lines)):
        if filled[-1] - filled[first] <= best:
            break
        for last in range(first + 1, len(lines)):
            count = filled[last + 1] - filled[first]
            if count > best and syntax_check("\n".join(lines[first : last + 1])):
                best, start, end = count, first, last
    return "\n".join(lines[start : end + 1])


def _sanitized(text: str, entry_point: str) -> str:
    from evalplus.sanitize import sanitize

    def give_up(*_: object) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, _SANITIZE_S)  # it parses every range of lines
    try:
        return str(sanitize(text, entrypoint=entry_point))
    except (ValueError, RecursionError, MemoryError, TimeoutError):  # no Python; EvalPlus itself would end, or not end
        return text
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _judge(dataset: str, problem: dict[str, Any], solution: str, kind: str, expected: Any) -> str:
    from evalplus.eval import untrusted_check

    outputs, seconds = expected
    status, _ = untrusted_check(
        dataset,
        solution,
        problem[f"{kind}_input"],
        problem["entry_point"],
        expected=outputs,
        atol=problem["atol"],
        ref_time=seconds,
        fast_check=True,
    )
    return str(status)


def main() -> None:
    """Read the job, run it, say the verdict."""
    given = sys.stdin.read()
    channel = _answer_channel()
    job = json.loads(given) if given else _TRIAL
    sys.path.extend(job["path"])
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)  # no process of the same user can trace us
    _prepare()
    dataset, problem = job["dataset"], json.loads(job["row"])
    if dataset == "mbpp":
        from evalplus.data.mbpp import mbpp_deserialize_inputs

        for kind in ("base_input", "plus_input"):
            problem[kind] = mbpp_deserialize_inputs(problem["task_id"], problem[kind])
    verdict = {"solution": job["text"], "base": "fail", "plus": "skipped"}
    _say(channel, stage="reference")
    expected = _expected(dataset, problem, "base")
    _say(channel, stage="answer")
    verdict["solution"] = _sanitized(job["text"], problem["entry_point"])
    verdict["base"] = _judge(dataset, problem, verdict["solution"], "base", expected)
    if verdict["base"] == "pass":
        _say(channel, stage="reference")
        expected = _expected(dataset, problem, "plus")
        _say(channel, stage="answer")
        verdict["plus"] = _judge(dataset, problem, verdict["solution"], "plus", expected)
    if not given and verdict["plus"] != "pass":
        sys.exit(f"a right answer is judged {verdict}")
    _say(channel, verdict=verdict)


if __name__ == "__main__":
    main()
