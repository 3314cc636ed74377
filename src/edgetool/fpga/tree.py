"""The file tree of EdgeLLM's own tools, for `--emit edgellm-tree`: the bytes of the image under other names.

BLOCKnn/ holds a layer, OutLayer/ the final norm and lm_head. The names are those that its public compiler's generated
code loads (`dlavm`'s BLOCK_write_data).
"""

from __future__ import annotations

from edgetool.fpga.hardware import VCU128
from edgetool.fpga.model import Linear

_STEPS = {
    "q": ("MVM_BN", "MVMBN0_q"),
    "k": ("MVM_BN", "MVMBN0_k"),
    "v": ("MVM_BN", "MVMBN0_v"),
    "gate": ("MVM_BN", "MVMBN1"),
    "o": ("MVM_BN_RES", "MVMBNRES0"),
    "up": ("MVM_BN_RES", "MVMBNRES1"),
    "down": ("MVM_BN_RES", "MVMBNRES2"),
    "lm_head": ("MVM_BN", "MVMBN_Argmax"),
}
"""Role -> (kind of operation, its step)."""

_NORMS = {"input_norm": "LN0", "post_norm": "LN1", "final_norm": "LN"}


def weight_files(linear: Linear) -> list[str]:
    """The 32 files of a matrix, port by port; each holds the port's bytes without padding behind."""
    kind, step = _STEPS[linear.role]
    folder = f"{_block(linear.name)}/{kind}_write_to_HBM_bin"
    return [f"{folder}/{step}_HBM_DDR_{port:02d}.bin" for port in range(VCU128.pseudo_channels)]


def bias_file(linear: Linear) -> str:
    """Multiplier and bias of each output channel."""
    kind, step = _STEPS[linear.role]
    return f"{_block(linear.name)}/{kind}_DDR_bin/{step}_wt_and_bias_in_DDR.bin"


def norm_file(name: str) -> str:
    """gamma, then beta."""
    return f"{_block(name)}/LN_DDR_bin/{_NORMS[name.rpartition('.')[2]]}_wt_in_DDR.bin"


def _block(name: str) -> str:
    """`layers.3.q` -> BLOCK03; what belongs to no layer -> OutLayer."""
    parts = name.split(".")
    return f"BLOCK{int(parts[1]):02d}" if parts[0] == "layers" else "OutLayer"
