"""The numerics `et1` of docs/image-format.md in plain loops over single numbers, one token at a time: slow and simple.

Written from the document, for tiny images. Sums that must be exact are sums of Python's integers; everything in fp32 is
one numpy scalar operation after the other. Matrices come from `scalar_reader.py`; nothing of the simulator is used.
"""

from __future__ import annotations

from operator import mul
from pathlib import Path
from typing import Any

import numpy as np

from edgetool.fpga.image import Image
from edgetool.fpga.scalar_reader import ScalarReader

F16, F32 = np.float16, np.float32


def tree(products: list[np.float32]) -> np.float32:
    """Blocks of 128 lanes by a binary tree, missing lanes 0; blocks one after the other onto 0."""
    total = F32(0)
    for start in range(0, len(products), 128):
        lanes = products[start : start + 128]
        lanes = lanes + [F32(0)] * (128 - len(lanes))
        width = 64
        while width:
            lanes = [lanes[i] + lanes[i + width] for i in range(width)]
            width //= 2
        total = total + lanes[0]
    return total


def fixed(x: np.float16) -> int:
    """x * 2^24, which is a whole number for every finite fp16."""
    scaled = float(x) * 2.0**24
    assert scaled == int(scaled)
    return int(scaled)


def prepared(xs: list[np.float16]) -> list[int] | list[float]:
    """All of `xs` as whole numbers for `exact_sum`, or as floats where one is infinite or NaN."""
    return [fixed(x) for x in xs] if all(np.isfinite(x) for x in xs) else [float(x) for x in xs]


def exact_sum(xs: list[int] | list[float], qs: list[int]) -> np.float32:
    """The sum of x * q, rounded to fp32 once; by IEEE 754 where some x is infinite or NaN. xs: as `prepared`."""
    whole = sum(map(mul, xs, qs))
    if isinstance(whole, float):
        return F32(whole)
    assert abs(whole) < 2**53
    return F32(whole * 2.0**-24)


