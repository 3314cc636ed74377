"""Which language: the option before the variable, and the locale in POSIX' order."""

from __future__ import annotations

import io
import sys

import pytest

from edgetool.messages import choice


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, "en"),
        ({"LANG": "C"}, "en"),
        ({"LANG": "POSIX"}, "en"),
        ({"LANG": "de_DE.UTF-8"}, "en"),
        ({"LANG": "zh_TW.UTF-8"}, "en"),
        ({"LANG": "zh_HK"}, "en"),
        ({"LANG": "zh"}, "zh_CN"),
        ({"LANG": "zh_CN"}, "zh_CN"),
        ({"LANG": "zh_CN.GB18030"}, "zh_CN"),
        ({"LANG": "zh_SG.UTF-8"}, "zh_CN"),
        ({"LANG": "zh-Hans"}, "zh_CN"),
        ({"LANG": "zh_Hans_CN.UTF-8@pinyin"}, "zh_CN"),
        ({"LANG": "zh_CN.UTF-8", "LC_MESSAGES": "en_US.UTF-8"}, "en"),
        ({"LANG": "zh_CN.UTF-8", "LC_ALL": "C.UTF-8", "LC_MESSAGES": "zh_CN.UTF-8"}, "en"),
        ({"LANG": "en_US.UTF-8", "LC_MESSAGES": "zh_CN.UTF-8"}, "zh_CN"),
        ({"LANG": "zh_CN.UTF-8", "LC_ALL": "", "LC_MESSAGES": ""}, "zh_CN"),
        ({"LANGUAGE": "zh_CN", "LANG": "en_US.UTF-8"}, "en"),
    ],
)
def test_the_locale_is_read_as_posix_orders_it(environ: dict[str, str], expected: str) -> None:
    assert choice.of_locale(environ) == expected


@pytest.mark.parametrize(
    ("arguments", "environ", "expected"),
    [
        (["inspect", "m"], {}, "en"),
        (["inspect", "m", "--lang", "zh_CN"], {}, "zh_CN"),
        (["--lang=zh_CN", "inspect", "m"], {}, "zh_CN"),
        (["inspect", "--lang"], {"LANG": "zh_CN"}, "zh_CN"),
        (["inspect", "--lang", "en"], {"EDGETOOL_LANG": "zh_CN"}, "en"),
        (["inspect"], {"EDGETOOL_LANG": "zh_CN", "LANG": "C"}, "zh_CN"),
        (["inspect"], {"EDGETOOL_LANG": "en", "LANG": "zh_CN"}, "en"),
        (["inspect", "--lang", "auto"], {"LANG": "zh_CN"}, "zh_CN"),
        (["inspect", "--lang", "klingon"], {"LANG": "zh_CN"}, "zh_CN"),
        (["gpus", "run", "--", "program", "--lang", "zh_CN"], {}, "en"),
    ],
)
def test_the_option_comes_before_the_variable_and_the_locale(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], environ: dict[str, str], expected: str
) -> None:
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
    assert choice.asked(arguments, environ) == expected


@pytest.mark.parametrize(("encoding", "expected"), [("utf-8", "zh_CN"), ("gb18030", "zh_CN"), ("latin-1", "en")])
def test_a_terminal_that_cannot_show_chinese_gets_english(
    monkeypatch: pytest.MonkeyPatch, encoding: str, expected: str
) -> None:
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    assert choice.resolved("zh_CN", {}) == expected
