"""Layers written by edgetool, read by the tools themselves in the environments that `edgetool envs` makes."""

import json
import subprocess

import numpy as np
import pytest
from typer.testing import CliRunner

from edgetool.checkpoints.formats import FORMATS, Spec
from edgetool.cli import app
from tests.fakes.packed_checkpoints import (
    GOLDEN,
    golden_checkpoint,
    make_checkpoint,
    random_layers,
    read_checkpoint,
    read_safetensors,
)
from tests.interpreters import interpreter_of
from tests.parity.test_layouts import random_linear

pytestmark = pytest.mark.backends
OUT, IN, GROUP = 96, 128, 32

# Each script defines read(layer: name -> array) -> weight [out_features, in_features]; one process reads all layers.
MAIN = """
stored, layers = np.load(sys.argv[1]), {}
for key in stored.files:
    case, _, name = key.rpartition("/")
    layers.setdefault(case, {})[name] = stored[key]
np.savez(sys.argv[2], **{case: read(layer).contiguous().numpy() for case, layer in layers.items()})
"""

GPTQMODEL = """
import sys
import numpy as np, torch
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

def read(layer):
    bits, sym, desc_act, version = (int(value) for value in layer.pop("case"))
    layer = {name: torch.from_numpy(array) for name, array in layer.items()}
    groups, out_features = layer["scales"].shape
    if version == 0:
        group_size = len(layer["qweight"]) // groups
        return dequantize_gemm(layer["qweight"], layer["qzeros"], layer["scales"], bits, group_size).T
    in_features = len(layer["g_idx"])
    module = TorchLinear(bits=bits, group_size=in_features // groups, sym=bool(sym), desc_act=bool(desc_act),
                         in_features=in_features, out_features=out_features, bias=False, pack_dtype=torch.int32,
                         adapter=None, register_buffers=True)
    for name, tensor in layer.items():
        setattr(module, name, tensor)
    if version == 1:
        convert_gptq_v1_to_v2_format_module(module, bits, torch.int32)
    module.post_init()
    return module.dequantize_weight().T
"""

COMPRESSED_TENSORS = """
import json, sys
import numpy as np, torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationScheme

def read(layer):
    scheme = QuantizationScheme.model_validate(json.loads(str(layer.pop("scheme"))))
    state = {name: torch.from_numpy(array) for name, array in layer.items()}
    return PackedQuantizationCompressor.decompress(state, scheme)["weight"]
"""


