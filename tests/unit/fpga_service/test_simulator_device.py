"""The simulated board as a device: what it says token by token is what the simulator's logits say."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgetool.errors import BadInput
from edgetool.fpga.image import Image
from edgetool.fpga.simulator.engine import Simulator
from edgetool.fpga_service.device import ContextLengthExceeded, Device, GenerateOptions, Step
from edgetool.fpga_service.simulator_device import SimulatorDevice, open_device
from edgetool.fpga_service.tokens import Tokens, rounds
from tests.fakes.tiny_image import make_tiny_image
from tests.unit.fpga.test_checks import rewrite

CONTEXT = 96
QUESTION = [{"role": "user", "content": "The quick brown fox?"}]
GREEDY = GenerateOptions(max_tokens=24, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_image(tmp_path_factory.mktemp("tiny"), max_context=CONTEXT)


@pytest.fixture(scope="module")
def device(image: Path) -> Iterator[SimulatorDevice]:
    device = open_device(image, board="bench", model="tiny", threads=1)
    yield device
    device.close()


@pytest.fixture(scope="module")
def prompt(device: SimulatorDevice) -> list[int]:
    return device.encode_chat(QUESTION)


def never() -> bool:
    return False


def steps_of(device: Device, prompt: list[int], options: GenerateOptions) -> list[Step]:
    return list(device.generate(prompt, options, never))


def text_of(steps: list[Step]) -> str:
    return "".join(step.text for step in steps)


def logits_after(image: Path, ids: list[int]) -> np.ndarray:
    """float64 [len(ids), vocab] by a simulator of its own, one token at a time."""
    with Simulator(Image.open(image)).session() as session:
        return np.concatenate([session.feed([one]) for one in ids]).astype(np.float64)


def log_chances(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def test_it_says_what_it_is(device: SimulatorDevice, image: Path) -> None:
    facts = device.facts
    assert (facts.model, facts.board, facts.family, facts.numerics) == ("tiny", "bench", "llama", "et1")
    assert (facts.vocab, facts.max_context_tokens, facts.chat) == (512, CONTEXT, True)
    assert device.decode([facts.eos_token_ids[0]]) == "<|im_end|>"
    assert open_device(image).facts.model == "image"  # the directory's name, where none is given


def test_greedy_tokens_are_the_likeliest_ones(device: SimulatorDevice, image: Path, prompt: list[int]) -> None:
    steps = steps_of(device, prompt, GREEDY)
    ids = [step.id for step in steps]
    logits = logits_after(image, [*prompt, *ids[:-1]])[len(prompt) - 1 :]
    assert ids == logits.argmax(1).tolist() and len(ids) == 24
    assert [step.finish for step in steps] == [None] * 23 + ["length"]
    whole = device._tokens.tokenizer.decode(ids, skip_special_tokens=True)
    assert text_of(steps) == whole.rstrip("\ufffd")  # a character that is not complete at the end is left out


def test_logprobs_are_those_of_the_models_distribution(device: SimulatorDevice, image: Path, prompt: list[int]) -> None:
    options = GenerateOptions(max_tokens=4, temperature=0.7, seed=3, logprobs=5, ignore_eos=True)
    steps = steps_of(device, prompt, options)
    logits = logits_after(image, [*prompt, *(step.id for step in steps)])[len(prompt) - 1 :]
    for step, row in zip(steps, logits, strict=False):
        chances = log_chances(row)
        assert step.logprob == pytest.approx(chances[step.id], abs=1e-4)
        order = np.lexsort((np.arange(len(chances)), -chances))[:5]
        assert [one for one, _, _ in step.top] == order.tolist()
        assert [chance for _, _, chance in step.top] == pytest.approx(chances[order], abs=1e-4)
        assert step.token == device.decode([step.id])
    plain = steps_of(device, prompt, GenerateOptions(max_tokens=1, logprobs=0))
    assert plain[0].top == () and plain[0].logprob is not None
    none = steps_of(device, prompt, GenerateOptions(max_tokens=1))
    assert none[0].logprob is None and none[0].token == ""


def test_a_seed_decides_and_other_seeds_decide_otherwise(device: SimulatorDevice, prompt: list[int]) -> None:
    def ids(**how: Any) -> list[int]:
        return [step.id for step in steps_of(device, prompt, GenerateOptions(12, ignore_eos=True, **how))]

    assert ids(seed=5) == ids(seed=5) != ids(seed=6)
    assert ids(seed=-1) == ids(seed=-1) and ids(seed=2**63 + 9) == ids(seed=2**63 + 9)
    assert ids(seed=None) != ids(seed=None)  # 512 tokens of about equal chance, 12 times
    greedy = ids(temperature=0)
    assert ids(seed=5, top_k=1) == ids(seed=5, top_p=1e-6) == greedy


def test_a_stop_string_ends_the_answer_and_is_left_out(device: SimulatorDevice, prompt: list[int]) -> None:
    whole = text_of(steps_of(device, prompt, GREEDY))
    stop = whole[5:9]  # over the border of tokens, wherever that is
    assert len(stop) == 4
    steps = steps_of(device, prompt, GenerateOptions(24, temperature=0, ignore_eos=True, stop=("never this", stop)))
    assert text_of(steps) == whole[: whole.index(stop)]
    assert steps[-1].finish == "stop" and len(steps) < 24


def test_an_end_token_ends_the_answer_unless_it_is_ignored(image: Path, prompt: list[int], tmp_path: Path) -> None:
    usual = steps_of(open_device(image), prompt, GREEDY)
    ending = usual[3].id
    assert ending not in {step.id for step in usual[:3]}
    ends = Path(shutil.copytree(image, tmp_path / "image"))
    change_defaults(ends, {"eos_token_id": [ending]})
    device = open_device(ends)
    assert set(device.facts.eos_token_ids) == {ending, *open_device(image).facts.eos_token_ids}
    steps = steps_of(device, prompt, GenerateOptions(24, temperature=0))
    assert [step.id for step in steps] == [step.id for step in usual[:4]]
    assert (steps[-1].finish, [step.finish for step in steps[:-1]]) == ("stop", [None] * 3)
    assert steps_of(device, prompt, GREEDY) == usual


def change_defaults(image: Path, document: Any) -> None:
    """Write generation_config.json into an image, so that its hash is right."""
    import hashlib

    raw = (document if isinstance(document, str) else json.dumps(document)).encode()
    (image / "tokenizer/generation_config.json").write_bytes(raw)
    manifest = json.loads((image / "manifest.json").read_text())
    manifest["tokenizer"]["generation_config.json"] = hashlib.sha256(raw).hexdigest()
    (image / "manifest.json").write_text(json.dumps(manifest))


def test_the_models_own_defaults_are_facts(image: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(image, tmp_path / "image"))
    change_defaults(own, {"temperature": 0.6, "top_p": 0.9, "top_k": 40, "eos_token_id": 5})
    facts = open_device(own).facts
    assert (facts.temperature, facts.top_p, facts.top_k, facts.eos_token_ids) == (0.6, 0.9, 40, (1, 2, 5))
    for wrong in ({"temperature": "warm"}, {"top_k": []}, {"eos_token_id": ["x"]}, "{", "[]"):
        change_defaults(own, wrong if wrong else {})
        if wrong == {"top_k": []}:
            assert open_device(own).facts.top_k == 0  # nothing is no cut
            continue
        with pytest.raises(BadInput, match=r"generation_config\.json"):
            open_device(own)


def test_what_does_not_fit_is_refused_before_anything_runs(device: SimulatorDevice, prompt: list[int]) -> None:
    long = [7] * (CONTEXT - 3)
    assert len(steps_of(device, long, GenerateOptions(3, ignore_eos=True))) == 3
    assert len(steps_of(device, long, GenerateOptions(None, ignore_eos=True))) == 3  # until the context is full
    with pytest.raises(ContextLengthExceeded) as found:
        device.generate(long, GenerateOptions(4), never)
    assert (found.value.prompt_tokens, found.value.max_tokens, found.value.max_context_tokens) == (
        CONTEXT - 3,
        4,
        CONTEXT,
    )
    for full in ([7] * CONTEXT, [7] * (CONTEXT + 1)):
        with pytest.raises(ContextLengthExceeded):
            device.generate(full, GenerateOptions(), never)
    for wrong in ([], [512], [-1]):
        with pytest.raises(BadInput, match="from 0 to 511"):
            device.generate(wrong, GenerateOptions(1), never)
        with pytest.raises(BadInput, match="from 0 to 511"):
            device.score(wrong)
    assert len(device.score([7] * CONTEXT)) == CONTEXT
    with pytest.raises(ContextLengthExceeded):
        device.score([7] * (CONTEXT + 1))


def test_a_cancelled_answer_ends_without_an_error_and_the_next_one_is_whole(
    device: SimulatorDevice, prompt: list[int]
) -> None:
    usual = steps_of(device, prompt, GREEDY)
    asked = count()
    cut = list(device.generate(prompt, GREEDY, lambda: next(asked) > 20))
    assert 0 < len(cut) < 24 and cut == usual[: len(cut)] and cut[-1].finish is None
    assert list(device.generate(prompt, GREEDY, lambda: True)) == []
    assert device.score(prompt, 0, lambda: True)[0].id == prompt[0]
    begun = device.generate(prompt, GREEDY, never)
    next(begun)
    begun.close()  # type: ignore[attr-defined]
    assert steps_of(device, prompt, GREEDY) == usual


def test_scores_are_the_chances_of_each_token_after_those_before(device: SimulatorDevice, image: Path) -> None:
    ids = device.encode("Ein kleiner Text, damit auch Umlaute wie ä und 你 vorkommen 🎉.")
    scored = device.score(ids, 3)
    logits = logits_after(image, ids)
    assert [one.id for one in scored] == ids
    assert scored[0].logprob is None and scored[0].top == ()
    for one, row in zip(scored[1:], logits, strict=False):
        chances = log_chances(row)
        assert one.logprob == pytest.approx(chances[one.id], abs=1e-4)
        assert [top for top, _, _ in one.top] == np.lexsort((np.arange(512), -chances))[:3].tolist()
    texts = "".join(one.text for one in scored)
    assert texts == device.decode(ids) and "你 vorkommen 🎉." in texts
    assert [one.text_offset for one in scored] == [len(texts_before(scored, at)) for at in range(len(scored))]
    assert device.score(ids[:1], 3) == scored[:1]


def texts_before(scored: list[Any], at: int) -> str:
    return "".join(one.text for one in scored[:at])


def test_scores_do_not_depend_on_how_many_are_in_memory(
    device: SimulatorDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = device.encode("The quick brown fox jumps over the lazy dog, again and again.")
    whole = device.score(ids, 2)
    monkeypatch.setattr("edgetool.fpga_service.simulator_device._SCORED_LOGITS", 3 * 512)
    assert device.score(ids, 2) == whole


def test_the_template_is_the_models_own_and_gets_the_whole_history(device: SimulatorDevice) -> None:
    history = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Who?"},
    ]
    text = device.decode(device.encode_chat(history))
    said = [f"<|im_start|>{one['role']}\n{one['content']}<|im_end|>\n" for one in history]
    assert text == "".join(said) + "<|im_start|>assistant\n"
    with pytest.raises(BadInput, match="messages is empty"):
        device.encode_chat([])


@pytest.mark.parametrize("template", ["{{ raise_exception('a user must begin') }}", "{{ messages[9].a.b }}", "{%"])
def test_what_a_template_refuses_is_the_clients_error(image: Path, template: str) -> None:
    tokens = Tokens(image / "tokenizer", "llama")
    tokens.tokenizer.chat_template = template
    with pytest.raises(BadInput, match="refuses these messages"):
        tokens.encode_chat(QUESTION)


def test_a_model_without_a_template_does_not_converse(image: Path, tmp_path: Path) -> None:
    plain = tmp_path / "tokenizer"
    shutil.copytree(image / "tokenizer", plain)
    for name in ("chat_template.jinja", "chat_template.json"):
        (plain / name).unlink(missing_ok=True)
    config = json.loads((plain / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (plain / "tokenizer_config.json").write_text(json.dumps(config))
    tokens = Tokens(plain, "llama")
    assert not tokens.chat
    with pytest.raises(BadInput, match="no chat template"):
        tokens.encode_chat(QUESTION)
    glm = Tokens(plain, "chatglm")
    assert glm.chat and glm.decode(glm.encode_chat(QUESTION)) == "[Round 1]\n\n问：The quick brown fox?\n\n答："


def test_glms_rounds_are_those_of_its_authors() -> None:
    history = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Who?"},
    ]
    assert rounds(history) == "[Round 1]\n\n问：Be brief.\nHi\n\n答：Hello\n\n[Round 2]\n\n问：Who?\n\n答："
    with pytest.raises(BadInput, match="must follow a question"):
        rounds([{"role": "assistant", "content": "Hello"}])
    with pytest.raises(BadInput, match="must be a question"):
        rounds(history[:3])


def test_fast_numerics_answer_too(image: Path, prompt: list[int]) -> None:
    device = open_device(image, numerics="fast", device="cpu")
    assert device.facts.numerics == "fast"
    steps = steps_of(device, prompt, GenerateOptions(8, temperature=0, ignore_eos=True, logprobs=1))
    assert len(steps) == 8 and all(step.top[0][0] == step.id for step in steps)


def test_an_image_whose_numbers_overflow_says_so_instead_of_guessing(
    image: Path, prompt: list[int], tmp_path: Path
) -> None:
    broken = Path(shutil.copytree(image, tmp_path / "image"))
    record = Image.open(broken).tensors["layers.0.down"]

    def blow_up(raw: np.ndarray) -> None:
        rows = raw[record["addr"] : record["addr"] + record["bytes_per_pc"]].reshape(record["Np"] // 32, -1)
        rows[:, :32] = np.frombuffer(np.full(16, 60000, dtype="<f2").tobytes(), dtype=np.uint8)

    for pc in range(32):
        rewrite(broken, f"hbm/pc{pc:02}.bin", blow_up)
    device = open_device(broken)
    with pytest.raises(BadInput, match="became infinite in layers"):
        steps_of(device, prompt, GREEDY)
    with pytest.raises(BadInput, match="became infinite in layers"):
        device.score(prompt, 2)
