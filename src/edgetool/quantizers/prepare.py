"""What a quantisation decides and gathers before it starts: recipe, device, plan, calibration tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetool.artifacts import atomic_write, disk_errors
from edgetool.checkpoints.checkpoint import Checkpoint, read_json_object
from edgetool.checkpoints.formats import Spec
from edgetool.config import CommonConfig, QuantizeConfig
from edgetool.models.architectures import map_layers
from edgetool.progress import Progress
from edgetool.quantizers.recipe import Recipe

if TYPE_CHECKING:
    from edgetool.models.streamed import StreamedModel
    from edgetool.quantizers.calibration import Calibration

RECORD_SCHEMA = "edgetool.quantize-record/1"
"""Of edgetool.json, whatever quantised."""


def recipe_of(config: QuantizeConfig) -> Recipe:
    """The engine's recipe: what the user gave, and this version's best defaults for the rest."""
    scaling = config.method == "awq" if config.awq_scaling is None else config.awq_scaling
    follow = 0.5 if config.asymmetric_calibration and config.method == "gptq" else 0.0
    return Recipe(
        method=config.method,
        bits=config.bits,
        group_size=config.group_size,
        sym=config.sym,
        desc_act=config.desc_act and config.group_size != -1,  # one group has no order to follow
        scale_search=config.scale_search,
        asymmetric_calibration=follow,
        awq_scaling=scaling and config.method != "rtn",
        bias_correction=config.bias_correction,
        damp=config.damp,
        shrinkage=config.shrinkage,
        min_zero=1 if config.format == "gptq" and not config.sym else 0,
    )


@dataclass(frozen=True)
class Prepared:
    """What is decided before anything is written."""

    recipe: Recipe
    spec: Spec
    dtype: str
    device: Any
    tokenizer: Any
    plan: dict[str, Any]

    @classmethod
    def of(cls, config: QuantizeConfig, checkpoint: Checkpoint) -> Prepared:
        from edgetool.models.devices import fast_dtype, resolve_device
        from edgetool.models.streamed import StreamedModel, load_tokenizer
        from edgetool.quantizers.plan import free_gpu_bytes, make_plan
        from edgetool.quantizers.storage import model_dtype

        layers = map_layers(checkpoint.config, checkpoint.tensors)
        recipe = recipe_of(config)
        spec = Spec(config.bits, config.group_size, config.sym, recipe.desc_act)
        dtype = model_dtype(checkpoint.config, checkpoint.tensors)
        device = resolve_device(config.device)
        plan = make_plan(config, checkpoint, layers, recipe, spec, dtype, str(device), free_gpu_bytes(device))
        # before the tokenizer: a configuration that cannot be used is no tokenizer that cannot be read
        StreamedModel(checkpoint, device, fast_dtype(device)).check()
        # Every method ends by trying the result, so a model without a tokenizer must not get as far as that.
        return cls(recipe, spec, dtype, device, load_tokenizer(checkpoint), plan)


def calibration_asked(config: QuantizeConfig) -> dict[str, Any]:
    """The settings that decide which tokens a run calibrates on."""
    keys = ("calib", "calib_column", "calib_samples", "calib_seqlen", "seed")
    return {key: getattr(config, key) for key in keys}


def calibration_of(
    config: QuantizeConfig,
    common: CommonConfig,
    tokenizer: Any,
    model: Callable[[], StreamedModel],
    kept: Path,
    progress: Progress,
    stop_requested: Callable[[], bool],
) -> Calibration:
    """Calibration windows, kept in a file so that resuming does not draw them again; `model` writes those of `self`."""
    import torch

    from edgetool.quantizers import calibration as c

    asked = calibration_asked(config)
    if kept.is_file():
        document = read_json_object(kept)
        if document.get("asked") == asked:
            return c.from_tokens(torch.tensor(document["token_ids"], dtype=torch.int64), config.calib)
    sizes = {"samples": config.calib_samples, "seqlen": config.calib_seqlen, "seed": config.seed}
    if config.calib == "self":
        from edgetool.quantizers.self_calibration import sample_from_model

        found = sample_from_model(model(), tokenizer, progress=progress, stop_requested=stop_requested, **sizes)
    else:
        texts = c.texts_of(config.calib, config.calib_column, offline=common.offline)
        found = c.calibration_from(texts, tokenizer, source=config.calib, **sizes)
    with disk_errors(kept):
        atomic_write(kept, json.dumps({"asked": asked, "token_ids": found.token_ids.tolist()}).encode())
    return found
