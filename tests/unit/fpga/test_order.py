"""Activation order: what is permuted, what is gathered at run time, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgetool.checkpoints.checkpoint import Checkpoint
from edgetool.errors import BadInput
from edgetool.fpga.compiler import Draft, compile_plan
from edgetool.fpga.settings import CompileSettings
from tests.fakes.packed_checkpoints import read_safetensors, write_safetensors
from tests.fakes.quantized_models import Made, make_quantized


def plan(made: Made, **settings: Any) -> Draft:
    given = {"profile": "sim", "lm_head": "rtn4", "max_context": 64} | settings
    return compile_plan(Checkpoint.open(made.path), CompileSettings(**given), str(made.path))


def operations(draft: Draft) -> list[str]:
    return [f"{op['op']} {op.get('weight', op.get('index', ''))}".strip() for op in draft.program.layer]


def test_down_alone_needs_no_gather_and_takes_gate_and_up_along(tmp_path: Path) -> None:
    made = make_quantized(tmp_path / "q", desc_act=("down",), biases=("gate", "up"))
    draft = plan(made)
    assert not any(op.startswith("PERM") for op in operations(draft))
    order = np.argsort(made.linears["model.layers.1.mlp.down_proj"].g_idx, kind="stable")
    assert np.array_equal(draft.orders.columns["layers.1.down"], order)
    for role in ("gate", "up"):
        assert np.array_equal(draft.orders.rows[f"layers.1.{role}"], order)
    assert set(draft.orders.columns) == {"layers.0.down", "layers.1.down"}


def test_q_k_v_of_one_order_share_one_gather(tmp_path: Path) -> None:
    draft = plan(make_quantized(tmp_path / "q", desc_act=("q", "k", "v", "gate", "up")))
    perms = [op for op in operations(draft) if op.startswith("PERM")]
    assert perms == ["PERM layers.{layer}.qkv.order", "PERM layers.{layer}.gate_up.order"]


def test_orders_that_differ_are_gathered_one_by_one(tmp_path: Path) -> None:
    draft = plan(make_quantized(tmp_path / "q", desc_act=("q", "v", "o"), same_order=False))
    perms = [op for op in operations(draft) if op.startswith("PERM")]
    assert perms == [f"PERM layers.{{layer}}.{role}.order" for role in ("q", "k", "v", "o")]
    # k is in its own order, and takes part in the template with one that changes nothing
    assert np.array_equal(draft.orders.constants["layers.0.k.order"], np.arange(192))
    assert not np.array_equal(draft.orders.constants["layers.0.q.order"], np.arange(192))


def test_without_activation_order_there_is_no_trace_of_it(tmp_path: Path) -> None:
    draft = plan(make_quantized(tmp_path / "q"))
    assert not draft.orders.constants
    assert "gathered" not in {buffer.name for buffer in draft.ddr.buffers}


def test_a_group_of_another_size_is_refused_by_name(tmp_path: Path) -> None:
    made = make_quantized(tmp_path / "q", desc_act=("down",))
    path = made.path / "model.safetensors"
    tensors = read_safetensors(path)
    g_idx = tensors["model.layers.1.mlp.down_proj.g_idx"]
    g_idx[np.flatnonzero(g_idx == 3)[:2]] = 4
    write_safetensors(path, tensors)
    with pytest.raises(BadInput) as refused:
        plan(made)
    assert "model.layers.1.mlp.down_proj" in refused.value.message


def test_edgellm_names_the_remedy(tmp_path: Path) -> None:
    made = make_quantized(tmp_path / "q", desc_act=("down",))
    with pytest.raises(BadInput, match="desc_act: quantise without --desc-act"):
        plan(made, profile="edgellm")
