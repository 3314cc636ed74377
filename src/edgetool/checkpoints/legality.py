"""Who can run a quantised checkpoint: pure tables, asked before the long job starts.

The conditions of vLLM are those of version 0.32 (its loaders `auto_gptq.py`, `auto_awq.py`, `compressed_tensors*` and
the `can_implement` of each class in `kernels/linear/mixed_precision`), gptqmodel's those of 7.6 (`SUPPORTS_*` of its
torch kernels), the board's those of the VCU128 design.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

VLLM_VERSION = "0.32"

_MARLIN_GROUPS = (-1, 32, 64, 128)
_NEED_ONE_GROUP_PER_ROW = (
    "vLLM 0.32 dropped activation order at run time (desc_act); order inside static groups is fine"
)


@dataclass(frozen=True)
class KernelVerdict:
    """Whether one kernel, or one board profile, takes a checkpoint. `why`: the reason when not, the limits when so."""

    name: str
    ok: bool
    why: str


@dataclass(frozen=True)
class _Kernel:
    name: str
    needs: str
    sym_bits: tuple[int, ...]  # codes with the fixed middle zero
    asym_bits: tuple[int, ...]  # codes with stored zeros (AWQ always has them)
    groups: tuple[int, ...] | None  # None: any even size or -1
    multiples: tuple[int, int] = (1, 1)  # in_features, out_features
    capabilities: tuple[float, float] | None = (0.0, 99.0)  # lowest and highest of NVIDIA GPUs; None: runs on CPUs


_VLLM_KERNELS = (
    _Kernel("vLLM CPU", "any x86 or Arm CPU", (4,), (4,), None, (32, 32), None),
    _Kernel("vLLM Machete", "Hopper GPU (9.0)", (4, 8), (4, 8), (-1, 64, 128), (64, 128), (9.0, 9.0)),
    _Kernel("vLLM Marlin", "NVIDIA GPU from 7.5", (4, 8), (4,), _MARLIN_GROUPS, (1, 1), (7.5, 99.0)),
    _Kernel("vLLM Conch", "GPU from 8.0, package conch-triton-kernels", (4, 8), (4, 8), (-1, 128), (1, 1), (8.0, 99.0)),
    _Kernel("vLLM ExLlama", "GPU from 6.0, float16 activations", (4, 8), (), (32, 64, 128, 256), (1, 1), (6.0, 99.0)),
    _Kernel("vLLM Triton W4A16", "NVIDIA or AMD GPU", (4,), (4,), (-1, 32, 64, 128, 256), (1, 8)),
    _Kernel(
        "vLLM Humming", "NVIDIA GPU from 7.5, package humming", (2, 3, 4, 8), (2, 3, 4, 8), None, (1, 1), (7.5, 99.0)
    ),
)


def kernels(
    format_name: str,
    bits: int,
    group_size: int,
    sym: bool,
    desc_act: bool,
    shapes: Iterable[tuple[int, int]] = (),
) -> list[KernelVerdict]:
    """A verdict for each kernel of vLLM, and for gptqmodel's own (which transformers uses).

    format_name: a name of `formats.FORMATS`. group_size: -1 for one group a row. desc_act: g_idx is not trivial.
    shapes: (in_features, out_features) of the layers, where known, for kernels that want multiples.
    """
    verdicts = _vllm(_VLLM_KERNELS, format_name, bits, group_size, sym, desc_act, set(shapes))
    verdicts.append(_gptqmodel(format_name, bits, group_size, desc_act))
    return verdicts


def vllm_kernels(
    capability: float | None,
    format_name: str,
    bits: int,
    group_size: int,
    sym: bool,
    desc_act: bool,
    shapes: Iterable[tuple[int, int]] = (),
) -> list[KernelVerdict]:
    """As `kernels`, only for what one device has: an NVIDIA GPU of this compute capability (8.9), or a CPU (None)."""
    there = []
    for kernel in _VLLM_KERNELS:
        span = kernel.capabilities
        if (span is None) == (capability is None) and (
            span is None or capability is None or span[0] <= capability <= span[1]
        ):
            there.append(kernel)
    return _vllm(there, format_name, bits, group_size, sym, desc_act, set(shapes))


def _vllm(
    there: Sequence[_Kernel],
    format_name: str,
    bits: int,
    group_size: int,
    sym: bool,
    desc_act: bool,
    known: set[tuple[int, int]],
) -> list[KernelVerdict]:
    loader = _vllm_loader(format_name, bits, group_size, sym, desc_act)
    verdicts = []
    for kernel in there:
        reason = loader or _vllm_kernel(kernel, format_name, bits, group_size, sym, known)
        if reason is None and kernel.name == "vLLM CPU" and format_name.startswith("gptq") and bits != 4:
            reason = "4 bits only"
        verdicts.append(KernelVerdict(kernel.name, reason is None, reason or f"needs: {kernel.needs}"))
    return verdicts


def vcu128(
    bits: int, group_size: int, sym: bool, desc_act: bool, head_dim: int, qk_norm: bool = False
) -> list[KernelVerdict]:
    """A verdict for each image profile of compile-vcu128; `why` of a refusal names everything that stands against it.

    head_dim: channels an attention head. qk_norm: whether queries and keys are normalised (Qwen3).
    """
    common = [f"bits {bits}: the array multiplies 4-bit codes"] if bits != 4 else []
    board = list(common)
    if group_size != 128:
        board.append(f"group_size {group_size}: must be 128")
    if not sym:
        board.append("asymmetric: zero points cannot be stored (--requant sym rounds again)")
    if head_dim != 128:
        board.append(f"head_dim {head_dim}: must be 128")
    if desc_act:
        board.append("desc_act: quantise without --desc-act (order inside static groups is fine)")
    if qk_norm:
        board.append("query and key norms are not in the board's operations")
    simulator = list(common)
    if group_size not in (32, 64, 128):
        simulator.append(f"group_size {group_size}: must be 32, 64 or 128")
    if head_dim % 32:
        simulator.append(f"head_dim {head_dim}: must be a multiple of 32")
    notes = {
        "edgellm": "byte-compatible with the board",
        "sim": "desc_act is folded or gathered" if desc_act else "it fits",
    }
    return [
        KernelVerdict(f"vcu128 {profile}", not reasons, "; ".join(reasons) or notes[profile])
        for profile, reasons in (("edgellm", board), ("sim", simulator))
    ]


def _vllm_loader(format_name: str, bits: int, group_size: int, sym: bool, desc_act: bool) -> str | None:
    """What vLLM refuses while it reads the configuration, before it looks for a kernel."""
    if format_name in ("gptq", "gptq_v2"):
        if desc_act and group_size != -1:
            return _NEED_ONE_GROUP_PER_ROW
        if not sym:
            return "vLLM 0.32 reads GPTQ with sym only; awq or compressed-tensors hold asymmetric codes"
        if bits not in (4, 8):
            return f"vLLM 0.32 reads GPTQ with 4 or 8 bits, not {bits}"
        if group_size not in _MARLIN_GROUPS:
            return f"group_size {group_size}; vLLM reads GPTQ with {', '.join(map(str, _MARLIN_GROUPS))}"
    elif format_name == "awq":
        if bits != 4:
            return f"AWQ has 4 bits only, not {bits}"
    elif format_name == "compressed-tensors":
        if desc_act:
            return _NEED_ONE_GROUP_PER_ROW
    else:
        return f"vLLM has no reader for {format_name}"
    return None


def _vllm_kernel(
    kernel: _Kernel, format_name: str, bits: int, group_size: int, sym: bool, shapes: set[tuple[int, int]]
) -> str | None:
    stored_zeros = format_name == "awq" or not sym
    can = kernel.asym_bits if stored_zeros else kernel.sym_bits
    if bits not in can:
        kind = "with zero points" if stored_zeros else "symmetric"
        return f"{bits} bits {kind}: can {', '.join(map(str, can))}" if can else f"no codes {kind}"
    if kernel.groups is not None and group_size not in kernel.groups:
        return f"group_size {group_size}: can {', '.join(map(str, kernel.groups))}"
    if kernel.groups is None and group_size != -1 and group_size % 2:
        return f"group_size {group_size}: must be even"
    for in_features, out_features in sorted(shapes):
        for label, size, multiple in zip(
            ("in_features", "out_features"), (in_features, out_features), kernel.multiples, strict=True
        ):
            if size % multiple:
                return f"{label} {size} is not a multiple of {multiple}"
    return None


def _gptqmodel(format_name: str, bits: int, group_size: int, desc_act: bool) -> KernelVerdict:
    name = "gptqmodel torch"
    if format_name in ("gptq", "gptq_v2"):
        groups: tuple[int, ...] = (-1, 16, 32, 64, 128, 256, 512, 1024)
        ok = bits in (2, 3, 4, 8) and group_size in groups
    elif format_name == "awq":
        groups = (-1, 16, 32, 64, 128)
        ok = bits == 4 and group_size in groups and not desc_act
    else:
        return KernelVerdict(name, False, f"reads GPTQ and AWQ, not {format_name}")
    limits = f"bits {bits}, group_size {group_size}: can group_size {', '.join(map(str, groups))}"
    return KernelVerdict(name, ok, "needs: any device, slow; also what transformers runs" if ok else limits)
