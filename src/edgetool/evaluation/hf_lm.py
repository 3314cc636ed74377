"""A checkpoint as upstream's own language model `hf`, whose weights are read when the first question is asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from edgetool.checkpoints.checkpoint import Checkpoint
from edgetool.evaluation.loaded import LoadedModel
from edgetool.evaluation.stock_tasks import quiet
from edgetool.evaluation.targets import CPU_BATCH_SIZE
from edgetool.models.devices import out_of_memory_named
from edgetool.models.streamed import load_tokenizer
from edgetool.models.whole import skeleton

_LESS = "use a smaller --batch-size"


class LazyHFLM(HFLM):  # type: ignore[misc]
    """`hf` of lm-evaluation-harness around a model that `load` gives. Nothing in how it scores is changed.

    Until a question comes that has to be computed, only the tokenizer and the model's structure (on torch's meta
    device) are there: a run whose answers are all known reads no weights.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        load: Callable[[], LoadedModel],
        device: torch.device,
        batch_size: int | str,
        max_length: int | None,
    ) -> None:
        self._load: Callable[[], LoadedModel] | None = load
        with quiet():
            super().__init__(
                pretrained=skeleton(checkpoint),
                tokenizer=load_tokenizer(checkpoint),
                backend="causal",
                batch_size=CPU_BATCH_SIZE if batch_size == "auto" and device.type == "cpu" else batch_size,
                max_length=max_length,
            )

    def _be_loaded(self) -> None:
        if self._load is not None:
            loaded = self._load()
            self._load = None
            self._model, self._device = loaded.model, loaded.device
            self._model.eval()

    def _loglikelihood_tokens(self, *args: Any, **options: Any) -> Any:
        self._be_loaded()
        with out_of_memory_named("scoring answers", _LESS):
            return super()._loglikelihood_tokens(*args, **options)

    def loglikelihood_rolling(self, *args: Any, **options: Any) -> Any:
        self._be_loaded()
        with out_of_memory_named("scoring answers", _LESS):
            return super().loglikelihood_rolling(*args, **options)

    def generate_until(self, *args: Any, **options: Any) -> Any:
        self._be_loaded()
        with out_of_memory_named("generating answers", _LESS):
            return super().generate_until(*args, **options)
