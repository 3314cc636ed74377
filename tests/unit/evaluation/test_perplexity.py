"""Perplexity and divergence of tiny models against naive loops over transformers' own logits and upstream's figures."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgetool.checkpoints.checkpoint import Checkpoint
from edgetool.errors import ResourceUnavailable, Stopped
from edgetool.evaluation.answers import Answers
from edgetool.evaluation.divergence import KeptDistributions, chosen_windows, summed
from edgetool.evaluation.endpoint import Client, Endpoint
from edgetool.evaluation.endpoint_lm import TokenLM
from edgetool.evaluation.loaded import LoadedModel, load
from edgetool.evaluation.perplexity import Against, divergence_known, measure
from edgetool.evaluation.perplexity_remote import cut_at_blanks, measure_text, measure_tokens
from edgetool.evaluation.windows import CutText, cut
from edgetool.progress import NullProgress, RecordingProgress
from tests.fakes.openai_server import Running
from tests.fakes.scoring_server import ScoringServer
from tests.unit.models.reference import stirred_model, transformers_model

QUIET = NullProgress()
TEXT = (Path(__file__).parents[3] / "src/edgetool/data/held_out.txt").read_text()[:700]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An original and what could be its quantised form: the same but for noise."""
    original = stirred_model(tmp_path_factory.mktemp("original"), "llama", tied=False)
    other = stirred_model(tmp_path_factory.mktemp("other"), "llama", tied=False)
    from safetensors.torch import load_file, save_file

    tensors = load_file(other / "model.safetensors")
    noise = torch.Generator().manual_seed(3)
    for name, tensor in tensors.items():
        if tensor.dim() == 2:
            tensors[name] = (tensor + 0.1 * tensor.std() * torch.randn(tensor.shape, generator=noise)).to(tensor.dtype)
        if name == "lm_head.weight":
            tensors[name] = (20 * tensors[name]).to(tensor.dtype)
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    return original, other


def loaded(directory: Path) -> LoadedModel:
    return load(Checkpoint.open(directory), torch.device("cpu"), torch.float32, QUIET)


@pytest.fixture
def answers(tmp_path: Path) -> Iterator[list[Answers]]:
    """Four empty ledgers."""
    found = [Answers.open(tmp_path / f"{number}.jsonl") for number in range(4)]
    yield found
    for one in found:
        one.close()


def naive_log_probabilities(directory: Path, text: CutText) -> list[torch.Tensor]:
    """float64 [predicted, vocabulary] of each window, from one forward pass of it with nothing left out."""
    model = transformers_model(directory)
    with torch.no_grad():
        return [
            model(input_ids=torch.tensor([one.tokens[:-1]])).logits[0, -one.predicted :].double().log_softmax(-1)
            for one in text.windows
        ]


def naive_nll(directory: Path, text: CutText) -> list[float]:
    return [
        -sum(float(row[token]) for row, token in zip(rows, window.tokens[-window.predicted :], strict=True))
        for rows, window in zip(naive_log_probabilities(directory, text), text.windows, strict=True)
    ]


@pytest.mark.parametrize(("context", "stride", "limit"), [(64, 64, None), (64, 24, None), (200, 7, 4)])
def test_each_windows_loss_is_that_of_a_naive_loop(
    models: tuple[Path, Path], answers: list[Answers], context: int, stride: int, limit: int | None
) -> None:
    model = loaded(models[0])
    text = cut(TEXT, model.tokenizer, context, stride, limit)
    found, _ = measure(lambda: model, text, answers[0], QUIET, "model")
    # float32 log-probabilities near 6 are exact to about 1e-6
    assert [one.nll for one in found.windows] == pytest.approx(naive_nll(models[0], text), rel=1e-5)
    assert (found.tokens, found.words, found.context, found.stride) == (text.predicted, text.words, context, stride)
    assert found.perplexity == pytest.approx(math.exp(sum(naive_nll(models[0], text)) / text.predicted), rel=1e-5)


