import pytest
import torch

from edgetool.models.architectures import STAGES
from edgetool.models.streamed import ComputeLinear
from edgetool.quantizers.activations import ActivationFile
from edgetool.quantizers.layer_pass import LayerPass
from tests.unit.models.reference import some_ids, stirred_model, streamed

CPU = torch.device("cpu")


def opened(directory, model, batches):
    """The first layer between files, with the embeddings of `batches` as its inputs."""
    files = [ActivationFile(directory / name, torch.float32, CPU) for name in ("in.bin", "out.bin", "stash.bin")]
    states = [model.embed(batch) for batch in batches]
    for file in files[:2]:
        file.layout([tuple(state.shape) for state in states])
    for number, state in enumerate(states):
        files[0].write(number, state)
    arguments = [model.layer_arguments(state)[0] for state in states]
    return LayerPass(model.layer(0), arguments, *files), states, arguments


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "qwen2_5_vl"])
def test_stage_by_stage_gives_what_the_layer_gives_and_what_its_linears_read(family, tmp_path):
    options = {"sliding_window": 8} if family == "mistral" else {}
    model = streamed(stirred_model(tmp_path, family, layers=1, **options))
    batches = [some_ids(3, 20), some_ids(1, 20)]
    one, states, arguments = opened(tmp_path, model, batches)
    found = {stage.name: [one.inputs(stage, n) for n in range(2)] for stage in STAGES}
    for n in range(2):
        one.finish(n)

    whole, read = model.layer(0), {}
    for stage in STAGES:
        for name in stage.linears:
            module = whole.get_submodule(name)
            module.register_forward_hook(lambda _, inputs, __, name=name: read.update({name: inputs[0].flatten(0, 1)}))
    for n in range(2):
        with torch.no_grad():
            expected = whole(states[n], **arguments[n])
        torch.testing.assert_close(one.result.read(n), expected, rtol=1e-5, atol=1e-5)
        for stage in STAGES:
            for name in stage.linears:
                torch.testing.assert_close(found[stage.name][n], read[name], rtol=1e-5, atol=1e-5)
        assert torch.equal(one.hidden.read(n), states[n])  # the layer's input survives, for a run taken up again


def test_later_stages_see_what_replaced_linears_compute(tmp_path):
    model = streamed(stirred_model(tmp_path, "llama", layers=1))
    one, states, arguments = opened(tmp_path, model, [some_ids(2, 10)])
    whole = model.layer(0)
    generator = torch.Generator().manual_seed(0)
    for stage in STAGES:
        one.inputs(stage, 0)
        for name in stage.linears:
            weight = model.weight(f"model.layers.0.{name}")
            other = ComputeLinear(weight + 0.1 * torch.randn(weight.shape, generator=generator), None, torch.float32)
            one.replace(name, other)
            parent, _, leaf = name.rpartition(".")
            setattr(whole.get_submodule(parent), leaf, other)
    one.finish(0)
    with torch.no_grad():
        expected = whole(states[0], **arguments[0])
        torch.testing.assert_close(one.result.read(0), expected, rtol=1e-5, atol=1e-5)
        assert (expected - model.layer(0)(states[0], **arguments[0])).abs().max() > 0.01
