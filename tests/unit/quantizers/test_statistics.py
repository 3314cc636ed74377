import pytest
import torch

from edgetool.quantizers import statistics
from edgetool.quantizers.statistics import Moments

CPU = torch.device("cpu")


def batches_of(x, sizes):
    assert sum(sizes) == len(x)
    return x.split(list(sizes))


@pytest.mark.parametrize("width", [1, 5, 7, 20])
@pytest.mark.parametrize("block", [7, 384])
def test_moments_of_whole_numbers_are_exact_whatever_the_batches(width, block, monkeypatch):
    """Small whole numbers are exact in bf16, their products and sums in float32: nothing may be off by one bit."""
    monkeypatch.setattr(statistics, "GRAM_BLOCK", block)
    generator = torch.Generator().manual_seed(width)
    x = torch.randint(-8, 9, (60, width), generator=generator).float()
    original = x + torch.randint(-3, 4, (60, width), generator=generator)
    moments = Moments(width, CPU, follow_original=True)
    for batch, other in zip(*(batches_of(part, (1, 17, 3, 32, 7)) for part in (x, original)), strict=True):
        moments.add(batch, other)
    found = moments.mean()
    wide, difference = x.double(), (original - x).double()
    assert torch.equal(found.gram, ((wide.T @ wide) / 60).float())
    assert torch.equal(found.mean, (wide.sum(0) / 60).float())
    # E[(x_original - x) x^T]: rows of the difference, columns of the quantised model's input
    assert torch.equal(found.cross, ((difference.T @ wide) / 60).float())
    assert torch.equal(found.gram, found.gram.T)


def test_moments_of_real_numbers_are_exact_to_bfloat16_products():
    x = torch.randn(500, 40, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 1, 40)
    moments = Moments(40, CPU, follow_original=False)
    for batch in x.split(77):
        moments.add(batch)
    found = moments.mean()
    expected = x.double().T @ x.double() / 500
    # Each factor may be rounded to 8 significant bits: 2**-9 of itself, twice; Cauchy-Schwarz bounds the sum of it.
    size = expected.diagonal().sqrt()
    assert ((found.gram - expected).abs() <= 2**-7.9 * torch.outer(size, size)).all()
    torch.testing.assert_close(found.mean.double(), x.double().mean(0), rtol=1e-5, atol=1e-6)
    assert found.cross is None
    assert torch.linalg.eigvalsh(found.gram.double()).min() > 0


def test_the_inputs_are_not_modified():
    x = torch.randn(9, 6, generator=torch.Generator().manual_seed(0))
    kept = x.clone()
    Moments(6, CPU, follow_original=True).add(x, x + 1)
    assert torch.equal(x, kept)


@pytest.mark.parametrize(("value", "fine"), [(float("nan"), False), (float("inf"), False), (1e25, False), (1e15, True)])
def test_inputs_whose_square_is_no_number_are_noticed(value, fine):
    moments = Moments(4, CPU, follow_original=False)
    moments.add(torch.ones(3, 4))
    assert moments.finite()
    bad = torch.ones(2, 4)
    bad[1, 2] = value
    moments.add(bad)
    assert moments.finite() == fine


def test_the_precision_setting_of_products_is_put_back():
    before = torch.backends.mkldnn.matmul.fp32_precision
    Moments(4, CPU, follow_original=False).add(torch.ones(2, 4))
    assert torch.backends.mkldnn.matmul.fp32_precision == before
