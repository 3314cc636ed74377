"""`edgetool serve-gpu` with vLLM's CPU build and the demo model that edgetool quantised: asked, stopped and killed."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from tests.fakes.served import Served, is_free, leases

from .conftest import Quantized

pytestmark = pytest.mark.vllm

HEADERS = {"Authorization": "Bearer k"}
FRANCE: Any = [{"role": "user", "content": "What is the capital of France?"}]
Start = Callable[..., Served]


@pytest.fixture(scope="module")
def start(vllm_python: Path, quantized_gptq: Quantized) -> Start:
    def begin(directory: Path, *arguments: str, **env: str) -> Served:
        usual = ("--device", "cpu", "--port", "0", "--max-model-len", "1024")
        interpreter = {"EDGETOOL_ENVS_PYTHON": f"vllm-cpu={vllm_python}"}
        return Served(directory, str(quantized_gptq.directory), *usual, *arguments, env=interpreter | env)

    return begin


@pytest.fixture(scope="module")
def running(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with start(tmp_path_factory.mktemp("served")) as served:
        served.ready()
        yield served


@pytest.fixture
def client(running: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=running.ready()["openai_base_url"], api_key="k", max_retries=0)


def test_a_chat_is_answered_with_the_fact_asked_for(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="gptq", messages=FRANCE, max_tokens=32, temperature=0)
    assert "Paris" in str(answer.choices[0].message.content)
    assert answer.usage is not None and answer.usage.completion_tokens > 0


def test_a_stream_comes_in_pieces_and_says_the_same(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(model="gptq", messages=FRANCE, max_tokens=32, temperature=0, stream=True)
    )
    assert "Paris" in "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert len(chunks) > 5


def test_a_wrong_key_is_401_also_where_vllm_itself_asks_for_none(running: Served) -> None:
    url = running.ready()["url"]
    for path in ("/v1/models", "/metrics", "/invocations", "/tokenize", "/version", "/docs"):
        assert httpx.get(url + path, headers={"Authorization": "Bearer wrong"}).status_code == 401
    assert "vllm" in httpx.get(f"{url}/metrics", headers=HEADERS).text
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{url}/v1", api_key="wrong").models.list()


def test_the_api_of_vllm_answers_on_no_port_but_the_fronts(running: Served) -> None:
    ours = {process.pid for process in running.processes()}
    listening = {
        (connection.laddr.ip, connection.laddr.port)
        for connection in psutil.net_connections("inet")
        if connection.pid in ours and connection.status == psutil.CONN_LISTEN
    }
    front = ("127.0.0.1", running.ready()["port"])
    assert front in listening
    # the others belong to torch.distributed, by which the workers would talk to each other
    for address, port in listening - {front}:
        with pytest.raises(httpx.TransportError):
            httpx.get(f"http://{address}:{port}/metrics", timeout=2, trust_env=False)


def test_a_prompt_that_is_too_long_is_400_with_the_limit(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="1024"):
        client.completions.create(model="gptq", prompt="word " * 3000)


def test_predict_answers_a_list_with_a_list(running: Served) -> None:
    body = {"prompt": ["What is the capital of France?", "Count to three."], "max_tokens": 24}
    answer = httpx.post(f"{running.ready()['url']}/predict", json=body, headers=HEADERS, timeout=120)
    first, second = answer.json()["response"]
    assert "Paris" in first
    assert second


def test_the_load_client_measures_it(running: Served) -> None:
    options = ("--concurrency", "1,2", "--requests", "2", "--rounds", "1", "--prompt-tokens", "64")
    done = running.edgetool("bench", running.ready()["url"], *options, "--output-tokens", "8", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["schema"] == "edgetool.bench/1"
    assert [found["failed"] for found in document["results"]] == [0, 0]
    assert all(found["output_tokens_mean"] == 8 for found in document["results"])
    # lengths are fitted to the server's own count; words of more than one token are few
    assert all(abs(found["prompt_tokens_mean"] - 64) < 6 for found in document["results"])


def test_the_port_of_it_is_refused_to_another_at_once(running: Served, start: Start) -> None:
    shared = {name: running.environment[name] for name in ("XDG_STATE_HOME", "EDGETOOL_LOCK_DIR")}
    port = str(running.ready()["port"])
    with start(running.directory / "second", "--port", port, **shared) as second:
        assert second.wait() == 6
        assert f"port {port} is leased by" in json.loads(second.output.read_text())["message"]


def test_sigterm_in_mid_stream_ends_the_stream_as_clients_expect_and_leaves_nothing(
    start: Start, tmp_path: Path
) -> None:
    before = _segments()
    with start(tmp_path) as served:
        document = served.ready()
        events = _stream(document, lambda: served.process.send_signal(signal.SIGTERM))
        assert events[-1] == "[DONE]"
        assert "error" in json.loads(events[-2])
        assert served.wait() == 143
        assert served.left() == []
        assert is_free(document["port"])
        assert _segments() <= before


def test_sigkill_of_the_api_process_leaves_nothing_and_is_a_failed_backend(start: Start, tmp_path: Path) -> None:
    before = _segments()
    with start(tmp_path) as served:
        document = served.ready()
        events = _stream(document, lambda: os.kill(document["engine_pid"], signal.SIGKILL))
        assert "error" in json.loads(events[-2])
        assert served.wait() == 7
        assert "killed by SIGKILL" in served.errors.read_text()
        assert served.left() == []
        assert is_free(document["port"])
        assert leases(served) == []
        assert _segments() <= before


def test_two_servers_started_at_once_live_and_die_apart(start: Start, tmp_path: Path) -> None:
    before = _segments()
    shared = {"XDG_STATE_HOME": str(tmp_path / "state"), "EDGETOOL_LOCK_DIR": str(tmp_path / "locks")}
    with start(tmp_path / "a", **shared) as first, start(tmp_path / "b", **shared) as second:
        one, other = first.ready(), second.ready()
        assert one["port"] != other["port"]
        assert one["lease"] != other["lease"]

        first.process.kill()
        first.wait()
        assert first.left() == []
        assert is_free(one["port"])
        assert [lease["id"] for lease in leases(second)] == [other["lease"]]
        assert httpx.get(f"{other['url']}/v1/models", headers=HEADERS).status_code == 200

        worker = next(process for process in second.processes() if "VLLM::Worker" in " ".join(process.cmdline()))
        worker.kill()
        assert second.wait() == 7
        assert second.left() == []
        assert json.loads(second.edgetool("serve-gpu", "--list", "--json").stdout)["servers"] == []
        assert _segments() <= before


def _stream(document: dict[str, Any], at_tenth: Callable[[], None]) -> list[str]:
    """The events of a long answer, with something done when the tenth has come."""
    body = {"model": "gptq", "messages": FRANCE, "max_tokens": 900, "stream": True, "ignore_eos": True}
    events: list[str] = []
    with httpx.stream(
        "POST", f"{document['url']}/v1/chat/completions", json=body, headers=HEADERS, timeout=120
    ) as response:
        for line in response.iter_lines():
            if line.startswith("data: "):
                events.append(line.removeprefix("data: "))
                if len(events) == 10:
                    at_tenth()
    return events


def _segments() -> set[str]:
    return {path.name for path in Path("/dev/shm").glob("psm_*")}
