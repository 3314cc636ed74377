"""From a checkpoint to a whole plan of its image, in an explicit order of passes. Nothing is written here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetool.checkpoints.checkpoint import Checkpoint
from edgetool.checkpoints.detect import QuantizationFound, detect, read_rest
from edgetool.checkpoints.rounding import MIDDLE
from edgetool.errors import BadInput
from edgetool.fpga import estimate, plan, profiles
from edgetool.fpga.halves import to_half
from edgetool.fpga.layout import MatrixLayout, bias_words
from edgetool.fpga.model import BoardModel, Linear, Norm, board_model
from edgetool.fpga.order import Orders, fold_order
from edgetool.fpga.program import Program, buffers_of, build_program
from edgetool.fpga.settings import DEFAULT_CONTEXT_TOKENS, CompileSettings
from edgetool.fpga.tables import ENTRIES, exp_table, silu_table
from edgetool.fpga.weights import HalfMatrix, Jobs, Matrix, PackedMatrix, RoundedMatrix, unrepresentable

Array = npt.NDArray[Any]


@dataclass
class Draft:
    """What the passes fill in, one after the other."""

    checkpoint: Checkpoint
    settings: CompileSettings
    spec: str
    """The model as the user named it, for commands in hints."""
    found: QuantizationFound = field(init=False)
    model: BoardModel = field(init=False)
    asymmetric: dict[str, int] = field(default_factory=dict)
    max_context: int = 0
    orders: Orders = field(default_factory=Orders)
    matrices: tuple[Matrix, ...] = ()
    hbm: plan.HbmPlan = field(init=False)
    ddr: plan.DdrPlan = field(init=False)
    program: Program = field(init=False)
    estimate: dict[str, Any] = field(default_factory=dict)
    lm_head: str = ""
    warnings: list[str] = field(default_factory=list)

    def constant(self, constant: plan.Constant, jobs: Jobs) -> Array:
        """The content of one array of ddr.bin, as `constant` describes it."""
        values = _constant_values(self, constant.name, jobs)
        assert values.dtype == np.dtype(constant.dtype) and values.shape == constant.shape, constant
        return values


def compile_plan(checkpoint: Checkpoint, settings: CompileSettings, spec: str) -> Draft:
    """Run all passes. Raises BadInput for whatever cannot be compiled; reads only headers, g_idx and zero points."""
    draft = Draft(checkpoint, settings, spec)
    for one in PASSES:
        one(draft)
    return draft


def read_quantization(draft: Draft) -> None:
    """What the checkpoint is, from its tensors."""
    checkpoint = draft.checkpoint
    found = detect(checkpoint.tensors, checkpoint.read, checkpoint.config)
    if found is None:
        model = board_model(checkpoint, None)  # an architecture that cannot be compiled is the better news
        raise profiles.refuse_unquantized(checkpoint, model, draft.spec, draft.settings)
    draft.found = found
    draft.warnings += list(found.disagreements)


def read_architecture(draft: Draft) -> None:
    """Sizes, tensors and their roles."""
    draft.model = board_model(draft.checkpoint, draft.found)


def read_zeros(draft: Draft) -> None:
    """Which modules have zero points other than 8: all of them are looked at, no configuration is believed."""
    checkpoint, found = draft.checkpoint, draft.found
    for module in {linear.module for linear in draft.model.linears()} & set(found.layouts):
        if found.layouts[module].bits != profiles.BITS:
            continue  # refused later, or rounded again
        count = int(np.count_nonzero(read_rest(checkpoint, module, found).zeros != MIDDLE))
        if count:
            draft.asymmetric[module] = count


def check_options(draft: Draft) -> None:
    """What was asked for against what is there."""
    profiles.check_given(draft.found, draft.settings, draft.spec)
    profiles.check_profile(draft.model, draft.found, draft.settings, draft.asymmetric, draft.spec)
    head = draft.model.lm_head
    draft.lm_head = profiles.check_lm_head(head, head.module in draft.found.layouts, draft.settings)


def settle_context(draft: Draft) -> None:
    """max_context, as given or 2048 (less where the model was trained for less)."""
    given, trained = draft.settings.max_context, draft.model.max_position
    draft.max_context = given or min(DEFAULT_CONTEXT_TOKENS, trained or DEFAULT_CONTEXT_TOKENS)
    draft.warnings += profiles.check_context(draft.model, draft.max_context)


def fold_activation_order(draft: Draft) -> None:
    """Columns in the order of their groups, and the gathers that this needs."""
    kept = {linear.name for linear in draft.model.linears() if not _rounded(draft, linear)}
    draft.orders = fold_order(draft.model, draft.checkpoint, draft.found, kept)


def choose_matrices(draft: Draft) -> None:
    """How each matrix is stored and where its weights come from."""
    group = profiles.effective_group(draft.found, draft.settings)
    matrices: list[Matrix] = []
    for linear in draft.model.linears():
        layout = draft.found.layouts.get(linear.module)
        if linear.role == "lm_head" and draft.lm_head == "fp16":
            matrices.append(HalfMatrix(linear, MatrixLayout(linear.n, linear.k, 0)))
        elif layout is None or _rounded(draft, linear):
            matrices.append(RoundedMatrix(linear, MatrixLayout(linear.n, linear.k, group)))
        else:
            zeros = linear.module in draft.asymmetric
            matrices.append(
                PackedMatrix(
                    linear,
                    MatrixLayout(linear.n, linear.k, layout.group_size, zeros),
                    draft.orders.rows.get(linear.name),
                    draft.orders.columns.get(linear.name),
                )
            )
    draft.matrices = tuple(matrices)


def _rounded(draft: Draft, linear: Linear) -> bool:
    """Whether --requant rounds this matrix again: only where its codes cannot be kept."""
    layout = draft.found.layouts.get(linear.module)
    if layout is None or draft.settings.requant is None:
        return False
    group = profiles.effective_group(draft.found, draft.settings)
    keeps_order = layout.g_idx_trivial or (draft.settings.profile == "sim" and draft.settings.desc_act is not False)
    return not (
        layout.bits == profiles.BITS
        and layout.group_size == group
        and linear.module not in draft.asymmetric
        and keeps_order
    )


def place_in_hbm(draft: Draft) -> None:
    """Addresses of weights and KV cache; refuses what does not fit."""
    layouts = [(matrix.linear.name, matrix.layout) for matrix in draft.matrices]
    draft.hbm = plan.plan_hbm(layouts, draft.model.sizes, draft.max_context)


def place_in_ddr(draft: Draft) -> None:
    """Addresses of constants and activations."""
    model = draft.model
    constants: list[tuple[str, str, str | None, str, tuple[int, ...]]] = []
    for norm in model.all_norms():
        constants.append((norm.name, "norm", norm.tensor, "float16", (2, norm.channels)))
    for matrix in draft.matrices:
        constants.append((f"{matrix.linear.name}.bias", "bias", matrix.linear.bias, "int32", (matrix.layout.padded_n,)))
    for name, order in draft.orders.constants.items():
        constants.append((name, "order", None, "uint32", order.shape))
    half = model.rope.rotary_dim // 2
    positions = draft.hbm.kv.capacity_tokens
    constants += [(f"rope.{part}", "table", None, "float16", (positions, half)) for part in ("cos", "sin")]
    constants += [(f"table.{function}", "table", None, "float16", (ENTRIES,)) for function in ("silu", "exp")]
    draft.ddr = plan.plan_ddr(constants, buffers_of(model, draft.orders.gathers, draft.hbm.kv.capacity_tokens))


def build_operations(draft: Draft) -> None:
    """The program."""
    draft.program = build_program(
        draft.model, draft.orders.gathers, draft.ddr.buffers, draft.ddr.chunk_tokens, draft.max_context
    )


def estimate_speed(draft: Draft) -> None:
    """Tokens a second, as a range."""
    layers = draft.model.sizes.layers
    macs = sum(matrix.layout.macs for matrix in draft.matrices if matrix.linear.role != "lm_head")
    draft.estimate = estimate.estimate(
        draft.hbm.weight_read_bytes, draft.hbm.kv_bytes_per_token, layers, macs, draft.max_context
    )


def check_encoding(draft: Draft) -> None:
    """signmag has no -8: refuse with a count of all of them before anything is written."""
    if draft.settings.int4 != "signmag":
        return
    counts = {
        matrix.linear.module: count
        for matrix in draft.matrices
        if isinstance(matrix, PackedMatrix) and (count := unrepresentable(matrix, draft.checkpoint, draft.found))
    }
    if counts:
        first = next(iter(counts))
        raise BadInput(
            f"{sum(counts.values())} weights in {len(counts)} modules are -8, which --int4 signmag cannot hold"
            f" ({first}: {counts[first]})",
            "use --int4 twos, or --requant sym to round the weights again",
        )


PASSES: tuple[Callable[[Draft], None], ...] = (
    read_quantization,
    read_architecture,
    read_zeros,
    check_options,
    settle_context,
    fold_activation_order,
    choose_matrices,
    place_in_hbm,
    place_in_ddr,
    build_operations,
    estimate_speed,
    check_encoding,
)
"""In this order."""


def _constant_values(draft: Draft, name: str, jobs: Jobs) -> Array:
    norms = {norm.name: norm for norm in draft.model.all_norms()}
    if name in norms:
        return _gamma_and_beta(norms[name], jobs)
    if name in draft.orders.constants:
        return draft.orders.constants[name].astype("<u4")
    if name.startswith("rope."):
        cos, sin = draft.model.rope.tables(draft.hbm.kv.capacity_tokens)
        return cos if name == "rope.cos" else sin
    if name.startswith("table."):
        return silu_table() if name == "table.silu" else exp_table()
    matrix = next(one for one in draft.matrices if f"{one.linear.name}.bias" == name)
    return bias_words(_bias(draft, matrix.linear, jobs), matrix.layout)


def _gamma_and_beta(norm: Norm, jobs: Jobs) -> Array:
    info = jobs.checkpoint.tensors[norm.tensor]
    values = np.zeros((2, norm.channels), dtype=np.float16)
    values[0] = to_half(jobs.checkpoint.read(norm.tensor), info.dtype, norm.tensor, jobs.losses)
    return values


def _bias(draft: Draft, linear: Linear, jobs: Jobs) -> Array | None:
    if linear.bias is None:
        return None
    stored = jobs.checkpoint.read(linear.bias)[linear.start : linear.start + linear.n]
    values = to_half(stored, jobs.checkpoint.tensors[linear.bias].dtype, linear.bias, jobs.losses)
    order = draft.orders.rows.get(linear.name)
    return values if order is None else values[order]
