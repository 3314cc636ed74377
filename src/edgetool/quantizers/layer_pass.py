"""One decoder layer run over all calibration samples, stage by stage, so that each stage sees what the ones before
it produce once they are quantised, and no product is computed twice."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from edgetool.models.architectures import Stage
from edgetool.quantizers.activations import ActivationFile


class LayerPass:
    """The layer, its inputs, and what has been computed of it so far.

    Stages must be visited in order (qkv, o, gate_up, down, then `finish`), each over all batches. A stage's linears may
    be replaced once its inputs have been seen. `hidden` is read, `result` written; `stash` keeps the inputs of o_proj
    and down_proj between their stage and the next. `arguments` holds the masks and rotary tables of each batch.
    """

    def __init__(
        self,
        layer: Any,
        arguments: list[dict[str, Any]],
        hidden: ActivationFile,
        result: ActivationFile,
        stash: ActivationFile,
    ) -> None:
        self.layer = layer
        self.arguments = arguments
        self.hidden = hidden
        self.result = result
        self.stash = stash

    def inputs(self, stage: Stage, batch: int) -> Tensor:
        """What the stage's linears read for this batch: [tokens, in_features], float32."""
        x = getattr(self, f"_{stage.name}")(batch)
        return x.reshape(-1, x.shape[-1]).to(torch.float32)  # type: ignore[no-any-return]

    def replace(self, name: str, linear: nn.Module) -> None:
        """Put `linear` in the place of the layer's linear of this name."""
        parent, _, leaf = name.rpartition(".")
        setattr(self.layer.get_submodule(parent), leaf, linear)

    def finish(self, batch: int) -> None:
        """Complete the layer for this batch: `result` then holds the next layer's input."""
        self.result.write(batch, self.result.read(batch) + self.layer.mlp.down_proj(self.stash.read(batch)))

    def _qkv(self, batch: int) -> Tensor:
        return self.layer.input_layernorm(self.hidden.read(batch))  # type: ignore[no-any-return]

    def _o(self, batch: int) -> Tensor:
        attention = self.layer.self_attn
        with _Bypassed(attention, "o_proj"):
            x = attention(hidden_states=self._qkv(batch), **self.arguments[batch])[0]
        self.stash.write(batch, x)
        return x  # type: ignore[no-any-return]

    def _gate_up(self, batch: int) -> Tensor:
        states = self.hidden.read(batch) + self.layer.self_attn.o_proj(self.stash.read(batch))
        self.result.write(batch, states)
        return self.layer.post_attention_layernorm(states)  # type: ignore[no-any-return]

    def _down(self, batch: int) -> Tensor:
        with _Bypassed(self.layer.mlp, "down_proj"):
            x = self.layer.mlp(self.layer.post_attention_layernorm(self.result.read(batch)))
        self.stash.write(batch, x)
        return x  # type: ignore[no-any-return]


class _Bypassed:
    """A module's last linear replaced by the identity for a moment, so that the module returns that linear's input."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module, self.name = module, name

    def __enter__(self) -> None:
        self.kept = getattr(self.module, self.name)
        setattr(self.module, self.name, nn.Identity())

    def __exit__(self, *_: object) -> None:
        setattr(self.module, self.name, self.kept)