def test_disjoint_windows_give_upstreams_rolling_log_likelihood(
    models: tuple[Path, Path], answers: list[Answers]
) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model = loaded(models[0])
    text = cut(TEXT, model.tokenizer, 64, 64)
    upstream = HFLM(pretrained=model.model, tokenizer=model.tokenizer, batch_size=1, max_length=64)
    (expected,) = upstream.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (TEXT,), 0)], disable_tqdm=True)
    here, _ = measure(lambda: model, text, answers[0], QUIET, "model")
    there = measure_tokens(upstream, text, answers[1], QUIET, "endpoint")
    # upstream adds float32 log-probabilities in float32
    assert (-here.nll, -there.nll) == pytest.approx((expected, expected), rel=1e-6)


def test_what_is_known_is_not_computed_again(models: tuple[Path, Path], answers: list[Answers]) -> None:
    model = loaded(models[0])
    text = cut(TEXT, model.tokenizer, 64, 32)

    def never() -> LoadedModel:
        raise AssertionError("nothing has to be loaded")

    first, _ = measure(lambda: model, text, answers[0], QUIET, "model")
    again, _ = measure(never, text, answers[0], QUIET, "model")
    assert again.windows == first.windows
    with pytest.raises(AssertionError):
        measure(never, cut(TEXT, model.tokenizer, 64, 16), answers[0], QUIET, "model")


def test_a_stopped_run_goes_on_where_it_was(models: tuple[Path, Path], answers: list[Answers]) -> None:
    model = loaded(models[0])
    text = cut(TEXT, model.tokenizer, 64, 32)
    calls: list[int] = []

    def stop_at_third() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise Stopped("stopped")

    with pytest.raises(Stopped):
        measure(lambda: model, text, answers[0], QUIET, "model", heed_stop=stop_at_third)
    assert len(answers[0]) == 3
    progress = RecordingProgress()
    found, _ = measure(lambda: model, text, answers[0], progress, "model")
    steps = [value for kind, _, value in progress.events if kind == "advance"]
    assert len(steps) == len(text.windows) - 3
    whole, _ = measure(lambda: model, text, answers[1], QUIET, "model")
    assert found.windows == whole.windows


def test_a_model_of_no_numbers_has_infinite_perplexity(models: tuple[Path, Path], answers: list[Answers]) -> None:
    model = loaded(models[0])
    with torch.no_grad():
        next(model.model.parameters()).fill_(math.nan)
    found, _ = measure(lambda: model, cut(TEXT, model.tokenizer, 64, 64), answers[0], QUIET, "model")
    assert found.perplexity == math.inf


def compared(
    models: tuple[Path, Path], text: CutText, answers: list[Answers], directory: Path, chosen: list[int]
) -> Any:
    original, quantized = loaded(models[0]), loaded(models[1])
    kept = KeptDistributions(directory, chosen)
    measure(lambda: original, text, answers[0], QUIET, "original", keep=kept)
    return measure(lambda: quantized, text, answers[1], QUIET, "quantised", against=Against(kept, "original"))


def test_the_divergence_is_that_of_a_naive_loop(
    models: tuple[Path, Path], answers: list[Answers], tmp_path: Path
) -> None:
    text = cut(TEXT, loaded(models[0]).tokenizer, 64, 24)
    scores, found = compared(models, text, answers, tmp_path / "kept", list(range(len(text.windows))))
    values, agreed = [], []
    for p, q in zip(naive_log_probabilities(models[0], text), naive_log_probabilities(models[1], text), strict=True):
        values += [float((row.exp() * (row - other)).sum()) for row, other in zip(p, q, strict=True)]
        agreed += [int(row.argmax()) == int(other.argmax()) for row, other in zip(p, q, strict=True)]
    assert found is not None and found.tokens == text.predicted == len(values)
    # log-probabilities wait as float16: off by up to 2**-9 for values to 8, the square of that in KL, and less than
    # 1e-3 of the tokens' KL of about 1 by the first-order part that stays after normalising
    assert found.kl_mean == pytest.approx(float(np.mean(values)), rel=1e-3)
    assert found.kl_percentiles == pytest.approx(
        {f"p{at}" if at < 100 else "max": float(np.percentile(values, at)) for at in (50, 90, 99, 100)}, rel=1e-2
    )
    assert found.top1_agreement == np.mean(agreed)
    assert 0.05 < found.top1_agreement < 0.95  # neither model is trivial: the comparison above could fail
    assert scores.nll == pytest.approx(sum(naive_nll(models[1], text)), rel=1e-5)


