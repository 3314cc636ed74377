"""What a quantised checkpoint is, decided from its tensors; the configuration is only compared.

GPTQ and AWQ share tensor names and differ in shape: GPTQ packs qweight along the inputs, AWQ along the outputs. GPTQ
version 1 and 2 differ in nothing but the zeros' offset of one, which the zeros (and the codes around them) betray.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from edgetool.checkpoints.canonical import BITS, QuantizedLinear, trivial_g_idx
from edgetool.checkpoints.config_claims import claimed_format, compare_claims
from edgetool.checkpoints.formats import FORMATS, Format, Spec
from edgetool.checkpoints.packing import unpack_rows, words_per_row
from edgetool.checkpoints.tensor_file import NUMPY_DTYPES, TensorInfo
from edgetool.errors import BadInput

Array = npt.NDArray[Any]
Read = Callable[[str], Array]

_ZEROS_SAMPLED = 16  # modules whose zeros are looked at, of a checkpoint that is not known
_CODES_SAMPLED = 3  # modules, the smallest, whose codes are looked at too
_SURE = 0.3  # how near to 0 or 1 the mean offset must lie to decide between GPTQ version 2 and 1
_PARTNERS = {"qweight": ("qzeros", "scales"), "weight_packed": ("weight_scale", "weight_shape")}


@dataclass(frozen=True)
class ModuleLayout:
    """One quantised linear as its tensors' shapes tell; `group_size` is the actual one (in_features for one group)."""

    kind: str
    bits: int
    out_features: int
    in_features: int
    group_size: int
    g_idx_trivial: bool


@dataclass(frozen=True)
class QuantizationFound:
    """The quantisation of a checkpoint.

    format: gptq, gptq_v2, awq or compressed-tensors. bits, group_size (-1: one group a row everywhere) and sym hold for
    most modules, desc_act (g_idx is not trivial) for at least one; `layouts` has every module's own. disagreements:
    sentences about modules that differ and about a configuration that says something else than the tensors.
    """

    format: str
    bits: int
    group_size: int
    sym: bool
    desc_act: bool
    modules: tuple[str, ...]
    disagreements: tuple[str, ...]
    layouts: Mapping[str, ModuleLayout]

    @property
    def spec(self) -> Spec:
        return Spec(bits=self.bits, group_size=self.group_size, sym=self.sym, desc_act=self.desc_act)

    def to_dict(self) -> dict[str, Any]:
        """The summary for reports, without the layout of each module."""
        fields = asdict(self)
        fields["modules"] = len(self.modules)
        fields["disagreements"] = list(self.disagreements)
        del fields["layouts"]
        return fields