class ScalarEt1:
    """One sequence through the image at `directory`. `results` has every operation's: (part, layer, number) -> values.

    The results of a token are those of the last call of `feed`.
    """

    def __init__(self, directory: Path) -> None:
        self.image = Image.open(directory)
        self.program = self.image.program
        self.ports = [np.asarray(self.image.port(pc)) for pc in range(32)]
        self.matrices: dict[str, Any] = {}
        self.constants: dict[str, np.ndarray] = {}
        self.cache: dict[tuple[int, str], list[list[np.float16]]] = {}
        self.position = 0
        self.results: dict[tuple[str, int, int], Any] = {}

    def feed(self, token: int) -> list[np.float16]:
        """Logits of one token behind those that were fed before."""
        self.token = token
        self.buffers: dict[str, Any] = {}
        with np.errstate(all="ignore"):
            for part, layers in (("prologue", 1), ("layer", self.program["layers"]), ("epilogue", 1)):
                for layer in range(layers):
                    for number, op in enumerate(self.program[part]):
                        self._do(part, layer, number, op)
        self.position += 1
        return self.buffers["logits"]

    def _do(self, part: str, layer: int, number: int, op: dict[str, Any]) -> None:
        self.layer = layer
        self.fields = {
            key: value.replace("{layer}", str(layer)) if isinstance(value, str) else value for key, value in op.items()
        }
        source = self.buffers.get(self.fields.get("in"))
        result = getattr(self, f"_{op['op'].lower()}")(source)
        if "out" in op:
            self.buffers[op["out"]] = result
        self.results[part, layer, number] = result

    def constant(self, key: str) -> np.ndarray:
        name = self.fields[key]
        if name not in self.constants:
            self.constants[name] = self.image.constant(name)
        return self.constants[name]

    def matrix(self, name: str) -> tuple[list[list[int]] | np.ndarray, Any, Any]:
        if name not in self.matrices:
            record = self.image.tensors[name]
            reader, rows = ScalarReader(self.ports, record, self.image.encoding), np.arange(record["N"])
            if record["group"]:
                scales, offsets = reader.scales(rows)
                self.matrices[name] = reader.codes(rows).tolist(), scales, offsets if record["zeros"] else None
            else:
                self.matrices[name] = reader.halves(rows), None, None
        return self.matrices[name]

    def _embed(self, source: Any) -> list[np.float16]:
        embedding = self.image.manifest["embedding"]
        rows = np.fromfile(self.image.directory / embedding["file"], "<f2").reshape(embedding["shape"])
        return list(rows[self.token])

    def _rmsnorm(self, source: list[np.float16]) -> list[np.float16]:
        width, eps = self.fields["width"], F32(self.fields["eps"])
        gamma, beta = self.constant("gamma")
        out = []
        for start in range(0, len(source), width):
            run = [F32(x) for x in source[start : start + width]]
            root = np.sqrt(tree([x * x for x in run]) / F32(width) + eps)
            out += [F16(x / root * F32(g) + F32(b)) for x, g, b in zip(run, gamma, beta, strict=True)]
        return out

    def _perm(self, source: list[np.float16]) -> list[np.float16]:
        return [source[i] for i in self.constant("index")]

    def _mvm(self, source: list[np.float16]) -> list[np.float16]:
        record = self.image.tensors[self.fields["weight"]]
        values, scales, offsets = self.matrix(self.fields["weight"])
        words = self.constant("bias").view(np.uint32)
        biases = (words & 0xFFFF).astype(np.uint16).view(F16)
        out = []
        starts = range(0, record["K"], record["group"] or record["K"])
        groups = [prepared(source[start : start + record["group"]]) for start in starts]
        for n in range(record["N"]):
            acc = F32(0)
            if record["group"]:
                for g, (start, xs) in enumerate(zip(starts, groups, strict=True)):
                    acc = acc + F32(scales[n, g]) * exact_sum(xs, values[n][start : start + record["group"]])
                    if offsets is not None:
                        acc = acc + F32(offsets[n, g]) * exact_sum(xs, [1] * len(xs))
            else:
                acc = tree([F32(x) * F32(w) for x, w in zip(source, values[n], strict=True)])
            acc = acc + F32(biases[n])
            if "residual" in self.fields:
                acc = acc + F32(self.buffers[self.fields["residual"]][n])
            if "mul" in self.fields:
                acc = acc * F32(self.buffers[self.fields["mul"]][n])
            out.append(F16(acc))
        return out

    def _rope(self, source: list[np.float16]) -> list[np.float16]:
        width, turned = self.fields["head_dim"], self.fields["rotary_dim"]
        cosines, sines = self.constant("cos")[self.position], self.constant("sin")[self.position]
        out = list(source)
        for head in range(self.fields["heads"]):
            for i in range(turned // 2):
                pair = (i, i + turned // 2) if self.fields["style"] == "half" else (2 * i, 2 * i + 1)
                first, second = (head * width + lane for lane in pair)
                a, b, c, s = (F32(x) for x in (source[first], source[second], cosines[i], sines[i]))
                out[first], out[second] = F16(a * c - b * s), F16(b * c + a * s)
        return out

    def _kv_write(self, source: list[np.float16]) -> list[np.float16]:
        self.cache.setdefault((self.layer, self.fields["cache"]), []).append(source)
        return source

    def _head(self, row: list[np.float16], head: int) -> list[np.float16]:
        width = self.fields["head_dim"]
        return row[head * width : (head + 1) * width]

    def _qk(self, source: list[np.float16]) -> list[list[np.float16]]:
        heads, kv_heads = self.fields["heads"], self.fields["kv_heads"]
        out = []
        for h in range(heads):
            query = self._head(source, h)
            keys = [self._head(row, h * kv_heads // heads) for row in self.cache[self.layer, "k"]]
            sums = [tree([F32(a) * F32(b) for a, b in zip(query, key, strict=True)]) for key in keys]
            out.append([F16(one * F32(self.fields["scale"])) for one in sums])
        return out

    def _softmax(self, source: list[list[np.float16]]) -> list[list[np.float16]]:
        table = self.constant("exp")
        out = []
        for row in source:
            m = np.max(row)
            e = [table[F16(F32(score) - F32(m)).view(np.uint16)] for score in row]
            total = tree([F32(one) for one in e])
            out.append([F16(F32(one) / total) for one in e])
        return out

    def _pv(self, source: list[list[np.float16]]) -> list[np.float16]:
        heads, kv_heads = self.fields["heads"], self.fields["kv_heads"]
        out = []
        for h in range(heads):
            values = [self._head(row, h * kv_heads // heads) for row in self.cache[self.layer, "v"]]
            for lane in range(self.fields["head_dim"]):
                weighted = [F32(p) * F32(v[lane]) for p, v in zip(source[h], values, strict=True)]
                out.append(F16(tree(weighted)))
        return out

    def _act(self, source: list[np.float16]) -> list[np.float16]:
        table = self.constant("table")
        return [table[x.view(np.uint16)] for x in source]

    def _logits(self, source: list[np.float16]) -> list[np.float16]:
        return source

    def _argmax(self, source: list[np.float16]) -> int:
        best = 0
        for i, x in enumerate(source):
            if x > source[best]:
                best = i
        return best
