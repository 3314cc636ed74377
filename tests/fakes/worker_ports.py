"""Ports of this worker of the tests: each scheduler has leases of its own, so nothing else keeps two tests apart."""

from __future__ import annotations

import os


def worker_number() -> int:
    """0, 1, ...: which of pytest-xdist's workers this is, or works for; 0 without it."""
    return int("".join(filter(str.isdigit, os.environ.get("PYTEST_XDIST_WORKER", "0"))))


def worker_ports(first: int, count: int, workers: int) -> tuple[int, int]:
    """First and last of `count` ports, of a block from `first` on for so many workers."""
    begin = first + worker_number() % workers * count
    return begin, begin + count - 1
