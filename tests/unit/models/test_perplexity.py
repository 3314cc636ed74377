import math

import pytest
import torch

from edgetool.models import perplexity
from edgetool.models import streamed as streamed_module
from edgetool.progress import NullProgress, RecordingProgress
from tests.unit.models.reference import all_states, some_ids, stirred_model, streamed, transformers_model


@pytest.fixture(scope="module")
def mistral(tmp_path_factory):
    return stirred_model(tmp_path_factory.mktemp("mistral"), "mistral", sliding_window=8)


def direct_losses(directory, ids):
    """Cross entropy of every token but the first of each window, from transformers' logits, in float64."""
    with torch.no_grad():
        logits = transformers_model(directory)(input_ids=ids).logits.double()
    log_probabilities = logits[:, :-1].log_softmax(-1)
    return -log_probabilities.gather(2, ids[:, 1:].unsqueeze(2)).flatten()


@pytest.mark.parametrize("tokens_at_once", [20, 60, 1024])
def test_perplexity_is_that_of_the_whole_model(mistral, tokens_at_once, monkeypatch):
    monkeypatch.setattr(perplexity, "TOKENS_AT_ONCE", tokens_at_once)
    ids = some_ids(5, 20)
    expected = direct_losses(mistral, ids)
    found = perplexity.measure(streamed(mistral), ids, NullProgress(), "perplexity")
    # float32 logits of about 1 are exact to 1e-6; the mean of 95 losses is no worse
    assert found.nll_per_token == pytest.approx(float(expected.mean()), rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(float(expected.mean())), rel=1e-4)
    assert (found.predicted_tokens, found.context_tokens) == (5 * 19, 20)


@pytest.mark.parametrize(("chunk", "rows"), [(100, 7), (512, 1024), (511, 19), (1, 1024)])
def test_losses_over_vocabulary_chunks_are_those_over_all_of_it(mistral, chunk, rows, monkeypatch):
    monkeypatch.setattr(streamed_module, "VOCAB_CHUNK", chunk)
    ids = some_ids(1, 20)
    ids[0, 1:3] = torch.tensor([0, 511])  # the first and the last row of the matrix
    model = streamed(mistral)
    states = all_states(model, ids)[-1][0, :-1]
    found = perplexity.token_losses(model, states, ids[0, 1:], rows_at_once=rows)
    torch.testing.assert_close(found.double(), direct_losses(mistral, ids), rtol=1e-4, atol=1e-4)


def test_a_target_one_off_gives_other_losses(mistral):
    """Negative control: the comparison above notices a wrong target."""
    ids = some_ids(1, 20)
    model = streamed(mistral)
    states = all_states(model, ids)[-1][0, :-1]
    shifted = perplexity.token_losses(model, states, ids[0, 1:] - 1)
    assert (shifted.double() - direct_losses(mistral, ids)).abs().max() > 0.01


def test_windows_do_not_overlap_and_leave_the_rest_out():
    assert perplexity.windows(list(range(11)), 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert perplexity.windows(list(range(11)), 4, limit_tokens=7).tolist() == [[0, 1, 2, 3]]
    assert perplexity.windows([1, 2], 4).shape == (0, 4)


def test_progress_counts_layers(mistral):
    progress = RecordingProgress()
    perplexity.measure(streamed(mistral), some_ids(2, 8), progress, "perplexity, tiny")
    assert progress.events == [
        ("start", "perplexity, tiny", 2),
        ("advance", "perplexity, tiny", 1),
        ("advance", "perplexity, tiny", 1),
        ("end", "perplexity, tiny", 2),
    ]
