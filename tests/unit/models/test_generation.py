import pytest
import torch

from edgetool.checkpoints.checkpoint import Checkpoint
from edgetool.models.generation import chat_prompt, degenerate, generate
from edgetool.models.streamed import load_tokenizer
from tests.unit.models.reference import some_ids, stirred_model, streamed, transformers_model

CASES = {
    "llama": {},
    "mistral": {"sliding_window": 8},  # shorter than prompt and answer: the cache must forget in time
    "qwen2": {"tied": False},
    "qwen3": {},
    "qwen2_5_vl": {},
}


@pytest.mark.parametrize("family", CASES)
def test_greedy_generation_is_token_for_token_that_of_transformers(family, tmp_path):
    directory = stirred_model(tmp_path, family, **CASES[family])
    prompts = some_ids(2, 6)
    whole = transformers_model(directory)
    whole.generation_config.eos_token_id = None
    expected = whole.generate(
        input_ids=prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=14, do_sample=False
    )
    assert len(set(expected[0, 6:].tolist())) > 3  # a constant answer would prove little
    for keep_bytes in (1 << 30, 200_000, 0):
        found = generate(streamed(directory), prompts, 14, keep_bytes=keep_bytes)
        assert torch.equal(found, expected[:, 6:])


def test_one_row_ends_at_the_stop_token_and_several_rows_do_not(tmp_path):
    model = streamed(stirred_model(tmp_path, "llama", layers=1))
    prompts = some_ids(2, 6)
    free = generate(model, prompts[:1], 10)[0].tolist()
    stop = free[3]
    cut = free.index(stop) + 1
    assert generate(model, prompts[:1], 10, stop=stop)[0].tolist() == free[:cut]
    assert generate(model, prompts, 10, stop=stop).shape == (2, 10)


def test_the_caller_may_choose_tokens_from_the_logits(tmp_path):
    model = streamed(stirred_model(tmp_path, "llama", layers=1))
    seen = []

    def least_likely(logits):
        seen.append(logits.shape)
        return logits.argmin(1)

    found = generate(model, some_ids(3, 4), 2, least_likely)
    assert seen == [(3, 512), (3, 512)]
    assert not torch.equal(found, generate(model, some_ids(3, 4), 2))


@pytest.mark.parametrize(
    ("tokens", "reason"),
    [
        ([5] * 7, None),
        ([5] * 24, "token 5 makes up 24 of 24 tokens"),
        ([1, 2, 3] * 8, "only 3 different tokens in 24"),
        ([5] * 13 + list(range(100, 111)), "token 5 makes up 13 of 24 tokens"),
        ([5] * 12 + list(range(100, 112)), None),
        (list(range(24)), None),
        ([1, 2, 3, 4] * 6, None),
        ([1, 2, 3, 4, 5] * 10, "only 5 different tokens in 50"),
    ],
)
def test_a_sequence_is_degenerate_when_one_or_few_tokens_make_it_up(tokens, reason):
    assert degenerate(tokens) == reason


def test_the_prompt_is_in_the_models_chat_template_or_plain_where_it_has_none(tmp_path):
    tokenizer = load_tokenizer(Checkpoint.open(stirred_model(tmp_path, "llama", layers=1)))
    prompt = chat_prompt(tokenizer, "How?")
    assert prompt.dtype == torch.int64
    assert tokenizer.decode(prompt[0]) == "<|im_start|>user\nHow?<|im_end|>\n<|im_start|>assistant\n"
    tokenizer.chat_template = None
    assert tokenizer.decode(chat_prompt(tokenizer, "How?")[0]) == "How?"
    for broken in ("{{ 1 / 0 }}", "{% for", "{{ raise_exception('no system message') }}", "{{ messages[5]['role'] }}"):
        tokenizer.chat_template = broken
        assert tokenizer.decode(chat_prompt(tokenizer, "How?")[0]) == "How?"
