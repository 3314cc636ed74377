"""Steps as command lines, and hints of commands as settings of steps."""

from __future__ import annotations

import pytest

from edgetool.pipeline.command_line import for_a_step
from edgetool.pipeline.commands import COMMANDS


@pytest.mark.parametrize(
    ("command", "hint", "told"),
    [
        (
            "quantize",
            "use --group-size 64 or 32",
            "use --group-size 64 or 32; for this step: --set small.group_size=64",
        ),
        (
            "quantize",
            "lower --calib-samples or --calib-seqlen",
            "lower --calib-samples or --calib-seqlen; "
            "for this step: --set small.calib_samples=... --set small.calib_seqlen=...",
        ),
        ("compile-vcu128", "use --lm-head rtn4", "use --lm-head rtn4; for this step: --set small.lm_head=rtn4"),
        # the next word of the sentence is no value, and a value may be several words
        (
            "convert",
            "--fold-act-order removes the activation order; --to compressed-tensors keeps it, --requant rounds again",
            "--fold-act-order removes the activation order; --to compressed-tensors keeps it, --requant rounds again; "
            "for this step: --set small.fold_act_order=true --set small.to=compressed-tensors --set small.requant=true",
        ),
        ("eval", "for instance --tasks a,b", "for instance --tasks a,b; for this step: --set small.tasks=a,b"),
        ("serve-fpga", "add --record FILE", "add --record FILE; for this step: --set small.record=..."),
        ("compile-vcu128", "use --int4 twos", "use --int4 twos; for this step: --set small.int4=twos"),
        (
            "quantize",
            "leave --scale-search out, or use --backend native",
            "leave --scale-search out, or use --backend native; for this step: --set small.backend=native",
        ),
        # what is no setting of the step, or no option at all, stays
        ("quantize", "use --lm-head rtn4", "use --lm-head rtn4"),
        ("quantize", "add --resume, or --overwrite to start again", "add --resume, or --overwrite to start again"),
        ("quantize", "edgetool quantize demo -o out --bits 4", "edgetool quantize demo -o out --bits 4"),
        ("quantize", "edit config.json", "edit config.json"),
    ],
)
def test_a_hint_names_the_setting_of_the_step(command: str, hint: str, told: str) -> None:
    assert for_a_step(hint, "small", COMMANDS[command]) == told
