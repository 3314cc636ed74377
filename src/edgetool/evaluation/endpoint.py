"""An OpenAI endpoint as a source of answers: found, asked with bounded patience, and never believed blindly."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from edgetool.errors import BackendFailed, BadInput, ConfigError, ResourceUnavailable
from edgetool.loadtest.client import base_url, find_model, open_client
from edgetool.serving.ready import Endpoint

TRIES = 4
"""How often a request is sent before it counts as failed: a server that restarts, or is busy, gets some seconds."""
PAUSES_S = (0.5, 2.0, 5.0)
_AGAIN = {408, 409, 429, 500, 502, 503, 504}
_FIND_LIMIT_S = 30.0
_RESUME = "the answers so far are kept: start the server again, then run the same command with --resume"

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"


def connect(given_url: str, key: str | None, model: str | None) -> Endpoint:
    """The endpoint at an address, with the model that it is to be asked for.

    Raises:
        ConfigError: no address, or the key is refused.
        ResourceUnavailable: nothing answers there.
        BadInput: no such model, or several to choose from.
    """
    url = base_url(given_url)

    async def find() -> str:
        async with open_client(key, _FIND_LIMIT_S) as client:
            try:
                return await find_model(client, url, model)
            except BadInput as error:
                hint = error.hint and error.hint.replace("--model", "--endpoint-model")
                raise BadInput(error.message, hint) from None

    return Endpoint(url, key, asyncio.run(find()))


class Client:
    """Sends requests, from any number of threads; a failure is one clear error after `TRIES` attempts."""

    def __init__(
        self,
        endpoint: Endpoint,
        timeout_s: float,
        *,
        stopped: Callable[[], bool] = lambda: False,
        pauses_s: tuple[float, ...] | None = None,
    ) -> None:
        self.endpoint = endpoint
        self._stopped = stopped
        self._pauses_s = PAUSES_S if pauses_s is None else pauses_s
        self._down = threading.Event()  # one request that has failed for good ends the patience of all others
        headers = {"Authorization": f"Bearer {endpoint.key}"} if endpoint.key else {}
        self._http = httpx.Client(
            base_url=endpoint.url,
            headers=headers,
            timeout=httpx.Timeout(timeout_s, connect=min(timeout_s, 30.0)),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
        )

    def close(self) -> None:
        """Let the connections go."""
        self._http.close()

    @property
    def given_up(self) -> bool:
        """Whether the server did not answer for so long that it is not waited for any more."""
        return self._down.is_set() or self._stopped()

    def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The JSON object that the server answers with.

        Raises:
            ConfigError: the key is refused.
            BadInput: the request is refused, in the server's words.
            BackendFailed: it does not answer, answers with an error, or not with JSON.
        """
        last = ""
        for attempt in range(TRIES):
            if attempt:
                self._pause(self._pauses_s[min(attempt - 1, len(self._pauses_s) - 1)], last)
            try:
                response = self._http.post(path, json={"model": self.endpoint.model, **body})
            except httpx.HTTPError as error:
                last = f"{type(error).__name__} {error}".strip()
                continue
            if response.status_code in _AGAIN:
                last = f"{response.status_code}: {_words(response)}"
                continue
            return self._document(path, response)
        self._down.set()
        raise BackendFailed(f"{self.endpoint.url}{path} does not answer ({TRIES} tries): {last}", _RESUME)

    def _pause(self, seconds: float, last: str) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            if self.given_up:
                raise BackendFailed(f"{self.endpoint.url} does not answer: {last}", _RESUME)
            time.sleep(min(left, 0.1))

    def _document(self, path: str, response: httpx.Response) -> dict[str, Any]:
        url, status = self.endpoint.url, response.status_code
        if status in (401, 403):
            raise ConfigError(f"{url} refuses the key ({status})", "set EDGETOOL_API_KEY, or use --api-key")
        if status != 200:
            raise BadInput(f"{url}{path} refuses a request ({status}): {_words(response)}")
        try:
            document = response.json()
        except (ValueError, RecursionError):
            raise garbage(self.endpoint, f"no JSON: {_words(response)!r}") from None
        if not isinstance(document, dict):
            raise garbage(self.endpoint, f"a {type(document).__name__} in place of an object")
        if "error" in document and "choices" not in document:
            raise BadInput(f"{url}{path} refuses a request: {str(document['error'])[:300]}")
        return document

    def choices(self, path: str, body: Mapping[str, Any], count: int = 1) -> list[dict[str, Any]]:
        """The `count` choices of an answer, by index. Raises as `post`, and BackendFailed where they are not there."""
        document = self.post(path, body)
        found = document.get("choices")
        if not isinstance(found, list) or len(found) != count or not all(isinstance(one, dict) for one in found):
            raise garbage(self.endpoint, f"{count} choices were asked for, and it answers {str(document)[:200]}")
        if all(isinstance(one.get("index"), int) for one in found):
            found = sorted(found, key=lambda one: int(one["index"]))
        return found

    def text(self, path: str, body: Mapping[str, Any]) -> str:
        """The text of one completion or chat answer; what is null is empty (a model that only thought)."""
        choice = self.choices(path, body)[0]
        holder = choice.get("message") if path == CHAT else choice
        if not isinstance(holder, dict) or ("content" if path == CHAT else "text") not in holder:
            raise garbage(self.endpoint, f"no text in {str(choice)[:200]}")
        said = holder["content" if path == CHAT else "text"]
        if said is not None and not isinstance(said, str):
            raise garbage(self.endpoint, f"a {type(said).__name__} in place of text")
        return said or ""

    def scored(self, prompt: str | list[int]) -> Scored:
        """The log-probabilities that the model gives to the tokens of `prompt`.

        Raises as `post`, and BackendFailed where the answer does not hold them.
        """
        body = {"prompt": prompt, "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True, "seed": 1234}
        return read_scored(self.endpoint, self.choices(COMPLETIONS, body)[0])


@dataclass(frozen=True)
class Scored:
    """A prompt's tokens, and one generated token at the end, as a server scored them.

    logprobs[i]: of token i given those before it; None for the first, which follows nothing. greedy[i]: whether token i
    was the most likely one, None where the server does not tell.
    """

    tokens: tuple[str, ...]
    logprobs: tuple[float | None, ...]
    greedy: tuple[bool | None, ...]


def read_scored(endpoint: Endpoint, choice: Mapping[str, Any]) -> Scored:
    """The `logprobs` of a choice, checked. Raises BackendFailed."""
    found = choice.get("logprobs")
    if not isinstance(found, dict):
        raise garbage(endpoint, "no logprobs, though they were asked for")
    tokens, values = found.get("tokens"), found.get("token_logprobs")
    if not isinstance(tokens, list) or not isinstance(values, list) or len(tokens) != len(values) or not tokens:
        raise garbage(endpoint, "logprobs without a value for each token")
    for place, value in enumerate(values):
        if value is None and place == 0:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value) or value > 1e-3:
            raise garbage(endpoint, f"{value!r} as the log-probability of token {place}")
    top = found.get("top_logprobs")
    tops = top if isinstance(top, list) and len(top) == len(tokens) else [None] * len(tokens)
    greedy = tuple(_is_greedy(value, best) for value, best in zip(values, tops, strict=True))
    return Scored(tuple(map(str, tokens)), tuple(values), greedy)


