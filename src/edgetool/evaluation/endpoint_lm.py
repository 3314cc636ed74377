"""An endpoint as a language model of lm-evaluation-harness: by tokens, by text, or in chat.

Where the tokenizer is known, requests are upstream's own (`local-completions`: same tokens, payload, truncation); only
sending them is ours, so that a failure is one clear error and each answer is kept as it comes. Without a tokenizer the
text is sent, and the server's tokens show where the context ends.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, TypeVar

from lm_eval.api.model import LM
from lm_eval.models.openai_completions import LocalCompletionsAPI

from edgetool.errors import BadInput, EdgetoolError, Stopped
from edgetool.evaluation.endpoint import CHAT, COMPLETIONS, Client, garbage, read_scored

DEFAULT_LENGTH_TOKENS = 2048
"""Context of an endpoint that is not told otherwise, as in upstream."""
DEFAULT_GENERATED_TOKENS = 256
MOST_STOPS = 4
"""Stop strings that OpenAI's API takes; the others are applied to the answer here."""

Asked = TypeVar("Asked")
Answer = TypeVar("Answer")


def never() -> bool:
    """Nobody asks to stop."""
    return False


class TokenLM(LocalCompletionsAPI):  # type: ignore[misc]
    """`local-completions` with our way of sending. `client` is asked for when the first answer is wanted."""

    def __init__(
        self,
        client: Callable[[], Client],
        tokenizer: Path,
        concurrency: int,
        max_length: int | None,
        stopped: Callable[[], bool] = never,
    ) -> None:
        super().__init__(
            tokenizer=str(tokenizer),
            tokenizer_backend="huggingface",
            max_length=max_length or DEFAULT_LENGTH_TOKENS,
        )
        self._client = client
        self._workers = concurrency
        self._stopped = stopped

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        client = self._client()

        def score(request: Any) -> tuple[float, bool]:
            inputs, context_lengths, _ = self.batch_loglikelihood_requests([[request]])
            payload = self._create_payload(self.create_message(inputs), generate=False, seed=self._seed)
            del payload["model"]  # the client knows it
            choice = client.choices(COMPLETIONS, payload)[0]
            found = read_scored(client.endpoint, choice)
            if len(found.tokens) != len(inputs[0]) + 1:
                raise garbage(
                    client.endpoint,
                    f"{len(found.tokens)} tokens scored, and {len(inputs[0])} were sent with one to generate",
                )
            if None in found.logprobs[context_lengths[0] :] or None in found.greedy[context_lengths[0] : -1]:
                raise garbage(client.endpoint, "tokens without a log-probability, or without the likeliest")
            logprob, greedy = self.parse_logprobs([{"choices": [choice]}], inputs, context_lengths)[0]
            return logprob, greedy

        longest_first = sorted(range(len(requests)), key=lambda at: -len(requests[at][1]) - len(requests[at][2]))
        return _in_order(
            longest_first,
            requests,
            score,
            lambda request, answer: request[0] and self.cache_hook.add_partial("loglikelihood", request[0], answer),
            self._workers,
            self._stopped,
        )

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        client = self._client()

        def generate(request: Any) -> str:
            context, options = request.args
            tokens = self.tok_encode([context], add_special_tokens=self.add_bos_token)[0]
            room = self.max_length - int(options.get("max_gen_toks", self._max_gen_toks))
            payload = self._create_payload(
                [tokens[-max(1, room) :]], generate=True, gen_kwargs=dict(options), seed=self._seed, eos=self.eos_string
            )
            del payload["model"]
            return _cut(client.text(COMPLETIONS, _few_stops(payload)), payload.get("stop"))

        return _generated(self, requests, generate, self._workers, self._stopped)


class TextLM(LM):  # type: ignore[misc]
    """An endpoint whose tokenizer is not known: texts are sent and, with `chat`, messages."""

    def __init__(
        self, client: Callable[[], Client], concurrency: int, chat: bool, stopped: Callable[[], bool] = never
    ) -> None:
        super().__init__()
        self._stopped = stopped
        self._client = client
        self._workers = concurrency
        self._chat = chat

    @property
    def tokenizer_name(self) -> str:
        return "server"

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The messages as JSON: the template is the server's."""
        if not add_generation_prompt:
            raise BadInput(
                f"{self._client().endpoint.url}: this task begins the answer itself, which a server that applies "
                "the chat template cannot do",
                "give MODEL, whose tokenizer has the template, or leave --chat-template out",
            )
        return json.dumps(chat_history, ensure_ascii=False)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        client = self._client()

        def score(request: Any) -> tuple[float, bool]:
            context, continuation = request.args
            spaces = len(context) - len(context.rstrip())
            if spaces:  # as upstream does: a space belongs to the word after it
                context, continuation = context[:-spaces], context[-spaces:] + continuation
            return continuation_score(client, context, continuation)

        def keep(request: Any, answer: tuple[float, bool]) -> None:
            self.cache_hook.add_partial("loglikelihood", request.args, answer)

        longest_first = sorted(range(len(requests)), key=lambda at: -sum(map(len, requests[at].args)))
        return _in_order(longest_first, requests, score, keep, self._workers, self._stopped)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        raise BadInput(f"{self._client().endpoint.url}: rolling log-likelihood needs the tokenizer", "give MODEL too")

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        client = self._client()

        def generate(request: Any) -> str:
            context, options = request.args
            said = {"messages": json.loads(context)} if self._chat else {"prompt": context}
            stops = options.get("until") or []
            stops = [stops] if isinstance(stops, str) else [stop for stop in stops if stop]
            body = {
                **said,
                "max_tokens": int(options.get("max_gen_toks", DEFAULT_GENERATED_TOKENS)),
                "temperature": float(options.get("temperature") or 0.0) if options.get("do_sample") else 0.0,
                "stop": stops,
                "seed": 1234,
            }
            return _cut(client.text(CHAT if self._chat else COMPLETIONS, _few_stops(body)), stops)

        return _generated(self, requests, generate, self._workers, self._stopped)


