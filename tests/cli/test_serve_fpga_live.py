"""`edgetool serve-fpga` as users run it: real processes, the real simulator, a tiny image."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from tests.fakes.served import Served, is_free, leases
from tests.fakes.tiny_image import make_tiny_image

pytestmark = pytest.mark.slow

FIELDS = {
    "schema", "ok", "url", "openai_base_url", "listen", "port", "pid", "host_pid", "host", "model", "max_model_len",
    "image", "image_sha256", "numerics", "board", "lease", "log", "seconds_to_ready", "api_key",
}  # fmt: skip
LIMIT_S = 120.0


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_image(tmp_path_factory.mktemp("image"))


def served_at(directory: Path, *arguments: str, **options: Any) -> Served:
    options = {"key": "k", "command": "serve-fpga"} | options
    return Served(directory, "--port", "0", "--threads", "1", *arguments, **options)


@pytest.fixture(scope="module")
def running(image: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One server for all tests that only ask it something."""
    with served_at(tmp_path_factory.mktemp("served"), "--image", str(image)) as served:
        served.ready()
        yield served


def client_of(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=served.ready()["openai_base_url"], api_key="k", max_retries=0, timeout=LIMIT_S)


QUESTION: dict[str, Any] = {
    "model": "image",
    "messages": [{"role": "user", "content": "the quick brown fox"}],
    "temperature": 0,
    "max_tokens": 12,
}


def eventually(condition: Any, limit_s: float = LIMIT_S) -> None:
    until = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def ready_status(document: dict[str, Any]) -> int:
    return httpx.get(f"{document['url']}/ready", headers={"Authorization": "Bearer k"}).status_code


def test_the_document_says_everything_that_a_script_needs(running: Served, image: Path) -> None:
    document = running.ready()
    assert set(document) == FIELDS
    assert (document["schema"], document["ok"]) == ("edgetool.serve-fpga/1", True)
    assert document["pid"] == running.process.pid
    assert document["url"] == f"http://127.0.0.1:{document['port']}"
    assert (document["image"], document["model"], document["max_model_len"]) == (str(image), "image", 512)
    assert document["numerics"] == "et1" and document["board"].startswith("sim-")
    assert document["api_key"] is None and document["host"] is None
    assert psutil.Process(document["host_pid"]).is_running() and Path(document["log"]).is_file()
    assert leases(running)[0]["port"] == document["port"]
    boards = json.loads(running.edgetool("gpus", "--json").stdout)["boards"]
    assert [board["board"] for board in boards] == [document["board"]]