class Source(Protocol):
    """What `read_linear` needs of a checkpoint."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    def read(self, name: str) -> Array: ...


def detect(
    tensors: Mapping[str, TensorInfo], read: Read, config: Mapping[str, Any], *, written_as: str | None = None
) -> QuantizationFound | None:
    """Find the quantisation of a checkpoint, or None when it holds none of the formats of `FORMATS`.

    tensors: name -> header entry. read(name) -> array. config: the content of config.json. written_as: gptq or gptq_v2
    where the caller has written the tensors and knows; what the zeros suggest is then no finding.
    Reads every g_idx and weight_shape, and of a few modules the zeros and codes. Raises BadInput, naming the module,
    when a quantised module's tensors are incomplete or their shapes fit no format.
    """
    stems = [(name.rpartition("."), name) for name in tensors]
    found = sorted((prefix, suffix) for (prefix, _, suffix), _ in stems if suffix in _PARTNERS)
    if not found:
        return None
    layouts = {prefix: _layout(prefix, suffix, tensors, read) for prefix, suffix in found}
    notes: list[str] = []
    kind = _most(notes, "format", {name: layout.kind for name, layout in layouts.items()})
    bits = _most(notes, "bits", {name: layout.bits for name, layout in layouts.items()})
    grouped = {name: layout.group_size for name, layout in layouts.items() if layout.group_size < layout.in_features}
    group_size = _most(notes, "group_size", grouped) if grouped else -1
    ragged = [name for name, layout in layouts.items() if layout.in_features % layout.group_size]
    if ragged:
        layout = layouts[ragged[0]]
        notes.append(
            f"group_size {layout.group_size} does not divide in_features {layout.in_features} of {ragged[0]}"
            f" ({len(ragged)} modules): no kernel runs this"
        )
    desc_act = any(not layout.g_idx_trivial for layout in layouts.values())
    if kind == "compressed-tensors":
        sym, name = all(f"{module}.weight_zero_point" not in tensors for module in layouts), kind
    else:
        same = {module: layout for module, layout in layouts.items() if (layout.kind, layout.bits) == (kind, bits)}
        claimed_v2 = claimed_format(config) == "gptq_v2"
        sym, name = _from_zeros(kind, bits, same, read, notes, claimed_v2, written_as)
    whole = QuantizationFound(
        format=name,
        bits=bits,
        group_size=group_size,
        sym=sym,
        desc_act=desc_act,
        modules=tuple(layouts),
        disagreements=(),
        layouts=layouts,
    )
    single = {layout.in_features for layout in layouts.values()} if not grouped else set()
    notes += compare_claims(config, name, whole.spec, single)
    return replace(whole, disagreements=tuple(notes))


def read_linear(checkpoint: Source, module: str, found: QuantizationFound) -> QuantizedLinear:
    """One quantised linear of `checkpoint` in canonical form. `module` is one of `found.modules`."""
    target, spec = module_format(found, module)
    return target.read(read_stored(checkpoint, module, target.suffixes), spec, module)


def read_rest(checkpoint: Source, module: str, found: QuantizationFound) -> QuantizedLinear:
    """The same with `absent_codes`: everything but the codes, which are not read from the disk."""
    target, spec = module_format(found, module)
    if target.name == "compressed-tensors" and spec.bits == 3:  # whose codes tell in which of two ways they are packed
        return target.read_rest(read_stored(checkpoint, module, target.suffixes), spec, module)
    codes, *others = target.suffixes
    stored = read_stored(checkpoint, module, others)
    info = checkpoint.tensors[f"{module}.{codes}"]
    # only their shape and dtype are looked at
    stored[codes] = np.broadcast_to(np.zeros((), NUMPY_DTYPES[info.dtype]), info.shape)
    return target.read_rest(stored, spec, module)


def module_format(found: QuantizationFound, module: str) -> tuple[Format, Spec]:
    """The format of one linear, and the specification to read it with."""
    layout = found.layouts[module]
    name = found.format if layout.kind == "gptq" and found.format in ("gptq", "gptq_v2") else layout.kind
    return FORMATS[name], Spec(layout.bits, layout.group_size, found.sym, not layout.g_idx_trivial)


def read_stored(checkpoint: Source, module: str, suffixes: Sequence[str]) -> dict[str, Array]:
    """Suffix -> array as stored, of those tensors of the module that are there."""
    names = {suffix: f"{module}.{suffix}" for suffix in suffixes}
    return {suffix: checkpoint.read(name) for suffix, name in names.items() if name in checkpoint.tensors}


def _layout(module: str, suffix: str, tensors: Mapping[str, TensorInfo], read: Read) -> ModuleLayout:
    for partner in _PARTNERS[suffix]:
        if f"{module}.{partner}" not in tensors:
            raise BadInput(f"{module} has {suffix} but no {partner}")
    shapes = {part: tensors[f"{module}.{part}"].shape for part in (*_PARTNERS[suffix], suffix)}
    if any(len(shape) != 2 or 0 in shape for part, shape in shapes.items() if part != "weight_shape"):
        raise BadInput(f"{module}: {_shown(shapes)}; all must have two dimensions")
    if suffix == "weight_packed":
        kind = "compressed-tensors"
        sizes = read(f"{module}.weight_shape")
        if sizes.shape != (2,) or sizes.dtype.kind not in "iu":
            raise BadInput(f"{module}.weight_shape is {sizes.dtype} {sizes.shape}; must be two whole numbers")
        out_features, in_features = (int(size) for size in sizes)
        groups = shapes["weight_scale"][1]
        bits = _packed_bits(in_features, shapes[suffix][1])
        fits = shapes[suffix][0] == shapes["weight_scale"][0] == out_features and bits is not None
        g_idx_name = f"{module}.weight_g_idx"
    else:
        words, (groups, out_features) = shapes[suffix], shapes["scales"]
        bits = _likeliest_bits(out_features, shapes["qzeros"][1])
        fits = shapes["qzeros"][0] == groups and bits is not None
        if bits == 4 and words[1] == shapes["qzeros"][1]:
            kind, in_features = "awq", words[0]
        else:
            kind, in_features = "gptq", words[0] * 32 // (bits or 4)
            fits = fits and words[1] == out_features and words[0] * 32 % (bits or 4) == 0
        g_idx_name = f"{module}.g_idx"
    if not fits or bits is None or groups > in_features:
        raise BadInput(f"{module}: {_shown(shapes)} fit neither GPTQ, AWQ gemm nor compressed-tensors pack-quantized")
    g_idx = read(g_idx_name) if g_idx_name in tensors and kind != "awq" else None
    if g_idx is not None and g_idx.dtype.kind not in "iu":
        raise BadInput(f"{g_idx_name} is stored as {tensors[g_idx_name].dtype}, not as whole numbers")
    if g_idx is not None and (g_idx.size == 0 or bool(np.all(g_idx == -1))):
        g_idx = None
    if g_idx is not None and (g_idx.shape != (in_features,) or int(g_idx.min()) < 0 or int(g_idx.max()) >= groups):
        raise BadInput(
            f"{g_idx_name} has shape {g_idx.shape} and values {g_idx.min()}..{g_idx.max()}; must be"
            f" {(in_features,)} with groups 0..{groups - 1}"
        )
    size = _group_size(in_features, groups, g_idx)
    if size is None:
        raise BadInput(f"{module}: {groups} groups do not divide in_features {in_features}")
    trivial = g_idx is None or np.array_equal(g_idx, trivial_g_idx(in_features, size))
    return ModuleLayout(kind, bits, out_features, in_features, size, bool(trivial))


def _likeliest_bits(count: int, width: int) -> int | None:
    """Bits with which `count` fields fill `width` words. Of few fields 2, 3 and 4 bits can: then without idle bits."""
    fitting = [bits for bits in BITS if words_per_row(count, bits) == width]
    return min(fitting, key=lambda bits: count * bits % 32 != 0, default=None)


def _packed_bits(in_features: int, width: int) -> int | None:
    """Bits of compressed-tensors' words: dense first, then 0.17's sparse 3 bits."""
    bits = _likeliest_bits(in_features, width)
    if bits is not None:
        return bits
    return 3 if -(-in_features // 10) == width else None


def _group_size(in_features: int, groups: int, g_idx: Array | None) -> int | None:
    if g_idx is not None:
        size = int(np.bincount(g_idx).max())
        if -(-in_features // size) == groups:
            return size
    if in_features % groups == 0:
        return in_features // groups
    return next((size for size in (128, 64, 32, 256, 512) if -(-in_features // size) == groups), None)


def _from_zeros(
    kind: str,
    bits: int,
    layouts: Mapping[str, ModuleLayout],
    read: Read,
    notes: list[str],
    claimed_v2: bool,
    written_as: str | None,
) -> tuple[bool, str]:
    """(symmetric?, format name) of GPTQ or AWQ modules."""
    middle = 1 << (bits - 1)
    names = list(layouts)
    # what has just been written is checked as a whole, what is met is only looked at
    sample = names if written_as is not None else names[:: max(1, -(-len(names) // _ZEROS_SAMPLED))]
    if kind == "awq":
        # All nibbles 8 is a fact that no order of the nibbles changes.
        words = {int(word) for module in sample for word in np.unique(read(f"{module}.qzeros"))}
        return words == {int.from_bytes(b"\x88" * 4, "little", signed=True)}, "awq"
    stored: set[int] = set()
    for module in sample:
        zeros = unpack_rows(read(f"{module}.qzeros"), bits, layouts[module].out_features)
        stored |= set(np.unique(zeros).tolist())
    if written_as is not None:
        return stored == {middle - 1 if written_as == "gptq" else middle}, written_as
    offset = _mean_offset(bits, layouts, read)
    # In 8 bits the codes' own skew is larger than the step that would tell the versions apart.
    telling = bits < 8
    sure = telling and min(abs(offset), abs(offset - 1)) < _SURE
    by_codes = 1 if offset > 0.5 else 2
    if stored in ({middle - 1}, {middle}):
        version, sym = (1 if stored == {middle - 1} else 2), True
        if sure and by_codes != version:
            notes.append(
                f"zeros of {middle - 2 + version} say symmetric GPTQ version {version}, but codes lie {offset:.2f}"
                f" above them on average, which is usual for version {by_codes}"
            )
    else:
        version, sym = by_codes, False
        if not sure:
            version = 2 if claimed_v2 else 1
            if telling:
                notes.append(
                    f"codes lie {offset:.2f} above the stored zeros on average, so the tensors do not tell GPTQ version"
                    f" 1 (near 1) from 2 (near 0); version {version} as config.json says"
                )
    if not sym and version == 1 and (1 << bits) - 1 in stored:
        notes.append("some GPTQ version 1 zeros are stored as all ones: readers disagree about them; read as 0 here")
    return sym, "gptq" if version == 1 else "gptq_v2"


def _mean_offset(bits: int, layouts: Mapping[str, ModuleLayout], read: Read) -> float:
    """How far codes lie above their stored zero on average: near 0 for version 2, near 1 for version 1.

    Trained weights have a mean of nearly zero, so codes scatter around the zero point that is meant; thousands of
    groups average out what single groups deviate.
    """
    total, count = 0.0, 0
    smallest = sorted(layouts, key=lambda module: layouts[module].in_features * layouts[module].out_features)
    for module in smallest[:_CODES_SAMPLED]:
        layout = layouts[module]
        codes = unpack_rows(read(f"{module}.qweight").T, bits, layout.in_features)
        zeros = unpack_rows(read(f"{module}.qzeros"), bits, layout.out_features)
        if layout.g_idx_trivial and layout.in_features % layout.group_size == 0:
            mean_zero = float(zeros.mean())  # groups are of equal size, so no weighting is needed
        else:
            members = np.bincount(read(f"{module}.g_idx"), minlength=zeros.shape[0])
            mean_zero = float((zeros.mean(axis=1) * members).sum() / members.sum())
        total += (float(codes.mean()) - mean_zero) * codes.size
        count += codes.size
    return total / count


def _most(notes: list[str], what: str, values: Mapping[str, Any]) -> Any:
    counts = Counter(values.values())
    common, _ = counts.most_common(1)[0]
    for value, count in counts.items():
        if value != common:
            first = next(name for name, other in values.items() if other == value)
            notes.append(f"{what} is {value} in {count} modules ({first} ...) and {common} in most")
    return common


def _shown(shapes: Mapping[str, Sequence[int]]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
