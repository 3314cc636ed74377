"""What a target is: the same content is the same target, and what does not fit into memory is refused with figures."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from edgetool.checkpoints.checkpoint import Checkpoint
from edgetool.errors import BadInput, ResourceUnavailable
from edgetool.evaluation import identity, plan, targets
from edgetool.evaluation.identity import identity_of
from edgetool.evaluation.targets import Asking, InProcess
from edgetool.models.whole import skeleton
from edgetool.progress import NullProgress
from tests.fakes.quantized_models import make_quantized
from tests.fakes.tiny_models import make_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny", "llama", hidden_size=32, layers=1)


def target(directory: Path, dtype: torch.dtype = torch.float32, **asking: object) -> InProcess:
    checkpoint = Checkpoint.open(directory)
    asked = Asking(**asking)  # type: ignore[arg-type]
    return InProcess("tiny", checkpoint, "content", asked, torch.device("cpu"), dtype, NullProgress())


def test_copies_are_the_same_checkpoint_and_any_other_content_is_another(model: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(model, tmp_path / "copy")
    cache = tmp_path / "cache"
    found = identity_of(Checkpoint.open(model), cache, NullProgress())
    assert identity_of(Checkpoint.open(copy), cache, NullProgress()) == found
    (copy / "README.md").write_text("prose decides no answer")
    assert identity_of(Checkpoint.open(copy), cache, NullProgress()) == found
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        data = bytearray((copy / name).read_bytes())
        data[-2] ^= 1 if name == "model.safetensors" else 0
        (copy / name).write_bytes(data if name == "model.safetensors" else bytes(data) + b"\n")
        changed = identity_of(Checkpoint.open(copy), cache, NullProgress())
        assert changed != found, name
        found = changed


def test_files_that_are_known_are_not_read_again_and_changed_ones_are(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copytree(model, tmp_path / "copy")
    read: list[str] = []
    hash_of = identity.sha256_file

    def counted(path: Path) -> str:
        read.append(path.name)
        return hash_of(path)

    monkeypatch.setattr(identity, "sha256_file", counted)
    first = identity_of(Checkpoint.open(copy), tmp_path / "cache", NullProgress())
    assert "model.safetensors" in read
    read.clear()
    assert identity_of(Checkpoint.open(copy), tmp_path / "cache", NullProgress()) == first
    assert read == []
    weights = copy / "model.safetensors"
    before = weights.stat()
    data = weights.read_bytes()
    weights.write_bytes(data[:-2] + bytes([data[-2] ^ 1]) + data[-1:])
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    while weights.stat().st_ctime_ns == before.st_ctime_ns:  # the clock of a file system ticks some 100 times a second
        os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    # as large and as old as before: the change of the inode gives it away
    assert (weights.stat().st_size, weights.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert identity_of(Checkpoint.open(copy), tmp_path / "cache", NullProgress()) != first
    assert read == ["model.safetensors"]
    (tmp_path / "cache" / "hashes.json").write_text("{broken")
    assert identity_of(Checkpoint.open(copy), tmp_path / "cache", NullProgress()) != first


def test_what_decides_an_answer_decides_whose_answers_they_are(model: Path) -> None:
    ids = {
        plan.target_id(one)
        for one in (
            target(model),
            target(model),
            target(model, torch.bfloat16),
            target(model, batch_size=3),
            target(model, max_length=64),
        )
    }
    assert len(ids) == 4


def test_a_model_that_does_not_fit_is_refused_with_what_it_needs(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = target(model, batch_size=2)
    parameters = 512 * 32 + 32 * (32 + 16 + 16 + 32 + 3 * 64) + 3 * 32
    logits = 3 * 4 * 512 * max(2 * 512, 2000)
    assert one.needed_bytes(2000) == 4 * parameters + logits + 2**30
    monkeypatch.setattr(targets, "available_memory_bytes", lambda: one.needed_bytes(2000))
    one.check_memory(2000)
    monkeypatch.setattr(targets, "available_memory_bytes", lambda: one.needed_bytes(2000) - 1)
    with pytest.raises(ResourceUnavailable, match="needs about"):
        one.check_memory(2000)


def test_a_quantised_checkpoint_needs_the_memory_of_its_dequantised_weights(tmp_path: Path) -> None:
    made = make_quantized(tmp_path / "q")
    wide, narrow = target(made.path), target(made.path, torch.bfloat16)
    dense = sum(parameter.numel() for parameter in skeleton(wide.checkpoint).parameters())
    assert wide.needed_bytes(0) - narrow.needed_bytes(0) == 2 * dense
    assert str(wide.facts()["quantization"]).startswith("gptq, 4 bits")


def test_a_released_model_comes_back_when_it_is_asked_for(model: Path) -> None:
    one = target(model)
    before = one.loaded().model.state_dict()["model.norm.weight"].clone()
    one.release()
    one.release()
    assert torch.equal(one.loaded().model.state_dict()["model.norm.weight"], before)


def test_a_template_that_is_missing_is_refused_when_the_target_is_made(model: Path, tmp_path: Path) -> None:
    bare = shutil.copytree(model, tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    with pytest.raises(BadInput, match="no chat template"):
        target(bare, chat_template=True)
    target(model, chat_template=True)
