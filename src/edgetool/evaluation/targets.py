"""What is measured: a checkpoint in this process, a server that serves one for the run, or somebody's endpoint."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from edgetool.checkpoints.checkpoint import Checkpoint
from edgetool.checkpoints.inspect import has_chat_template
from edgetool.errors import BadInput, ResourceUnavailable
from edgetool.evaluation.endpoint import Client, check_scores
from edgetool.progress import Progress
from edgetool.progress_lines import size
from edgetool.runs import available_memory_bytes
from edgetool.serving.legality import look
from edgetool.serving.memory import DTYPE_BYTES, sizes, text_config
from edgetool.serving.ready import Endpoint

if TYPE_CHECKING:
    import torch

    from edgetool.evaluation.loaded import LoadedModel

CPU_BATCH_SIZE = 8
"""What --batch-size auto is on a CPU: upstream's own search for the largest would be ended by the kernel there."""
_OVERHEAD_BYTES = 1 << 30
_LOGIT_COPIES = 3
"""Logits in float32, their logarithms, and what a gather of them takes."""
_TYPICAL_TOKENS = 512
"""Length of a question that memory is planned for; longer ones come in smaller numbers."""


class Target(Protocol):
    """One side of an evaluation. Nothing is loaded or started before an answer is wanted that is not known."""

    title: str
    identity: dict[str, Any]
    """What decides its answers: two targets of the same identity share their answers."""

    def language_model(self) -> Any:
        """An `LM` of lm-evaluation-harness, the same at each call."""

    def loaded(self) -> LoadedModel | None:
        """The model in memory; None for a server."""

    def client(self) -> Client | None:
        """The server, ready to be asked; None for a model in memory."""

    def release(self) -> None:
        """Give memory or server back; it comes again when it is wanted."""

    def facts(self) -> dict[str, Any]:
        """For the plan and the record of the run."""


@dataclass(frozen=True)
class Asking:
    """How every target is asked: batch_size is a number or auto; lengths in tokens, None = the target's own."""

    batch_size: int | str = "auto"
    max_length: int | None = None
    concurrency: int = 8
    timeout_s: float = 600.0
    chat_template: bool = False


class InProcess:
    """A checkpoint that is loaded into this process."""

    def __init__(
        self,
        title: str,
        checkpoint: Checkpoint,
        content: str,
        asking: Asking,
        device: torch.device,
        dtype: torch.dtype,
        progress: Progress,
    ) -> None:
        """`content`: the checkpoint's identity (identity.py)."""
        self.title = title
        self.checkpoint = checkpoint
        self._asking = asking
        self._device = device
        self._dtype = dtype
        self._progress = progress
        self._loaded: LoadedModel | None = None
        self._lm: Any = None
        self.identity = {
            "checkpoint": content,
            "dtype": str(dtype).removeprefix("torch."),
            "device": device.type,
            "batch_size": asking.batch_size,
            "max_length": asking.max_length,
        }
        if asking.chat_template:
            need_template(checkpoint)

    def needed_bytes(self, context_tokens: int) -> int:
        """Memory for the weights and for the logits of one batch or window, about."""
        return needed_bytes(self.checkpoint, str(self.identity["dtype"]), self._asking.batch_size, context_tokens)

    def free_bytes(self) -> int:
        """Memory that its device has free now."""
        if self._device.type == "cpu":
            return available_memory_bytes()
        import torch

        return int(torch.cuda.mem_get_info(self._device)[0])

    def check_memory(self, context_tokens: int) -> None:
        """Raise ResourceUnavailable where the model does not fit."""
        needed, free = self.needed_bytes(context_tokens), self.free_bytes()
        if self._loaded is None and needed > free:
            raise ResourceUnavailable(
                f"{self.title} needs about {size(needed)} in memory ({self.identity['dtype']}, with the logits of a "
                f"batch), and {self._device} has {size(free)} free",
                "use a smaller --batch-size or --context, another --device, or measure a server: --via serve-gpu",
            )

    def language_model(self) -> Any:
        if self._lm is None:
            from edgetool.evaluation.hf_lm import LazyHFLM

            self._lm = LazyHFLM(
                self.checkpoint, self.loaded, self._device, self._asking.batch_size, self._asking.max_length
            )
        return self._lm

    def loaded(self) -> LoadedModel:
        if self._loaded is None:
            from edgetool.evaluation.loaded import load

            self._loaded = load(self.checkpoint, self._device, self._dtype, self._progress)
        return self._loaded

    def client(self) -> None:
        return None

    def release(self) -> None:
        if self._loaded is None:
            return
        import gc

        import torch

        self._loaded = self._lm = None
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def facts(self) -> dict[str, Any]:
        found = look(self.checkpoint)
        return {
            "model": self.title,
            "quantization": None if found is None else f"{found.format}, {found.bits} bits, group {found.group_size}",
            **self.identity,
        }


