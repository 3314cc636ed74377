"""Sizes of the tests' images: tiny, and fitting no multiple of anything."""

from __future__ import annotations

from tests.fakes.quantized_models import Shape

SMALL = Shape(layers=2, hidden=96, ffn=160, heads=3, kv_heads=1, head_dim=32, vocab=70)
LONG_ROWS = Shape(layers=1, hidden=64, ffn=576, heads=2, kv_heads=1, head_dim=32, vocab=40)
"""Rows of more than one package, with groups of 32."""
WIDE_ROWS = Shape(layers=1, hidden=256, ffn=384, heads=2, kv_heads=2, head_dim=128, vocab=33)
"""For groups of 64 and 128; sums over more than one block of lanes."""
SMALLEST = Shape(layers=1, hidden=64, ffn=64, heads=2, kv_heads=1, head_dim=32, vocab=34)
"""So little work that plain loops manage a long context."""
