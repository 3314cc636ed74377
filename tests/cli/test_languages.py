"""The command line in Chinese: help, tables, progress and errors; what programs read is the same in every language."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer.main
from rich.cells import cell_len
from typer.testing import CliRunner

from edgetool.cli import app

CHINESE = {"LANG": "zh_CN.UTF-8", "LC_ALL": "", "LC_MESSAGES": ""}
ENGLISH = {"LANG": "C", "LC_ALL": "", "LC_MESSAGES": ""}
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
PATHS = [
    [name, *below] for name, one in COMMANDS.items() for below in ([], *([sub] for sub in getattr(one, "commands", {})))
]


def edgetool(*arguments: str, env: dict[str, str] = CHINESE) -> Any:
    return CliRunner().invoke(app, list(arguments), env=env)


def shell(*arguments: str, env: dict[str, str]) -> subprocess.CompletedProcess[bytes]:
    """A process of its own, since encodings are chosen when Python starts."""
    return subprocess.run(
        [sys.executable, "-m", "edgetool", *arguments], env={**os.environ, **env}, capture_output=True, timeout=120
    )


def prose(text: str) -> list[str]:
    """English left in a page: three small words in a row, outside of command lines and quoted text."""
    bare = re.sub(r"`[^`]*`|'[^']*'|edgetool( [a-z-]+)+", " ", text)
    return re.findall(r"(?<![\w./-])[a-z]+ [a-z]+ [a-z]+(?![\w=/-])", bare)


@pytest.mark.parametrize("path", [[], *PATHS], ids=lambda path: " ".join(path) or "edgetool")
def test_help_is_chinese_throughout_and_fits_the_terminal(path: list[str]) -> None:
    result = edgetool(*path, "--help", env={**CHINESE, "COLUMNS": "80"})
    assert result.exit_code == 0
    assert result.stdout.startswith("用法：")
    assert "选项：" in result.stdout and "显示本帮助并退出。" in result.stdout
    assert prose(result.stdout) == []
    assert "Options" not in result.stdout and "default" not in result.stdout.replace("--default", "")
    for line in result.stdout.splitlines():
        assert cell_len(line) <= 80 or " " not in line.strip(), line


@pytest.mark.parametrize("width", [40, 80])
def test_the_meanings_of_options_stand_in_one_column(width: int) -> None:
    lines = edgetool("quantize", "--help", env={**CHINESE, "COLUMNS": str(width)}).stdout.splitlines()
    begins = {
        cell_len(line[: match.start(1)]) for line in lines if (match := re.match(r"  -.*? {2,}([\u4e00-\u9fff])", line))
    }
    assert len(begins) == 1


def test_english_help_is_what_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    text = edgetool("quantize", "--help", env=ENGLISH).stdout
    assert text.startswith("Usage: edgetool quantize [OPTIONS] [MODEL]")
    assert "\nOptions:\n" in text and "Weights per scale" in text
    assert text.isascii()


@pytest.mark.parametrize(
    ("arguments", "env"),
    [
        (("inspect", "nowhere", "--lang", "zh_CN"), ENGLISH),
        (("--lang", "zh_CN", "inspect", "nowhere"), ENGLISH),
        (("inspect", "nowhere"), {**ENGLISH, "EDGETOOL_LANG": "zh_CN"}),
        (("inspect", "nowhere"), CHINESE),
        (("inspect", "nowhere", "--lang", "auto"), {**CHINESE, "EDGETOOL_LANG": "en"}),
    ],
)
def test_the_language_can_be_asked_for_in_many_ways(arguments: tuple[str, ...], env: dict[str, str]) -> None:
    assert "错误：nowhere：没有这个文件或目录" in edgetool(*arguments, env=env).stderr


@pytest.mark.parametrize(
    ("arguments", "env"),
    [
        (("inspect", "nowhere", "--lang", "en"), CHINESE),
        (("--lang", "en", "inspect", "nowhere"), CHINESE),
        (("--lang", "zh_CN", "inspect", "nowhere", "--lang", "en"), ENGLISH),
        (("inspect", "nowhere"), {**CHINESE, "LC_ALL": "C"}),
        (("inspect", "nowhere"), {**CHINESE, "EDGETOOL_LANG": "en"}),
    ],
)
def test_and_turned_down_in_as_many(arguments: tuple[str, ...], env: dict[str, str]) -> None:
    assert "error: nowhere: no such file or directory" in edgetool(*arguments, env=env).stderr


def test_a_file_can_ask_for_it(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text('[common]\nlang = "zh_CN"\n')
    assert "错误：" in edgetool("inspect", "nowhere", "--config", str(tmp_path / "c.toml"), env=ENGLISH).stderr


def test_a_language_that_there_is_not_is_a_wrong_setting() -> None:
    result = edgetool("inspect", "nowhere", "--lang", "tlh", env=ENGLISH)
    assert result.exit_code == 3
    assert "lang 'tlh' (given by --lang) cannot be used: must be en, zh_CN or auto" in result.stderr


def test_one_command_after_another_each_speaks_its_own_language() -> None:
    assert "错误：" in edgetool("inspect", "nowhere").stderr
    assert "error: " in edgetool("inspect", "nowhere", env=ENGLISH).stderr


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("quantize", "{m}", "-o", "{t}/o", "--group-size", "33"), 3, "（来源：--group-size）不可用，应为：-1、32、"),
        (("quantize", "{m}", "-o", "{t}/o", "--bits", "x"), 2, "错误：'--bits' 的值无效：应为整数，无法解析"),
        (("quantize", "-o", "{t}/o"), 2, "错误：quantize 需要 MODEL"),
        (("quantize", "{m}"), 2, "错误：quantize 需要"),
        (("quantize", "nowhere", "-o", "{t}/o"), 4, "提示：模型是一个目录、一个 .gguf 文件、demo、"),
        (("quantize", "--bitz", "4"), 2, "错误：没有选项 --bitz（可能的选项：--bits, --quiet）"),
        (("quantize", "--bits"), 2, "错误：选项 '--bits' 需要一个值。"),
        (("quantize", "--resume=1"), 2, "错误：选项 '--resume' 不带值。"),
        (("inspect", "a", "b"), 2, "错误：多余的参数（b）"),
        (("quantise",), 2, "错误：没有命令 'quantise'。是不是 'quantize'？"),
        (("gpus", "run", "--"), 2, "错误：gpus run 需要一个命令"),
        (("convert", "{m}", "--to", "gptq", "-o", "{t}/o"), 4, "没有无损的"),
        (("jobs", "logs", "5"), 4, "没有任务 5"),
        (("chat", "http://127.0.0.1:9", "--message", "hi"), 6, "http://127.0.0.1:9 上没有应答"),
    ],
)  # fmt: skip
def test_mistakes_are_told_in_chinese(
    tiny: Callable[..., Path], tmp_path: Path, arguments: tuple[str, ...], code: int, said: str
) -> None:
    words = [word.format(m=tiny("llama"), t=tmp_path) for word in arguments]
    result = edgetool(*words, env={**CHINESE, "EDGETOOL_JOBS_DIRECTORY": str(tmp_path / "jobs")})
    assert (result.exit_code, said in result.stderr) == (code, True), result.stderr
    assert prose(result.stderr) == []


def test_a_port_in_use_is_told_in_chinese(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        locks = {"EDGETOOL_LOCK_DIR": str(tmp_path / "locks")}
        result = edgetool("gpus", "run", "--port", str(port), "--", "true", env={**CHINESE, **locks})
    assert result.exit_code == 6
    assert re.search(rf"端口 {port} 被占用：\S+ 的进程正在监听", result.stderr)


def test_tables_are_chinese(tiny: Callable[..., Path], tmp_path: Path) -> None:
    shown = edgetool("inspect", str(tiny("llama"))).stdout
    assert all(name in shown for name in ("架构", "LlamaForCausalLM", "参数量", "分词器", "\n问题\n- 没有找到"))
    plan = edgetool("quantize", str(tiny("llama")), "-o", str(tmp_path / "o"), "--group-size", "32", "--dry-run").stdout
    assert plan.startswith("计划（未写入任何内容）")
    assert all(
        name in plan
        for name in ("分组大小    32", "激活顺序", "内核", "需要：计算能力 7.5 及以上的 NVIDIA GPU", "是", "否")
    )
    assert prose(plan) == []


def test_columns_of_a_table_align(tiny: Callable[..., Path]) -> None:
    lines = edgetool("inspect", str(tiny("llama"))).stdout.split("\n\n")[0].splitlines()[1:]
    begins = {cell_len(line) - cell_len(re.split(r" {2,}", line)[-1]) for line in lines}
    assert len(lines) > 5 and len(begins) == 1


def test_progress_is_chinese_for_people_and_english_for_programs(quantize: Any, tiny: Any, tmp_path: Path) -> None:
    small = ["--group-size", "32", "--calib-samples", "4", "--calib-seqlen", "32", "--threads", "1"]
    plain, events = (
        edgetool("quantize", str(tiny("llama")), "-o", str(tmp_path / mode), *small, "--progress", mode).stderr
        for mode in ("plain", "json")
    )
    assert "量化: 0/2 层" in plain and "完成，用时" in plain and prose(plain) == []
    assert {json.loads(line)["event"] for line in events.splitlines()} >= {"start", "done", "note"}
    assert events.isascii() and '"task": "quantise"' in events


@pytest.mark.parametrize(
    "arguments",
    [
        ("inspect", "{m}", "--json"),
        ("inspect", "nowhere", "--json"),
        ("quantize", "{m}", "-o", "{t}/o", "--group-size", "32", "--dry-run", "--json"),
        ("quantize", "--bitz", "--json"),
        ("gpus", "--json"),
        ("envs", "list", "--json"),
        ("jobs", "--json"),
    ],
)
def test_json_is_the_same_byte_for_byte(tiny: Callable[..., Path], tmp_path: Path, arguments: tuple[str, ...]) -> None:
    words = [word.format(m=tiny("llama"), t=tmp_path) for word in arguments]
    jobs = {"EDGETOOL_JOBS_DIRECTORY": str(tmp_path / "jobs")}
    chinese, english = (edgetool(*words, env={**env, **jobs}).stdout for env in (CHINESE, ENGLISH))
    volatile = re.compile(r'"(\w*memory\w*|free\w*|available\w*)": \d+')
    assert volatile.sub("", chinese) == volatile.sub("", english)
    assert json.loads(chinese)["schema"]
    assert chinese.isascii()


def test_the_value_of_an_option_before_the_command_is_not_taken_for_the_command() -> None:
    failed = edgetool("--lang", "zh_CN", "inspect", "nowhere", "--json", env=ENGLISH)
    assert json.loads(failed.stdout)["schema"] == "edgetool.inspect/1"
    assert json.loads(failed.stdout)["message"] == "nowhere: no such file or directory"


def test_the_log_of_a_job_is_english(tiny: Callable[..., Path], tmp_path: Path) -> None:
    jobs = {"EDGETOOL_JOBS_RECORD": "1", "EDGETOOL_JOBS_DIRECTORY": str(tmp_path / "jobs")}
    converted = edgetool(
        "convert", str(tiny("llama")), "--to", "fp16", "-o", str(tmp_path / "o"), env={**CHINESE, **jobs}
    )
    assert converted.exit_code == 0 and "写入" in converted.stderr
    logged = edgetool("jobs", "logs", "1", env={**CHINESE, **jobs}).stdout
    assert "write: done in" in logged and logged.isascii()


@pytest.mark.parametrize(
    ("env", "encoding", "said"),
    [
        ({"LC_ALL": "zh_CN.UTF-8"}, "utf-8", "错误：没有选项 --bitz"),
        ({"LC_ALL": "zh_CN.GB18030", "PYTHONIOENCODING": "gb18030"}, "gb18030", "错误：没有选项 --bitz"),
        ({"LC_ALL": "zh_CN.UTF-8", "PYTHONIOENCODING": "ascii"}, "ascii", "Error: No such option: --bitz"),
        ({"LC_ALL": "zh_CN.UTF-8", "PYTHONIOENCODING": "latin-1"}, "latin-1", "Error: No such option: --bitz"),
        ({"LC_ALL": "C"}, "ascii", "Error: No such option: --bitz"),
    ],
)
def test_a_terminal_of_any_encoding_gets_what_it_can_show(env: dict[str, str], encoding: str, said: str) -> None:
    result = shell("quantize", "--bitz", env=env)
    assert result.returncode == 2
    assert said in result.stderr.decode(encoding)
    page = shell("inspect", "--help", env=env)
    assert page.returncode == 0 and page.stdout.decode(encoding)


def test_the_catalogue_is_not_read_for_english() -> None:
    script = (
        "import sys\nfrom edgetool.cli import app\n"
        "try:\n    app(['inspect', 'nowhere'])\nexcept SystemExit:\n    pass\n"
        "print([name for name in sys.modules if name.startswith('edgetool.messages.') or name.endswith('._help')])"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "LC_ALL": "C"}, capture_output=True, text=True
    )
    assert result.stdout.strip() == "['edgetool.messages.choice']"
