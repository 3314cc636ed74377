"""The layer-by-layer engine: read a decoder layer, calibrate, quantise, pack, write, let go.

Memory is one layer, its statistics and one batch of activations. Every finished layer is a file of its own beside a
line in the ledger; the files are put together when all are there (assemble.py).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgetool.checkpoints.canonical import QuantizedLinear
from edgetool.checkpoints.formats import Format, Spec, stored_dtype
from edgetool.checkpoints.tensor_file import write_tensor_file
from edgetool.errors import BadInput
from edgetool.models.architectures import STAGES, Stage
from edgetool.models.streamed import ComputeLinear, StreamedModel
from edgetool.progress import Progress
from edgetool.quantizers import awq
from edgetool.quantizers.guards import memory_named
from edgetool.quantizers.layer_pass import LayerPass
from edgetool.quantizers.ledger import Ledger
from edgetool.quantizers.recipe import Recipe
from edgetool.quantizers.solve import Solved, solve_gptq, solve_rtn
from edgetool.quantizers.statistics import InputStatistics, Moments
from edgetool.quantizers.storage import to_storage
from edgetool.quantizers.streams import Streams

ROWS_AT_ONCE = 16384
"""Output rows of lm_head solved together."""


@dataclass(frozen=True)
class Job:
    """Everything the engine needs for one run.

    token_ids: int64 [samples, seqlen], or None for a method that needs no calibration.
    dtype: "F16" or "BF16", how tensors that are not quantised are stored.
    stop_requested: asked between stages; True abandons the layer and raises `Abandoned`.
    """

    model: StreamedModel
    recipe: Recipe
    format: Format
    spec: Spec
    dtype: str
    token_ids: Tensor | None
    directory: Path
    quantize_lm_head: bool
    stop_requested: Callable[[], bool]


class Abandoned(Exception):
    """A stop was asked for; everything before the layer at hand is on disk."""


def layer_file(directory: Path, layer: int) -> Path:
    """Where layer `layer`'s tensors wait to be assembled."""
    return directory / f"layer-{layer:05d}.safetensors"


HEAD_FILE = "lm-head.safetensors"


def run(job: Job, ledger: Ledger, progress: Progress) -> None:
    """Quantise every layer the ledger does not know yet. Raises Abandoned when a stop is asked for."""
    with torch.no_grad():
        streams = _streams(job)
        try:
            _run(job, ledger, streams, progress)
        finally:
            if streams is not None:
                streams.close()


def _streams(job: Job) -> Streams | None:
    if job.token_ids is None:
        return None
    follow = job.recipe.asymmetric_calibration > 0
    return Streams(job.model, job.token_ids, job.directory, follow_original=follow)


def _run(job: Job, ledger: Ledger, streams: Streams | None, progress: Progress) -> None:
    total = job.model.map.n_layers + int(job.quantize_lm_head)
    if streams is not None:
        streams.prepare(ledger)
    done = len(ledger.layers)
    if done:
        progress.note(f"taking up the earlier run after {done} of {total} layers")
    with progress.task("quantise", total, "layer", done) as task:
        for layer in range(done, job.model.map.n_layers):
            with memory_named(f"quantising layer {layer}"):
                tensors, reports = _LayerJob(job, layer, streams).run(task.advance)
            write_tensor_file(layer_file(job.directory, layer), tensors)
            checksums = streams.advance() if streams is not None else []
            ledger.append({"layer": layer, "modules": reports, "activations": checksums})
            worst = max(report["relative_error"] for report in reports)
            task.advance(1 - len(STAGES) * _STAGE_SHARE, f"layer {layer} done, worst module off by {worst:.1%}")
        if job.quantize_lm_head and len(ledger.layers) == job.model.map.n_layers:
            with memory_named("quantising lm_head"):
                tensors, report = _quantize_head(job, streams)
            write_tensor_file(job.directory / HEAD_FILE, tensors)
            ledger.append({"layer": "lm_head", "modules": [report], "activations": []})
            task.advance()


_STAGE_SHARE = 0.2
"""Part of a layer's progress that one stage is worth; what is left comes when the layer is written."""


