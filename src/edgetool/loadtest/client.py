"""One streamed request to an OpenAI endpoint, timed as a user feels it."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import httpx

from edgetool.errors import BackendFailed, BadInput, ConfigError, ResourceUnavailable

Api = Literal["chat", "completions"]
DONE = "[DONE]"
"""What the last event of a stream carries."""


@dataclass(frozen=True)
class Target:
    """An endpoint under load. url: without /v1 and without a slash at the end.

    extras: fields that only some servers know and this one accepted (ignore_eos, stream_options).
    """

    url: str
    model: str
    key: str | None
    api: Api
    extras: dict[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if self.api == "chat" else "/v1/completions"

    def body(self, prompt: str, max_tokens: int, *, stream: bool) -> dict[str, Any]:
        """The request for one prompt; greedy, so that what is compared is the same work."""
        said = {"messages": [{"role": "user", "content": prompt}]} if self.api == "chat" else {"prompt": prompt}
        extras = self.extras if stream else {name: v for name, v in self.extras.items() if name != "stream_options"}
        return {
            "model": self.model, **said, "max_tokens": max_tokens, "temperature": 0.0, "stream": stream, **extras
        }  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """One request. Times are seconds since it was sent; None where they do not exist (a failure, a single token).

    tokens: as the server counted them, or the number of pieces of text where it does not (`counted` is then False).
    """

    latency_s: float
    ttft_s: float | None
    tpot_s: float | None
    prompt_tokens: int | None
    tokens: int
    counted: bool
    error: str | None = None


def base_url(given: str) -> str:
    """The address without /v1. Raises ConfigError for what is no address."""
    text = given if "://" in given else f"http://{given}"
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL as error:
        raise ConfigError(f"{given!r} is not an address: {error}", "for instance http://127.0.0.1:8000") from error
    if url.scheme not in ("http", "https") or not url.host or not 0 < (url.port or 80) < 1 << 16:
        raise ConfigError(f"{given!r} is not an address of a server", "for instance http://127.0.0.1:8000")
    return str(url.copy_with(query=None, fragment=None)).rstrip("/").removesuffix("/v1").rstrip("/")


def open_client(target_key: str | None, timeout_s: float) -> httpx.AsyncClient:
    """A client without a queue of its own: every request is on its way at once."""
    return httpx.AsyncClient(
        headers={"Authorization": f"Bearer {target_key}"} if target_key else {},
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
        timeout=httpx.Timeout(timeout_s),
    )


async def find_model(client: httpx.AsyncClient, url: str, wanted: str | None) -> str:
    """The model to ask for: `wanted`, or the only one that is served.

    Raises:
        ResourceUnavailable: nothing answers there.
        ConfigError: the key is refused.
        BadInput: no such model, or several to choose from.
    """
    try:
        response = await client.get(f"{url}/v1/models")
    except httpx.HTTPError as error:
        raise ResourceUnavailable(
            f"nothing answers at {url} ({type(error).__name__})", "start a server: edgetool serve-gpu MODEL"
        ) from error
    if response.status_code in (401, 403):
        raise ConfigError(f"{url} refuses the key ({response.status_code})", "set EDGETOOL_API_KEY, or use --api-key")
    try:
        names = [str(model["id"]) for model in response.raise_for_status().json()["data"]]
    except (httpx.HTTPStatusError, ValueError, KeyError, TypeError) as error:
        if wanted is not None:
            return wanted  # some servers have no such route
        raise BadInput(f"{url}/v1/models does not list models ({response.status_code})", "use --model NAME") from error
    if wanted is not None and wanted not in names:
        raise BadInput(f"{url} does not serve {wanted!r}; it serves {', '.join(names) or 'nothing'}")
    if wanted is None and len(names) != 1:
        raise BadInput(f"{url} serves {len(names)} models: {', '.join(names)}", "choose with --model NAME")
    return wanted or names[0]


async def settle(client: httpx.AsyncClient, target: Target, *, ignore_eos: bool) -> Target:
    """`target` with those extras that its server accepts, found by asking. Raises BackendFailed if it accepts none."""
    usage = {"stream_options": {"include_usage": True}}
    full = {"ignore_eos": True} if ignore_eos else {}
    last = ""
    for extras in ({**full, **usage}, usage, full, {}):
        candidate = replace(target, extras=extras)
        sample = await ask(client, candidate, "Count from one to ten.", 4)
        if sample.error is None:
            return candidate
        last = sample.error
    raise BackendFailed(f"{target.url}{target.path} does not answer a streamed request: {last}", "try another --api")


async def count_prompt(client: httpx.AsyncClient, target: Target, prompt: str) -> int | None:
    """How many tokens the server says `prompt` has, its template included; None when it does not say."""
    body = target.body(prompt, 1, stream=False)
    try:
        response = await client.post(target.url + target.path, json=body)
        value = response.json()["usage"]["prompt_tokens"]
    except (httpx.HTTPError, ValueError, KeyError, TypeError):
        return None
    return value if isinstance(value, int) else None


async def ask(client: httpx.AsyncClient, target: Target, prompt: str, max_tokens: int) -> Sample:
    """Send one request and read its stream to the end. Failures come back in the sample."""
    begun = time.perf_counter()
    first = last = None
    pieces, usage = 0, None
    whole, error = False, None
    try:
        body = target.body(prompt, max_tokens, stream=True)
        async with client.stream("POST", target.url + target.path, json=body) as response:
            if response.status_code != 200:
                error = f"{response.status_code}: {(await response.aread()).decode(errors='replace')[:300]}"
            else:
                async for line in response.aiter_lines():
                    data = event_data(line)
                    if data is None:
                        continue
                    if data == DONE:
                        whole = True
                        break
                    document = json.loads(data)
                    if "error" in document:
                        error = failure_of(document)[:300]
                        break
                    whole = whole or any(choice.get("finish_reason") for choice in document.get("choices") or ())
                    usage = document.get("usage") or usage
                    if _has_text(document):
                        last = time.perf_counter()
                        first = last if first is None else first
                        pieces += 1
    except httpx.HTTPError as failure:
        error = f"{type(failure).__name__} {failure}".strip()
    except (ValueError, AttributeError, TypeError) as failure:
        error = f"the stream is not in OpenAI's form ({failure})"
    ended = time.perf_counter()
    if error is None and first is None:
        error = "the answer was empty"
    if error is None and not whole:
        error = "the answer broke off"
    if error is not None or first is None or last is None:
        return Sample(ended - begun, None, None, None, 0, False, error)
    told = usage.get("completion_tokens") if isinstance(usage, dict) else None
    tokens = told if isinstance(told, int) else pieces
    asked = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    tpot_s = (last - first) / (tokens - 1) if tokens > 1 else None
    prompt_tokens = asked if isinstance(asked, int) else None
    return Sample(ended - begun, first - begun, tpot_s, prompt_tokens, tokens, isinstance(told, int))


def event_data(line: str) -> str | None:
    """What a line of a stream carries, a document or DONE; None for comments, which keep connections alive."""
    return line[5:].strip() if line.startswith("data:") else None


def failure_of(document: dict[str, Any]) -> str:
    """What an event says that holds an `error`: OpenAI's record, or just a text."""
    said = document["error"]
    return str(said.get("message") or said) if isinstance(said, dict) else str(said)


def _has_text(document: dict[str, Any]) -> bool:
    for choice in document.get("choices") or ():
        delta = choice.get("delta") or {}
        if choice.get("text") or delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning"):
            return True
    return False
