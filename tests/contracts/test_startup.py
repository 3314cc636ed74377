"""What must not be imported before it is needed, so that the command line answers at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.fakes.quantized_models import make_quantized

HEAVY = ["torch", "transformers", "rich.progress", "huggingface_hub", "gguf", "numpy", "yaml"]
# pydantic is not on the list: typer itself imports it, where it is installed, as soon as a command is looked up.


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--version"], 0),
        (["gpus", "--json"], 0),
        (["--help"], 0),
        (["quantize", "--help"], 0),
        (["compile-vcu128", "--help"], 0),
        (["run", "--help"], 0),
        (["jobs", "--json"], 0),
        (["serve-fpga", "--help"], 0),
        (["serve-fpga"], 2),
        (["chat"], 2),
    ],
)
def test_start_imports_nothing_heavy(arguments: list[str], code: int) -> None:
    script = (
        "import sys, atexit\n"
        f"sys.argv = ['edgetool', *{arguments!r}]\n"
        f"loaded = lambda: [name for name in {HEAVY!r} if name in sys.modules]\n"
        "atexit.register(lambda: print('HEAVY', loaded(), file=sys.stderr))\n"
        "from edgetool.__main__ import main\n"
        "main()\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert result.returncode == code
    assert "HEAVY []" in result.stderr


def test_the_check_would_notice() -> None:
    script = "import sys, pydantic; print([name for name in ['pydantic'] if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == "['pydantic']"


def test_resolving_a_configuration_needs_no_torch() -> None:
    script = (
        "import sys\nfrom edgetool.config import load\nload('quantize', {'model': 'demo', 'output': 'out'}, None, {})\n"
        "sys.exit(any(name in sys.modules for name in ['torch', 'transformers', 'numpy', 'rich', 'typer']))"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == 0


def test_compiling_an_image_needs_no_torch(tmp_path: Path) -> None:
    made = make_quantized(tmp_path / "q", desc_act=("down",))
    script = (
        "import sys\nfrom edgetool.cli import app\n"
        f"arguments = ['compile-vcu128', {str(made.path)!r}, '-o', {str(tmp_path / 'image')!r}, '--lm-head', 'rtn4']\n"
        "try:\n    app(arguments)\nexcept SystemExit as leaving:\n"
        "    assert not leaving.code, leaving.code\n"
        "sys.exit(any(name in sys.modules for name in ['torch', 'transformers', 'gguf']))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "image" / "manifest.json").is_file()