def assert_read_upstream(environment, script, tmp_path, meant, stored):
    """The tool in .envs/<environment> sees in each layer of `stored` the weights of `meant` (same keys, float32)."""
    python = interpreter_of(environment, f"EDGETOOL_{environment.upper()}_PYTHON")
    arrays = {f"{case}/{name}": array for case, tensors in stored.items() for name, array in tensors.items()}
    np.savez(tmp_path / "layers.npz", **arrays)
    command = [python, "-c", script + MAIN, tmp_path / "layers.npz", tmp_path / "weights.npz"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    weights = np.load(tmp_path / "weights.npz")
    # The tools multiply in the scales' dtype, mostly float16: one rounding of the exact float32 product.
    different = [
        case for case in meant if not np.array_equal(weights[case].astype(np.float16), meant[case].astype(np.float16))
    ]
    assert different == []
    assert len(weights.files) == len(meant) > 0


def dequantized(layers):
    return {case: layer.dequantize() for case, layer in layers.items()}


def test_gptqmodel_reads_the_same_weights_of_every_gptq_kind_and_of_awq(tmp_path):
    layers, stored = {}, {}
    for bits in (2, 3, 4, 8):
        for sym in (True, False):
            for desc_act in (True, False):
                for version, name in ((1, "gptq"), (2, "gptq_v2")):
                    case = f"{name}-{bits}-{'sym' if sym else 'asym'}-{'act-order' if desc_act else 'plain'}"
                    layers[case] = random_linear(len(layers), OUT, IN, bits, GROUP, sym, desc_act, 2 - version)
                    stored[case] = FORMATS[name].write(layers[case], Spec(bits, GROUP, sym, desc_act))
                    stored[case]["case"] = np.array([bits, sym, desc_act, version])
    layers["awq"] = random_linear(5, OUT, IN, 4, GROUP, sym=False)
    stored["awq"] = FORMATS["awq"].write(layers["awq"], Spec(4, GROUP, False))
    stored["awq"]["case"] = np.array([4, False, False, 0])
    assert_read_upstream("gptqmodel", GPTQMODEL, tmp_path, dequantized(layers), stored)


def test_compressed_tensors_reads_the_same_weights_of_every_width(tmp_path):
    layers, stored = {}, {}
    target = FORMATS["compressed-tensors"]
    for bits in (2, 3, 4, 8):
        for sym in (True, False):
            for group_size in (GROUP, -1):
                case, spec = f"{bits}-{'sym' if sym else 'asym'}-{group_size}", Spec(bits, group_size, sym)
                layers[case] = random_linear(len(layers), OUT, IN, bits, group_size, sym)
                stored[case] = target.write(layers[case], spec)
                scheme = target.quantization_config(spec, ["lm_head"])["config_groups"]["group_0"]
                stored[case]["scheme"] = np.array(json.dumps(scheme))
    assert_read_upstream("llmcompressor", COMPRESSED_TENSORS, tmp_path, dequantized(layers), stored)


# --- what `edgetool convert` makes


def converted(source, output, target):
    """Module -> suffix -> array of what the command writes, or None where it refuses."""
    result = CliRunner().invoke(app, ["convert", str(source), "-o", str(output), "--to", target, "--json"])
    document = json.loads(result.stdout)
    if result.exit_code == 4:
        return None
    assert result.exit_code == 0 and document["tensors_equal"] == document["tensors_compared"] > 0
    modules = {}
    for name, array in read_checkpoint(output).items():
        module, _, suffix = name.rpartition(".")
        modules.setdefault(module, {})[suffix] = array
    return {module: t for module, t in modules.items() if t.keys() & {"qweight", "weight_packed"}}


def sources(tmp_path):
    """Name -> (checkpoint directory, module -> float32 weights): formats, widths, and other tools' own tensors."""
    found = {}
    for kind in ("gptq", "gptq_v2", "awq", "compressed-tensors"):
        for bits in (4,) if kind == "awq" else (2, 3, 4, 8):
            for act_order in (False,) if kind == "awq" else (False, True):
                for sym in (False, True):
                    options = {"bits": bits, "act_order": act_order, "sym": sym}
                    layers = random_layers(layers=1, seed=50, **options)
                    name = f"{kind}-{bits}-{'act-order' if act_order else 'plain'}-{'sym' if sym else 'asym'}"
                    directory = make_checkpoint(tmp_path / "sources" / name, layers, kind)
                    found[name] = directory, {module: layer.weight() for module, layer in layers.items()}
    for tool in ("autoawq-0.2.9-gemm", "autoround-0.16-awq", "autoround-0.16-gptq", "gptqmodel-7.6.0-gptq",
                 "llmcompressor-0.14-awq-asym", "llmcompressor-0.14-gptq-sym"):  # fmt: skip
        tensors = read_safetensors(GOLDEN / f"{tool}.safetensors")
        # of k_proj the first rows are expected; the whole is held by its hash in test_convert_matrix
        meant = {"down_proj": tensors["expected.down_proj"].astype(np.float32)}
        found[tool] = golden_checkpoint(tmp_path / "sources" / tool, tool), meant
    return found


def test_gptqmodel_reads_the_sources_weights_in_whatever_was_converted(tmp_path):
    meant, stored = {}, {}
    for name, (source, weights) in sources(tmp_path).items():
        for target, version in (("gptq", 1), ("gptq_v2", 2), ("awq", 0)):
            modules = converted(source, tmp_path / target / name, target)
            config = json.loads((source / "config.json").read_text())["quantization_config"]
            if modules is None:
                assert name.startswith("llmcompressor") or (target == "awq" and "-4-plain" not in name), name
                continue
            for module, weight in weights.items():
                case = f"{name} to {target}: {module}"
                tensors = modules[module]
                bits = config.get("bits") or config["config_groups"]["group_0"]["weights"]["num_bits"]
                act_order = "g_idx" in tensors and bool(np.any(np.diff(tensors["g_idx"]) < 0))
                sym = len(np.unique(tensors["qzeros"])) == 1
                stored[case] = tensors | {"case": np.array([bits, sym, act_order, version])}
                meant[case] = weight
    assert len(meant) > 200
    assert_read_upstream("gptqmodel", GPTQMODEL, tmp_path, meant, stored)


def test_compressed_tensors_reads_the_sources_weights_in_whatever_was_converted(tmp_path):
    meant, stored = {}, {}
    for name, (source, weights) in sources(tmp_path).items():
        if "act-order" in name:
            continue  # 0.19 does not read weight_g_idx
        modules = converted(source, tmp_path / "out" / name, "compressed-tensors")
        config = json.loads((tmp_path / "out" / name / "config.json").read_text())["quantization_config"]
        for module, weight in weights.items():
            case = f"{name}: {module}"
            scheme = config["config_groups"]["group_0"]
            stored[case] = modules[module] | {"scheme": np.array(json.dumps(scheme))}
            meant[case] = weight
    assert len(meant) > 100
    assert_read_upstream("llmcompressor", COMPRESSED_TENSORS, tmp_path, meant, stored)
