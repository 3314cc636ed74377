"""The simulated board: one image, run from its bytes alone, for any number of sequences."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from edgetool.errors import BadInput
from edgetool.fpga.image import Image
from edgetool.fpga.simulator.binding import BoundProgram, bind
from edgetool.fpga.simulator.interfaces import Call, KvStore, Numerics, NumericsName, SimulatorFacts, Step, Trace
from edgetool.fpga.simulator.kv_cache import KvGeometry
from edgetool.fpga.simulator.prefix_cache import PrefixCache
from edgetool.fpga.simulator.resources import ImageResources
from edgetool.fpga.simulator.session import Session
from edgetool.fpga.simulator.traffic import check_plan

Array = npt.NDArray[Any]

_LARGEST_SCORES = 1 << 26
"""Scores of one call, heads x tokens x keys: a long context takes smaller chunks, which changes no bit."""

__all__ = ["Session", "Simulator"]


class Simulator:
    """An image on a simulated board. Several threads may have sessions, each its own."""

    def __init__(
        self,
        image: Image,
        numerics: NumericsName = "et1",
        threads: int | None = None,
        device: str = "cpu",
        trace: Trace | None = None,
        prefix_cache_bytes: int = 1 << 30,
    ) -> None:
        """Read the whole image. threads: at most that many of torch's while a call runs (None: as many as it has).

        Raises BadInput where program and image do not fit together, VerificationFailed where the weights are not as
        large as the manifest says that reading them is.
        """
        self._threads = torch.get_num_threads() if threads is None else threads
        self.image = image
        self.program = bind(image)
        self.prefixes = PrefixCache(prefix_cache_bytes)
        self._numerics = _numerics(numerics, image, self.program, device)
        self._trace = trace
        self._heads = max((op.fields["heads"] for op in self.program.body if op.kind == "QK"), default=1)
        resources = ImageResources(image)
        self._body = self._numerics.compile(self.program.body, resources, trace is not None)
        self._epilogue = self._numerics.compile(self.program.epilogue, resources, trace is not None)
        check_plan(str(image.directory), resources.read_bytes_by_role, _plan(image))
        self.facts = _facts(image, self.program, numerics)

    @property
    def logits_dtype(self) -> Any:
        """numpy's dtype of what `feed` returns."""
        return np.float16 if self._numerics.logits_dtype is torch.float16 else np.float32

    def session(self, prompt: Sequence[int] = ()) -> Session:
        """A new sequence. Where a kept one begins like `prompt`, it starts behind the longest prefix that they share.

        That is at most len(prompt) - 1 tokens, so that there is one left to feed: feed `prompt[session.position:]`.
        """
        cache = self.new_cache()
        shared, snapshot = self.prefixes.longest(prompt[:-1]) if len(prompt) > 1 else (0, None)
        if snapshot is not None:
            cache.restore(snapshot, shared)
        return Session(self, cache, prompt[:shared])

    def new_cache(self) -> KvStore:
        """An empty cache for one sequence."""
        return self._numerics.new_cache()

    def keep(self, ids: Sequence[int], cache: KvStore) -> None:
        """Hand a finished sequence's keys and values to the prefix cache."""
        if ids:
            self.prefixes.keep(ids, lambda: cache.snapshot(len(ids)))

    def chunk_tokens(self, position: int) -> int:
        """How many tokens may go through the program together from `position` on."""
        chunk = self.program.chunk_tokens
        while chunk > 1 and self._heads * chunk * (position + chunk) > _LARGEST_SCORES:
            chunk //= 2
        return chunk

    def run(self, call: Call, cancelled: Callable[[], bool] | None = None) -> bool:
        """Put one call through the program; False where `cancelled` said so in between, with nothing taken."""
        before = torch.get_num_threads()
        torch.set_num_threads(self._numerics.threads(call.tokens, self._threads))
        try:
            # what becomes infinite is counted by the operations; nothing here needs a gradient
            with np.errstate(all="ignore"), torch.inference_mode():
                return self._run(call, cancelled)
        finally:
            torch.set_num_threads(before)

    def _run(self, call: Call, cancelled: Callable[[], bool] | None) -> bool:
        layer = -1
        for step in self._body:
            if step.op.layer != layer:
                layer = step.op.layer
                if cancelled is not None and cancelled():
                    return False
            self._do(step, call)
        if call.wanted != "none":
            for step in self._epilogue:
                self._do(step, call)
        return True

    def logits_of(self, call: Call) -> Array:
        """[rows, vocab] of a call that went through."""
        logits: Array = call.buffers[self.program.logits].cpu().numpy()
        return logits

    def _do(self, step: Step, call: Call) -> None:
        if self._trace is None:
            step.run(call)
            return
        start = time.perf_counter()
        step.run(call)
        seconds = time.perf_counter() - start
        result = call.buffers.get(step.op.fields.get("out", step.op.fields.get("in")))
        self._trace.step(step.op, call, result, seconds)


def _numerics(name: NumericsName, image: Image, program: BoundProgram, device: str) -> Numerics:
    geometry = KvGeometry.of(image.manifest["kv"], program.layers, program.kv.kv_heads, program.kv.head_dim)
    if name == "et1":
        from edgetool.fpga.simulator.exact_numerics import ExactNumerics

        if device != "cpu":
            raise BadInput(f"numerics et1 run on the CPU, not on {device!r}", "use --numerics fast for a GPU")
        return ExactNumerics(geometry)
    from edgetool.fpga.simulator.fast_numerics import FastNumerics

    return FastNumerics(geometry, device)


def _plan(image: Image) -> dict[str, int]:
    """Bytes that a token reads by role of matrix, as the manifest says."""
    try:
        return {str(role): int(count) for role, count in image.manifest["memory"]["read_bytes_by_role"].items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        raise BadInput(
            f"{image.directory / 'manifest.json'}: memory.read_bytes_by_role is missing or no table of numbers",
            "compile the checkpoint again",
        ) from None


def _facts(image: Image, program: BoundProgram, numerics: NumericsName) -> SimulatorFacts:
    model = image.manifest["model"]
    vocab, hidden = image.manifest["embedding"]["shape"]
    return SimulatorFacts(
        family=model["family"],
        vocab=vocab,
        hidden=hidden,
        layers=program.layers,
        max_context_tokens=program.max_context_tokens,
        chunk_tokens=program.chunk_tokens,
        bos_token_id=model.get("bos_token_id"),
        eos_token_ids=tuple(model.get("eos_token_ids") or ()),
        numerics=numerics,
        int4_encoding=image.encoding,
        profile=image.manifest["profile"],
        tokenizer_files=tuple(sorted(image.manifest["tokenizer"])),
    )
