"""What other quantisers cannot do is refused before anything runs, with a backend that can."""

from __future__ import annotations

import itertools
from typing import Any, get_args

import pytest

from edgetool.backends.environments import RECIPES
from edgetool.config import QuantizeConfig
from edgetool.config_models import BackendName
from edgetool.errors import BadInput
from edgetool.peers.table import PEERS, check


def config(**given: Any) -> QuantizeConfig:
    return QuantizeConfig(**{"method": "gptq", "group_size": 128, **given})


def test_every_backend_has_an_entry_and_an_environment() -> None:
    assert {"native", *PEERS} == set(get_args(BackendName))
    assert set(PEERS) <= set(RECIPES)


@pytest.mark.parametrize(
    ("backend", "given", "device", "message", "hint"),
    [
        ("gptqmodel", {"method": "rtn"}, "cpu", "has no method rtn", "native or llmcompressor or auto-round"),
        ("autoawq", {"method": "awq"}, "cpu", "corrupts weights", "native or gptqmodel or llmcompressor"),
        ("auto-gptq", {}, "cpu", "CUDA only, and the device is cpu", "native or gptqmodel"),
        ("llmcompressor", {"desc_act": True}, "cpu", r"no activation order \(g_idx\)", "native or gptqmodel"),
        ("llmcompressor", {"bits": 3}, "cpu", "gptq has 4, 8 bits there, not 3", "native or gptqmodel"),
        ("gptqmodel", {"method": "awq", "sym": True}, "cuda:0", "its awq is asymmetric only", "--asym"),
        ("autoawq", {"method": "awq", "bits": 8, "format": "gptq"}, "cuda:0", "awq has 4 bits there", "native"),
        ("gptqmodel", {"quantize_lm_head": True}, "cpu", "lm_head", "native"),
        ("gptqmodel", {"resume": True}, "cpu", "cannot be resumed", "native"),
        ("gptqmodel", {"shrinkage": 0.0}, "cpu", "it has no shrinkage", "leave --shrinkage out"),
        ("auto-round", {"damp": 0.1}, "cpu", "it has no damp", "leave --damp out"),
    ],
)
def test_what_a_backend_cannot_do_is_refused_naming_what_can(
    backend: str, given: dict[str, Any], device: str, message: str, hint: str
) -> None:
    with pytest.raises(BadInput, match=message) as refused:
        check(config(**given), PEERS[backend], device)
    assert refused.value.message.startswith(f"backend {backend}: ")
    assert hint in str(refused.value.hint)


def test_the_backends_that_a_refusal_names_take_the_same_settings() -> None:
    named = 0
    for backend, method, bits, sym, desc_act, device in itertools.product(
        PEERS, ("gptq", "awq", "rtn"), (2, 3, 4, 8), (True, False), (True, False), ("cpu", "cuda:0")
    ):
        if desc_act and method != "gptq":
            continue
        asked = config(method=method, bits=bits, sym=sym, desc_act=desc_act, format="gptq")
        try:
            check(asked, PEERS[backend], device)
        except BadInput as refused:
            choices = str(refused.hint).partition("--backend ")[2].partition(",")[0].split(" or ")
            for other in set(choices) - {"native"}:
                check(asked, PEERS[other], device)
                named += 1
    assert named > 100


@pytest.mark.parametrize("backend", sorted(PEERS))
def test_what_a_backend_can_do_is_let_pass(backend: str) -> None:
    peer = PEERS[backend]
    passed = 0
    for method in peer.formats:
        for bits in peer.bits[method]:
            sym = peer.symmetric.get(method, True)
            check(config(method=method, bits=bits, sym=sym, format="gptq"), peer, "cuda:0")
            passed += 1
    assert passed
