"""The one record of the board's numbers: compiler, simulator, report and driver all take them from here.

Sources: Xilinx UG1302 and PG276 (VCU128, HBM2 controller) for memory; Shuhai (arXiv 2005.04324) for the bandwidth seen;
EdgeLLM (arXiv 2407.21325) and its public compiler's generated addresses for clocks, array and alignment.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Hardware:
    """What a compiled image relies on. Sizes in bytes, clocks in Hz, times in seconds."""

    name: str = "vcu128"
    pseudo_channels: int = 32
    """Independent HBM2 channels (PC); weight rows are dealt out to them in turn, so this is also the array's width."""
    pc_bytes: int = 1 << 28
    pc_address_bits: int = 28
    """The DMA address of byte 0 of a PC is its number << this."""
    axi_beat_bytes: int = 32
    axi_clock_hz: float = 280e6
    hbm_peak_bytes_per_s: float = 460e9
    compute_clock_hz: float = 140e6
    int4_macs_per_cycle: int = 4096
    fp16_macs_per_cycle: int = 1024
    """For attention, whose operands are both activations."""
    ddr_base: int = 0x2_0000_0000
    ddr_bytes: int = 4 << 30
    in_channels_per_step: int = 128
    """Tin: input channels are padded to a multiple of it."""
    out_channels_per_step: int = 32
    """Tout: output channels are padded to a multiple of it."""
    scales_per_beat: int = 16
    """fp16 scales (or offsets) in one beat, hence groups in one package."""
    hbm_alignment_bytes: int = 0x4000
    ddr_alignment_bytes: int = 64
    layer_overhead_s: float = 0.23e-3
    """What a decoder layer costs beside reading its weights; fitted to the published tokens per second."""
    efficiency_low: float = 0.70
    efficiency_high: float = 0.80
    """Share of the port rate that is reached: 76 % published for a 4096 x 4096 product."""

    @property
    def port_bytes_per_s(self) -> float:
        """All PCs together at one beat a cycle: 286.7 GB/s."""
        return self.pseudo_channels * self.axi_beat_bytes * self.axi_clock_hz

    @property
    def ddr_end(self) -> int:
        return self.ddr_base + self.ddr_bytes

    def pc_address(self, pc: int, offset: int = 0) -> int:
        """DMA address of byte `offset` of pseudo-channel `pc`."""
        return (pc << self.pc_address_bits) + offset

    def to_dict(self) -> dict[str, Any]:
        """For the manifest: every field, so that an image says what it was made for."""
        return asdict(self)


VCU128 = Hardware()


def align_up(size: int, alignment: int) -> int:
    """The next multiple of `alignment`."""
    return -(-size // alignment) * alignment
