"""The load: a number of requests always under way, level by level; two endpoints take turns in short rounds.

A machine gets slower and faster while a benchmark runs. Two endpoints measured one after the other are therefore not
compared; in turns of a few seconds, in the order A B, B A, A B ..., they meet the same conditions, and the spread of
the rounds says how far a difference can be trusted.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import httpx

from edgetool.errors import BackendFailed
from edgetool.loadtest import prompts
from edgetool.loadtest.client import Api, Sample, Target, ask, base_url, count_prompt, find_model, open_client, settle
from edgetool.progress import Progress, Task

_BUSY = 0.8


@dataclass(frozen=True)
class Endpoint:
    """An endpoint as the user names it; model None: the only one it serves."""

    url: str
    model: str | None
    key: str | None


@dataclass(frozen=True)
class Load:
    """What is to be done.

    concurrency: levels, each a number of requests under way at the same time. requests: on each level and endpoint,
    over all rounds. prompt_tokens, output_tokens: lengths; outputs are exact only where the server knows ignore_eos.
    """

    concurrency: Sequence[int]
    requests: int | None
    prompt_tokens: int
    output_tokens: int
    rounds: int
    warmup: int
    api: Api
    ignore_eos: bool
    seed: int
    timeout_s: float

    def per_round(self, level: int) -> int:
        """Requests of one round; at least as many as are under way at once."""
        total = self.requests if self.requests is not None else max(16, 4 * level)
        return max(level, math.ceil(total / self.rounds))


@dataclass(frozen=True)
class Round:
    """One turn of one endpoint on one level."""

    endpoint: int
    concurrency: int
    wall_s: float
    samples: tuple[Sample, ...]


@dataclass(frozen=True)
class Measured:
    """What came of it: targets as they were asked, all rounds in order, and what should be known when judging them."""

    targets: tuple[Target, ...]
    rounds: tuple[Round, ...]
    warnings: tuple[str, ...]


def measure(endpoints: Sequence[Endpoint], load: Load, progress: Progress) -> Measured:
    """Run the load against one or two endpoints.

    Raises ResourceUnavailable, ConfigError or BadInput as `find_model`, BackendFailed when an endpoint serves nothing.
    """
    return asyncio.run(_measure(endpoints, load, progress))


async def _measure(endpoints: Sequence[Endpoint], load: Load, progress: Progress) -> Measured:
    clients = [open_client(endpoint.key, load.timeout_s) for endpoint in endpoints]
    try:
        return await _with_clients(endpoints, clients, load, progress)
    finally:
        for client in clients:
            await client.aclose()


async def _with_clients(
    endpoints: Sequence[Endpoint], clients: list[httpx.AsyncClient], load: Load, progress: Progress
) -> Measured:
    warnings: list[str] = []
    targets, words = [], []
    for endpoint, client in zip(endpoints, clients, strict=True):
        target, count = await _prepare(endpoint, client, load, warnings)
        targets.append(target)
        words.append(count)
    plan = [(level, number) for level in load.concurrency for number in range(load.rounds)]
    # the same prompts for both, but never the same prompt twice for one server, whose prefix cache would answer
    twice = len({target.url for target in targets}) < len(targets)
    total = sum(load.per_round(level) for level, _ in plan) * len(targets)
    rounds: list[Round] = []
    busy_s, begun = time.process_time(), time.monotonic()
    serial = 0
    with progress.task("requests", total, "request") as task:
        for level, number in plan:
            order = range(len(targets)) if number % 2 == 0 else reversed(range(len(targets)))
            for index in order:
                seed = load.seed + (index if twice else 0)
                texts = [prompts.text(words[index], seed, serial + n) for n in range(load.per_round(level))]
                rounds.append(await _round(index, clients[index], targets[index], level, texts, load, task))
            serial += load.per_round(level)
    share = (time.process_time() - busy_s) / max(1e-9, time.monotonic() - begun)
    if share > _BUSY:
        warnings.append(f"this client was busy {share:.0%} of the time: the servers may be faster than measured")
    for index, target in enumerate(targets):
        samples = [sample for found in rounds if found.endpoint == index for sample in found.samples]
        _judge(target, samples, load, warnings)
    return Measured(tuple(targets), tuple(rounds), tuple(warnings))


async def _prepare(
    endpoint: Endpoint, client: httpx.AsyncClient, load: Load, warnings: list[str]
) -> tuple[Target, int]:
    """The target as its server wants to be asked, and the number of words of a prompt; the server is warm then."""
    url = base_url(endpoint.url)
    model = await find_model(client, url, endpoint.model)
    target = await settle(client, Target(url, model, endpoint.key, load.api), ignore_eos=load.ignore_eos)
    if load.ignore_eos and "ignore_eos" not in target.extras:
        warnings.append(f"{url} does not know ignore_eos: answers end where the model ends them")
    counts = [
        await count_prompt(client, target, prompts.text(size, load.seed, -1 - place))
        for place, size in enumerate(prompts.PROBE_WORDS)
    ]
    length = prompts.fit((counts[0], counts[1]))
    if not length.measured:
        warnings.append(f"{url} does not count prompt tokens: prompts have {load.prompt_tokens} words instead")
    words = length.words(load.prompt_tokens)
    for number in range(load.warmup):
        await ask(client, target, prompts.text(words, load.seed, -100 - number), load.output_tokens)
    return target, words


async def _round(
    index: int, client: httpx.AsyncClient, target: Target, level: int, texts: list[str], load: Load, task: Task
) -> Round:
    waiting = iter(texts)
    samples: list[Sample] = []

    async def worker() -> None:
        for text in waiting:
            samples.append(await ask(client, target, text, load.output_tokens))
            task.advance(note=f"{level} at once")

    begun = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(min(level, len(texts)))))
    return Round(index, level, time.perf_counter() - begun, tuple(samples))


def _judge(target: Target, samples: list[Sample], load: Load, warnings: list[str]) -> None:
    failed = [sample for sample in samples if sample.error is not None]
    good = [sample for sample in samples if sample.error is None]
    if not good:
        raise BackendFailed(f"all {len(failed)} requests to {target.url} failed; the first: {failed[0].error}")
    if failed:
        warnings.append(
            f"{len(failed)} of {len(samples)} requests to {target.url} failed; the first: {failed[0].error}"
        )
    if not all(sample.counted for sample in good):
        warnings.append(
            f"{target.url} does not count tokens: pieces of its stream were counted, which may hold several"
        )
    short = sum(sample.tokens < load.output_tokens for sample in good)
    if short:
        warnings.append(f"{short} of {len(good)} answers of {target.url} are shorter than {load.output_tokens} tokens")
