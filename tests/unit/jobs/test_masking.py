"""Command lines without their secrets."""

from __future__ import annotations

import pytest

from edgetool.jobs.masking import masked


@pytest.mark.parametrize(
    ("typed", "shown"),
    [
        (["--api-key", "k1", "demo"], ["--api-key", "***", "demo"]),
        (["--api-key=k1"], ["--api-key=***"]),
        (["--", "--hf-token", "t", "--seed", "3"], ["--", "--hf-token", "***", "--seed", "3"]),
        (["--api-key", "--api-key", "demo"], ["--api-key", "***", "demo"]),
        (["http://user:pass@host:80/v1"], ["http://***@host:80/v1"]),
        (["--keys-file", "keys.txt"], ["--keys-file", "keys.txt"]),
        (["--max-tokens", "5"], ["--max-tokens", "5"]),
        (["quantize", "demo", "-o", "out"], ["quantize", "demo", "-o", "out"]),
    ],
)
def test_values_of_secret_options_become_stars(typed: list[str], shown: list[str]) -> None:
    assert masked(typed, []) == shown


def test_a_known_secret_is_masked_wherever_it_stands() -> None:
    assert masked(["--header", "Bearer sesame", "sesame"], ["sesame", ""]) == ["--header", "Bearer ***", "***"]
