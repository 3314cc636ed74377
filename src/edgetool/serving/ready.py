"""Ready means: it answers /health, lists its model, and completes a prompt with something like language."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import httpx

from edgetool.errors import BackendFailed, VerificationFailed
from edgetool.models.degeneration import degenerate

PROMPT = "The capital of France is"
TOKENS = 32
COMPLETION_LIMIT_S = 300.0
"""The first completion of a large model compiles kernels; later ones are fast."""


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI server: address without /v1, key, and the name of the model."""

    url: str
    key: str | None
    model: str

    def client(self, timeout_s: float) -> httpx.Client:
        """A client that carries the key; it goes past any proxy of the environment, since the server is here."""
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=timeout_s, trust_env=False)


def healthy(endpoint: Endpoint) -> bool:
    """Whether /health answers 200."""
    try:
        with endpoint.client(2.0) as client:
            return client.get("/health").status_code == 200
    except httpx.HTTPError:
        return False


def check_answers(endpoint: Endpoint) -> str:
    """Check /v1/models and one completion of a server that is healthy; returns the text that it wrote.

    Tokens are drawn at temperature 1, not the likeliest taken: small healthy models fall into loops when they are
    decoded greedily, and only broken ones (wrong zero points, wrong scales, NaN) repeat themselves even so.

    Raises:
        BackendFailed: a route does not answer as it should.
        VerificationFailed: what it writes is no language.
    """
    try:
        with endpoint.client(COMPLETION_LIMIT_S) as client:
            names = [model["id"] for model in _json(client.get("/v1/models"), "/v1/models")["data"]]
            if endpoint.model not in names:
                raise BackendFailed(f"/v1/models of {endpoint.url} lists {names}, not {endpoint.model!r}")
            body = {"model": endpoint.model, "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 1.0, "seed": 0}
            answer = _json(client.post("/v1/completions", json=body), "/v1/completions")
            text = str(answer["choices"][0]["text"])
    except httpx.HTTPError as error:
        raise BackendFailed(f"{endpoint.url} broke off the first request: {type(error).__name__}: {error}") from error
    except (KeyError, IndexError, TypeError) as error:
        raise BackendFailed(f"{endpoint.url} does not answer in OpenAI's form: {error!r}") from error
    reason = babble(text, answer.get("usage", {}).get("completion_tokens"))
    if reason is not None:
        raise VerificationFailed(
            f"the model starts but does not speak: {PROMPT!r} is completed with {text[:120]!r} ({reason})",
            "the weights are damaged or wrongly read: `edgetool inspect MODEL`; --no-check serves it all the same",
        )
    return text


def babble(text: str, tokens: int | None = None) -> str | None:
    """Why `text` (of `tokens` tokens) is nothing a working model writes, or None.

    The tokens themselves are not known, so words, and where there are too few of them characters, are counted.
    """
    if not text.strip():
        return None if tokens is not None and tokens <= 1 else "nothing but white space"
    pieces: list[str] = re.findall(r"\w+|[^\w\s]", text)
    if len(pieces) < 8:
        pieces = [character for character in text if not character.isspace()]
    return degenerate(pieces)


def _json(response: httpx.Response, route: str) -> dict[str, Any]:
    if response.status_code != 200:
        raise BackendFailed(f"{route} answers {response.status_code}: {response.text[:300]}")
    document = response.json()
    if not isinstance(document, dict):
        raise BackendFailed(f"{route} answers {type(document).__name__}, not an object")
    return document
