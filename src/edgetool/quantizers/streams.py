"""The calibration samples' hidden states on their way through the layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgetool.errors import BadInput
from edgetool.models.streamed import StreamedModel
from edgetool.quantizers.activations import ActivationFile
from edgetool.quantizers.layer_pass import LayerPass
from edgetool.quantizers.ledger import Ledger

TOKENS_AT_ONCE = {"cpu": 512, "cuda": 8192}
"""Tokens of a batch: on a CPU few enough that a layer's activations stay in the cache."""


class Streams:
    """Hidden states entering the layer at hand: of the quantised model and, when targets follow it, of the original.

    Two files a stream, read and written in turn, so that a kill in the middle of a layer leaves its input whole.
    """

    def __init__(self, model: StreamedModel, token_ids: Tensor, directory: Path, *, follow_original: bool) -> None:
        self.model = model
        self.directory = directory
        at_once = TOKENS_AT_ONCE[model.device.type]
        self.batches = list(token_ids.split(max(1, at_once // token_ids.shape[1])))  # type: ignore[no-untyped-call]
        names = ["quantised", "original"] if follow_original else ["quantised"]
        self.files = {name: [self._file(f"{name}-{turn}") for turn in (0, 1)] for name in names}
        self.stashes = {name: self._file(f"{name}-stash", model.compute_dtype) for name in names}
        self.layer = 0
        self.arguments: dict[int, list[dict[str, Any]]] = {}

    def _file(self, name: str, dtype: torch.dtype = torch.float32) -> ActivationFile:
        return ActivationFile(self.directory / f"activations-{name}.bin", dtype, self.model.device)

    def prepare(self, ledger: Ledger) -> None:
        """Bring the streams to the first layer that is not done: from the files of a stopped run, or the embedding."""
        model = self.model
        self.layer = len(ledger.layers)
        shapes = [(*batch.shape, model.map.hidden_size) for batch in self.batches]
        for shape in set(shapes):
            self.arguments[shape[0]] = model.layer_arguments(torch.zeros(shape, device=model.device))
        for pair in self.files.values():
            for file in pair:
                file.layout(shapes)
        if self.layer == 0:
            for number, batch in enumerate(self.batches):
                states = model.embed(batch)
                for pair in self.files.values():
                    pair[0].write(number, states)
            return
        expected = ledger.layers[-1]["activations"]
        if [pair[self.layer % 2].checksum() for pair in self.files.values()] != expected:
            raise BadInput(
                f"the activations in {self.directory} are damaged (did the machine crash?)",
                "start again with --overwrite",
            )

    def advance(self) -> list[int]:
        """Make the layer's results the next layer's inputs; returns their checksums for the ledger."""
        self.layer += 1
        return [pair[self.layer % 2].checksum() for pair in self.files.values()]

    def pass_through(self, name: str, layer: Any) -> LayerPass:
        """`layer` between this stream's files."""
        pair = self.files[name]
        arguments = [self.arguments[len(batch)][self.layer] for batch in self.batches]
        return LayerPass(layer, arguments, pair[self.layer % 2], pair[(self.layer + 1) % 2], self.stashes[name])

    def close(self) -> None:
        for file in [*(f for pair in self.files.values() for f in pair), *self.stashes.values()]:
            file.close()
