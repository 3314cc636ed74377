"""The routes that ask the model: /v1/chat/completions, /v1/completions and /predict."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from edgetool.fpga_service.api_answers import Likely, chat_logprobs, completion_logprobs
from edgetool.fpga_service.api_errors import Gone, while_there
from edgetool.fpga_service.api_requests import ChatRequest, Common, CompletionRequest, Refusal
from edgetool.fpga_service.device import GenerateOptions
from edgetool.fpga_service.exchange import Ask, Conversation, Exchange, Piece, Wish
from edgetool.fpga_service.observing import CLIENT_GONE, NOTES, Notes
from edgetool.serving.auth import KEY_NAME, Receive, Scope, Send
from edgetool.serving.openai_api import DONE, Shapes, stream_event
from edgetool.serving.prediction import Prediction
from edgetool.serving.strict_json import StrictRoute

if TYPE_CHECKING:
    from edgetool.fpga_service.gateway import Gateway

Logprobs = Callable[[Sequence[Likely]], dict[str, Any]]
_LAST_WORD_S = 1.0
"""For the event that says that the time is over."""


class Events(StreamingResponse):
    """Server-sent events, whose source is closed when they end or the client goes away, not some time later.

    A client that does not read keeps its place in the queue no longer than `limit_s`.
    """

    def __init__(self, events: AsyncIterator[bytes], source: AsyncIterator[Any], limit_s: float) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._source = source
        self._limit_s = limit_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._limit_s):
                    await super().__call__(scope, receive, send)
        finally:
            await close(self._source)


def routes(gateway: Gateway) -> APIRouter:
    """The routes of `gateway`."""
    router = APIRouter(route_class=StrictRoute)

    @router.post("/v1/chat/completions", summary="Answer a conversation", response_class=JSONResponse)
    @router.post("/chat/completions", include_in_schema=False)
    async def chat(body: ChatRequest, request: Request) -> Response:
        body.check()
        tokens = body.max_completion_tokens or body.max_tokens
        options = _options(gateway, body, tokens, body.wanted_logprobs)
        wish = Wish([Conversation(body.history())], options, tokens, "messages")
        most = body.wanted_logprobs
        logprobs = None if most is None else lambda tokens: chat_logprobs(tokens, most)
        return await _answer(gateway, request, body, wish, Shapes("chat", gateway.name_for(body.model)), logprobs)

    @router.post("/v1/completions", summary="Go on from a prompt", response_class=JSONResponse)
    @router.post("/completions", include_in_schema=False)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        body.check()
        options = _options(gateway, body, body.tokens or None, body.logprobs)
        wish = Wish(body.prompts(), options, body.tokens, "prompt", bool(body.echo))
        most = body.logprobs
        logprobs = None if most is None else lambda tokens: completion_logprobs(tokens, most)
        return await _answer(gateway, request, body, wish, Shapes("text", gateway.name_for(body.model)), logprobs)

    @router.post("/predict", summary="Answer one question, or a list of them", response_class=JSONResponse)
    async def predict(body: Prediction, request: Request) -> Response:
        gateway.name_for(None)
        questions = [body.prompt] if isinstance(body.prompt, str) else body.prompt
        stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
        options = GenerateOptions(
            body.max_tokens, body.temperature, seed=body.seed, stop=tuple(word for word in stops if word)
        )
        asks: list[Ask] = list(questions)
        if gateway.chats:
            asks = [Conversation([{"role": "user", "content": question}]) for question in questions]
        exchange = _begin(gateway, request, Wish(asks, options, body.max_tokens, "prompt"))
        try:
            await while_there(request, _exhaust(gateway, exchange))
        except Gone:
            return Response(status_code=CLIENT_GONE)
        answers = [choice.text for choice in exchange.choices]
        return JSONResponse({"response": answers[0] if isinstance(body.prompt, str) else answers})

    return router


def _options(gateway: Gateway, body: Common, tokens: int | None, logprobs: int | None) -> GenerateOptions:
    """How to answer; what the request does not say is the gateway's, then the model's own."""
    own = gateway.host.facts
    temperature = body.temperature
    if temperature is None:
        temperature = gateway.settings.temperature
    if temperature is None:
        temperature = 1.0 if own is None else own.temperature
    top_p, top_k = body.top_p, None if body.top_k is None else max(0, body.top_k)
    return GenerateOptions(
        max_tokens=tokens,
        temperature=temperature,
        top_p=(1.0 if own is None else own.top_p) if top_p is None else top_p,
        top_k=(0 if own is None else own.top_k) if top_k is None else top_k,
        seed=body.seed,
        stop=body.stops,
        logprobs=logprobs,
        ignore_eos=bool(body.ignore_eos),
    )


def _begin(gateway: Gateway, request: Request, wish: Wish) -> Exchange:
    """An exchange for a request that is allowed one. Raises Refusal."""
    if gateway.rates is not None:
        gateway.rates.take(request.scope.get(KEY_NAME, "-"))
    if gateway.host.state == "plain":
        _check_plain(wish)
    settings = gateway.settings
    exchange = Exchange(gateway.host, wish, settings.timeout_s, settings.max_model_len, gateway.counter)
    notes: Notes = request.scope[NOTES]
    notes.exchange = exchange
    return exchange


def _check_plain(wish: Wish) -> None:
    """Raise Refusal for what a host of plain A cannot do."""
    if wish.param == "prompt" and any(not isinstance(ask, Conversation) for ask in wish.asks):
        raise Refusal(
            400, "the host of this model answers conversations only: use /v1/chat/completions", param="prompt"
        )
    if wish.options.logprobs is not None:
        raise Refusal(400, "the host of this model gives no log-probabilities", param="logprobs")
    if wish.options.stop:
        raise Refusal(400, "the host of this model knows no stop strings", param="stop")


async def _answer(
    gateway: Gateway, request: Request, body: Common, wish: Wish, shapes: Shapes, logprobs: Logprobs | None
) -> Response:
    exchange = _begin(gateway, request, wish)
    notes: Notes = request.scope[NOTES]
    notes.id, notes.stream = shapes.id, bool(body.stream)
    try:
        if not body.stream:
            await while_there(request, _exhaust(gateway, exchange))
            choices = exchange.choices
            answers = [(choice.text, choice.finish or "length") for choice in choices]
            likely = [] if logprobs is None else [logprobs(choice.likely) for choice in choices]
            return JSONResponse(shapes.whole(answers, exchange.usage(), likely))
        pieces = exchange.pieces(gateway.queue)
        # the first piece is waited for, so that what fails before it is an HTTP status
        first = await while_there(request, _first(pieces))
    except Gone:
        return Response(status_code=CLIENT_GONE)
    events = _events(exchange, first, pieces, notes, shapes, logprobs, with_usage=body.with_usage)
    return Events(events, pieces, gateway.settings.timeout_s + _LAST_WORD_S)


async def _exhaust(gateway: Gateway, exchange: Exchange) -> None:
    pieces = exchange.pieces(gateway.queue)
    try:
        async for _ in pieces:
            pass
    finally:
        await close(pieces)


async def _first(pieces: AsyncIterator[Piece]) -> Piece | None:
    async for piece in pieces:
        return piece
    return None


async def _events(
    exchange: Exchange,
    first: Piece | None,
    pieces: AsyncIterator[Piece],
    notes: Notes,
    shapes: Shapes,
    logprobs: Logprobs | None,
    *,
    with_usage: bool,
) -> AsyncIterator[bytes]:
    begun: set[int] = set()

    def event(piece: Piece) -> bytes | None:
        new = piece.index not in begun
        if not (piece.text or piece.finish or piece.likely or new):
            return None
        begun.add(piece.index)
        likely = None if logprobs is None or not piece.likely else logprobs(piece.likely)
        return stream_event(shapes.chunk(piece.index, piece.text, piece.finish, first=new, logprobs=likely))

    try:
        if first is not None and (line := event(first)):
            yield line
        async for piece in pieces:
            if line := event(piece):
                yield line
        if with_usage:
            yield stream_event({**shapes.usage_chunk({}), "usage": exchange.usage()})
    except Refusal as refusal:
        notes.error = refusal.code or refusal.kind
        yield stream_event(refusal.body())
    yield DONE


async def close(pieces: AsyncIterator[Any]) -> None:
    """End a generator now: what it holds is given back."""
    aclose = getattr(pieces, "aclose", None)
    if aclose is not None:
        await aclose()
