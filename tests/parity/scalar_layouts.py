"""What each stored format means, one weight at a time: the oracle that the vectorised readers are held against.

Written from the formats' own packers (AutoGPTQ's `pack`, autoawq's `gemm` order, compressed-tensors' `pack_to_int32`),
in plain loops over Python integers, sharing nothing with edgetool.
"""

from __future__ import annotations

import numpy as np

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def word(array, *index) -> int:
    return int(array[index]) & 0xFFFFFFFF


def gptq_field(words: list[int], index: int, bits: int) -> int:
    """Field `index` of words that AutoGPTQ packed."""
    if bits != 3:
        per_word = 32 // bits
        return words[index // per_word] >> (bits * (index % per_word)) & ((1 << bits) - 1)
    first, second, third = words[index // 32 * 3 : index // 32 * 3 + 3]
    j = index % 32
    if j < 10:
        return first >> (3 * j) & 7
    if j == 10:
        return first >> 30 | (second & 1) << 2
    if j < 21:
        return second >> (3 * (j - 11) + 1) & 7
    if j == 21:
        return second >> 31 | (third & 3) << 1
    return third >> (3 * (j - 22) + 2) & 7


def gptq_weight(t, bits: int, version: int, o: int, i: int) -> np.float32:
    code = gptq_field([word(t["qweight"], row, o) for row in range(t["qweight"].shape[0])], i, bits)
    group = int(t["g_idx"][i])
    zero = gptq_field([word(t["qzeros"], group, c) for c in range(t["qzeros"].shape[1])], o, bits)
    if version == 1:
        zero = (zero + 1) % (1 << bits)
    return np.float32(t["scales"][group, o]) * np.float32(code - zero)


def awq_weight(t, group_size: int, o: int, i: int) -> np.float32:
    nibble = AWQ_ORDER.index(o % 8)
    code = word(t["qweight"], i, o // 8) >> (4 * nibble) & 15
    zero = word(t["qzeros"], i // group_size, o // 8) >> (4 * nibble) & 15
    return np.float32(t["scales"][i // group_size, o]) * np.float32(code - zero)


def dense_field(words: list[int], index: int, bits: int) -> int:
    stream = sum(value << (32 * k) for k, value in enumerate(words))
    return stream >> (bits * index) & ((1 << bits) - 1)


def compressed_weight(t, bits: int, group_size: int, o: int, i: int) -> np.float32:
    packed = t["weight_packed"]
    half = 1 << (bits - 1)
    signed = dense_field([word(packed, o, c) for c in range(packed.shape[1])], i, bits) - half
    group = int(t["weight_g_idx"][i]) if "weight_g_idx" in t else i // group_size
    zero = 0
    if "weight_zero_point" in t:
        zeros = t["weight_zero_point"]
        zero = dense_field([word(zeros, r, group) for r in range(zeros.shape[0])], o, bits) - half
    return np.float32(t["weight_scale"][o, group]) * np.float32(signed - zero)


def whole(weight, out_features: int, in_features: int) -> np.ndarray:
    """float32 [out_features, in_features] from `weight(o, i)`."""
    return np.array([[weight(o, i) for i in range(in_features)] for o in range(out_features)], dtype=np.float32)


# --- writing: what a layer of plain integers looks like in each format


def stream(fields: list[int], bits: int) -> list[int]:
    """Fields one after the other from bit 0 of word 0 on, as words; a field may cross from one word into the next."""
    binary = [f"{value:0{bits}b}" for value in range(1 << bits)]
    digits = "".join(binary[field] for field in reversed(fields))
    number = int(digits, 2)
    return [number >> place & 0xFFFFFFFF for place in range(0, len(digits), 32)]


def _array(rows: list[list[int]]) -> np.ndarray:
    return np.array(rows, dtype=np.uint32).view(np.int32)


def _turned(rows: list[list[int]]) -> list[list[int]]:
    return [list(column) for column in zip(*rows, strict=True)]


def gptq_tensors(codes, zeros, scales, g_idx, bits: int, version: int) -> dict[str, np.ndarray]:
    """codes [out][in], zeros [out][groups], g_idx [in] as lists; scales [out, groups] as stored."""
    stored = [[(zero - 1) % (1 << bits) if version == 1 else zero for zero in row] for row in zeros]
    return {
        "qweight": _array(_turned([stream(row, bits) for row in codes])),
        "qzeros": _array([stream(row, bits) for row in _turned(stored)]),
        "scales": np.array(scales.T, order="C"),
        "g_idx": np.array(g_idx, dtype=np.int32),
    }


def awq_tensors(codes, zeros, scales) -> dict[str, np.ndarray]:
    def shuffled(rows: list[list[int]]) -> np.ndarray:
        moved = [[row[8 * (k // 8) + AWQ_ORDER[k % 8]] for k in range(len(row))] for row in rows]
        return _array([stream(row, 4) for row in moved])

    return {
        "qweight": shuffled(_turned(codes)),
        "qzeros": shuffled(_turned(zeros)),
        "scales": np.array(scales.T, order="C"),
    }


def compressed_tensors(codes, zeros, scales, g_idx, bits: int, sym: bool) -> dict[str, np.ndarray]:
    """g_idx None: no activation order."""
    tensors = {
        "weight_packed": _array([stream(row, bits) for row in codes]),
        "weight_scale": np.array(scales, order="C"),
        "weight_shape": np.array([len(codes), len(codes[0])], dtype=np.int64),
    }
    if not sym:
        tensors["weight_zero_point"] = _array(_turned([stream(row, bits) for row in _turned(zeros)]))
    if g_idx is not None:
        tensors["weight_g_idx"] = np.array(g_idx, dtype=np.int32)
    return tensors