def continuation_score(client: Client, context: str, continuation: str) -> tuple[float, bool]:
    """Log-probability of `continuation` after `context`, and whether each of its tokens was the likeliest.

    Where the context ends is seen in the texts of the server's tokens, and a token that reaches over the border belongs
    to the continuation. Tokens that are parts of characters have no text of their own: the context is then sent alone,
    and has as many tokens as it has there, which is upstream's rule. The first token of all has no probability where
    the server puts nothing before it; it is left out where the context is empty. Raises BackendFailed.
    """
    scored = client.scored(context + continuation)
    first = _tokens_before(scored.tokens, context, context + continuation)
    if first is None:
        first = len(client.scored(context).tokens) - 1 if context else 0
        if first >= len(scored.tokens) - 1:
            raise garbage(client.endpoint, f"more tokens for {context[-40:]!r} than for a longer text")
    total, greedy = [], True
    for value, likeliest in list(zip(scored.logprobs, scored.greedy, strict=True))[first:-1]:
        if value is None:
            if context:
                raise garbage(client.endpoint, "tokens without a log-probability")
            continue
        total.append(value)
        greedy = greedy and likeliest is True
    return math.fsum(total), greedy


def _tokens_before(tokens: Sequence[str], context: str, prompt: str) -> int | None:
    """How many tokens end within the context; None where the tokens' texts do not spell the prompt."""
    shift = "".join(tokens).find(prompt)  # special tokens may stand in front
    if shift < 0:
        return None
    ends = itertools.accumulate(map(len, tokens))
    return sum(end - shift <= len(context) for end in ends)


def _few_stops(body: dict[str, Any]) -> dict[str, Any]:
    stops = body.get("stop")
    return {**body, "stop": stops[:MOST_STOPS]} if isinstance(stops, list) else body


def _cut(text: str, stops: str | Sequence[str] | None) -> str:
    """`text` up to the first stop string."""
    for stop in [stops] if isinstance(stops, str) else stops or ():
        if stop:
            text = text.split(stop)[0]
    return text


def _generated(
    lm: Any, requests: list[Any], generate: Callable[[Any], str], workers: int, stopped: Callable[[], bool]
) -> list[str]:
    longest_first = sorted(range(len(requests)), key=lambda at: -len(requests[at].args[0]))
    return _in_order(
        longest_first,
        requests,
        generate,
        lambda request, answer: lm.cache_hook.add_partial("generate_until", request.args, answer),
        workers,
        stopped,
    )


def _in_order(
    order: Iterable[int],
    requests: Sequence[Asked],
    ask: Callable[[Asked], Answer],
    keep: Callable[[Asked, Answer], Any],
    workers: int,
    stopped: Callable[[], bool],
) -> list[Answer]:
    """`ask` for each request, `workers` at once, begun in `order`; each answer is kept in this thread as it comes.

    The first failure ends all, and so does `stopped`: what has not begun never begins, and the error is raised when the
    others have come.
    """
    answers: dict[int, Answer] = {}
    failed = threading.Event()

    def one(place: int) -> Answer | None:
        return None if failed.is_set() else ask(requests[place])

    with ThreadPoolExecutor(workers, "endpoint") as pool:
        waiting = {pool.submit(one, place): place for place in order}
        try:
            for future in as_completed(waiting):
                place = waiting[future]
                answer = future.result()
                assert answer is not None
                answers[place] = answer
                keep(requests[place], answer)
                if stopped():
                    raise Stopped("stopped on request: all answers so far are kept")
        except BaseException:
            failed.set()
            for future in waiting:
                future.cancel()
            for future, place in waiting.items():  # answers that were under way are not thrown away
                if place not in answers and not future.cancelled() and future.exception() is None:
                    late = future.result()
                    with contextlib.suppress(EdgetoolError):  # whoever keeps may be the one who stops
                        if late is not None:
                            keep(requests[place], late)
            raise
    return [answers[place] for place in range(len(requests))]
