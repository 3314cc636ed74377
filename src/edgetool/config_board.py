"""Settings of the commands that answer from a compiled image: serve-fpga, fpga-host and chat."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from edgetool.config_values import Address, Count, Duration, HomeDirectory, HomePath, Section, only_numbers, setting
from edgetool.errors import ConfigError

ListenAddress = Annotated[str, Field(min_length=1)]
AnyPort = Annotated[int, BeforeValidator(only_numbers), Field(ge=0, le=65_535)]
BoardName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:-]{0,63}$")]
HostAndPort = Annotated[str, Field(pattern=r"^(\[[0-9A-Fa-f:.]+\]|[^\s/:\[\]]+):\d{1,5}$")]
Temperature = Annotated[float, BeforeValidator(only_numbers), Field(ge=0, le=2)]

IMAGE = "image directory that compile-vcu128 has written, to be run by the simulator"
NUMERICS = "et1 = bit for bit as docs/image-format.md defines; fast = nearly so, and much faster"
COMPUTES = "where fast numerics are computed; auto = CUDA where there is a device"
BOARD = "board to lease (default: a simulated one of its own)"


def split_at_port(address: str) -> tuple[str, int]:
    """(host, port) of `host:port` or `[v6]:port`."""
    host, _, port = address.rpartition(":")
    return host.removeprefix("[").removesuffix("]"), int(port)


def _words(value: object) -> object:
    """`a,b` in a variable or option is the list ["a", "b"] of a file."""
    return [item.strip() for item in value.split(",") if item.strip()] if isinstance(value, str) else value


class FpgaHostConfig(Section):
    """Settings of `edgetool fpga-host`."""

    required: ClassVar = {"image": "--image"}
    uses = ("scheduler",)

    image: HomeDirectory | None = setting(None, IMAGE, "an image directory")
    listen: ListenAddress = setting("127.0.0.1", "address to listen on; 0.0.0.0 = all of this machine", "an address")
    port: AnyPort = setting(8124, "port of protocol A; 0 = a free one", "a number from 0 to 65535")
    protocol: Literal["A", "B", "both"] = setting(
        "A", "what is spoken: A = frames of JSON and text, B = frames of token ids", "A, B or both"
    )
    port_b: AnyPort = setting(8123, "port of protocol B; 0 = a free one", "a number from 0 to 65535")
    board: BoardName | None = setting(None, BOARD, "letters, digits and . _ : - (64 at most)")
    numerics: Literal["et1", "fast"] = setting("et1", NUMERICS, "et1 or fast")
    device: Literal["auto", "cpu", "cuda"] = setting("auto", COMPUTES, "auto, cpu or cuda")
    threads: Count | None = setting(None, "CPU threads (default: one per core)", "a number of at least 1")
    max_queue: Count = setting(256, "requests that may wait for the device", "a number of at least 1")
    timeout_s: Annotated[Duration, Field(gt=0)] = setting(
        600.0, "longest time for one request, its wait included", "a time such as 600 or 10m", option="--timeout"
    )
    wait_s: Duration = setting(
        0.0, "how long to wait for a board that is not free", "a time such as 90, 10m or 2h", option="--wait"
    )


class ServeFpgaConfig(Section):
    """Settings of `edgetool serve-fpga`."""

    uses = ("scheduler",)

    image: HomeDirectory | None = setting(None, IMAGE, "an image directory")
    host: HostAndPort | None = setting(
        None, "a running host of a board (edgetool fpga-host) to pass on to", "HOST:PORT"
    )
    listen: ListenAddress = setting("127.0.0.1", "address to listen on; 0.0.0.0 = all of this machine", "an address")
    port: AnyPort = setting(7000, "port to listen on; 0 = a free one", "a number from 0 to 65535")
    served_model_name: Annotated[str, Field(min_length=1)] | None = setting(
        None, "name that clients ask for (default: that of the image, or what the host says)", "a name"
    )
    max_model_len: Annotated[int, BeforeValidator(only_numbers), Field(ge=2)] | None = setting(
        None, "longest context in tokens (default: that of the image)", "a number from 2"
    )
    temperature: Temperature | None = setting(
        None, "temperature where a request gives none (default: the model's own, else 1)", "a number from 0 to 2"
    )
    max_queue: Count = setting(64, "requests that may wait; one more is answered 429", "a number of at least 1")
    timeout_s: Annotated[Duration, Field(gt=0)] = setting(
        600.0, "longest time for one request, its wait included", "a time such as 600 or 10m", option="--timeout"
    )
    keys_file: HomePath | None = setting(
        None, "file with a line NAME KEY for each client, readable by its owner only", "a file"
    )
    rate_limit: Count | None = setting(
        None, "requests a minute for each key (default: no limit)", "a number of at least 1"
    )
    record: HomePath | None = setting(None, "JSONL file to add a line to for each request", "a file")
    record_contents: bool = setting(False, "record prompts and answers too", "true or false")
    cors_origins: Annotated[tuple[str, ...], BeforeValidator(_words)] = setting(
        (), "web origins whose pages may ask, with commas (default: none)", "origins such as https://chat.example.org"
    )
    tokenizer: HomeDirectory | None = setting(
        None, "tokenizer directory to count usage with, for hosts that do not count", "a directory"
    )
    board: BoardName | None = setting(None, BOARD, "letters, digits and . _ : - (64 at most)")
    numerics: Literal["et1", "fast"] = setting("et1", NUMERICS, "et1 or fast")
    device: Literal["auto", "cpu", "cuda"] = setting("auto", COMPUTES, "auto, cpu or cuda")
    threads: Count | None = setting(None, "CPU threads (default: one per core)", "a number of at least 1")
    wait_s: Duration = setting(
        0.0, "how long to wait for a board that is not free", "a time such as 90, 10m or 2h", option="--wait"
    )
    ready_timeout_s: Duration = setting(
        300.0, "time that the host gets to become ready", "a time such as 300 or 5m", option="--ready-timeout"
    )
    restarts: Annotated[int, BeforeValidator(only_numbers), Field(ge=0)] = setting(
        10, "start the simulated host again so often when it fails", "a number of at least 0"
    )
    drain_s: Duration = setting(
        0.0, "time that answers under way get to end when it is stopped", "a time such as 30 or 1m", option="--drain"
    )
    grace_s: Duration = setting(
        10.0, "time after that until what still runs is killed", "a time such as 10 or 1m", option="--grace"
    )
    state_dir: HomeDirectory = setting(
        Path("~/.local/state/edgetool/boards"),
        "where logs of hosts are kept ($XDG_STATE_HOME/edgetool/boards when that is set)",
        "a directory",
        option="",
    )
    dry_run: bool = setting(False, "show the plan and start nothing", "true or false")

    @model_validator(mode="after")
    def _fits_together(self) -> ServeFpgaConfig:
        if self.image is not None and self.host is not None:
            raise ConfigError(
                f"--image {self.image} and --host {self.host} exclude each other", "--image starts a host of its own"
            )
        if self.host is not None and not 1 <= split_at_port(self.host)[1] <= 65_535:
            raise ConfigError(f"--host {self.host} has no port from 1 to 65535", "for instance 127.0.0.1:8124")
        if self.record_contents and self.record is None:
            raise ConfigError("--record-contents is of no use without --record", "add --record FILE")
        return self


class ChatConfig(Section):
    """Settings of `edgetool chat`."""

    url: Address | None = setting(
        None, "address of an OpenAI endpoint, with or without /v1", "an address", option="URL"
    )
    image: HomeDirectory | None = setting(None, "image directory to talk to without a server", "an image directory")
    model: str | None = setting(None, "model to ask for (default: the only one served)", "a name")
    message: str | None = setting(None, "one question; print its answer and stop", "text")
    system: str | None = setting(None, "what the model is told before the first question", "text")
    temperature: Temperature | None = setting(
        None, "how freely tokens are drawn (default: left to the server)", "a number from 0 to 2"
    )
    top_p: Annotated[float, BeforeValidator(only_numbers), Field(gt=0, le=1)] | None = setting(
        None,
        "draw among the likeliest tokens that make up this share (default: left to the server)",
        "above 0, up to 1",
    )
    max_tokens: Count | None = setting(
        None, "longest answer in tokens (default: what the context holds)", "a number of at least 1"
    )
    seed: Annotated[int, BeforeValidator(only_numbers), Field(ge=0)] | None = setting(
        None, "seed of the drawing", "a number of at least 0"
    )
    timeout_s: Annotated[Duration, Field(gt=0)] = setting(
        600.0, "longest wait for the next word", "a time such as 600 or 10m", option="--timeout"
    )
    numerics: Literal["et1", "fast"] = setting("et1", NUMERICS, "et1 or fast")
    device: Literal["auto", "cpu", "cuda"] = setting("auto", COMPUTES, "auto, cpu or cuda")
    threads: Count | None = setting(None, "CPU threads (default: one per core)", "a number of at least 1")

    @model_validator(mode="after")
    def _fits_together(self) -> ChatConfig:
        if self.url is not None and self.image is not None:
            raise ConfigError(f"{self.url} and --image {self.image} exclude each other", "leave one of them out")
        return self
