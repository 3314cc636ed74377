"""The tables of SiLU and exp, entry by entry against the standard library."""

from __future__ import annotations

import math

import numpy as np

from edgetool.fpga.tables import exp_table, silu_table

HALVES = np.arange(65536, dtype=np.uint16).view(np.float16)


def same(got: np.float16, exact: float) -> bool:
    expected = np.float16(exact) if abs(exact) < 65520 else np.float16(math.copysign(math.inf, exact))
    return bool(got == expected)


def test_every_finite_entry_is_the_exact_value_rounded_once() -> None:
    silu, exp = silu_table(), exp_table()
    for index, x in enumerate(HALVES):
        value = float(x)
        if not math.isfinite(value):
            continue
        exact_exp = math.exp(value) if value < 700 else math.inf
        sigmoid = 1 / (1 + math.exp(-value)) if value > -700 else 0.0
        assert same(exp[index], exact_exp), value
        assert same(silu[index], value * sigmoid), value


def test_infinities_and_nan_have_the_limits() -> None:
    silu, exp = silu_table(), exp_table()
    plus, minus, nan = 0x7C00, 0xFC00, 0x7E00
    assert np.isposinf(silu[plus]) and silu[minus] == 0 and np.isnan(silu[nan])
    assert np.isposinf(exp[plus]) and exp[minus] == 0 and np.isnan(exp[nan])
