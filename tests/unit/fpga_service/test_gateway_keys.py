"""Keys, rates, figures and records of the gateway."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from edgetool.errors import BadInput
from edgetool.fpga_service.api_requests import Refusal
from edgetool.fpga_service.keys import read_keys
from edgetool.fpga_service.limits import Queue, RateLimit
from edgetool.fpga_service.recording import Recorder
from tests.fakes.fake_host import FakeHost
from tests.fakes.gateway_server import CHAT, run, serving, until

KEYS = {"alice": "key-of-alice", "bob": "key-of-bob"}
BODY = {"messages": [{"role": "user", "content": "the secret question"}]}
ROUTES = [
    ("GET", "/"), ("GET", "/ready"), ("GET", "/metrics"), ("GET", "/v1/models"), ("GET", "/v1/models/echo"),
    ("GET", "/models"), ("GET", "/openapi.json"), ("POST", CHAT), ("POST", "/chat/completions"),
    ("POST", "/v1/completions"), ("POST", "/predict"), ("GET", "/nothing"), ("GET", "/docs"), ("GET", "//health"),
    ("GET", "/health/"), ("GET", "/HEALTH"), ("GET", "/health/../metrics"),
]  # fmt: skip


def test_every_route_but_health_needs_a_key() -> None:
    async def test() -> None:
        async with FakeHost() as host, serving(host, keys=KEYS) as served:
            for headers in (
                {}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer"}, {"Authorization": "key-of-bob"},
                {"Authorization": "Basic key-of-bob"}, {"Authorization": "Bearer key-of-bobx"},
            ):  # fmt: skip
                for method, path in ROUTES:
                    response = await served.client.request(method, path, headers=headers, json=BODY)
                    assert response.status_code == 401, path
                    assert response.json()["error"]["code"] == "invalid_api_key"
            assert (await served.client.get("/health")).json() == {"status": "ok"}
            assert host.asked == []
            for key in KEYS.values():
                response = await served.client.post(CHAT, json=BODY, headers={"Authorization": f"Bearer {key}"})
                assert response.status_code == 200

    run(test)


def test_each_key_has_its_own_rate() -> None:
    async def test() -> None:
        async with FakeHost() as host, serving(host, keys=KEYS, rate_limit=2) as served:

            async def ask(name: str) -> httpx.Response:
                return await served.client.post(CHAT, json=BODY, headers={"Authorization": f"Bearer {KEYS[name]}"})

            assert [(await ask("alice")).status_code for _ in range(3)] == [200, 200, 429]
            refused = await ask("alice")
            assert refused.json()["error"]["code"] == "rate_limit_exceeded"
            assert 1 <= int(refused.headers["retry-after"]) <= 30
            assert (await ask("bob")).status_code == 200
            models = await served.client.get("/v1/models", headers={"Authorization": "Bearer key-of-alice"})
            assert models.status_code == 200  # only answers are counted

    run(test)


def test_a_rate_is_given_back_with_time() -> None:
    now_s = 0.0
    rates = RateLimit(60, clock=lambda: now_s)
    for _ in range(60):
        rates.take("a")
    with pytest.raises(Refusal) as refused:
        rates.take("a")
    assert refused.value.retry_after_s == 1
    now_s = 1.0
    rates.take("a")
    with pytest.raises(Refusal):
        rates.take("a")
    now_s = 10_000.0  # a long rest does not save up more than a minute's requests
    for _ in range(60):
        rates.take("a")
    with pytest.raises(Refusal):
        rates.take("a")


def test_a_queue_advises_to_come_back_after_what_one_request_takes() -> None:
    queue = Queue(0)
    with queue.place():
        for _ in range(100):
            queue.served(12.0)
        with pytest.raises(Refusal) as refused, queue.place():
            pass
        assert refused.value.retry_after_s == 12
        for _ in range(100):
            queue.served(1000.0)
        assert queue.retry_after_s == 60
    assert queue.admitted == 0


def test_metrics_count_requests_tokens_and_the_host() -> None:
    async def test() -> None:
        async with FakeHost() as host, serving(host, keys={"alice": "k"}, key="k") as served:
            await served.chat("a")
            await served.chat("a", n=2)
            await served.client.get("/v1/nothing/../../etc")
            text = (await served.client.get("/metrics")).text
            samples = {
                (sample.name, *sorted(sample.labels.items())): sample.value
                for family in text_string_to_metric_families(text)
                for sample in family.samples
            }
            label = ("key", "alice"), ("route", CHAT)
            assert samples["edgetool_requests_total", *label, ("status", "200")] == 1
            assert samples["edgetool_requests_total", *label, ("status", "400")] == 1
            assert samples["edgetool_prompt_tokens_total",] == 7
            assert samples["edgetool_completion_tokens_total",] == 4
            assert samples["edgetool_host_up",] == 1
            assert samples["edgetool_request_seconds_count", ("route", CHAT)] == 2
            assert samples["edgetool_first_token_seconds_count", ("route", CHAT)] == 1
            assert "etc" not in text  # what clients make up does not become a label

    run(test)


def test_the_record_holds_facts_and_no_contents(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"

    async def test() -> None:
        recorder = Recorder(path, contents=False)
        async with FakeHost() as host, serving(host, recorder, keys={"alice": "the-key"}, key="the-key") as served:
            await served.client.post(CHAT, json=BODY)
            await served.events(CHAT, **BODY)
            await served.client.post(CHAT, json={**BODY, "n": 2})
            await served.client.post(CHAT, json=BODY, headers={"Authorization": "Bearer wrong"})
            await served.client.get("/v1/models")
            await until(lambda: len(path.read_text().splitlines()) == 4)

    run(test)
    text = path.read_text()
    whole, stream, refused, unknown = (json.loads(line) for line in text.splitlines())
    assert (whole["key"], whole["route"], whole["status"], whole["stream"]) == ("alice", CHAT, 200, False)
    assert (whole["prompt_tokens"], whole["completion_tokens"], whole["finish_reason"]) == (7, 4, "stop")
    assert 0 < whole["first_token_s"] <= whole["seconds"]
    assert stream["stream"] is True and stream["id"] != whole["id"] and stream["completion_tokens"] == 4
    assert (refused["status"], unknown["status"], unknown["key"]) == (400, 401, "-")
    assert not any(word in text for word in ("secret", "echo:", "the-key", "wrong"))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_contents_are_recorded_when_that_is_wanted(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"

    async def test() -> None:
        async with FakeHost() as host, serving(host, Recorder(path, contents=True)) as served:
            await served.client.post(CHAT, json=BODY)
            await served.post("/predict", prompt=["a", "b"])
            await until(lambda: len(path.read_text().splitlines()) == 2)

    run(test)
    first, second = (json.loads(line) for line in path.read_text().splitlines())
    assert first["asked"] == [BODY["messages"]] and first["answered"] == ["echo: the secret question"]
    assert second["answered"] == ["echo: a", "echo: b"]


def test_a_client_that_left_is_recorded_as_such(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"

    async def test() -> None:
        async with FakeHost(token_delay_s=0.05, pieces=100) as host, serving(host, Recorder(path, contents=False)) as s:
            body = {"messages": [{"role": "user", "content": "x" * 200}], "stream": True}
            async with s.client.stream("POST", CHAT, json=body) as response:
                await anext(response.aiter_lines())
            await until(lambda: bool(path.read_text()))
            record = json.loads(path.read_text())
            assert record["status"] == 499 and 1 <= record["completion_tokens"] < 100

    run(test)


def test_a_record_that_cannot_be_written_ends_recording_and_nothing_else(tmp_path: Path) -> None:
    async def test() -> None:
        recorder = Recorder(Path("/dev/full"), contents=False)
        async with FakeHost() as host, serving(host, recorder) as served:
            assert [(await served.chat("a")).status_code for _ in range(3)] == [200] * 3
        assert recorder.failure is not None and "space" in recorder.failure

    run(test)
    with pytest.raises(BadInput, match="cannot write the record"):
        Recorder(tmp_path / "missing" / "record.jsonl", contents=False)


def keys_file(path: Path, text: str, mode: int = 0o600) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


def test_a_keys_file_names_its_keys(tmp_path: Path) -> None:
    text = "# clients\nalice  key-of-alice\n\nbob@example.org key/of+bob=\n"
    assert read_keys(keys_file(tmp_path / "keys", text)) == {"alice": "key-of-alice", "bob@example.org": "key/of+bob="}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no key"),
        ("alice\n", "line 1: a name, a space and a key"),
        ("ok fine\nalice clé\n", "line 2"),
        ("alice two words\n", "line 1"),
        ("alice a\nalice b\n", "line 2: alice or its key is there twice"),
        ("alice a\nbob a\n", "line 2: bob or its key is there twice"),
        ("-alice a\n", "line 1"),
    ],
)
def test_a_keys_file_that_is_wrong_is_refused_without_showing_a_key(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(BadInput, match=message) as refused:
        read_keys(keys_file(tmp_path / "keys", text))
    assert "clé" not in str(refused.value) and "words" not in str(refused.value)


def test_a_keys_file_that_others_can_read_or_that_is_none_is_refused(tmp_path: Path) -> None:
    path = keys_file(tmp_path / "keys", "alice a\n", 0o640)
    with pytest.raises(BadInput, match="can be read or written by others") as refused:
        read_keys(path)
    assert refused.value.hint == f"chmod 600 {path}"
    with pytest.raises(BadInput, match="No such file"):
        read_keys(tmp_path / "none")


def test_web_pages_may_ask_only_from_origins_that_were_named() -> None:
    async def test() -> None:
        preflight = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
        async with FakeHost() as host:
            async with serving(host, keys={"a": "k"}) as served:
                response = await served.client.options(CHAT, headers=preflight)
                assert "access-control-allow-origin" not in response.headers
            async with serving(host, keys={"a": "k"}, cors_origins=("https://a.example",)) as served:
                response = await served.client.options(CHAT, headers=preflight)
                assert response.headers["access-control-allow-origin"] == "https://a.example"
                other = {**preflight, "Origin": "https://b.example"}
                response = await served.client.options(CHAT, headers=other)
                assert "access-control-allow-origin" not in response.headers
                assert (await served.client.post(CHAT, json=BODY, headers=preflight)).status_code == 401

    run(test)
