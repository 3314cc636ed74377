"""Leases while processes are killed at random: 200 kills, no double grant, nothing leaked, nobody left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.other_user import NOBODY

ROOT = Path(__file__).parents[3]


@pytest.fixture
def directory() -> Iterator[Path]:
    # not tmp_path, which other users cannot enter
    with tempfile.TemporaryDirectory() as made:
        Path(made).chmod(0o1777)
        yield Path(made)


def campaign(directory: Path, *options: str) -> Any:
    command = [sys.executable, "-m", "tests.fakes.lease_campaign", str(directory), *options]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("seed", [1, 2])
def test_no_kill_makes_a_double_grant_a_leaked_lease_or_an_orphan_that_stays(directory: Path, seed: int) -> None:
    other_users = ["--uids", str(NOBODY)] if os.geteuid() == 0 else []
    seen = campaign(directory, "--kills", "120", "--seed", str(seed), *other_users)
    assert seen["kills"] == 120
    assert seen["crashes"] == []
    assert seen["ends"] == {"-9": 120}  # each was alive when it was killed
    assert seen["grants"] > 50
    assert seen["reaped"] > 0
    assert seen["violations"] == []
    assert seen["left"] == {"running": [], "leases": None, "files": [], "waiting": 0}


@pytest.mark.parametrize("broken", ["no lock", "no inheritance"])
def test_the_judge_sees_what_the_lock_and_the_inheritance_prevent(directory: Path, broken: str) -> None:
    assert campaign(directory, "--kills", "50", "--broken", broken)["violations"]