def test_a_model_does_not_diverge_from_itself(
    models: tuple[Path, Path], answers: list[Answers], tmp_path: Path
) -> None:
    text = cut(TEXT, loaded(models[1]).tokenizer, 64, 24)
    _, found = compared((models[1], models[1]), text, answers, tmp_path / "kept", list(range(len(text.windows))))
    assert found is not None
    assert found.top1_agreement == 1.0
    assert 0 <= found.kl_mean < 1e-5  # float16 log-probabilities, squared


def test_a_known_divergence_needs_neither_model_nor_what_was_kept(
    models: tuple[Path, Path], answers: list[Answers], tmp_path: Path
) -> None:
    text = cut(TEXT, loaded(models[0]).tokenizer, 64, 32)
    chosen = [0, 2]
    assert not divergence_known(text, chosen, "original", answers[1])
    first = compared(models, text, answers, tmp_path / "kept", chosen)
    assert divergence_known(text, chosen, "original", answers[1])
    assert not divergence_known(text, chosen, "another", answers[1])
    kept = KeptDistributions(tmp_path / "kept", chosen)
    kept.remove()
    assert not (tmp_path / "kept").exists()
    again = measure(pytest.fail, text, answers[1], QUIET, "quantised", against=Against(kept, "original"))
    assert again[1] == first[1] and again[0].windows == first[0].windows
    assert first[1].tokens == sum(text.windows[index].predicted for index in chosen)


def test_only_windows_that_are_missing_are_kept_again(
    models: tuple[Path, Path], answers: list[Answers], tmp_path: Path
) -> None:
    original = loaded(models[0])
    text = cut(TEXT, original.tokenizer, 64, 32)
    kept = KeptDistributions(tmp_path / "kept", [0, 1, 3])
    measure(lambda: original, text, answers[0], QUIET, "original", keep=kept)
    names = sorted(path.name for path in (tmp_path / "kept").iterdir())
    assert names == ["window-000000.npz", "window-000001.npz", "window-000003.npz"]
    before = {name: (tmp_path / "kept" / name).stat().st_mtime_ns for name in names}
    (tmp_path / "kept" / names[1]).unlink()
    measure(lambda: original, text, answers[0], QUIET, "original", keep=kept)
    after = {name: (tmp_path / "kept" / name).stat().st_mtime_ns for name in names}
    assert [name for name in names if before[name] != after[name]] == [names[1]]


def test_vocabularies_of_different_sizes_have_perplexities_and_no_divergence(
    models: tuple[Path, Path], answers: list[Answers], tmp_path: Path
) -> None:
    original, quantized = loaded(models[0]), loaded(models[1])
    quantized.model.resize_token_embeddings(520)
    text = cut(TEXT, original.tokenizer, 64, 64)
    kept = KeptDistributions(tmp_path / "kept", [0])
    measure(lambda: original, text, answers[0], QUIET, "original", keep=kept)
    progress = RecordingProgress()
    for _ in range(2):  # the second is answered from the ledger
        scores, found = measure(
            lambda: quantized, text, answers[1], progress, "quantised", against=Against(kept, "original")
        )
        assert found is None and scores.perplexity > 1
    assert sum("differ in size" in event[1] for event in progress.events if event[0] == "warn") == 2


def test_a_full_disk_is_said_while_distributions_are_kept(
    models: tuple[Path, Path], answers: list[Answers], tmp_path: Path
) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    original = loaded(models[0])
    text = cut(TEXT, original.tokenizer, 64, 64)
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "window-000000.part").symlink_to("/dev/full")
    with pytest.raises(ResourceUnavailable):
        measure(lambda: original, text, answers[0], QUIET, "o", keep=KeptDistributions(tmp_path / "kept", [0]))


def test_as_many_windows_are_compared_as_fit_evenly_over_the_text() -> None:
    text = cut("x" * 1000, _OneToken(), 10, 10)
    assert len(text.windows) == 100
    assert chosen_windows(text, 500, 10 * 500 * 2 * 5) == [0, 25, 50, 74, 99]
    assert chosen_windows(text, 500, 1 << 40) == list(range(100))
    assert chosen_windows(text, 500, 1) == [0]
    longer_first = cut("x" * 100, _OneToken(), 20, 10)  # 20 tokens, then 10 a window
    assert chosen_windows(longer_first, 500, 500 * 2 * (20 + 10 + 10)) == [0, 4, 8]


