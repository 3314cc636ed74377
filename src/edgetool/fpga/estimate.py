"""How fast the board should be: two formulas and their terms. An estimate, labelled so wherever it is shown.

    t_decode  = (W + KV(context)) / (efficiency x port rate) + layers x 0.23 ms
    t_prefill = tokens x MACs / (4096 x 140 MHz)

Published for EdgeLLM (arXiv 2407.21325): a 4096 x 4096 product in 38.5 us (76 % of the port rate), Qwen-7B at 42.5 to
69.4 tokens/s, GLM-6B with 3 of 8 weights kept at 85.8 tokens/s and 56.86 W. No board was measured by this project.
"""

from __future__ import annotations

from typing import Any

from edgetool.fpga.hardware import VCU128, Hardware

DECODE_FORMULA = "tokens/s = 1 / ((weight_read_bytes + kv_read_bytes) / (efficiency x port_rate) + layers x overhead)"
PREFILL_FORMULA = "tokens/s = compute_clock x int4_macs_per_cycle / macs_per_token"


def decode_tokens_per_s(
    weight_read_bytes: int, kv_read_bytes: int, layers: int, efficiency: float, hardware: Hardware = VCU128
) -> float:
    """Tokens a second of one sequence, each reading all weights and the whole KV cache once."""
    reading_s = (weight_read_bytes + kv_read_bytes) / (efficiency * hardware.port_bytes_per_s)
    return 1.0 / (reading_s + layers * hardware.layer_overhead_s)


def prefill_tokens_per_s(macs_per_token: int, hardware: Hardware = VCU128) -> float:
    """Tokens a second of a long prompt, bound by the 4-bit array; attention and lm_head come on top."""
    return hardware.compute_clock_hz * hardware.int4_macs_per_cycle / macs_per_token


def estimate(
    weight_read_bytes: int,
    kv_bytes_per_token: int,
    layers: int,
    macs_per_token: int,
    max_context: int,
    hardware: Hardware = VCU128,
) -> dict[str, Any]:
    """The estimate as the manifest and the report hold it.

    decode_tokens_per_s [low, high]: low with the full context at the lower efficiency, high with an empty context at
    the higher one. by_context: the same range for contexts between. terms: every number that goes in.
    """

    def rate(context: int, efficiency: float) -> float:
        read = context * kv_bytes_per_token
        return round(decode_tokens_per_s(weight_read_bytes, read, layers, efficiency, hardware), 2)

    low, high = hardware.efficiency_low, hardware.efficiency_high
    contexts = sorted({0, max_context // 4, max_context // 2, max_context})
    bound = 0.75 * hardware.port_bytes_per_s / weight_read_bytes
    return {
        "label": "estimate: formulas below, no board was measured",
        "decode_tokens_per_s": [rate(max_context, low), rate(0, high)],
        "prefill_tokens_per_s": round(prefill_tokens_per_s(macs_per_token, hardware), 1),
        "decode_bound_tokens_per_s": round(bound, 1),
        "by_context": [
            {"context_tokens": context, "decode_tokens_per_s": [rate(context, low), rate(context, high)]}
            for context in contexts
        ],
        "formulas": {"decode": DECODE_FORMULA, "prefill": PREFILL_FORMULA},
        "terms": {
            "weight_read_bytes": weight_read_bytes,
            "kv_bytes_per_token": kv_bytes_per_token,
            "max_context_tokens": max_context,
            "port_rate_bytes_per_s": hardware.port_bytes_per_s,
            "efficiency": [low, high],
            "layers": layers,
            "overhead_s_per_layer": hardware.layer_overhead_s,
            "macs_per_token": macs_per_token,
            "int4_macs_per_cycle": hardware.int4_macs_per_cycle,
            "compute_clock_hz": hardware.compute_clock_hz,
        },
    }
