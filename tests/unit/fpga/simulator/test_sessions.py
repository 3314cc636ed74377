"""Sequences on the simulated board: any cut of a prompt, any number of threads, shared prefixes - the same bits."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from edgetool.errors import BadInput, Stopped
from edgetool.fpga.image import Image
from edgetool.fpga.simulator import exact_attention, exact_numerics
from edgetool.fpga.simulator.engine import Session, Simulator
from edgetool.fpga.simulator.errors import ContextFull
from edgetool.fpga.simulator.kv_cache import KvCache
from tests.fakes.quantized_models import Made
from tests.unit.fpga.simulator.recording import bits
from tests.unit.fpga.simulator.shapes import SMALL

Compiled = Callable[..., tuple[Made, Path]]

IDS = [(11 * number + 5) % 70 for number in range(150)]
CONTEXT = 160


@pytest.fixture(scope="module")
def image(compiled: Compiled) -> Image:
    return Image.open(compiled("qwen2", {"max_context": CONTEXT}, shape=SMALL)[1])


@pytest.fixture(scope="module")
def simulator(image: Image) -> Simulator:
    return Simulator(image)


@pytest.fixture(scope="module")
def one_by_one(image: Image) -> np.ndarray:
    """Logits after every token of IDS, fed one at a time: bits [150, vocab]."""
    with Simulator(image, prefix_cache_bytes=0).session() as session:
        return np.concatenate([bits(session.feed([one])) for one in IDS])


def kv(session: Session) -> np.ndarray:
    assert isinstance(session.cache, KvCache)
    return session.cache.data[..., : session.position].view(np.uint16).copy()


def test_a_prompt_in_chunks_of_any_size_gives_the_bits_of_one_token_at_a_time(
    simulator: Simulator, one_by_one: np.ndarray
) -> None:
    rng = np.random.default_rng(0)
    for largest in (3, 40, 150):
        session = simulator.session()
        while session.position < len(IDS):
            count = int(rng.integers(1, largest + 1))
            logits = session.feed(IDS[session.position : session.position + count], logits="all")
            here = slice(session.position - len(logits), session.position)
            assert np.array_equal(bits(logits), one_by_one[here])


def test_the_images_own_chunks_give_the_same_bits(image: Image, one_by_one: np.ndarray) -> None:
    simulator = Simulator(image)
    object.__setattr__(simulator.program, "chunk_tokens", 16)
    session = simulator.session()
    assert np.array_equal(bits(session.feed(IDS, logits="all")), one_by_one)
    assert session.traffic.calls == 10


def test_tiles_of_any_size_give_the_same_bits(
    simulator: Simulator, one_by_one: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    for values in (1, 3000, 20000):
        monkeypatch.setattr(exact_attention, "_TILE_VALUES", values)
        assert np.array_equal(bits(simulator.session().feed(IDS[:140]))[0], one_by_one[139])


def test_one_thread_and_many_give_the_same_bits(
    image: Image, one_by_one: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exact_numerics, "_LITTLE_WORK", 0)
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        simulator = Simulator(image, threads=threads)
        assert np.array_equal(bits(simulator.session().feed(IDS[:100]))[0], one_by_one[99])
        assert torch.get_num_threads() == before


def test_a_large_chunk_uses_the_threads_that_a_token_leaves_alone(simulator: Simulator) -> None:
    numerics = simulator._numerics
    assert numerics.threads(1, 4) == 1
    assert numerics.threads(100_000, 4) == 4


def test_logits_are_of_the_last_token_of_all_or_of_none(simulator: Simulator, one_by_one: np.ndarray) -> None:
    vocab = simulator.facts.vocab
    session = simulator.session()
    assert session.feed(IDS[:5], logits="none").shape == (0, vocab)
    last = session.feed(IDS[5:9])
    assert last.shape == (1, vocab) and last.dtype == np.float16
    assert session.feed(IDS[9:12], logits="all").shape == (3, vocab)
    assert np.array_equal(bits(last)[0], one_by_one[8])


def test_a_fork_and_its_origin_go_their_own_ways(simulator: Simulator, one_by_one: np.ndarray) -> None:
    session = simulator.session()
    session.feed(IDS[:20], logits="none")
    fork = session.fork()
    fork.feed([1, 2, 3], logits="none")
    assert np.array_equal(bits(session.feed(IDS[20:21]))[0], one_by_one[20])
    assert fork.position == 23 and session.position == 21
    fork.truncate(20)
    assert np.array_equal(bits(fork.feed(IDS[20:30]))[0], one_by_one[29])


def test_a_shared_prefix_gives_the_bits_of_a_fresh_start(image: Image, one_by_one: np.ndarray) -> None:
    simulator = Simulator(image)
    with simulator.session(IDS[:40]) as first:
        assert first.position == 0
        first.feed(IDS[:40], logits="none")
    prompt = [*IDS[:25], 69, 68, 67]
    second = simulator.session(prompt)
    assert second.position == 25
    fresh = Simulator(image).session()
    wanted = fresh.feed(prompt)
    assert np.array_equal(bits(second.feed(prompt[25:])), bits(wanted))
    assert np.array_equal(kv(second), kv(fresh))
    third = simulator.session(IDS[:40])
    assert third.position == 39  # one token is left to feed
    assert np.array_equal(bits(third.feed(IDS[39:40]))[0], one_by_one[39])


def test_kept_prefixes_stay_within_their_bytes_and_the_least_used_goes_first(image: Image) -> None:
    per_token = 2 * 2 * SMALL.layers * SMALL.kv_heads * SMALL.head_dim
    simulator = Simulator(image, prefix_cache_bytes=25 * per_token)

    def run(first: int) -> None:
        with simulator.session() as session:
            session.feed([first] * 10, logits="none")

    run(1)
    run(2)
    assert simulator.session([1] * 5).position == 4  # now 2 is the least used
    run(3)
    assert simulator.prefixes.nbytes == 20 * per_token
    found = [simulator.session([first] * 5).position for first in (1, 2, 3)]
    assert found == [4, 0, 4]


def test_a_longer_sequence_replaces_its_own_beginning(image: Image) -> None:
    simulator = Simulator(image)
    for count in (10, 20, 15):
        with simulator.session() as session:
            session.feed(IDS[:count], logits="none")
    assert len(simulator.prefixes) == 1
    assert simulator.session(IDS[:30]).position == 20


def test_a_full_context_is_refused_before_anything_is_taken(simulator: Simulator) -> None:
    session = simulator.session()
    session.feed([1] * (CONTEXT - 2), logits="none")
    before = kv(session)
    with pytest.raises(ContextFull, match=r"158 \+ 3 tokens .* 160") as caught:
        session.feed([1, 2, 3])
    assert caught.value.details == {"position": 158, "new_tokens": 3, "max_context_tokens": 160}
    assert session.position == 158 and np.array_equal(kv(session), before)
    session.feed([1, 2])
    with pytest.raises(ContextFull):
        session.feed([1])


@pytest.mark.parametrize("ids", [[], [70], [-1], [3, 1 << 40]])
def test_ids_outside_of_the_vocabulary_are_refused(simulator: Simulator, ids: list[int]) -> None:
    session = simulator.session()
    with pytest.raises(BadInput):
        session.feed(ids)
    assert session.position == 0


def test_a_cancelled_prompt_keeps_its_whole_chunks_and_can_go_on(image: Image, one_by_one: np.ndarray) -> None:
    simulator = Simulator(image)
    object.__setattr__(simulator.program, "chunk_tokens", 8)
    session = simulator.session()
    asked = 0

    def cancelled() -> bool:
        nonlocal asked
        asked += 1
        return asked > 4  # it is asked before each of 2 layers: in the middle of the third chunk

    with pytest.raises(Stopped, match="16 of 30"):
        session.feed(IDS[:30], cancelled=cancelled)
    assert session.position == 16
    assert np.array_equal(bits(session.feed(IDS[16:30]))[0], one_by_one[29])


def test_sessions_of_several_threads_do_not_meet(simulator: Simulator, one_by_one: np.ndarray) -> None:
    found: dict[int, np.ndarray] = {}

    def run(count: int) -> None:
        with simulator.session(IDS[:count]) as session:
            while session.position < count:
                found[count] = bits(session.feed(IDS[session.position : min(session.position + 7, count)]))

    threads = [threading.Thread(target=run, args=(count,)) for count in (20, 33, 46, 59)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for count, logits in found.items():
        assert np.array_equal(logits[0], one_by_one[count - 1])
    assert len(found) == 4


def test_a_closed_session_takes_nothing_more(simulator: Simulator) -> None:
    session = simulator.session()
    session.feed([1])
    session.close()
    session.close()
    with pytest.raises(RuntimeError, match="closed"):
        session.feed([1])


def test_facts_are_the_images(simulator: Simulator) -> None:
    facts = simulator.facts
    assert (facts.vocab, facts.layers, facts.max_context_tokens, facts.eos_token_ids) == (70, 2, CONTEXT, (2,))
    assert (facts.family, facts.numerics, facts.int4_encoding) == ("qwen2", "et1", "twos")