class Remote:
    """A server: somebody's, or one that `start` starts for the run."""

    def __init__(
        self,
        title: str,
        start: Callable[[contextlib.ExitStack], Endpoint],
        identity: dict[str, Any],
        tokenizer: Checkpoint | None,
        asking: Asking,
        stopped: Callable[[], bool],
        *,
        scores: bool = False,
    ) -> None:
        """`tokenizer`: a checkpoint with the server's tokenizer, None where it is not known. `scores`: whether prompts
        have to be scored; asked of the server before anything else is."""
        self.title = title
        self.identity = {**identity, "tokenizer": tokenizer is not None, "max_length": asking.max_length}
        self.tokenizer = tokenizer
        self._start = start
        self._asking = asking
        self._stopped = stopped
        self._scores = scores
        self._held: contextlib.ExitStack | None = None
        self._client: Client | None = None
        self._lm: Any = None
        if asking.chat_template and tokenizer is not None:
            need_template(tokenizer)

    def loaded(self) -> None:
        return None

    def client(self) -> Client:
        if self._client is None:
            with contextlib.ExitStack() as held:
                endpoint = self._start(held)
                client = Client(endpoint, self._asking.timeout_s, stopped=self._stopped)
                held.callback(client.close)
                if self._scores:
                    check_scores(client)
                self._held, self._client = held.pop_all(), client
        return self._client

    def language_model(self) -> Any:
        if self._lm is None:
            from edgetool.evaluation.endpoint_lm import TextLM, TokenLM

            asking = self._asking
            if self.tokenizer is None:
                self._lm = TextLM(self.client, asking.concurrency, asking.chat_template, self._stopped)
            else:
                self._lm = TokenLM(
                    self.client, self.tokenizer.directory, asking.concurrency, asking.max_length, self._stopped
                )
        return self._lm

    def release(self) -> None:
        held, self._held, self._client = self._held, None, None
        if held is not None:
            held.close()

    def facts(self) -> dict[str, Any]:
        return {"model": self.title, **self.identity}


def needed_bytes(checkpoint: Checkpoint, dtype: str, batch_size: int | str, context_tokens: int) -> int:
    """Memory that a checkpoint takes in-process, about: weights in `dtype`, logits of a batch or a window, the rest."""
    weights = sizes(checkpoint, look(checkpoint), DTYPE_BYTES[dtype]).weights_bytes
    vocabulary = int(text_config(checkpoint.config).get("vocab_size") or 0)
    batch = batch_size if isinstance(batch_size, int) else CPU_BATCH_SIZE
    tokens = max(batch * _TYPICAL_TOKENS, context_tokens)
    return weights + tokens * vocabulary * 4 * _LOGIT_COPIES + _OVERHEAD_BYTES


def need_template(checkpoint: Checkpoint) -> None:
    """Raise BadInput where questions are to be put into a chat template, and there is none."""
    if not has_chat_template(checkpoint):
        raise BadInput(
            f"{checkpoint.directory}: the model has no chat template, and --chat-template asks for one",
            "leave --chat-template out, or add chat_template.jinja to the model",
        )
