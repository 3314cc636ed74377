"""`edgetool serve-fpga` and `edgetool chat`: what is refused before anything starts, and what a dry run says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.fakes.tiny_image import make_tiny_image


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_image(tmp_path_factory.mktemp("image"))


def invoke(*arguments: str, env: dict[str, str] | None = None) -> Any:
    from edgetool.cli import app

    return CliRunner().invoke(app, list(arguments), env=env)


def refused(code: int, *arguments: str, env: dict[str, str] | None = None) -> str:
    """The message and hint of a command that must end with `code`."""
    result = invoke(*arguments, env=env)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return str(result.stderr)


def test_an_image_or_a_host_has_to_be_named_and_not_both(image: Path) -> None:
    assert "needs --image or --host" in refused(2, "serve-fpga")
    assert "exclude each other" in refused(3, "serve-fpga", "--image", str(image), "--host", "127.0.0.1:8124")


@pytest.mark.parametrize("host", ["nowhere", "a:b", "a:1:2", "a:0", "a:99999", ":8124", "http://a:8124"])
def test_a_host_that_is_no_address_is_refused(host: str) -> None:
    assert "--host" in refused(3, "serve-fpga", "--host", host)


@pytest.mark.parametrize(
    ("option", "value"),
    [("--temperature", "3"), ("--max-queue", "0"), ("--timeout", "0"), ("--rate-limit", "0"), ("--port", "70000"),
     ("--numerics", "exact"), ("--board", "-x"), ("--max-model-len", "1"), ("--restarts", "-1")],
)  # fmt: skip
def test_values_that_cannot_be_used_are_refused(image: Path, option: str, value: str) -> None:
    assert f"given by {option}" in refused(3, "serve-fpga", "--image", str(image), option, value)


def test_contents_are_recorded_only_into_a_record(image: Path) -> None:
    assert "of no use without --record" in refused(3, "serve-fpga", "--image", str(image), "--record-contents")


def test_what_is_no_image_is_refused_before_anything_starts(image: Path, tmp_path: Path) -> None:
    assert "no such directory" in refused(4, "serve-fpga", "--image", str(tmp_path / "none"))
    assert "not a compiled image" in refused(4, "serve-fpga", "--image", str(image.parent / "q"))
    damaged = shutil.copytree(image, tmp_path / "damaged")
    (damaged / "hbm" / "pc07.bin").write_bytes(b"short")
    assert "pc07.bin: 5 bytes; the manifest says" in refused(4, "serve-fpga", "--image", str(damaged))


def test_a_context_that_the_image_does_not_hold_is_refused(image: Path) -> None:
    said = refused(3, "serve-fpga", "--image", str(image), "--max-model-len", "1000")
    assert "more than the 512 tokens" in said and "--max-context 1000" in said


def test_a_dry_run_shows_the_plan_and_no_key(image: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("alice key-of-alice\n")
    keys.chmod(0o600)
    result = invoke(
        "serve-fpga", "--image", str(image), "--keys-file", str(keys), "--dry-run", "--json",
        env={"EDGETOOL_API_KEY": "the-key"},
    )  # fmt: skip
    document = json.loads(result.stdout)
    assert (document["schema"], document["ok"]) == ("edgetool.serve-fpga/1", True)
    assert (document["plan"]["max_model_len"], document["plan"]["keys"]) == (512, ["alice", "default"])
    assert "key-of-alice" not in result.output and "the-key" not in result.output


def test_a_keys_file_that_others_can_read_is_refused(image: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("alice key-of-alice\n")
    keys.chmod(0o644)
    said = refused(4, "serve-fpga", "--image", str(image), "--keys-file", str(keys))
    assert f"chmod 600 {keys}" in said and "key-of-alice" not in said
    keys.chmod(0o600)
    keys.write_text("default key-of-alice\n")
    arguments = ("serve-fpga", "--image", str(image), "--keys-file", str(keys))
    assert "another one default" in refused(3, *arguments, env={"EDGETOOL_API_KEY": "k"})


def test_a_record_or_a_tokenizer_that_cannot_be_used_is_refused_first(image: Path, tmp_path: Path) -> None:
    env = {"EDGETOOL_LOCK_DIR": str(tmp_path / "locks")}
    record = ("--record", str(tmp_path / "missing" / "record.jsonl"))
    assert "cannot write the record" in refused(4, "serve-fpga", "--image", str(image), *record, env=env)
    tokenizer = ("--host", "127.0.0.1:1", "--tokenizer", str(tmp_path / "none"))
    assert str(tmp_path / "none") in refused(4, "serve-fpga", *tokenizer, env=env)
    assert not (tmp_path / "locks").exists()  # nothing was leased


def test_an_address_of_others_is_refused(image: Path, tmp_path: Path) -> None:
    env = {"EDGETOOL_LOCK_DIR": str(tmp_path / "locks")}
    said = refused(3, "serve-fpga", "--image", str(image), "--listen", "192.0.2.1", "--port", "0", env=env)
    assert "192.0.2.1 is not an address of this machine" in said


def test_chat_needs_somebody_to_talk_to(image: Path, tmp_path: Path) -> None:
    assert "needs URL or --image" in refused(2, "chat")
    assert "add --message" in refused(2, "chat", "http://127.0.0.1:1", "--json")
    assert "exclude each other" in refused(3, "chat", "http://127.0.0.1:1", "--image", str(image))
    assert "nothing answers at http://127.0.0.1:1" in refused(6, "chat", "http://127.0.0.1:1", "-m", "hi")
    assert "no such directory" in refused(4, "chat", "--image", str(tmp_path / "none"), "-m", "hi")
    assert "not an address" in refused(3, "chat", "ftp://x", "-m", "hi")


def test_an_image_is_talked_to_without_a_server(image: Path) -> None:
    arguments = ("chat", "--image", str(image), "-m", "hi", "--max-tokens", "6", "--temperature", "0")
    document = json.loads(invoke(*arguments, "--json").stdout)
    assert (document["schema"], document["model"]) == ("edgetool.chat/1", "image")
    assert 1 <= document["completion_tokens"] <= 6 and document["prompt_tokens"] > 4
    told = invoke(*arguments)
    assert told.stdout == document["answer"] + "\n"  # the answer and nothing else


def test_questions_are_read_from_stdin_until_they_end(image: Path) -> None:
    from edgetool.cli import app

    lines = "hi\n\n/help\nagain\n/new\n/quit\nnever asked\n"
    arguments = ["chat", "--image", str(image), "--max-tokens", "3", "--temperature", "0", "--system", "be short"]
    result = CliRunner().invoke(app, arguments, input=lines)
    assert result.exit_code == 0, result.output
    assert result.stderr.count("tokens, first after") + result.stderr.count("tokens/s, first after") == 2
    assert "/new begins again" in result.stderr and "a new conversation" in result.stderr
