"""The directory of the socket between a gateway and its host."""

from __future__ import annotations

import os
import stat
import time
from pathlib import Path

import pytest

from edgetool.fpga_service.embedded import private_directory


def test_only_its_owner_can_enter_it_and_it_is_gone_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with private_directory() as path:
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
        (path / "host.sock").touch()
    assert list(tmp_path.iterdir()) == []


def test_what_killed_gateways_left_is_removed_and_what_living_ones_hold_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    hour_ago = time.time() - 3600
    left, young, other = (tmp_path / name for name in ("edgetool-board-left", "edgetool-board-young", "another"))
    for path in (left, young, other):
        path.mkdir()
    (left / "host.sock").touch()
    with private_directory() as held:
        for path in (left, other, held):
            os.utime(path, (hour_ago, hour_ago))
        with private_directory():
            assert not left.exists()
            assert held.exists() and young.exists() and other.exists()
