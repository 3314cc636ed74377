"""What a quantising run has finished: a record for each layer."""

from __future__ import annotations

from typing import Any

from edgetool.ledger import RunLedger


class Ledger(RunLedger):
    """The ledger of a quantising run."""

    @property
    def layers(self) -> list[dict[str, Any]]:
        """Records of finished layers, in order."""
        return self.having("layer")

    @property
    def assembled(self) -> bool:
        """Whether the checkpoint's files have been put together (the layers' files are then no longer needed)."""
        return bool(self.having("assembled"))
