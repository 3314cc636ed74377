import pytest

from edgetool.checkpoints.formats import FORMATS, Spec
from edgetool.checkpoints.legality import kernels, vcu128


def able(*arguments, **keywords):
    return {verdict.name.removeprefix("vLLM ") for verdict in kernels(*arguments, **keywords) if verdict.ok}


@pytest.mark.parametrize(
    ("checkpoint", "runs", "does_not"),
    [
        # format, bits, group_size, sym, desc_act
        (("gptq", 4, 64, True, False), {"CPU", "Marlin", "Machete", "ExLlama"}, {"Conch"}),
        (("gptq", 8, 128, True, False), {"Marlin", "Machete"}, {"CPU", "Triton W4A16"}),
        (("gptq", 4, -1, True, True), {"CPU", "Marlin"}, {"ExLlama"}),
        (("awq", 4, 64, False, False), {"CPU", "Marlin", "Triton W4A16"}, {"ExLlama"}),
        (("compressed-tensors", 4, 32, False, False), {"CPU", "Marlin"}, {"Machete", "ExLlama"}),
        (("compressed-tensors", 8, 128, False, False), {"Machete", "Conch"}, {"Marlin", "CPU"}),
        (("compressed-tensors", 3, 64, True, False), {"Humming"}, {"CPU", "Marlin", "ExLlama"}),
    ],
)
def test_kernels_of_vllm_run_what_its_own_tables_say(checkpoint, runs, does_not):
    names = able(*checkpoint)
    assert runs <= names
    assert not does_not & names


@pytest.mark.parametrize(
    ("checkpoint", "reason"),
    [
        (("gptq", 4, 64, True, True), "desc_act"),
        (("gptq", 4, 64, False, False), "sym only"),
        (("gptq_v2", 3, 64, True, False), "4 or 8 bits, not 3"),
        (("gptq", 4, 256, True, False), "group_size 256"),
        (("compressed-tensors", 4, 64, True, True), "desc_act"),
    ],
)
def test_what_vllm_cannot_load_is_refused_for_every_kernel_with_the_reason(checkpoint, reason):
    verdicts = [verdict for verdict in kernels(*checkpoint) if verdict.name.startswith("vLLM")]
    assert len(verdicts) >= 6
    assert not any(verdict.ok for verdict in verdicts)
    assert all(reason in verdict.why for verdict in verdicts)


def test_gptqmodel_runs_gptq_that_vllm_dropped():
    assert "gptqmodel torch" in able("gptq_v2", 3, 64, False, True)
    assert "gptqmodel torch" not in able("compressed-tensors", 4, 64, True, False)


def test_shapes_rule_out_kernels_that_want_multiples():
    assert "Machete" in able("gptq", 4, 64, True, False, shapes=[(576, 128)])
    assert "Machete" not in able("gptq", 4, 64, True, False, shapes=[(576, 192)])
    assert "CPU" not in able("compressed-tensors", 4, 20, True, False, shapes=[(100, 64)])


def verdicts(**changes):
    board = {"bits": 4, "group_size": 128, "sym": True, "desc_act": False, "head_dim": 128} | changes
    return {verdict.name: verdict for verdict in vcu128(**board)}


def test_the_board_takes_symmetric_4_bit_groups_of_128():
    assert all(verdict.ok for verdict in verdicts().values())


@pytest.mark.parametrize(
    ("change", "board", "simulator"),
    [
        ({"bits": 8}, "bits 8", "bits 8"),
        ({"group_size": 64}, "group_size 64", None),
        ({"group_size": -1}, "group_size -1", "group_size -1"),
        ({"sym": False}, "zero points", None),
        ({"head_dim": 64}, "head_dim 64", None),
        ({"head_dim": 80}, "head_dim 80", "head_dim 80"),
        ({"desc_act": True}, "desc_act", None),
        ({"qk_norm": True}, "norms", None),
    ],
)
def test_the_profiles_of_the_board_differ_as_written(change, board, simulator):
    found = verdicts(**change)
    for name, reason in (("vcu128 edgellm", board), ("vcu128 sim", simulator)):
        assert found[name].ok == (reason is None)
        assert reason is None or reason in found[name].why


def test_every_reason_against_the_board_is_named_at_once():
    why = verdicts(group_size=64, sym=False, head_dim=64)["vcu128 edgellm"].why
    assert "group_size 64" in why
    assert "zero points" in why
    assert "head_dim 64" in why


def test_formats_refuse_before_the_job_what_they_cannot_store():
    assert FORMATS["awq"].check(Spec(8, 64, False)) == "AWQ's gemm layout has 4-bit codes only, not 8"
    assert "g_idx" in FORMATS["awq"].check(Spec(4, 64, False, desc_act=True))
    assert "weight_g_idx" in FORMATS["compressed-tensors"].check(Spec(4, 64, True, desc_act=True))
    for bits in (2, 3, 4, 8):
        assert FORMATS["gptq"].check(Spec(bits, 64, True)) is None
        assert FORMATS["compressed-tensors"].check(Spec(bits, -1, False)) is None
    assert FORMATS["gptq"].check(Spec(5, 64, True)) is not None