def test_the_openai_client_is_answered_streamed_and_not(running: Served) -> None:
    client = client_of(running)
    whole = client.chat.completions.create(**QUESTION)
    stream = client.chat.completions.create(**QUESTION, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == (
        whole.choices[0].message.content
    )
    assert whole.usage is not None and chunks[-1].usage == whole.usage
    assert 1 <= whole.usage.completion_tokens <= 12
    assert [model.id for model in client.models.list()] == ["image"]
    seeded = [client.chat.completions.create(**{**QUESTION, "temperature": 1.0}, seed=5) for _ in range(2)]
    assert seeded[0].choices == seeded[1].choices


def test_logprobs_come_with_chats_and_their_stream(running: Served) -> None:
    client = client_of(running)
    whole = client.chat.completions.create(**QUESTION, logprobs=True, top_logprobs=2).choices[0]
    assert whole.logprobs is not None and whole.logprobs.content
    for entry in whole.logprobs.content:
        assert entry.logprob == entry.top_logprobs[0].logprob >= entry.top_logprobs[1].logprob  # greedy
    stream = client.chat.completions.create(**QUESTION, logprobs=True, top_logprobs=2, stream=True)
    streamed = [entry for chunk in stream for entry in (chunk.choices[0].logprobs or whole.logprobs).content or []
                if chunk.choices[0].logprobs]  # fmt: skip
    assert [entry.token for entry in streamed] == [entry.token for entry in whole.logprobs.content]


def test_a_context_that_is_too_long_is_openais_error(running: Served) -> None:
    with pytest.raises(openai.BadRequestError, match="maximum context length is 512") as refused:
        client_of(running).completions.create(model="image", prompt="word " * 800)
    assert refused.value.code == "context_length_exceeded"


def test_no_process_of_it_shows_the_key_and_no_port_is_open_besides_its_own(running: Served) -> None:
    processes = running.processes()
    assert len(processes) >= 3  # edgetool, the host, and a guard
    listening = set()
    for process in processes:
        assert "k" not in process.cmdline()
        listening |= {c.laddr.port for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    assert listening == {running.ready()["port"]}


def test_chat_talks_to_it_and_says_how_fast_it_was(running: Served) -> None:
    url = running.ready()["url"]
    options = ("chat", url, "-m", "the quick brown fox", "--max-tokens", "12", "--temperature", "0")
    told = running.edgetool(*options)
    assert told.returncode == 0, told.stderr
    whole = client_of(running).chat.completions.create(**QUESTION).choices[0].message.content
    assert told.stdout == f"{whole}\n"
    document = json.loads(running.edgetool(*options, "--json").stdout)
    assert document["answer"] == whole and document["completion_tokens"] >= 1
    running.environment["EDGETOOL_API_KEY"] = "wrong"
    try:
        refused = running.edgetool(*options)
    finally:
        running.environment["EDGETOOL_API_KEY"] = "k"
    assert refused.returncode == 3 and "refuses the key" in refused.stderr


def test_a_host_that_is_killed_in_an_answer_is_an_error_and_the_next_answer_works(image: Path, tmp_path: Path) -> None:
    with served_at(tmp_path, "--image", str(image), "--timeout", "60") as served:
        client = client_of(served)
        document = served.ready()
        begun_s = time.monotonic()
        with pytest.raises(openai.APIError) as failed:
            for number, _ in enumerate(client.chat.completions.create(**{**QUESTION, "max_tokens": 400}, stream=True,
                                                                      extra_body={"ignore_eos": True})):  # fmt: skip
                if number == 2:
                    os.kill(document["host_pid"], signal.SIGKILL)
        assert time.monotonic() - begun_s < 60
        assert failed.value.code == "host_unavailable"
        assert httpx.get(f"{document['url']}/health").status_code == 200

        def answers() -> bool:
            try:
                return bool(client.chat.completions.create(**QUESTION).choices)
            except openai.InternalServerError as error:
                assert error.status_code == 503
                return False

        eventually(answers)
        assert "killed by SIGKILL" in served.said()


def test_a_host_that_fails_too_often_ends_the_server_with_exit_7(image: Path, tmp_path: Path) -> None:
    with served_at(tmp_path, "--image", str(image), "--restarts", "0") as served:
        os.kill(served.ready()["host_pid"], signal.SIGKILL)
        assert served.wait() == 7
        assert "log: " in served.said() and served.left() == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_it_and_leaves_nothing(image: Path, tmp_path: Path, number: int, code: int) -> None:
    with served_at(tmp_path, "--image", str(image)) as served:
        port = served.ready()["port"]
        served.process.send_signal(number)
        assert served.wait() == code
        assert served.left() == [] and is_free(port)
        assert leases(served) == []


def test_an_answer_under_way_at_the_end_is_an_error_for_its_client_and_nothing_for_the_terminal(
    image: Path, tmp_path: Path
) -> None:
    with served_at(tmp_path, "--image", str(image)) as served:
        asked = {**QUESTION, "max_tokens": 480}
        stream = client_of(served).chat.completions.create(**asked, stream=True, extra_body={"ignore_eos": True})
        next(iter(stream))
        served.process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError) as failed:
            list(stream)
        assert failed.value.code == "host_unavailable" and "gateway is ending" in failed.value.message
        assert served.wait() == 143 and served.left() == []
        assert "Traceback" not in served.said() and "ERROR" not in served.said()


def test_a_drained_server_ends_its_answers_first(image: Path, tmp_path: Path) -> None:
    with served_at(tmp_path, "--image", str(image), "--drain", "60") as served:
        stream = client_of(served).chat.completions.create(
            **{**QUESTION, "max_tokens": 60}, stream=True, extra_body={"ignore_eos": True}
        )
        chunks = [next(iter(stream))]
        served.process.send_signal(signal.SIGTERM)
        chunks += list(stream)
        assert chunks[-1].choices[0].finish_reason == "length"
        assert served.wait() == 143 and served.left() == []


def test_a_gateway_that_is_killed_takes_its_host_along(image: Path, tmp_path: Path) -> None:
    with served_at(tmp_path, "--image", str(image)) as served:
        served.ready()
        served.process.kill()
        served.wait()
        assert served.left() == []


def test_a_damaged_image_is_said_by_the_host_that_reads_it(image: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(image, tmp_path / "damaged")
    path = damaged / "hbm" / "pc07.bin"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    with served_at(tmp_path / "served", "--image", str(damaged)) as served:
        assert served.wait() == 8
        document = json.loads(served.output.read_text())
        assert document["type"] == "VerificationFailed" and "pc07.bin: SHA-256 is" in document["message"]


def test_a_gateway_and_a_host_of_its_own_find_each_other_again(image: Path, tmp_path: Path) -> None:
    def host(directory: Path, port: int) -> Served:
        options = ("--image", str(image), "--port", str(port), "--threads", "1")
        return Served(directory, *options, command="fpga-host")

    with host(tmp_path / "host", 0) as first:
        port = first.ready()["ports"]["A"]
        with served_at(tmp_path / "served", "--host", f"127.0.0.1:{port}") as served:
            client = client_of(served)
            document = served.ready()
            assert (document["host"], document["image"], document["host_pid"]) == (f"127.0.0.1:{port}", None, None)
            answer = client.chat.completions.create(**QUESTION).choices[0].message.content
            first.process.kill()
            first.wait()
            eventually(lambda: ready_status(document) == 503)
            with pytest.raises(openai.InternalServerError, match="the host is away"):
                client.chat.completions.create(**QUESTION)
            with host(tmp_path / "again", port) as second:
                second.ready()
                eventually(lambda: ready_status(document) == 200)
                assert client.chat.completions.create(**QUESTION).choices[0].message.content == answer
