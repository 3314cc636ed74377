"""What each profile takes, asked before anything is written; every refusal says what was found and what to type.

edgellm: the format of EdgeLLM's public compiler, byte for byte. sim: a superset for the simulator and new bitstreams.
That compiler takes inputs that it then compiles wrongly (g_idx and zero points unread, 8 bits, odd group counts); here
each is refused or handled.
"""

from __future__ import annotations

from collections.abc import Mapping

from edgetool.checkpoints.checkpoint import Checkpoint
from edgetool.checkpoints.detect import QuantizationFound
from edgetool.checkpoints.legality import vcu128
from edgetool.errors import BadInput
from edgetool.fpga.model import BoardModel, Linear
from edgetool.fpga.settings import CompileSettings

GROUPS = {"edgellm": (128,), "sim": (128, 64, 32)}
"""Profile -> group sizes it can hold."""

BITS = 4


def refuse_unquantized(
    checkpoint: Checkpoint, model: BoardModel | None, spec: str, settings: CompileSettings
) -> BadInput:
    """The error for a checkpoint without quantised weights."""
    sizes = (model.sizes.hidden, model.sizes.ffn) if model else ()
    fitting = [group for group in GROUPS[settings.profile] if all(size % group == 0 for size in sizes)]
    group = settings.group_size or (fitting or list(GROUPS[settings.profile]))[0]
    return BadInput(
        f"{checkpoint.directory} is not quantised; the board multiplies 4-bit weights",
        f"edgetool quantize {spec} -o quantized --group-size {group}, then compile that",
    )


def check_given(found: QuantizationFound, settings: CompileSettings, spec: str) -> None:
    """Raise BadInput where bits, group_size or desc_act were given and the checkpoint has others."""
    original = "edgetool quantize ORIGINAL -o quantized"
    if settings.bits is not None and settings.bits != BITS:
        raise BadInput(f"bits {settings.bits} cannot be compiled: the array multiplies 4-bit codes", "leave --bits out")
    if settings.requant is not None:
        return
    requant = "--requant sym rounds the quantised weights again, which costs accuracy"
    if settings.bits is not None and settings.bits != found.bits:
        raise BadInput(
            f"{spec} has {found.bits} bits, and bits {settings.bits} was asked for",
            f"{original} --bits {settings.bits} (best); {requant}",
        )
    if settings.group_size is not None and settings.group_size != found.group_size:
        raise BadInput(
            f"{spec} has group_size {found.group_size}, and group_size {settings.group_size} was asked for",
            f"{original} --group-size {settings.group_size} (best); {requant}",
        )
    if settings.desc_act is not None and settings.desc_act != found.desc_act:
        if found.desc_act:
            remedy = f"{original} without --desc-act; edgetool convert {spec} --fold-act-order takes out what can be; "
            raise BadInput(
                f"{spec} has desc_act (a true activation order), and --no-desc-act was given", remedy + requant
            )
        raise BadInput(
            f"{spec} has no desc_act (its g_idx is trivial), and --desc-act was given", "leave --desc-act out"
        )


def check_profile(
    model: BoardModel,
    found: QuantizationFound,
    settings: CompileSettings,
    asymmetric: Mapping[str, int],
    spec: str,
) -> None:
    """Raise BadInput that names everything that stands against the profile.

    asymmetric: module -> number of zero points that are not 8.
    """
    rounding = settings.requant is not None
    group = effective_group(found, settings)
    (verdict,) = [
        one
        for one in vcu128(
            BITS if rounding else found.bits,
            group,
            rounding or not asymmetric,
            found.desc_act and not rounding,
            model.sizes.head_dim,
            model.qk_norm,
        )
        if one.name.endswith(settings.profile)
    ]
    if not verdict.ok:
        raise BadInput(
            f"profile {settings.profile} cannot hold {spec}: {verdict.why}",
            _hint(model, found, settings, group, bool(asymmetric) and not rounding),
        )
    if not rounding:
        _check_modules(model, found, settings)


