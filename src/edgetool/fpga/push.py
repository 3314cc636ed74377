"""Writes an image into the board's memory by DMA, and reads all of it back.

Xilinx' XDMA driver maps the position in /dev/xdma0_h2c_0 (host to card) onto the card's address; /dev/xdma0_c2h_0 is
for reading. Any empty file stands in for a device: what a position is in one is a position in the other.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgetool.errors import BackendFailed, BadInput, ResourceUnavailable, VerificationFailed
from edgetool.fpga.hardware import VCU128
from edgetool.fpga.image import Image
from edgetool.progress import Progress

_CHUNK_BYTES = 4 << 20


def push(directory: Path, device: Path, threads: int, progress: Progress) -> dict[str, Any]:
    """Check the image, write its HBM and DDR segments to `device` at their addresses, read back and compare.

    Raises ResourceUnavailable where the device cannot be opened, BadInput for a place that must not be written,
    BackendFailed for a transfer that fails, VerificationFailed for what comes back otherwise.
    """
    _check_device(device)
    image = Image.open(directory)
    progress.note("checking every hash of the image")
    image.check_hashes(threads)
    segments = [one for one in image.manifest["segments"] if one["space"] in ("hbm", "ddr")]
    total = sum(segment["bytes"] for segment in segments)
    with progress.task("write", total, "B") as task:
        target = _open(device, os.O_WRONLY)
        try:
            for segment in segments:
                for address, piece in _pieces(image, segment):
                    _write(target, address, piece, device)
                    task.advance(len(piece))
        finally:
            os.close(target)
    back = _readable(device)
    with progress.task("read back", total, "B") as task:
        source = _open(back, os.O_RDONLY)
        try:
            for segment in segments:
                for address, piece in _pieces(image, segment):
                    _compare(source, address, piece, back)
                    task.advance(len(piece))
        finally:
            os.close(source)
    return {
        "image": str(directory),
        "device": str(device),
        "read_back_from": str(back),
        "segments_written": len(segments),
        "bytes_written": total,
        "bytes_verified": total,
    }


def address_of(segment: Mapping[str, Any]) -> int:
    """DMA address of a segment's first byte."""
    if segment["space"] == "hbm":
        return VCU128.pc_address(segment["pc"], segment["addr"])
    return int(segment["addr"])


def _pieces(image: Image, segment: Mapping[str, Any]) -> Any:
    with (image.directory / segment["file"]).open("rb") as file:
        address = address_of(segment)
        while piece := file.read(_CHUNK_BYTES):
            yield address, piece
            address += len(piece)


def _check_device(device: Path) -> None:
    """A slip of the hand must cost neither a disk nor a document."""
    try:
        found = device.stat()
    except OSError as error:
        raise ResourceUnavailable(
            f"device {device}: {error.strerror}", "is the XDMA driver loaded? (ls /dev/xdma*)"
        ) from error
    if stat.S_ISCHR(found.st_mode):
        return
    if stat.S_ISBLK(found.st_mode):
        raise BadInput(f"device {device} is a disk; a board is a character device such as /dev/xdma0_h2c_0")
    if not stat.S_ISREG(found.st_mode):
        raise BadInput(f"device {device} is neither a character device nor a file")
    if 0 < found.st_size <= VCU128.ddr_base:
        raise BadInput(
            f"{device} is a file with other content ({found.st_size:,} bytes), which would be overwritten",
            "give an empty file to stand in for the board: truncate -s 0 FILE",
        )


def _readable(device: Path) -> Path:
    """Where to read back: XDMA has a channel for each direction."""
    if "h2c" in device.name:
        other = device.with_name(device.name.replace("h2c", "c2h"))
        if other.exists():
            return other
    return device


def _open(path: Path, flags: int) -> int:
    try:
        return os.open(path, flags | os.O_CLOEXEC)
    except OSError as error:
        raise ResourceUnavailable(f"device {path}: {error.strerror}", "are you allowed to use it? (ls -l)") from error


def _write(target: int, address: int, piece: bytes, device: Path) -> None:
    done = 0
    while done < len(piece):
        try:
            count = os.pwrite(target, memoryview(piece)[done:], address + done)
        except OSError as error:
            raise BackendFailed(f"writing to {device} at {address + done:#x}: {error.strerror}") from error
        if count == 0:
            raise BackendFailed(f"writing to {device} at {address + done:#x}: no byte was taken")
        done += count


def _compare(source: int, address: int, piece: bytes, device: Path) -> None:
    done = 0
    while done < len(piece):
        try:
            back = os.pread(source, len(piece) - done, address + done)
        except OSError as error:
            raise BackendFailed(f"reading {device} at {address + done:#x}: {error.strerror}") from error
        if not back or back != piece[done : done + len(back)]:
            at = next((i for i, (a, b) in enumerate(zip(back, piece[done:], strict=False)) if a != b), 0)
            raise VerificationFailed(
                f"{device}: what was written at {address + done + at:#x} does not come back",
                "write it again; if that does not help, the board's memory or its bitstream is faulty",
            )
        done += len(back)
