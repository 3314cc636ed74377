"""An OpenAI server around a tiny model that scores prompts (echo with logprobs), written without any of edgetool."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


@dataclass
class ScoringServer:
    """Answers /v1/models and /v1/completions, in float32, as vLLM does: offsets count characters of the joined tokens.

    key: what it wants as bearer token. down_after: answers so many completions and then 503 to all. garbage: what it
    changes in its answers: "html", "deep", "null", "no_logprobs", "no_echo", "nan", "no_choices". speaks_tokens:
    whether prompts may be token ids. seen: the bodies of all completions.
    """

    directory: Path
    key: str | None = None
    down_after: int | None = None
    garbage: str | None = None
    speaks_tokens: bool = True
    seen: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(self.directory)
        self.model = AutoModelForCausalLM.from_pretrained(self.directory, dtype=torch.float32).eval()
        self._one_at_a_time = threading.Lock()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        data, more = b"", True
        while more:
            message = await receive()
            data += message.get("body", b"")
            more = message.get("more_body", False)
        status, body = self.answer(scope["path"], dict(scope["headers"]).get(b"authorization"), data)
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": body})

    def answer(self, path: str, authorization: bytes | None, data: bytes) -> tuple[int, bytes]:
        """Status and body."""
        if self.key is not None and authorization != f"Bearer {self.key}".encode():
            return 401, b'{"error": {"message": "no"}}'
        if path == "/v1/models":
            return 200, json.dumps({"data": [{"id": "tiny"}]}).encode()
        if path != "/v1/completions":
            return 404, b'{"error": {"message": "no such route"}}'
        body = json.loads(data)
        if self.down_after is not None and len(self.seen) >= self.down_after:
            return 503, b'{"error": {"message": "going down"}}'
        self.seen.append(body)
        if self.garbage == "html":
            return 200, b"<html>welcome</html>"
        if self.garbage == "deep":
            return 200, b"[" * 200_000
        if self.garbage == "null":
            return 200, b"null"
        prompts = body["prompt"]
        if isinstance(prompts, str) or isinstance(prompts[0], int):
            prompts = [prompts]
        if not self.speaks_tokens and not isinstance(prompts[0], str):
            return 400, b'{"error": {"message": "prompt must be a string"}}'
        with self._one_at_a_time, torch.no_grad():
            choices = [self._complete(prompt, body, index) for index, prompt in enumerate(prompts)]
        if self.garbage == "no_choices":
            return 200, json.dumps({"choices": []}).encode()
        return 200, json.dumps({"object": "text_completion", "choices": choices}).encode().replace(b"-1e+300", b"NaN")

    def _complete(self, prompt: str | list[int], body: dict[str, Any], index: int) -> dict[str, Any]:
        ids = self.tokenizer(prompt, add_special_tokens=False)["input_ids"] if isinstance(prompt, str) else list(prompt)
        start = len(ids)
        for _ in range(body.get("max_tokens", 16)):
            logits = self.model(torch.tensor([ids])).logits[0, -1]
            ids.append(int(logits.argmax()))
            made = self.tokenizer.decode(ids[start:])
            if any(stop in made for stop in body.get("stop") or ()):
                made = min((made.split(stop)[0] for stop in body["stop"]), key=len)
                break
        else:
            made = self.tokenizer.decode(ids[start:])
        echo = body.get("echo") and self.garbage != "no_echo"
        choice: dict[str, Any] = {"index": index, "text": (self.tokenizer.decode(ids[:start]) if echo else "") + made}
        if body.get("logprobs") is None or self.garbage == "no_logprobs":
            return choice
        shown = list(range(0 if echo else start, len(ids)))
        table = torch.log_softmax(self.model(torch.tensor([ids])).logits[0], -1)
        words = [self.tokenizer.decode([ids[place]]) for place in shown]
        values = [float(table[place - 1, ids[place]]) if place else None for place in shown]
        if self.garbage == "nan":
            values[-2] = -1e300
        tops: list[Any] = [None] * len(shown)
        for number, place in enumerate(shown):
            if place:
                best = int(table[place - 1].argmax())
                tops[number] = {
                    f"#{ids[place]}": float(table[place - 1, ids[place]]),
                    f"#{best}": float(table[place - 1, best]),
                }
        offsets = [sum(map(len, words[:number])) for number in range(len(words))]
        choice["logprobs"] = {
            "tokens": words, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets,
        }  # fmt: skip
        return choice
