import pytest
import torch

from edgetool.checkpoints.checkpoint import Checkpoint
from edgetool.errors import BadInput
from edgetool.models.streamed import load_tokenizer
from edgetool.progress import NullProgress
from edgetool.quantizers import self_calibration
from edgetool.quantizers.engine import Abandoned
from edgetool.quantizers.self_calibration import sample_from_model
from tests.unit.models.reference import all_states, logits, stirred_model, streamed


@pytest.fixture(scope="module")
def model_and_tokenizer(tmp_path_factory):
    directory = stirred_model(tmp_path_factory.mktemp("model"), "llama", layers=1)
    return streamed(directory), load_tokenizer(Checkpoint.open(directory))


def sample(model_and_tokenizer, seed=0, samples=5, seqlen=12, **options):
    model, tokenizer = model_and_tokenizer
    return sample_from_model(
        model, tokenizer, samples=samples, seqlen=seqlen, seed=seed, progress=NullProgress(), **options
    )


def test_the_same_seed_draws_the_same_tokens_and_another_draws_others(model_and_tokenizer):
    first = sample(model_and_tokenizer)
    torch.rand(10)  # the global generator must not matter
    assert torch.equal(first.token_ids, sample(model_and_tokenizer).token_ids)
    assert first.sha256 != sample(model_and_tokenizer, seed=1).sha256
    assert first.token_ids.shape == (5, 12) and first.token_ids.dtype == torch.int64
    assert first.source == "self"


def test_rows_are_drawn_in_batches_and_all_differ(model_and_tokenizer, monkeypatch):
    monkeypatch.setattr(self_calibration, "ROWS_AT_ONCE", 2)
    rows = sample(model_and_tokenizer).token_ids.tolist()
    assert len({tuple(row) for row in rows}) == 5


def test_special_tokens_never_appear_and_the_first_steps_are_the_most_likely(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    ids = sample(model_and_tokenizer).token_ids
    special = sorted(tokenizer.all_special_ids)
    assert not set(ids.flatten().tolist()) & set(special)
    scores = logits(model, all_states(model, ids)[-1])
    scores[..., special] = -torch.inf
    greedy = self_calibration.GREEDY_TOKENS
    assert torch.equal(scores[:, :greedy].argmax(-1), ids[:, 1 : greedy + 1])
    assert not torch.equal(scores[:, greedy:-1].argmax(-1), ids[:, greedy + 1 :])


def test_it_needs_two_tokens_and_heeds_a_stop(model_and_tokenizer):
    with pytest.raises(BadInput, match="calib_seqlen is 1"):
        sample(model_and_tokenizer, seqlen=1)
    with pytest.raises(Abandoned):
        sample(model_and_tokenizer, stop_requested=lambda: True)