def _is_greedy(value: float | None, top: Any) -> bool | None:
    if value is None or not isinstance(top, dict) or not top:
        return None
    numbers = [one for one in top.values() if isinstance(one, int | float)]
    return bool(numbers) and value >= max(numbers)


def check_scores(client: Client) -> None:
    """Raise BadInput unless the endpoint scores prompts (echo with logprobs): log-likelihood tasks need that."""
    text = "The capital of France is Paris."
    why = f"{client.endpoint.url} gives no log-probabilities of a prompt (echo with logprobs)"
    hint = "serve-gpu's vLLM does; tasks that generate, such as gsm8k_cot, run without"
    try:
        scored = client.scored(text)
    except BadInput as error:
        raise BadInput(f"{why}: {error.message}", hint) from error
    except BackendFailed as error:
        if client.given_up:
            raise ResourceUnavailable(error.message, "start the server, or give another --endpoint") from error
        raise BadInput(f"{why}: {error.message}", hint) from error
    if text not in "".join(scored.tokens):
        raise BadInput(f"{why}: it scored {''.join(scored.tokens)!r} in place of {text!r}", hint)


def garbage(endpoint: Endpoint, what: str) -> BackendFailed:
    """The error for an answer that is not in OpenAI's form."""
    return BackendFailed(
        f"{endpoint.url} answers, but not as the OpenAI API does: {what}",
        "the answers before it are kept; if the server has been put right, run the same command with --resume",
    )


def _words(response: httpx.Response) -> str:
    return " ".join(response.text.split())[:300] or "(nothing)"
