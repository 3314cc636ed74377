"""Layers written by edgetool, read by the tools themselves in the environments that `edgetool envs` makes."""

import json
import subprocess

import numpy as np
import pytest

from edgetool.checkpoints.formats import FORMATS, Spec
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
    if version == 0:
        return dequantize_gemm(layer["qweight"], layer["qzeros"], layer["scales"], bits, 32).T
    module = TorchLinear(bits=bits, group_size=32, sym=bool(sym), desc_act=bool(desc_act), in_features=128,
                         out_features=96, bias=False, pack_dtype=torch.int32, adapter=None, register_buffers=True)
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


def assert_read_upstream(environment, script, tmp_path, layers, stored):
    """The tool in the environment sees each layer of `layers` in `stored` (same keys) as edgetool does."""
    python = interpreter_of(environment, f"EDGETOOL_{environment.upper()}_PYTHON")
    arrays = {f"{case}/{name}": array for case, tensors in stored.items() for name, array in tensors.items()}
    np.savez(tmp_path / "layers.npz", **arrays)
    command = [python, "-c", script + MAIN, tmp_path / "layers.npz", tmp_path / "weights.npz"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    weights = np.load(tmp_path / "weights.npz")
    # The tools multiply in float16: one rounding of the exact float32 product.
    different = [
        case for case in layers if not np.array_equal(weights[case], layers[case].dequantize().astype(np.float16))
    ]
    assert different == []
    assert len(weights.files) == len(layers) > 0


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
    assert_read_upstream("gptqmodel", GPTQMODEL, tmp_path, layers, stored)


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
    assert_read_upstream("llmcompressor", COMPRESSED_TENSORS, tmp_path, layers, stored)
