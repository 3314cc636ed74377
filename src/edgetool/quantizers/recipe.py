"""What is to be done to each linear: the options of a quantisation, resolved and free of any file or terminal."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

Method = Literal["gptq", "awq", "rtn"]


@dataclass(frozen=True)
class Recipe:
    """One quantisation recipe.

    group_size: input channels that share a scale, or -1 for all of them.
    desc_act: columns are ordered by activation and groups follow that order (a g_idx that is not trivial). Without it
        GPTQ still works in activation order, but groups stay where they are and every kernel can run the result.
    act_order: process channels by falling activation (arXiv 2210.17323's reference code, "act-order").
    scale_search: "mse" searches clipped ranges, "minmax" spans each group exactly.
    asymmetric_calibration: 0..1, how far the target moves from W x to W x_original (0 = plain GPTQ), after
        arXiv 2504.02692.
    awq_scaling: fold a per-channel scale into the tensor in front (arXiv 2306.00978).
    bias_correction: shift the biases a model has by the mean error of their linear's outputs (arXiv 1906.04721,
        section 4.2); linears without a bias stay without.
    damp: fraction of the Gram matrix's mean diagonal added to its diagonal.
    shrinkage: 0..1, fraction by which correlations between channels are taken back (see gptq.damped).
    min_zero: smallest zero point the target format can store (GPTQ v1 stores zero - 1, so 1 there).
    """

    method: Method = "gptq"
    bits: int = 4
    group_size: int = 128
    sym: bool = True
    desc_act: bool = False
    act_order: bool = True
    scale_search: Literal["mse", "minmax"] = "mse"
    asymmetric_calibration: float = 0.0
    awq_scaling: bool = False
    bias_correction: bool = False
    damp: float = 0.01
    shrinkage: float = 0.5
    min_zero: int = 0

    def groups(self, in_features: int) -> int:
        """Number of groups along in_features."""
        return 1 if self.group_size == -1 else in_features // self.group_size

    def size(self, in_features: int) -> int:
        """Channels of one group."""
        return in_features if self.group_size == -1 else self.group_size

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def for_scale_search(self) -> Recipe:
        """The recipe with the quick grid search: AWQ compares candidates, and the final grid is searched afterwards."""
        return replace(self, scale_search="minmax")

    def without_target(self) -> Recipe:
        """The recipe for a matrix whose original inputs are not followed."""
        return replace(self, asymmetric_calibration=0.0)
