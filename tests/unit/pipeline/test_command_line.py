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
        # what is no setting of the step, or no option at all, stays
        ("quantize", "use --lm-head rtn4", "use --lm-head rtn4"),
        ("quantize", "add --resume, or --overwrite to start again", "add --resume, or --overwrite to start again"),
        ("quantize", "edgetool quantize demo -o out --bits 4", "edgetool quantize demo -o out --bits 4"),
        ("quantize", "edit config.json", "edit config.json"),
    ],
)
def test_a_hint_names_the_setting_of_the_step(command: str, hint: str, told: str) -> None:
    assert for_a_step(hint, "small", COMMANDS[command]) == told
