"""A model that is never in memory as a whole: layers are built from the checkpoint one at a time and let go again.

The structure comes from transformers' own classes on torch's meta device; weights come from the shards when a layer is
asked for. The same class runs original and quantised checkpoints, so that both are measured by the same code.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from edgetool.checkpoints.checkpoint import Checkpoint
from edgetool.errors import BadInput, MissingDependency
from edgetool.models.architectures import STAGES, VISION_FAMILIES, LayerMap, map_layers

if TYPE_CHECKING:
    from edgetool.checkpoints.detect import QuantizationFound
    from edgetool.checkpoints.tensor_file import TensorInfo

VOCAB_CHUNK = 4096
"""Rows of the output matrix held at once."""


class ComputeLinear(nn.Module):
    """y = x W^T + b in a fast dtype, whatever the dtype of x.

    Inside attention and MLP everything flows in that dtype; the residual stream and the norms in front of each block
    are float32, so that rounding does not add up over the layers.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = weight.to(compute_dtype)
        self.bias = None if bias is None else bias.to(compute_dtype)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x.to(self.weight.dtype), self.weight, self.bias)


class StreamedModel:
    """Reads a checkpoint layer by layer.

    `compute_dtype` is that of matrix products; hidden states are float32. Quantised checkpoints are dequantised
    as they are read, through the canonical form.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device, compute_dtype: torch.dtype) -> None:
        self.checkpoint = checkpoint
        self.device = device
        self.compute_dtype = compute_dtype
        self.map: LayerMap = map_layers(checkpoint.config, checkpoint.tensors)

    @cached_property
    def quantization(self) -> QuantizationFound | None:
        """What the tensors say about how the checkpoint is quantised; None for a 16-bit one."""
        from edgetool.checkpoints.detect import detect

        return detect(self.checkpoint.tensors, self.checkpoint.read, self.checkpoint.config)

    @cached_property
    def _quantized_modules(self) -> frozenset[str]:
        return frozenset(self.quantization.modules) if self.quantization else frozenset()

    @cached_property
    def skeleton(self) -> Any:
        """transformers' decoder (without output matrix) on the meta device; its rotary embedding is real."""
        config = load_config(self.checkpoint)
        from transformers import AutoModel

        config._attn_implementation = "sdpa"
        text_config = config.get_text_config() if self.map.model_type in VISION_FAMILIES else config
        text_config._attn_implementation = "sdpa"
        with torch.device("meta"):
            try:
                base = AutoModel.from_config(text_config if self.map.model_type in VISION_FAMILIES else config)
                text = getattr(base, "language_model", base)
                with torch.device("cpu"):  # the rotary tables are computed, not stored: on "meta" they would be empty
                    text.rotary_emb = type(text.rotary_emb)(config=text.config).to(self.device)
            except Exception as error:
                raise _refused_config(self.checkpoint, error) from error
        text.eval().requires_grad_(False)
        return text

    def check(self) -> None:
        """Hold all tensors of a 16-bit checkpoint's decoder against config.json; hardly anything is read for it.

        Raises BadInput naming the first that is missing, has another shape, or is a bias that config.json knows
        nothing of: loaders leave those out. Zeros change nothing (AutoGPTQ writes such biases).
        """
        decoder, names = self.skeleton, self.map
        meant = {names.embedding: decoder.embed_tokens.weight, names.final_norm: decoder.norm.weight}
        if names.lm_head is not None:
            meant[names.lm_head] = decoder.embed_tokens.weight
        for index, layer in enumerate(decoder.layers):
            meant |= {names.layer_prefix(index) + name: parameter for name, parameter in layer.named_parameters()}
        for name, parameter in meant.items():
            if name not in self.checkpoint.tensors:
                raise BadInput(f"{self.checkpoint.directory}: tensor {name} is missing")
            _agree(name, self.checkpoint.tensors[name], parameter)
        linears = [name.removesuffix("weight") for name in names.quantizable()]
        for name in [f"{linear}bias" for linear in linears if f"{linear}bias" not in meant]:
            if name in self.checkpoint.tensors and bool(self.tensor(name).any()):
                raise BadInput(f"{name} is stored, and config.json asks for none: loaders would leave it out")

    def tensor(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """A stored tensor on the device, converted to `dtype`."""
        if name not in self.checkpoint.tensors:
            raise BadInput(f"{self.checkpoint.directory}: tensor {name} is missing")
        return as_torch(self.checkpoint.read(name), self.checkpoint.tensors[name].dtype).to(self.device, dtype)

    def weight(self, linear: str) -> Tensor:
        """Weight [out_features, in_features], float32, of the linear with this full name, dequantised if need be."""
        if linear in self._quantized_modules:
            from edgetool.checkpoints.detect import read_linear

            assert self.quantization is not None
            return torch.from_numpy(read_linear(self.checkpoint, linear, self.quantization).dequantize()).to(
                self.device
            )
        return self.tensor(f"{linear}.weight")

    def bias(self, linear: str) -> Tensor | None:
        """Bias [out_features], float32, or None."""
        return self.tensor(f"{linear}.bias") if f"{linear}.bias" in self.checkpoint.tensors else None

    def linear(self, name: str) -> ComputeLinear:
        """The linear with this full name, ready to compute."""
        return ComputeLinear(self.weight(name), self.bias(name), self.compute_dtype)

    def layer(self, index: int, *, linears: bool = True) -> Any:
        """Decoder layer `index` with real weights; without `linears` the quantisable ones are left out (None)."""
        layer = copy.deepcopy(self.skeleton.layers[index])
        prefix = self.map.layer_prefix(index)
        for stage in STAGES:
            for name in stage.linears:
                parent, _, leaf = name.rpartition(".")
                linear = self.linear(prefix + name) if linears else None
                if linear is not None:
                    _agree(f"{prefix}{name}.weight", linear.weight, layer.get_submodule(name).weight)
                setattr(layer.get_submodule(parent), leaf, linear)
        for name, parameter in list(layer.named_parameters()):
            parent, _, leaf = name.rpartition(".")
            # Per-head norms lie between two products: float32 weights would promote one operand of attention.
            stored = self.tensor(prefix + name, self.compute_dtype if name.startswith("self_attn.") else torch.float32)
            _agree(prefix + name, stored, parameter)
            setattr(layer.get_submodule(parent), leaf, nn.Parameter(stored, requires_grad=False))
        return layer

    def layer_arguments(self, hidden: Tensor, cache: Any = None) -> list[dict[str, Any]]:
        """Keyword arguments transformers would pass to each layer (masks, rotary tables) for `hidden` [b, s, h].

        Taken by running the decoder's own forward with every layer replaced by one that writes down what it is given.
        """
        taken: list[dict[str, Any]] = []

        class Catcher(nn.Module):
            def forward(self, states: Tensor, **kwargs: Any) -> Tensor:
                taken.append(kwargs)
                return states

        text = self.skeleton
        layers, norm = text.layers, text.norm
        try:
            text.layers = nn.ModuleList(Catcher() for _ in range(self.map.n_layers))
            text.norm = nn.Identity()
            with torch.no_grad():
                text(inputs_embeds=hidden, past_key_values=cache, use_cache=cache is not None)
        finally:
            text.layers, text.norm = layers, norm
        for arguments in taken:
            cos, sin = arguments["position_embeddings"]
            arguments["position_embeddings"] = (cos.to(self.compute_dtype), sin.to(self.compute_dtype))
            mask = arguments.get("attention_mask")
            if mask is not None and mask.is_floating_point():
                arguments["attention_mask"] = mask.to(self.compute_dtype)
        return taken

    def embed(self, token_ids: Tensor) -> Tensor:
        """Hidden states float32 [..., hidden_size] of token ids int64 [...]; reads only the rows it needs."""
        info = self.checkpoint.tensors[self.map.embedding]
        unique, inverse = np.unique(token_ids.cpu().numpy(), return_inverse=True)
        if unique.size and int(unique[-1]) >= info.shape[0]:
            raise BadInput(f"token id {int(unique[-1])} is outside the vocabulary ({info.shape[0]} rows)")
        rows = as_torch(self.checkpoint.read_rows(self.map.embedding, unique), info.dtype).to(torch.float32)
        return rows[torch.from_numpy(inverse.reshape(token_ids.shape))].to(self.device)

    def final_norm(self, hidden: Tensor) -> Tensor:
        """The norm in front of the output matrix, applied to float32 [..., hidden_size]."""
        norm = copy.deepcopy(self.skeleton.norm)
        norm.weight = nn.Parameter(self.tensor(self.map.final_norm), requires_grad=False)
        with torch.no_grad():
            return norm(hidden)  # type: ignore[no-any-return]

    def output_rows(self, rows_at_once: int) -> Iterator[Tensor]:
        """The output matrix (the embedding where they are tied), float32, some rows at a time."""
        head = self.map.lm_head or self.map.embedding
        if head.removesuffix(".weight") in self._quantized_modules:
            yield from self.weight(head.removesuffix(".weight")).split(rows_at_once)  # type: ignore[no-untyped-call]
            return
        info = self.checkpoint.tensors[head]
        for start in range(0, info.shape[0], rows_at_once):
            rows = np.arange(start, min(start + rows_at_once, info.shape[0]))
            yield as_torch(self.checkpoint.read_rows(head, rows), info.dtype).to(self.device, torch.float32)

    def output_chunks(self) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows) of the output matrix in compute_dtype, VOCAB_CHUNK rows at a time."""
        start = 0
        for rows in self.output_rows(VOCAB_CHUNK):
            yield start, rows.to(self.compute_dtype)
            start += rows.shape[0]


def _agree(name: str, stored: Tensor | TensorInfo, meant: Tensor) -> None:
    if tuple(stored.shape) != tuple(meant.shape):
        raise BadInput(f"{name} has shape {list(stored.shape)}, config.json asks for {list(meant.shape)}")


_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


def as_torch(array: Any, dtype: str) -> Tensor:
    """A stored array (BF16 as uint16 bit patterns) as a torch tensor of its true dtype, without copying."""
    if dtype not in _DTYPES:
        raise BadInput(f"cannot compute with weights stored as {dtype}")
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if dtype == "BF16" else tensor


def load_config(checkpoint: Checkpoint) -> Any:
    """transformers' configuration object of the checkpoint. Raises BadInput if transformers cannot read it."""
    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise MissingDependency(f"transformers is not installed ({error})", "pip install 'edgetool[quant]'") from error
    try:
        return AutoConfig.from_pretrained(checkpoint.directory)
    except Exception as error:
        raise _refused_config(checkpoint, error) from error


def reason_of(error: Exception) -> str:
    """What transformers says of a user's file, in one line. It raises anything there, also ZeroDivisionError."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines or isinstance(error, ArithmeticError | LookupError):  # whose words alone say nothing
        return f"{type(error).__name__} {error}".strip()
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def _refused_config(checkpoint: Checkpoint, error: Exception) -> BadInput:
    path = checkpoint.directory / "config.json"
    return BadInput(f"{path}: transformers cannot use it: {reason_of(error)}")


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """The checkpoint's tokenizer. Raises BadInput if there is none."""
    return tokenizer_at(checkpoint.directory)


def tokenizer_at(directory: Path) -> Any:
    """The tokenizer whose files are in `directory`. Raises BadInput if there is none, or only one that is a program."""
    if not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise BadInput(f"{directory}: no tokenizer (tokenizer.json or tokenizer.model)")
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise MissingDependency(f"transformers is not installed ({error})", "pip install 'edgetool[quant]'") from error
    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:
        raise BadInput(f"{directory}: the tokenizer cannot be read: {reason_of(error)}") from error
