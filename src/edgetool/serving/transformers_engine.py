"""An OpenAI-compatible server on transformers, for machines without vLLM: any checkpoint that edgetool reads.

One answer at a time, in the order in which requests come; correct rather than fast. Run as
`python -m edgetool.serving.transformers_engine` with its job as one JSON object on stdin (the key is in it).
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import traceback
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse

from edgetool.serving.auth import RequireKey
from edgetool.serving.decode import Decoder, Piece, Sampling
from edgetool.serving.jobs import EngineJob
from edgetool.serving.openai_api import (
    DEFAULT_COMPLETION_TOKENS,
    DONE,
    ChatRequest,
    Common,
    CompletionRequest,
    Shapes,
    error,
    stream_event,
    usage,
)
from edgetool.serving.strict_json import StrictRoute, complaint

READY_LINE = "transformers engine: answering"


class Refused(Exception):
    """A request that cannot be served: HTTP status and reason."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


@dataclass(frozen=True)
class Work:
    """One prompt of a request, ready to be generated."""

    prompt: list[int]
    max_tokens: int
    sampling: Sampling
    stop: list[str]
    ignore_eos: bool


class Engine:
    """The model behind the routes. `defaults` are those of generation_config.json."""

    def __init__(self, decoder: Decoder, name: str, defaults: Sampling) -> None:
        self.decoder = decoder
        self.name = name
        self.defaults = defaults
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="generate")

    def chat_work(self, request: ChatRequest) -> Work:
        tokenizer = self.decoder.tokenizer
        if not getattr(tokenizer, "chat_template", None):
            raise Refused(400, "the model has no chat template: use /v1/completions")
        messages = [{**message.model_dump(), "content": _plain(message.content)} for message in request.messages]
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as failure:  # the template is the model's own program and may raise anything
            raise Refused(400, f"the chat template refuses these messages: {failure}") from failure
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return self._work(ids, request.max_completion_tokens or request.max_tokens, request)

    def completion_work(self, request: CompletionRequest) -> list[Work]:
        prompts = request.prompts()
        if not prompts:
            raise Refused(400, "prompt is empty")
        limit = request.max_tokens or DEFAULT_COMPLETION_TOKENS
        return [
            self._work(self.decoder.tokenizer(p)["input_ids"] if isinstance(p, str) else p, limit, request)
            for p in prompts
        ]

    def _work(self, ids: list[int], max_tokens: int | None, request: Common) -> Work:
        refusal = request.unsupported()
        if refusal is not None:
            raise Refused(400, refusal)
        if request.model is not None and request.model != self.name:
            raise Refused(404, f"the model {request.model!r} does not exist here; there is {self.name!r}")
        vocabulary = int(self.decoder.model.config.get_text_config().vocab_size)
        if not ids or min(ids) < 0 or max(ids) >= vocabulary:
            raise Refused(400, f"the prompt must hold at least one token id from 0 to {vocabulary - 1}")
        room = self.decoder.max_model_len - len(ids)
        if room < 1 or (max_tokens or 1) > room:
            asked = f" and {max_tokens} were asked for" if max_tokens else ""
            raise Refused(
                400,
                f"This model's maximum context length is {self.decoder.max_model_len} tokens; the prompt has {len(ids)}"
                f"{asked}",
            )
        own = self.defaults
        sampling = Sampling(
            own.temperature if request.temperature is None else request.temperature,
            own.top_p if request.top_p is None else request.top_p,
            own.top_k if request.top_k is None else max(0, request.top_k),
            request.seed,
        )
        return Work(ids, max_tokens or room, sampling, request.stops, bool(request.ignore_eos))

    async def pieces(self, work: Work) -> AsyncIterator[Piece]:
        """The pieces of one answer. Leaving the loop early stops the generation."""
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[Piece | Exception | None] = asyncio.Queue()
        stop = threading.Event()

        def put(item: Piece | Exception | None) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, item)

        def generate() -> None:
            try:
                for piece in self._generate(work, stop):
                    put(piece)
                put(None)
            except Exception as failure:
                put(failure)

        running = loop.run_in_executor(self._worker, generate)
        try:
            while (item := await queue.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            stop.set()
            running.cancel()  # a request that has not begun need not begin

    def _generate(self, work: Work, stop: threading.Event) -> Iterator[Piece]:
        decoder = self.decoder
        if work.ignore_eos:
            decoder = Decoder(decoder.model, decoder.tokenizer, (), decoder.max_model_len)
        yield from decoder.pieces(work.prompt, work.max_tokens, work.sampling, work.stop, stop.is_set)


def make_app(engine: Engine, key: str) -> RequireKey:
    """The routes of `engine` behind `key`."""
    app = FastAPI(title="edgetool transformers engine", docs_url=None, redoc_url=None, openapi_url=None)
    app.router.route_class = StrictRoute

    @app.exception_handler(Refused)
    async def _refused(_request: Request, refused: Refused) -> JSONResponse:
        kind = "server_error" if refused.status >= 500 else "invalid_request_error"
        return JSONResponse(error(refused.message, refused.status, kind), refused.status)

    @app.exception_handler(RequestValidationError)
    async def _invalid(_request: Request, invalid: RequestValidationError) -> JSONResponse:
        return JSONResponse(error(complaint(invalid)[0], 400), 400)

    @app.get("/health")
    async def health() -> Response:
        return Response()

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        record = {"id": engine.name, "object": "model", "created": 0, "owned_by": "edgetool"}
        return {"object": "list", "data": [{**record, "max_model_len": engine.decoder.max_model_len}]}

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        return await _answer(engine, Shapes("chat", engine.name), [engine.chat_work(body)], body, request)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await _answer(engine, Shapes("text", engine.name), engine.completion_work(body), body, request)

    return RequireKey(app, key)


async def _answer(engine: Engine, shapes: Shapes, works: list[Work], body: Common, request: Request) -> Response:
    if body.stream:
        with_usage = body.stream_options is not None and body.stream_options.include_usage
        return StreamingResponse(_events(engine, shapes, works, with_usage), media_type="text/event-stream")
    answers, made = [], 0
    for work in works:
        text, finish = "", "length"
        try:
            async for piece in engine.pieces(work):
                text, finish = text + piece.text, piece.finish or finish
                made += piece.tokens
                if await request.is_disconnected():
                    return Response(status_code=499)
        except Exception as failure:
            # not let through: the server would cut the connection, and with it the front's next request
            raise Refused(500, _failed(failure)) from failure
        answers.append((text, finish))
    return JSONResponse(shapes.whole(answers, usage(sum(len(work.prompt) for work in works), made)))


async def _events(engine: Engine, shapes: Shapes, works: list[Work], with_usage: bool) -> AsyncIterator[bytes]:
    made = 0
    try:
        for index, work in enumerate(works):
            first = True
            async for piece in engine.pieces(work):
                made += piece.tokens
                if piece.text or piece.finish or first:
                    yield stream_event(shapes.chunk(index, piece.text, piece.finish, first=first))
                    first = False
        if with_usage:
            yield stream_event(shapes.usage_chunk(usage(sum(len(work.prompt) for work in works), made)))
    except Exception as failure:
        yield stream_event(error(_failed(failure), 500, "server_error"))
    yield DONE


def _failed(failure: Exception) -> str:
    """What the client is told; the traceback is for the log."""
    traceback.print_exception(failure)
    return f"generation failed: {type(failure).__name__}: {failure}"


def _plain(content: str | list[dict[str, Any]] | None) -> str:
    """Text of a message; parts of text are joined, other parts are refused."""
    if isinstance(content, list):
        texts = [part.get("text") for part in content if part.get("type") == "text"]
        if len(texts) != len(content) or not all(isinstance(text, str) for text in texts):
            raise Refused(400, "messages may hold text only")
        return "".join(map(str, texts))
    return content or ""


def load(job: EngineJob) -> Engine:
    """The engine of `job`, its model in memory. What it prints goes to the log."""
    import torch

    from edgetool.checkpoints.checkpoint import Checkpoint
    from edgetool.models.streamed import load_tokenizer
    from edgetool.models.whole import load_whole
    from edgetool.progress_lines import PlainProgress

    if job.threads:
        torch.set_num_threads(job.threads)
    checkpoint = Checkpoint.open(Path(job.model))
    tokenizer = load_tokenizer(checkpoint)
    progress = PlainProgress(sys.stderr)
    model = load_whole(checkpoint, torch.device(job.device), getattr(torch, job.dtype), progress)
    progress.close()
    own = _generation_config(checkpoint.directory)
    ends = own.get("eos_token_id", model.config.get_text_config().eos_token_id)
    end_ids = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}
    sampling = Sampling(
        float(own.get("temperature") or 1.0), float(own.get("top_p") or 1.0), max(0, int(own.get("top_k") or 0))
    )
    decoder = Decoder(model, tokenizer, sorted(end_ids), job.max_model_len)
    return Engine(decoder, job.served_model_name, sampling)


def _generation_config(directory: Path) -> dict[str, Any]:
    path = directory / "generation_config.json"
    document = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return document if isinstance(document, dict) else {}


def main() -> None:
    """Load, listen, serve until a signal comes."""
    import socket as sockets

    import uvicorn

    from edgetool.errors import EdgetoolError

    job = EngineJob(**json.loads(sys.stdin.read()))
    try:
        app = make_app(load(job), job.key)
    except EdgetoolError as failure:
        print(f"error: {failure.message}", file=sys.stderr)
        raise SystemExit(failure.exit_code) from None
    settings = uvicorn.Config(
        app, access_log=False, log_level="warning", timeout_graceful_shutdown=1 + int(job.drain_s), uds=job.socket
    )
    listening = [sockets.socket(fileno=job.listen_fd)] if job.socket is None and job.listen_fd is not None else None
    print(READY_LINE, file=sys.stderr, flush=True)
    uvicorn.Server(settings).run(sockets=listening)


if __name__ == "__main__":
    main()
