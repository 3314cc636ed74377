"""--verify-run: the simulated board against torch in float32 on the dequantised checkpoint.

Three things are compared. Every operation, given the values that the simulator gave it. The logits of whole sequences,
against the model as transformers computes it (or, where transformers has no such model, as reference.py computes the
program); where the compiler rounded the output matrix itself, that has the image's. And the tokens chosen greedily,
which must be the reference's wherever its first choice leads by more than twice the largest difference of logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgetool.checkpoints.checkpoint import Checkpoint
from edgetool.errors import BadInput, VerificationFailed
from edgetool.fpga.image import Image
from edgetool.fpga.reference import Reference, ReferenceWeights
from edgetool.fpga.simulator.engine import Simulator
from edgetool.fpga.simulator.interfaces import BoundOp, Call, NumericsName, Trace
from edgetool.fpga.simulator.trace import JsonlTrace
from edgetool.fpga.simulator.traffic import check_plan, expected_decode_bytes
from edgetool.models.streamed import tokenizer_at
from edgetool.models.whole import load_whole
from edgetool.progress import Progress

OPERATION_LIMITS: dict[NumericsName, float] = {"et1": 2e-3, "fast": 1e-1}
"""Largest error of an operation, as a share of the largest value of its row. et1 rounds results to fp16 (2^-11 of each
value) and the argument of exp too (2^-11 of up to about 4). fast rounds inputs, scales and results of 4-bit products
to bfloat16 (2^-9 each), and a row of large inputs may have small results."""

LOGITS_LIMIT = 0.1
"""Largest root mean square difference of logits, as a share of their own spread. Another model's are at 1.4."""

PROMPTS = (
    "The capital of France is Paris. The capital of Italy is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "In 1969, two people walked on the Moon for the first time. They",
)
PROMPT_TOKENS = 24
NEW_TOKENS = 40


@dataclass(frozen=True)
class RunSettings:
    """How the image is run. device: cpu or cuda..., for `fast`. trace: file for a line of every compared operation."""

    numerics: NumericsName = "et1"
    device: str = "cpu"
    threads: int = 1
    trace: Path | None = None
    overwrite: bool = False
    new_tokens: int = NEW_TOKENS


def verify_run(directory: Path, checkpoint: Checkpoint, settings: RunSettings, progress: Progress) -> dict[str, Any]:
    """Run the image and compare; returns what was found.

    Raises VerificationFailed, with the same figures in `details`, where a limit above or the plan of bytes does not
    hold; BadInput where the checkpoint is not the image's.
    """
    image = Image.open(directory, hashes=True, jobs=settings.threads)
    weights = ReferenceWeights(image, checkpoint)
    errors = OperationErrors(weights)
    with ExitStack() as stack:
        traces: list[Trace] = [errors]
        if settings.trace is not None:
            traces.append(stack.enter_context(JsonlTrace(settings.trace, overwrite=settings.overwrite)))
        progress.note("generating on the simulated board")
        simulator = Simulator(image, settings.numerics, settings.threads, settings.device)
        runs = [_greedy(simulator, prompt, settings.new_tokens) for prompt in prompts(image)]
        del simulator
        traced = Simulator(image, settings.numerics, settings.threads, settings.device, _All(traces))
        with progress.task("compare operations", len(runs), "sequences") as task:
            for run in runs:
                errors.begin(run.ids)
                with traced.session() as session:
                    session.feed(run.ids, "all")
                task.advance()
        del traced
    name, logits = _reference_logits(weights, checkpoint, [run.ids for run in runs], progress)
    found = {
        "image": str(directory),
        "checkpoint": str(checkpoint.directory),
        "numerics": settings.numerics,
        "reference": name,
        "head": "of the image, rounded by the compiler" if weights.rounded("lm_head") else "of the checkpoint",
        "sequences": len(runs),
        "tokens": sum(len(run.ids) for run in runs),
        **_compare(runs, logits),
        "operations": errors.found(),
        "bytes_per_token": runs[0].decode_bytes,
    }
    if settings.trace is not None:
        found["trace"] = str(settings.trace)
    _judge(found, settings.numerics)
    return found


