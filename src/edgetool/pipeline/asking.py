"""A server is proven by a question: the step that serves starts it, asks once, and keeps the answer."""

from __future__ import annotations

import time
from typing import Any

from edgetool.errors import BackendFailed

_LIMIT_S = 600.0


def ask(document: dict[str, Any], key: str, question: str, max_tokens: int) -> dict[str, Any]:
    """Ask a server, as its ready document names it, one question; returns the answer and what it took.

    Raises:
        BackendFailed: it does not answer, or with nothing.
    """
    import httpx

    address = document["openai_base_url"]
    model = document.get("served_model_name") or document.get("model")
    body = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": max_tokens,
        "temperature": 0,
    }
    started = time.monotonic()
    try:
        response = httpx.post(
            f"{address}/chat/completions", json=body, headers={"Authorization": f"Bearer {key}"}, timeout=_LIMIT_S
        )
    except httpx.HTTPError as error:
        raise BackendFailed(f"{address} was ready and does not answer: {error}") from error
    seconds = time.monotonic() - started
    if response.status_code != 200:
        raise BackendFailed(f"{address} was ready and answers {response.status_code}: {response.text[:300]}")
    try:
        answer = response.json()
        text = str(answer["choices"][0]["message"]["content"] or "")
        tokens = int(answer["usage"]["completion_tokens"])
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise BackendFailed(f"{address} answers what is no chat completion: {response.text[:300]}") from error
    if not text.strip():
        raise BackendFailed(f"{address} answers {question!r} with nothing")
    return {"question": question, "answer": text, "tokens": tokens, "seconds": round(seconds, 3)}
