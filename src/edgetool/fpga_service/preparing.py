"""What `serve-fpga` finds out, and refuses, before it starts anything: packages, image, keys, and what to lease."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from edgetool.config import Config, FpgaHostConfig, ServeFpgaConfig
from edgetool.errors import ConfigError
from edgetool.fpga_service.keys import read_keys
from edgetool.progress import Progress
from edgetool.runs import need_packages
from edgetool.scheduler.inventory import Inventory
from edgetool.scheduler.leasing import Request
from edgetool.serving.secrets import Key, choose_key
from edgetool.serving.starting import is_loopback

if TYPE_CHECKING:
    from edgetool.fpga.image import Image

_SPARE_BYTES = 1 << 30
"""Memory of a GPU besides the image: activations, and what CUDA itself takes."""


def need_extra(settings: ServeFpgaConfig) -> None:
    """Raise MissingDependency where a package is missing; none is imported, which would cost seconds."""
    need_packages("serve-fpga", "fpga", "fastapi", "uvicorn", "prometheus_client")
    if settings.image is not None or settings.tokenizer is not None:
        need_simulator("serve-fpga")


def need_simulator(command: str) -> None:
    """Raise MissingDependency where `command` could not run the simulator."""
    need_packages(command, "fpga", "torch", "transformers")


def checked_image(settings: ServeFpgaConfig) -> Image | None:
    """The image, opened so that a bad one is refused before anything is leased. Its hashes are the host's to check."""
    if settings.image is None:
        return None
    from edgetool.fpga.image import Image

    image = Image.open(settings.image)
    held = _image_tokens(image)
    if settings.max_model_len is not None and settings.max_model_len > held:
        raise ConfigError(
            f"max_model_len {settings.max_model_len} is more than the {held} tokens that {settings.image} was made for",
            f"use --max-model-len {held}, or compile it with --max-context {settings.max_model_len}",
        )
    return image


def _image_tokens(image: Image) -> int:
    return int(image.manifest["kv"]["max_ctx"])


def context_tokens(settings: ServeFpgaConfig, image: Image | None) -> int | None:
    """Longest context; None where only the host knows."""
    if settings.max_model_len is not None or image is None:
        return settings.max_model_len
    return _image_tokens(image)


def client_keys(config: Config, progress: Progress | None) -> tuple[Mapping[str, str], Key | None]:
    """The keys by name, and one that was made here. None are needed where only this machine can ask."""
    settings = config.serve_fpga
    keys = {} if settings.keys_file is None else read_keys(settings.keys_file)
    given = config.common.server_key() is not None
    if given or (not keys and not is_loopback(settings.listen)):
        if "default" in keys:
            raise ConfigError("a key is given, and the keys file names another one default", "rename it in the file")
        if progress is None:
            return {**keys, "default": ""}, None if given else Key("", True)
        key = choose_key(config, progress)
        return {**keys, "default": key.text}, key if key.generated else None
    if not keys and progress is not None:
        progress.note("no key is set: everybody on this machine can ask; set EDGETOOL_API_KEY to change that")
    return keys, None


def requests(settings: ServeFpgaConfig | FpgaHostConfig, image: Image | None, inventory: Inventory) -> list[Request]:
    """What may be leased, the best first; a port comes to each."""
    if image is None:
        return [Request()]
    request = Request(board=board_of(settings))
    if settings.numerics != "fast" or settings.device == "cpu" or (settings.device == "auto" and not inventory.gpus):
        return [request]
    bytes_on_board = sum(int(segment["bytes"]) for segment in image.manifest["segments"])
    with_gpu = replace(request, gpus=1, min_free_bytes=bytes_on_board + _SPARE_BYTES)
    return [with_gpu] if settings.device == "cuda" else [with_gpu, request]


def board_of(settings: ServeFpgaConfig | FpgaHostConfig) -> str:
    """Name of the board: the one that was asked for, or a simulated one of this process."""
    return settings.board or f"sim-{os.getpid()}"
