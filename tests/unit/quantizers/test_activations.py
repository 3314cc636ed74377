import zlib

import pytest
import torch

from edgetool.errors import BadInput
from edgetool.quantizers.activations import ActivationFile

CPU = torch.device("cpu")


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_batches_come_back_as_they_were_written_in_any_order(tmp_path):
    file = ActivationFile(tmp_path / "states.bin", torch.float32, CPU)
    batches = [random(4, 6, 8, seed=1), random(4, 6, 8, seed=2), random(3, 6, 8, seed=3)]
    for number, batch in enumerate(batches):
        file.write(number, batch)
    again = random(4, 6, 8, seed=4)
    file.write(1, again)
    assert torch.equal(file.read(2), batches[2])
    assert torch.equal(file.read(0), batches[0])
    assert torch.equal(file.read(1), again)
    expected = torch.cat([batches[0].flatten(), again.flatten(), batches[2].flatten()]).numpy().tobytes()
    assert (tmp_path / "states.bin").read_bytes() == expected
    assert file.checksum() == zlib.crc32(expected)
    file.close()


def test_states_are_kept_in_the_files_own_dtype(tmp_path):
    file = ActivationFile(tmp_path / "states.bin", torch.bfloat16, CPU)
    batch = random(5, 7)
    file.write(0, batch)
    assert (tmp_path / "states.bin").stat().st_size == 5 * 7 * 2
    assert torch.equal(file.read(0), batch.bfloat16())
    file.close()


def test_a_view_with_strides_is_stored_by_its_values(tmp_path):
    file = ActivationFile(tmp_path / "states.bin", torch.float32, CPU)
    batch = random(6, 4).T
    file.write(0, batch)
    assert torch.equal(file.read(0), batch)
    file.close()


def test_another_width_starts_a_layout_in_which_no_batch_overlaps_another(tmp_path):
    """As the inputs of o_proj and then the wider ones of down_proj, stage after stage, layer after layer."""
    file = ActivationFile(tmp_path / "stash.bin", torch.float32, CPU)
    for turn, width in enumerate((8, 20, 8, 20)):
        batches = [random(rows, width, seed=10 * turn + rows) for rows in (5, 5, 3)]
        for number, batch in enumerate(batches):
            file.write(number, batch)
        for number, batch in enumerate(batches):
            assert torch.equal(file.read(number), batch)
    file.close()


def test_a_later_run_reads_what_an_earlier_one_wrote(tmp_path):
    path = tmp_path / "states.bin"
    batches = [random(4, 8, seed=1), random(2, 8, seed=2)]
    first = ActivationFile(path, torch.float32, CPU)
    for number, batch in enumerate(batches):
        first.write(number, batch)
    checksum = first.checksum()
    first.close()
    second = ActivationFile(path, torch.float32, CPU)
    second.layout([(4, 8), (2, 8)])
    assert second.checksum() == checksum
    assert all(torch.equal(second.read(number), batch) for number, batch in enumerate(batches))
    second.close()


def test_damage_changes_the_checksum_and_a_short_file_is_an_error(tmp_path):
    path = tmp_path / "states.bin"
    file = ActivationFile(path, torch.float32, CPU)
    file.write(0, random(4, 8))
    checksum = file.checksum()
    data = bytearray(path.read_bytes())
    data[77] ^= 1
    path.write_bytes(data)
    assert file.checksum() != checksum
    path.write_bytes(data[:100])
    with pytest.raises(BadInput, match=r"states\.bin: shorter than what was written"):
        file.read(0)
    file.close()
    file.close()  # twice does no harm
