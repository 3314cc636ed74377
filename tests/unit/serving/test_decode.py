"""Token by token: against transformers' own generation, and text that is never cut in the wrong place."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from edgetool.checkpoints.checkpoint import Checkpoint
from edgetool.models.whole import load_whole
from edgetool.progress import NullProgress
from edgetool.serving.decode import Decoder, Sampling, TextOut, choose
from tests.fakes.tiny_models import make_tiny_model

GREEDY = Sampling(temperature=0.0)


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def tiny(request, tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("models") / request.param, request.param, dtype="float32")


@pytest.fixture(scope="module")
def decoder(tiny):
    model = load_whole(Checkpoint.open(tiny), torch.device("cpu"), torch.float32, NullProgress())
    return Decoder(model, AutoTokenizer.from_pretrained(tiny), (), 256)


def run(decoder, prompt, count, sampling=GREEDY, stop=()):
    return list(decoder.pieces(prompt, count, sampling, list(stop), lambda: False))


def test_greedy_text_is_that_of_transformers_own_generation(decoder, tiny):
    prompt = [5, 17, 99, 300, 7]
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    made = model.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=None)
    expected = decoder.tokenizer.decode(made[0, len(prompt) :], skip_special_tokens=True)
    pieces = run(decoder, prompt, 24)
    assert "".join(piece.text for piece in pieces) == expected
    assert sum(piece.tokens for piece in pieces) == 24
    assert [piece.finish for piece in pieces] == [None] * 23 + ["length"]


def test_the_same_seed_gives_the_same_text_and_another_seed_another(decoder):
    def text(seed):
        return "".join(piece.text for piece in run(decoder, [3, 4], 30, Sampling(1.0, seed=seed)))

    assert text(1) == text(1)
    assert text(1) != text(2)


def test_the_context_is_never_overrun(decoder):
    assert len(run(decoder, list(range(250)), 100)) == 6


def test_an_end_token_ends_the_text_and_is_not_in_it(decoder):
    pieces = run(decoder, [5, 17], 12)
    expected = "".join(piece.text for piece in pieces)
    first_ids = decoder.tokenizer(expected, add_special_tokens=False).input_ids
    assert first_ids
    # what comes third is declared an end
    third = _third_token(decoder, [5, 17])
    ended = run(Decoder(decoder.model, decoder.tokenizer, (third,), 256), [5, 17], 12)
    assert ended[-1].finish == "stop"
    assert expected.startswith("".join(piece.text for piece in ended))
    assert len(ended) <= 3


def _third_token(decoder, prompt):
    ids = list(prompt)
    for _ in range(3):
        ids.append(int(decoder.model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[-1]


def test_generation_ends_when_it_is_cancelled(decoder):
    asked = 0

    def cancelled():
        nonlocal asked
        asked += 1
        return asked > 3

    assert len(list(decoder.pieces([1, 2], 50, GREEDY, [], cancelled))) == 3


CUTS = [(1e-300, {0}), (0.49, {0}), (0.5, {0}), (0.51, {0, 1}), (0.81, {0, 1, 2}), (1.0, {0, 1, 2, 3})]


@pytest.mark.parametrize(("top_p", "allowed"), CUTS)
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p, allowed):
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    generator = torch.Generator().manual_seed(0)
    seen = {choose(logits, Sampling(1.0, top_p), generator) for _ in range(400)}
    assert seen == allowed


def test_top_k_keeps_the_likeliest():
    logits = torch.tensor([0.1, 0.4, 0.3, 0.2]).log()
    generator = torch.Generator().manual_seed(0)
    assert {choose(logits, Sampling(1.0, 1.0, 2), generator) for _ in range(200)} == {1, 2}


def test_samples_follow_the_distribution():
    chances = np.array([0.5, 0.3, 0.2])
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor(np.log(chances))
    counts = np.bincount([choose(logits, Sampling(1.0), generator) for _ in range(6000)], minlength=3)
    # five standard deviations of a binomial count of 6000
    assert np.all(np.abs(counts - 6000 * chances) < 5 * np.sqrt(6000 * chances * (1 - chances)))


class Bytes:
    """A tokenizer whose tokens are bytes of UTF-8."""

    def decode(self, ids, skip_special_tokens=True):
        return bytes(ids).decode(errors="replace")


@pytest.mark.parametrize("text", ["naïve café", "日本語のテキスト", "a🙂b👩‍🚀c", "plain"])
def test_no_piece_holds_half_a_character(text):
    out = TextOut(Bytes(), [])
    pieces = [out.add(byte) for byte in text.encode()] + [out.rest()]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_half_a_character_at_the_very_end_is_not_lost():
    out = TextOut(Bytes(), [])
    pieces = [out.add(byte) for byte in "né".encode()[:-1]] + [out.rest()]
    assert "".join(pieces) == "n\ufffd"


@pytest.mark.parametrize(
    ("text", "stop", "expected", "stopped"),
    [
        ("one two three", ["two"], "one ", True),
        ("one two three", ["ee", "two"], "one ", True),
        ("one tw", ["two"], "one tw", False),
        ("aab", ["ab"], "a", True),
        ("ababac", ["abac"], "ab", True),
        ("two", ["two"], "", True),
        ("日本語。次", ["。"], "日本語", True),
        ("text", [""], "text", False),
    ],
)
def test_text_ends_before_the_first_stop_string_wherever_tokens_cut_it(text, stop, expected, stopped):
    out = TextOut(Bytes(), stop)
    said = ""
    for byte in text.encode():
        said += out.add(byte)
        assert expected.startswith(said)  # nothing of a stop string has been said before it was known
        if out.stopped:
            break
    assert said + out.rest() == expected
    assert out.stopped is stopped