def test_divergences_are_summed_over_tokens() -> None:
    found = summed([{"kl": [0.1, 0.2, 0.3], "agreed": 2}, {"kl": [1.0], "agreed": 1}])
    assert found is not None and found.kl_mean == pytest.approx(0.4) and found.top1_agreement == 0.75
    assert found.kl_percentiles["max"] == 1.0 and found.kl_percentiles["p50"] == pytest.approx(0.25)
    assert summed([{"kl": [], "agreed": 0}]) is None and summed([]) is None


class _OneToken:
    bos_token_id = 1
    eos_token_id = 2

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [5] * len(text)}


class _Scored:
    """What an endpoint says of a text: a token a character, -0.5 each, the first unknown, one generated at the end."""

    def __init__(self, text: str) -> None:
        self.logprobs = (None, *[-0.5] * (len(text) - 1), -99.0)


def test_an_endpoint_without_a_tokenizer_is_asked_by_pieces_of_text(answers: list[Answers]) -> None:
    asked: list[str] = []

    def score(text: str) -> Any:
        asked.append(text)
        return _Scored(text)

    found = measure_text(score, TEXT, "f" * 64, 40, None, answers[0], QUIET, "endpoint", concurrency=3)
    pieces = cut_at_blanks(TEXT, 120)
    assert sorted(asked) == sorted(pieces) and "".join(pieces) == TEXT
    assert found.tokens == len(TEXT) - len(pieces)
    assert found.nll == pytest.approx(0.5 * found.tokens)
    assert found.words == len(TEXT.split()) - len(pieces)
    assert (found.unit, found.context, found.prefix) == ("characters", 120, "none")
    again = measure_text(pytest.fail, TEXT, "f" * 64, 40, None, answers[0], QUIET, "endpoint")
    assert again.windows == found.windows
    part = measure_text(pytest.fail, TEXT, "f" * 64, 40, 2, answers[0], QUIET, "endpoint")
    assert part.windows == found.windows[:2]


def test_an_endpoint_has_the_perplexity_of_the_model_behind_it(
    models: tuple[Path, Path], answers: list[Answers]
) -> None:
    model = loaded(models[0])
    text = cut(TEXT, model.tokenizer, 64, 32, limit=5)
    here, _ = measure(lambda: model, text, answers[0], QUIET, "model")
    with Running(ScoringServer(models[0])) as running:
        client = Client(Endpoint(running.url, None, "tiny"), 30.0)
        by_tokens = measure_tokens(TokenLM(lambda: client, models[0], 4, 256), text, answers[1], QUIET, "endpoint")
        by_text = measure_text(client.scored, TEXT, "f" * 64, 20, 3, answers[2], QUIET, "endpoint", concurrency=2)
        client.close()
    # both are float32, in batches of other shapes
    assert [one.nll for one in by_tokens.windows] == pytest.approx([one.nll for one in here.windows], rel=1e-5)
    for piece, found in zip(cut_at_blanks(TEXT, 60), by_text.windows, strict=False):
        tokens = model.tokenizer(piece, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            rows = model.model(input_ids=torch.tensor([tokens])).logits[0].double().log_softmax(-1)
        expected = -sum(float(rows[place, token]) for place, token in enumerate(tokens[1:]))
        assert (found.nll, found.tokens) == (pytest.approx(expected, rel=1e-5), len(tokens) - 1)


@pytest.mark.parametrize("text", ["", "word", "a b " * 100, "x" * 500, "one two\nthree " * 30 + " ", "ä ö " * 90])
def test_pieces_join_to_the_text_and_break_no_word_that_fits(text: str) -> None:
    pieces = cut_at_blanks(text, 50)
    assert "".join(pieces).strip() == text.strip()
    assert all(0 < len(piece) <= 50 for piece in pieces)
    if "x" * 50 not in text:
        assert all(piece[0].isspace() for piece in pieces[1:])
