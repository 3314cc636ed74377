"""The commands that a recipe can chain, and what the pipeline has to know of each."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """One command of the command line.

    section: of the configuration. source: the key of what it reads. serves: it runs until it is stopped, and writes no
    directory. owned: further keys that the pipeline sets itself.
    """

    name: str
    section: str
    source: str
    serves: bool = False
    owned: frozenset[str] = frozenset()

    @property
    def set_by_us(self) -> frozenset[str]:
        """Keys that no recipe may set."""
        return self.modes | {self.source, "output", "resume", "overwrite"}

    @property
    def modes(self) -> frozenset[str]:
        """Those that would make it do something else, wherever they are set."""
        return self.owned | {"dry_run"}


COMMANDS = {
    command.name: command
    for command in (
        Command("quantize", "quantize", "model", owned=frozenset({"compare"})),
        Command("convert", "convert", "source", owned=frozenset({"fix_config"})),
        Command("eval", "eval", "model", owned=frozenset({"compare", "endpoint"})),
        Command(
            "compile-vcu128",
            "compile_vcu128",
            "model",
            owned=frozenset({"inspect", "diff", "extract", "verify", "verify_run", "push", "device"}),
        ),
        Command(
            "serve-gpu",
            "serve_gpu",
            "model",
            serves=True,
            owned=frozenset({"detach", "list_servers", "stop", "with_model"}),
        ),
        Command("serve-fpga", "serve_fpga", "image", serves=True, owned=frozenset({"host"})),
    )
}
