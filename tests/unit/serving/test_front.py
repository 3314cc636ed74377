"""The front before a stranger's engine: real sockets on both sides."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from edgetool.serving.front import make_app
from edgetool.serving.jobs import FrontJob
from edgetool.serving.proxy import engine_client
from tests.fakes.openai_server import Running, Stranger

KEY = "et-right"


@pytest.fixture
def engine() -> Stranger:
    return Stranger(key=KEY)


@pytest.fixture
def engine_socket(tmp_path: Path) -> Path:
    return tmp_path / "engine.sock"


@pytest.fixture
def client(engine: Stranger, engine_socket: Path) -> Iterator[httpx.Client]:
    with Running(engine, engine_socket), front(engine_socket) as opened:
        yield opened


def front(socket: Path, **job: object) -> ClientOfFront:
    return ClientOfFront(socket, **job)


class ClientOfFront:
    """A running front, as a context manager that gives a client with the key."""

    def __init__(self, socket: Path, **job: object) -> None:
        told = FrontJob(
            **{"key": KEY, "listen_fd": -1, "engine_socket": str(socket), "served_model_name": "fake", "chat": True}
            | job  # type: ignore[arg-type]
        )
        self._server = Running(make_app(told, engine_client(socket, told.key)))

    def __enter__(self) -> httpx.Client:
        self._server.__enter__()
        self._client = httpx.Client(
            base_url=self._server.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=60, trust_env=False
        )
        return self._client

    def __exit__(self, *_: object) -> None:
        self._client.close()
        self._server.__exit__()


ROUTES = ["/", "/v1/models", "/metrics", "/invocations", "/predict", "/docs", "/openapi.json", "//health", "/health/"]


WRONG = [None, "Bearer wrong", "Bearer", "Basic et-right", "et-right", "Bearer et-right2", "Bearer et-righ"]


def test_no_route_but_health_answers_without_the_right_key(client, engine):
    with httpx.Client(base_url=str(client.base_url), trust_env=False) as stranger:
        for path in ROUTES:
            for authorization in WRONG:
                headers = {"Authorization": authorization} if authorization else {}
                for method in ("GET", "POST", "OPTIONS", "HEAD"):
                    response = stranger.request(method, path, headers=headers)
                    assert response.status_code == 401, (method, path, authorization)
    assert response.headers["www-authenticate"] == "Bearer"
    assert engine.seen == []


def test_two_keys_at_once_are_refused(client):
    with httpx.Client(base_url=str(client.base_url), trust_env=False) as stranger:
        twice = [("Authorization", "Bearer nope"), ("Authorization", f"Bearer {KEY}")]
        assert stranger.get("/v1/models", headers=twice).status_code == 401


def test_the_refusal_is_what_openai_clients_understand(client):
    with httpx.Client(base_url=str(client.base_url), trust_env=False) as stranger:
        error = stranger.get("/v1/models").json()["error"]
    assert error["code"] == "invalid_api_key"


def test_health_needs_no_key_and_is_the_engines_own(client, engine):
    with httpx.Client(base_url=str(client.base_url), trust_env=False) as stranger:
        assert stranger.get("/health").status_code == 200
        engine.healthy = False
        assert stranger.get("/health").status_code == 503


def test_requests_pass_unchanged_and_answers_come_back(client, engine):
    body = {"model": "fake", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    response = client.post("/v1/chat/completions", json=body)
    assert response.json()["choices"][0]["message"]["content"] == "lorem lorem (hi)"
    assert engine.seen == [("/v1/chat/completions", body, f"Bearer {KEY}")]


def test_refusals_of_the_engine_come_back_as_they_are(client):
    response = client.post("/v1/chat/completions", json={"model": "other", "messages": [{"content": "x"}]})
    assert response.status_code == 400
    assert "cannot" in response.json()["error"]["message"]


def test_the_v1_may_be_left_out(client):
    assert client.get("/models").json() == client.get("/v1/models").json()


def test_a_stream_passes_event_by_event(client, engine):
    # the engine says a piece only when the client has what came before, so whoever gathers pieces waits for ever
    engine.gate = threading.Semaphore(0)
    body = {"model": "fake", "messages": [{"content": "x"}], "max_tokens": 4, "stream": True}
    pieces = []
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.headers["content-type"] == "text/event-stream"
        for piece in response.iter_raw():
            pieces.append(piece)
            engine.gate.release()
    assert len(pieces) >= 5  # the role, four words
    assert b"".join(pieces).endswith(b"data: [DONE]\n\n")


def test_a_client_that_goes_away_ends_its_request_in_the_engine(client, engine):
    engine.each_s = 30.0
    body = {"model": "fake", "messages": [{"content": "x"}], "max_tokens": 4, "stream": True}
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        next(response.iter_raw())
    assert engine.cancelled.wait(60)


def test_an_engine_that_ends_in_mid_stream_is_an_error_in_the_stream(client, engine):
    engine.cut_after = 2
    body = {"model": "fake", "messages": [{"content": "x"}], "max_tokens": 4, "stream": True}
    events = [
        line.removeprefix("data: ")
        for line in client.post("/v1/chat/completions", json=body).text.splitlines()
        if line.startswith("data:")
    ]
    assert json.loads(events[-2])["error"]["code"] == 500
    assert events[-1] == "[DONE]"


def test_no_engine_is_503(engine_socket):
    with front(engine_socket) as client:
        assert client.get("/v1/models").status_code == 503
        assert client.get("/health").status_code == 503
        assert client.post("/predict", json={"prompt": "x"}).status_code == 503


def test_predict_answers_one_prompt_with_a_string_and_a_list_with_a_list(client):
    one = client.post("/predict", json={"prompt": "red", "max_tokens": 1}).json()
    assert one == {"response": "lorem (red)"}
    prompts = [f"number {number}" for number in range(40)]
    many = client.post("/predict", json={"prompt": prompts, "max_tokens": 1}).json()
    assert many == {"response": [f"lorem ({prompt})" for prompt in prompts]}
    assert client.post("/predict", json={"prompt": []}).json() == {"response": []}


def test_predict_asks_a_model_without_chat_template_for_a_completion(engine, engine_socket):
    with Running(engine, engine_socket), front(engine_socket, chat=False) as client:
        client.post("/predict", json={"prompt": "once", "temperature": 0, "stop": "\n"})
    path, body, _ = engine.seen[-1]
    assert path == "/v1/completions"
    assert body == {"model": "fake", "prompt": "once", "max_tokens": 256, "temperature": 0.0, "stop": "\n"}


@pytest.mark.parametrize("body", [{}, {"prompt": 5}, {"prompt": ["a", 5]}, {"promt": "a"}, {"prompt": "a", "n": 2}])
def test_predict_refuses_what_it_does_not_understand(client, engine, body):
    assert client.post("/predict", json=body).status_code == 422
    assert engine.seen == []


def test_predict_refuses_half_a_character_which_nobody_could_send_on(client, engine):
    headers = {"Content-Type": "application/json"}
    assert client.post("/predict", content=rb'{"prompt": "\ud800"}', headers=headers).status_code == 422
    assert engine.seen == []


def test_predict_hands_on_a_refusal_of_the_engine(client, engine):
    engine.failing = True
    assert client.post("/predict", json={"prompt": ["a", "b"]}).status_code == 500


@pytest.mark.parametrize(("batch", "said"), [(False, "ok"), (True, "batch")])
def test_the_root_says_what_predict_should_be_sent(engine_socket, batch, said):
    with front(engine_socket, batch=batch) as client:
        assert client.get("/").json() == {"status": said}


def test_many_streams_at_once_do_not_mix(client, engine):
    engine.each_s = 0.001
    found: dict[int, str] = {}

    def one(number: int) -> None:
        body = {"model": "fake", "prompt": f"p{number}", "max_tokens": 20, "stream": False}
        found[number] = client.post("/v1/completions", json=body).json()["choices"][0]["text"]

    threads = [threading.Thread(target=one, args=(number,)) for number in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(found[number].endswith(f"(p{number})") for number in range(32))
