"""What other quantisers can do, so that a run that cannot end well is refused before it starts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from edgetool.config import QuantizeConfig
from edgetool.errors import BadInput


@dataclass(frozen=True)
class Peer:
    """One tool.

    Attributes:
        name: as in `--backend`, and of its environment.
        script: module of edgetool/backends/jobs that drives it.
        formats: method -> the format that it writes.
        bits: method -> widths that it can do.
        symmetric: method -> whether sym must be so; methods that are not here do both.
        cuda_only: why it needs CUDA; None where it does not.
        desc_act: it can store an activation order.
        lm_head: it can quantise lm_head.
        damp: it has a damping to set.
        own_method: it rounds in a way of its own under the name of `gptq`.
    """

    name: str
    script: str
    formats: Mapping[str, str]
    bits: Mapping[str, tuple[int, ...]]
    symmetric: Mapping[str, bool]
    cuda_only: str | None = None
    desc_act: bool = False
    lm_head: bool = False
    damp: bool = True
    own_method: str | None = None

    def method(self, method: str) -> str:
        """What a result of `method` is called."""
        return self.own_method or method if method == "gptq" else method


_ALL = (2, 3, 4, 8)
PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer(
            "gptqmodel",
            "gptqmodel",
            formats={"gptq": "gptq", "awq": "awq"},
            bits={"gptq": _ALL, "awq": (4,)},
            symmetric={"awq": False},
            desc_act=True,
        ),
        Peer(
            "llmcompressor",
            "llmcompressor",
            formats=dict.fromkeys(("gptq", "awq", "rtn"), "compressed-tensors"),
            bits=dict.fromkeys(("gptq", "awq", "rtn"), (4, 8)),
            symmetric={},
        ),
        Peer(
            "auto-round",
            "auto_round",
            formats={"gptq": "gptq", "rtn": "gptq"},
            bits={"gptq": _ALL, "rtn": _ALL},
            symmetric={},
            damp=False,
            own_method="auto-round",
        ),
        Peer(
            "auto-gptq",
            "auto_gptq",
            formats={"gptq": "gptq"},
            bits={"gptq": _ALL},
            symmetric={},
            cuda_only="auto-gptq quantises on CUDA only",
            desc_act=True,
        ),
        Peer(
            "autoawq",
            "autoawq",
            formats={"awq": "awq"},
            bits={"awq": (4,)},
            symmetric={"awq": False},
            cuda_only="autoawq quantises on CUDA only (on a CPU it corrupts weights without a word)",
            damp=False,
        ),
    )
}

NATIVE_ONLY = ("scale_search", "awq_scaling", "asymmetric_calibration", "bias_correction", "shrinkage")
"""Settings of edgetool's own engine."""


def check(config: QuantizeConfig, peer: Peer, device: str) -> None:
    """Raise BadInput for the first thing that `peer` cannot do, naming a backend that can."""
    for what, hint in _refusals(config, peer, device):
        raise BadInput(f"backend {peer.name}: {what}", hint)


def _refusals(config: QuantizeConfig, peer: Peer, device: str) -> Iterator[tuple[str, str]]:
    if config.method not in peer.formats:
        yield f"it has no method {config.method}", _others(config, device, "--method " + " or ".join(peer.formats))
        return
    if peer.cuda_only is not None and not device.startswith("cuda"):
        yield f"{peer.cuda_only}, and the device is {device}", _others(config, device)
    if config.bits not in peer.bits[config.method]:
        widths = ", ".join(map(str, peer.bits[config.method]))
        yield f"{config.method} has {widths} bits there, not {config.bits}", _others(config, device)
    if peer.symmetric.get(config.method, config.sym) != config.sym:
        word = "asymmetric" if config.sym else "symmetric"
        yield f"its {config.method} is {word} only", _others(config, device, "--asym" if config.sym else "--sym")
    if config.desc_act and not peer.desc_act:
        yield "it stores no activation order (g_idx)", _others(config, device, "leave --desc-act out")
    if config.quantize_lm_head and not peer.lm_head:
        yield "its lm_head cannot be taken over", "use --backend native"
    if config.resume:
        yield "it cannot be resumed: it keeps nothing between layers", "use --backend native, or --overwrite"
    defaults = QuantizeConfig.model_fields
    for key in NATIVE_ONLY if peer.damp else (*NATIVE_ONLY, "damp"):
        if getattr(config, key) != defaults[key].default:
            yield f"it has no {key}", f"leave --{key.replace('_', '-')} out, or use --backend native"


def _others(config: QuantizeConfig, device: str, otherwise: str = "") -> str:
    """The backends that can do what is asked for, or what to change instead."""
    able = ["native"]
    for peer in PEERS.values():
        fits = (
            config.method in peer.formats
            and config.bits in peer.bits[config.method]
            and peer.symmetric.get(config.method, config.sym) == config.sym
            and (peer.desc_act or not config.desc_act)
            and (peer.cuda_only is None or device.startswith("cuda"))
        )
        if fits:
            able.append(peer.name)
    return f"use --backend {' or '.join(able)}" + (f", or {otherwise}" if otherwise else "")
