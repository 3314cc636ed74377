"""Writing an image to a device: every byte at its address, read back, and nothing else overwritten."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from edgetool.errors import BadInput, ResourceUnavailable, VerificationFailed
from edgetool.fpga.push import push
from edgetool.progress import NullProgress
from tests.fakes.quantized_models import Made

Compiled = Callable[..., tuple[Made, Path]]


def test_every_segment_is_at_its_dma_address(compiled: Compiled, tmp_path: Path) -> None:
    _, image = compiled("llama")
    device = tmp_path / "board"
    device.touch()
    found = push(image, device, 1, NullProgress())
    with device.open("rb") as file:
        for pc in (0, 1, 17, 31):
            content = (image / f"hbm/pc{pc:02d}.bin").read_bytes()
            file.seek(pc << 28)
            assert file.read(len(content)) == content
        ddr = (image / "ddr.bin").read_bytes()
        file.seek(0x200000000)
        assert file.read() == ddr
    assert found["bytes_written"] == found["bytes_verified"] == 32 * len(content) + len(ddr)
    assert device.stat().st_blocks * 512 < 1 << 28  # sparse: the 8 GiB between take no room
    push(image, device, 1, NullProgress())  # what stood in for a board once may do so again


def test_h2c_is_read_back_through_c2h(compiled: Compiled, tmp_path: Path) -> None:
    _, image = compiled("llama")
    for name in ("xdma0_h2c_0", "xdma0_c2h_0"):
        (tmp_path / name).touch()
    with pytest.raises(VerificationFailed, match="does not come back") as found:
        push(image, tmp_path / "xdma0_h2c_0", 1, NullProgress())
    assert "c2h" in found.value.message  # two files are no board: nothing came back on the other
    (tmp_path / "xdma0_c2h_0").unlink()
    (tmp_path / "xdma0_c2h_0").symlink_to(tmp_path / "xdma0_h2c_0")
    os.truncate(tmp_path / "xdma0_h2c_0", 0)
    assert push(image, tmp_path / "xdma0_h2c_0", 1, NullProgress())["read_back_from"].endswith("xdma0_c2h_0")


def test_a_damaged_image_is_not_pushed(compiled: Compiled, tmp_path: Path) -> None:
    import shutil

    image = Path(shutil.copytree(compiled("llama")[1], tmp_path / "image"))
    with (image / "ddr.bin").open("r+b") as file:
        file.write(b"\xff")
    device = tmp_path / "board"
    device.touch()
    with pytest.raises(VerificationFailed, match=r"ddr\.bin"):
        push(image, device, 1, NullProgress())
    assert device.stat().st_size == 0


def test_what_is_no_device_is_refused(compiled: Compiled, tmp_path: Path) -> None:
    _, image = compiled("llama")
    with pytest.raises(ResourceUnavailable, match="No such file"):
        push(image, tmp_path / "xdma0_h2c_0", 1, NullProgress())
    thesis = tmp_path / "thesis.txt"
    thesis.write_text("years of work")
    with pytest.raises(BadInput, match="other content"):
        push(image, thesis, 1, NullProgress())
    assert thesis.read_text() == "years of work"
    with pytest.raises(BadInput, match="neither"):
        push(image, tmp_path, 1, NullProgress())