def _hint(model: BoardModel, found: QuantizationFound, settings: CompileSettings, group: int, asymmetric: bool) -> str:
    rounding = settings.requant is not None
    if found.bits != BITS and not rounding:
        return "edgetool quantize ORIGINAL -o quantized --bits 4 --group-size 128"
    if settings.profile == "edgellm":
        if model.sizes.head_dim != 128 or model.qk_norm:
            return "use --profile sim: the board's format cannot hold this architecture"
        if found.bits == BITS and group == 128 and asymmetric and not found.desc_act:
            return "add --requant sym (rounds again), use --profile sim, or edgetool quantize ORIGINAL --sym"
        return "edgetool quantize ORIGINAL -o quantized --group-size 128 --sym; or use --profile sim"
    if rounding or model.sizes.head_dim % 32:
        return "the simulator's format has groups of 32, 64 or 128, and head_dim must be a multiple of 32"
    return "edgetool quantize ORIGINAL -o quantized --bits 4 --group-size 128 (64 or 32 where 128 does not divide)"


def effective_group(found: QuantizationFound, settings: CompileSettings) -> int:
    """The group size of the image: as given, else the checkpoint's; rounding again takes one that the profile has."""
    if settings.group_size is not None:
        return settings.group_size
    if settings.requant is not None and found.group_size not in GROUPS[settings.profile]:
        return GROUPS[settings.profile][0]
    return found.group_size


def _check_modules(model: BoardModel, found: QuantizationFound, settings: CompileSettings) -> None:
    """The modules that differ from the rest of the checkpoint."""
    for linear in model.linears():
        layout = found.layouts.get(linear.module)
        if layout is None:
            if linear.role != "lm_head":
                raise BadInput(
                    f"{linear.module} is not quantised; the board multiplies 4-bit weights",
                    "quantise all linear layers; only lm_head can be rounded here (--lm-head rtn4)",
                )
            continue
        if layout.bits != BITS:
            raise BadInput(f"{linear.module} has {layout.bits} bits; the array multiplies 4-bit codes", _ROUND_AGAIN)
        if layout.group_size not in GROUPS[settings.profile] and layout.group_size < layout.in_features:
            allowed = ", ".join(map(str, GROUPS[settings.profile]))
            raise BadInput(
                f"{linear.module} has group_size {layout.group_size}; profile {settings.profile} has {allowed}",
                _ROUND_AGAIN,
            )
        if layout.group_size >= layout.in_features and layout.group_size not in GROUPS[settings.profile]:
            raise BadInput(f"{linear.module} has one group of {layout.in_features} weights a row", _ROUND_AGAIN)


_ROUND_AGAIN = "quantise it like the rest; --requant sym rounds the quantised weights again, which costs accuracy"


def check_lm_head(linear: Linear, quantized: bool, settings: CompileSettings) -> str:
    """How the output matrix is stored: `checkpoint` (as it is), `rtn4` or `fp16`. Raises BadInput where none fits."""
    if quantized:
        if settings.lm_head == "fp16":
            raise BadInput(f"{linear.module} is quantised already, and --lm-head fp16 was given", "leave --lm-head out")
        return "checkpoint"
    if settings.lm_head == "fp16" and settings.profile == "edgellm":
        raise BadInput("profile edgellm has no fp16 matrices: --lm-head fp16 cannot be", "use --lm-head rtn4")
    if settings.lm_head is None:
        other = "" if settings.profile == "edgellm" else " (or fp16)"
        raise BadInput(
            f"{linear.module} is not quantised, and nothing says how the output matrix is to be stored",
            f"add --lm-head rtn4{other}: rounds it to nearest, in groups; or edgetool quantize ... --quantize-lm-head",
        )
    return settings.lm_head


def check_context(model: BoardModel, max_context: int) -> list[str]:
    """Warnings; raises BadInput where the attention of the model needs what the board has not."""
    model.rope.refuse_context(max_context)
    if model.sliding_window is not None and model.sliding_window < max_context:
        raise BadInput(
            f"the model attends to a sliding window of {model.sliding_window} tokens, and max_context is {max_context}",
            f"use --max-context {model.sliding_window}: within the window nothing slides",
        )
    if model.max_position and max_context > model.max_position:
        return [f"max_context {max_context} is beyond the {model.max_position} positions the model was trained for"]
    return []