@dataclass(frozen=True)
class Run:
    """A prompt and its greedy answer. logits: float32 [tokens, vocab], simulated. first: the answer's position."""

    ids: list[int]
    first: int
    logits: Tensor
    decode_bytes: dict[str, Any]


def prompts(image: Image) -> list[list[int]]:
    """Ids of a few short texts; of an image whose tokenizer cannot be read, ids drawn with a fixed seed."""
    vocab = image.manifest["embedding"]["shape"][0]
    room = min(image.program["max_context"], image.program["chunk_tokens"])
    length = max(1, min(PROMPT_TOKENS, room // 2))
    try:
        tokenizer = tokenizer_at(image.directory / "tokenizer")
        found = [tokenizer(text)["input_ids"][:length] for text in PROMPTS]
    except BadInput:
        found = []
    if found and all(ids and max(ids) < vocab for ids in found):
        return found
    draw = np.random.default_rng(0)
    return [draw.integers(0, vocab, length).tolist() for _ in PROMPTS]


def _greedy(simulator: Simulator, prompt: list[int], new_tokens: int) -> Run:
    """Prompt in one piece, answer token by token; what the last token reads is held against the manifest's plan."""
    facts = simulator.facts
    with simulator.session() as session:
        rows = [session.feed(prompt, "all")]
        ids = list(prompt)
        last = min(new_tokens, min(facts.max_context_tokens, facts.chunk_tokens) - len(prompt))
        for _ in range(max(0, last)):
            ids.append(int(rows[-1][-1].argmax()))
            session.traffic.reset()
            rows.append(session.feed(ids[-1:], "last"))
        traffic = session.traffic.to_dict()
    memory = simulator.image.manifest["memory"]
    if last > 0:
        expected = expected_decode_bytes(memory, len(ids))
        check_plan(str(simulator.image.directory), traffic["bytes_by_role"], expected)
    logits = torch.from_numpy(np.concatenate(rows)).float()
    return Run(ids, len(prompt), logits, {"context_tokens": len(ids), **traffic})


class _All:
    """One Trace for several."""

    def __init__(self, traces: Sequence[Trace]) -> None:
        self._traces = traces

    def step(self, op: BoundOp, call: Call, result: Tensor | None, seconds: float) -> None:
        for trace in self._traces:
            trace.step(op, call, result, seconds)


@dataclass
class _Worst:
    """Errors of one kind of operation: each a share of the largest value of its row."""

    count: int = 0
    values: int = 0
    sum_of_squares: float = 0.0
    largest: float = 0.0
    where: str = ""


@dataclass
class OperationErrors:
    """A Trace that computes every operation again, from the values that the simulator gave it."""

    weights: ReferenceWeights
    kinds: dict[str, _Worst] = field(default_factory=dict)
    _reference: Reference | None = None

    def begin(self, ids: Sequence[int]) -> None:
        """A new sequence, which will be one call."""
        self._reference = Reference(self.weights, torch.tensor(ids, dtype=torch.int64))

    def step(self, op: BoundOp, call: Call, result: Tensor | None, seconds: float) -> None:
        reference = self._reference
        assert reference is not None and result is not None
        assert call.position == 0 and call.tokens == len(reference.ids), "one call for a sequence"
        wanted = reference.run(op.kind, op.fields)
        got = result.float().cpu().reshape(wanted.shape)
        if op.kind not in ("KV_WRITE", "LOGITS"):
            self._count(op, got, wanted)
            reference.buffers[op.fields["out"]] = got.clone()

    def _count(self, op: BoundOp, got: Tensor, wanted: Tensor) -> None:
        seen = torch.isfinite(wanted)  # scores behind the mask are nobody's
        scale = wanted.masked_fill(~seen, 0).abs().amax(-1, keepdim=True).clamp_min(1e-30)
        error = ((got - wanted) / scale).masked_fill(~seen, 0).abs()
        worst = self.kinds.setdefault(op.kind, _Worst())
        worst.count += 1
        worst.values += int(seen.sum())
        worst.sum_of_squares += float(error.double().square().sum())
        largest = float(error.max()) if bool(torch.isfinite(error).all()) else float("inf")
        if largest >= worst.largest:
            worst.largest, worst.where = largest, op.label

    def found(self) -> list[dict[str, Any]]:
        """A record for each kind of operation."""
        return [
            {
                "op": kind,
                "compared": worst.count,
                "largest_error": worst.largest,
                "rms_error": (worst.sum_of_squares / max(1, worst.values)) ** 0.5,
                "worst": worst.where,
            }
            for kind, worst in self.kinds.items()
        ]


def _reference_logits(
    weights: ReferenceWeights, checkpoint: Checkpoint, sequences: Sequence[list[int]], progress: Progress
) -> tuple[str, list[Tensor]]:
    """What computed them, and float32 [tokens, vocab] of each sequence."""
    try:
        model = load_whole(checkpoint, torch.device("cpu"), torch.float32, progress)
    except BadInput as error:
        progress.warn(f"the program itself is the reference for logits: {error.message}")
        return "program", [_program_logits(weights, ids) for ids in sequences]
    if weights.rounded("lm_head"):
        model.get_output_embeddings().weight = torch.nn.Parameter(weights.stored("lm_head"), requires_grad=False)
    with torch.inference_mode():
        return "transformers", [model(torch.tensor([ids])).logits[0].float() for ids in sequences]


def _program_logits(weights: ReferenceWeights, ids: list[int]) -> Tensor:
    """The program in float32, every operation on the results of those before it."""
    program = weights.image.program
    reference = Reference(weights, torch.tensor(ids, dtype=torch.int64))
    for part, layers in (("prologue", 1), ("layer", program["layers"]), ("epilogue", 1)):
        for layer in range(layers):
            for op in program[part]:
                fields = {
                    key: value.replace("{layer}", str(layer)) if isinstance(value, str) else value
                    for key, value in op.items()
                }
                result = reference.run(op["op"], fields)
                if op["op"] == "LOGITS":
                    return result
                if op["op"] != "KV_WRITE":
                    reference.buffers[op["out"]] = result
    raise BadInput(f"{weights.image.directory}: the program hands out no logits")


def _compare(runs: Sequence[Run], references: Sequence[Tensor]) -> dict[str, Any]:
    """Logits and greedy tokens of all sequences against the reference's."""
    ours = torch.cat([run.logits for run in runs])
    theirs = torch.cat(list(references))
    # the token chosen after the last one is not part of the sequence, but chosen it is
    chosen = torch.cat([run.logits[run.first - 1 :].argmax(1) for run in runs])
    judged = torch.cat([each[one.first - 1 :] for one, each in zip(runs, references, strict=True)])
    difference = (ours - theirs).abs()
    largest = float(difference.max()) if bool(torch.isfinite(difference).all()) else float("inf")
    best = judged.topk(2, 1).values
    clear = (best[:, 0] - best[:, 1]) > 2 * largest
    equal = chosen == judged.argmax(1)
    return {
        "logits": {
            "largest_difference": largest,
            "rms_difference": float((ours - theirs).square().mean().sqrt()),
            "spread": float(theirs.std()),
        },
        "greedy": {
            "tokens": len(chosen),
            "equal": int(equal.sum()),
            "margin_allows": int(clear.sum()),
            "equal_of_these": int((equal & clear).sum()),
        },
    }


def _judge(found: dict[str, Any], numerics: NumericsName) -> None:
    limit = OPERATION_LIMITS[numerics]
    for one in found["operations"]:
        if not one["largest_error"] <= limit:
            raise VerificationFailed(
                f"{one['worst']}: off by {one['largest_error']:.2g} of its row's largest value; numerics {numerics}"
                f" allow {limit:g}",
                "compile the checkpoint again",
                found,
            )
    logits, greedy = found["logits"], found["greedy"]
    if not logits["rms_difference"] <= LOGITS_LIMIT * logits["spread"]:
        raise VerificationFailed(
            f"logits differ by {logits['rms_difference']:.3g} (root mean square) from the reference, whose spread is"
            f" {logits['spread']:.3g}: this is not the same model",
            "name the checkpoint that the image was compiled from",
            found,
        )
    if greedy["equal_of_these"] != greedy["margin_allows"]:
        raise VerificationFailed(
            f"{greedy['margin_allows'] - greedy['equal_of_these']} of {greedy['tokens']} tokens are not the reference's"
            " though its first choice leads clearly",
            None,
            found,
        )