class _LayerJob:
    """One layer: its weights (folded by AWQ where asked), its statistics, its quantised linears."""

    def __init__(self, job: Job, layer: int, streams: Streams | None) -> None:
        self.job, self.layer, self.streams = job, layer, streams
        self.prefix = job.model.map.layer_prefix(layer)
        self.tensors: dict[str, tuple[str, Any]] = {}
        self.reports: list[dict[str, Any]] = []
        self.changed: dict[str, Tensor] = {}
        self.known: dict[str, InputStatistics] = {}

    def run(self, advance: Callable[..., None]) -> tuple[dict[str, tuple[str, Any]], list[dict[str, Any]]]:
        """Quantise the layer; returns its tensors (name -> dtype, array) and a report for each linear."""
        job, streams = self.job, self.streams
        passes: dict[str, LayerPass] = {}
        if streams is not None:
            if job.recipe.awq_scaling:
                self._fold_scales()
            passes = {name: streams.pass_through(name, self._built(name)) for name in streams.files}
        for stage in STAGES:
            if job.stop_requested():
                raise Abandoned
            statistics = self._statistics(stage, passes)
            self._quantize(stage, statistics, passes.get("quantised"))
            advance(_STAGE_SHARE)
        if streams is not None:
            for one in passes.values():
                for number in range(len(streams.batches)):
                    one.finish(number)
        self._store_the_rest()
        return self.tensors, self.reports

    def _built(self, stream: str) -> Any:
        """The layer with 16-bit weights; the quantised stream's has what AWQ changed."""
        layer = self.job.model.layer(self.layer)
        if stream == "quantised":
            for name, tensor in self.changed.items():
                owner, _, kind = name.rpartition(".")
                module = layer.get_submodule(owner)
                if isinstance(module, ComputeLinear):
                    setattr(module, kind, tensor.to(self.job.model.compute_dtype))
                else:
                    module.weight = torch.nn.Parameter(tensor, requires_grad=False)
        return layer

    def _weight(self, linear: str) -> Tensor:
        changed = self.changed.get(f"{linear}.weight")
        return self.job.model.weight(self.prefix + linear) if changed is None else changed

    def _bias(self, linear: str) -> Tensor | None:
        changed = self.changed.get(f"{linear}.bias")
        return self.job.model.bias(self.prefix + linear) if changed is None else changed

    def _statistics(self, stage: Stage, passes: dict[str, LayerPass]) -> InputStatistics | None:
        """Second moments of the stage's inputs; None without calibration."""
        if self.streams is None:
            return None
        quantised, original = passes["quantised"], passes.get("original")
        known = self.known.get(stage.name)
        moments: Moments | None = None
        for number in range(len(self.streams.batches)):
            x = quantised.inputs(stage, number)  # also where the moments are known: the next stage builds on it
            if known is None:
                moments = moments or Moments(x.shape[1], x.device, follow_original=original is not None)
                moments.add(x, None if original is None else original.inputs(stage, number))
        if moments is None:
            return known
        if not moments.finite():
            raise BadInput(
                f"the inputs of {self.prefix}{stage.linears[0]} are not finite: the model overflows, or holds NaN",
                "edgetool inspect shows which tensors hold NaN",
            )
        return moments.mean()

    def _quantize(self, stage: Stage, statistics: InputStatistics | None, one: LayerPass | None) -> None:
        recipe = self.job.recipe
        weights = [self._weight(name) for name in stage.linears]
        for name, weight in zip(stage.linears, weights, strict=True):
            if not bool(torch.isfinite(weight).all()):
                raise BadInput(f"{self.prefix}{name}.weight holds NaN or infinite values")
        sizes = [weight.shape[0] for weight in weights]
        # Linears that read the same input share its statistics, so their rows are solved together.
        solved = solve(torch.cat(weights), recipe, statistics)
        del weights
        quantized_t = solved.dequantized_t()
        start = 0
        for name, rows in zip(stage.linears, sizes, strict=True):
            part = slice(start, start + rows)
            start += rows
            values = quantized_t[:, part].t().contiguous()
            if one is not None:
                bias = self._bias(name)
                if bias is not None and statistics is not None and recipe.bias_correction:
                    bias = bias + (self._weight(name) - values) @ statistics.mean
                    self.changed[f"{name}.bias"] = bias
                one.replace(name, ComputeLinear(values, bias, self.job.model.compute_dtype))
            self._store_linear(name, solved, part, values)

    def _store_linear(self, name: str, solved: Solved, rows: slice, values: Tensor) -> None:
        full = self.prefix + name
        linear = canonical(solved, rows, self.job.recipe)
        for suffix, array in self.job.format.write(linear, self.job.spec, full).items():
            self.tensors[f"{full}.{suffix}"] = (stored_dtype(array), array)
        self.reports.append(
            {
                "module": full,
                "method": solved.method,
                "damp": solved.damp,
                "relative_error": solved.relative_error,
                "values_crc32": zlib.crc32(values.cpu().numpy().data),
            }
        )

    def _store_the_rest(self) -> None:
        """Norms and biases of the layer, changed or as they are, in 16 bit."""
        model = self.job.model
        quantized = {f"{self.prefix}{name}.weight" for stage in STAGES for name in stage.linears}
        for full, info in model.checkpoint.tensors.items():
            if not full.startswith(self.prefix) or full in quantized:
                continue
            changed = self.changed.get(full.removeprefix(self.prefix))
            if changed is None:
                self.tensors[full] = to_storage(model.checkpoint.read(full), info.dtype, self.job.dtype, full)
            else:
                self.tensors[full] = to_storage(changed.cpu().numpy(), "F32", self.job.dtype, full)

    def _fold_scales(self) -> None:
        """AWQ: statistics of the whole layer with 16-bit weights, then a scale for each stage, folded in turn."""
        job, streams = self.job, self.streams
        assert streams is not None
        layer = job.model.layer(self.layer)
        original = {"quantised": streams.pass_through("quantised", layer)}
        for stage in STAGES:
            if job.stop_requested():
                raise Abandoned
            statistics = self._statistics(stage, original)
            assert statistics is not None
            self.known[stage.name] = statistics
        tensors = {name: parameter for name, parameter in layer.named_parameters() if "norm" in name}
        for stage in STAGES:
            for name in stage.linears:
                tensors[f"{name}.weight"] = job.model.weight(self.prefix + name)
                bias = job.model.bias(self.prefix + name)
                if bias is not None:
                    tensors[f"{name}.bias"] = bias
        before = dict(tensors)
        scaling = job.recipe.for_scale_search()
        for stage in STAGES:
            source_of = self._source_of(stage)
            weight = torch.cat([tensors[f"{name}.weight"] for name in stage.linears])
            known = self.known[stage.name]
            scale = awq.find_scale(weight, known, scaling, source_of)
            tensors = awq.fold(tensors, stage, scale, source_of)
            wide = scale if source_of is None else scale[source_of]
            known.gram /= wide.unsqueeze(0) * wide.unsqueeze(1)
            known.mean /= wide
            known.magnitude /= wide
        self.changed = {name: tensor for name, tensor in tensors.items() if tensor is not before[name]}
        if job.recipe.method != "awq":
            self.known.clear()  # GPTQ wants the statistics its own earlier stages cause

    def _source_of(self, stage: Stage) -> Tensor | None:
        if stage.name != "o":
            return None
        text = self.job.model.skeleton.config
        query_heads = int(text.num_attention_heads)
        value_heads = int(getattr(text, "num_key_value_heads", None) or query_heads)
        head_dim = int(getattr(text, "head_dim", None) or text.hidden_size // query_heads)
        return awq.value_channel_of(query_heads, value_heads, head_dim).to(self.job.model.device)


def solve(weight: Tensor, recipe: Recipe, statistics: InputStatistics | None) -> Solved:
    """Quantise one matrix by the recipe's method; AWQ is rounding to nearest on what has been folded."""
    if recipe.method == "gptq":
        assert statistics is not None
        return solve_gptq(weight, recipe, statistics)
    return solve_rtn(weight, recipe, statistics)


def canonical(solved: Solved, rows: slice, recipe: Recipe) -> QuantizedLinear:
    """Output rows `rows` of a solved matrix in the form that formats store."""
    codes = np.ascontiguousarray(solved.codes[:, rows].t().cpu().numpy())
    return QuantizedLinear(
        codes=codes,
        scales=solved.grid.scales[:, rows].t().to(torch.float16).contiguous().cpu().numpy(),
        zeros=solved.grid.zeros[:, rows].t().to(torch.uint8).contiguous().cpu().numpy(),
        g_idx=None if solved.trivial else solved.group_of.to(torch.int32).cpu().numpy(),
        bits=recipe.bits,
        group_size=recipe.size(codes.shape[1]),
    )


def _quantize_head(job: Job, streams: Streams | None) -> tuple[dict[str, tuple[str, Any]], dict[str, Any]]:
    """lm_head (a copy of the embedding where they are tied) by the recipe's method, some rows at a time."""
    model = job.model
    statistics = None
    if streams is not None:
        moments = Moments(model.map.hidden_size, model.device, follow_original=False)
        states = streams.files["quantised"][streams.layer % 2]
        for number in range(len(streams.batches)):
            moments.add(model.final_norm(states.read(number)).flatten(0, 1))
        statistics = moments.mean()
    recipe = job.recipe.without_target()
    parts: list[QuantizedLinear] = []
    errors: list[float] = []
    crc = 0
    for rows in model.output_rows(ROWS_AT_ONCE):
        solved = solve(rows, recipe, statistics)
        parts.append(canonical(solved, slice(0, rows.shape[0]), recipe))
        errors.append(solved.relative_error)
        crc = zlib.crc32(parts[-1].dequantize().data, crc)
    linear = QuantizedLinear(
        np.concatenate([part.codes for part in parts]),
        np.concatenate([part.scales for part in parts]),
        np.concatenate([part.zeros for part in parts]),
        parts[0].g_idx,
        recipe.bits,
        parts[0].group_size,
    )
    arrays = job.format.write(linear, job.spec, "lm_head")
    report = {
        "module": "lm_head",
        "method": recipe.method,
        "damp": recipe.damp,
        "relative_error": max(errors),
        "values_crc32": crc,
    }
    return {f"lm_head.{suffix}": (stored_dtype(array), array) for suffix, array in arrays.items()}, report
