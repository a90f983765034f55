"""Quantising by kernels on a GPU, against torch's way on the same GPU."""

from __future__ import annotations

import pytest
import torch
from test_calibrated_methods import output_error, problem

import flute
from flute import cuda_quantize
from flute.format import QuantizedWeight, QuantSpec
from flute.methods import mse
from flute.methods.absmax import round_to_table
from flute.methods.fit import sum_by_rank
from flute.tables import get_table

CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _kernels_run_here():
    if not cuda_quantize.takes(torch.zeros(1, 1, device=CUDA)):
        pytest.skip("no kernels on this GPU")


@pytest.fixture
def plainly(monkeypatch):
    """Call a function without the kernels."""

    def call(function, *args, **kwargs):
        with monkeypatch.context() as patch:
            patch.setattr(cuda_quantize, "takes", lambda weight: False)
            return function(*args, **kwargs)

    return call


@pytest.mark.parametrize("num_bits", [2, 3, 4])
@pytest.mark.parametrize(("N", "K", "group"), [(1000, 512, 32), (4096, 768, 128), (33, 77, -1)])
@pytest.mark.parametrize("per_row", [False, True])
def test_scales_leave_no_more_error(plainly, num_bits, N, K, group, per_row):
    weight = torch.randn(N, K, device=CUDA)
    table = get_table("nf", num_bits).to(CUDA).expand(N if per_row else 1, -1).contiguous()
    spec = QuantSpec(num_bits, group)
    found = mse.group_scales(weight, table, spec)
    expected = plainly(mse.group_scales, weight, table, spec)
    assert torch.isclose(found, expected, rtol=1e-5).double().mean() > 0.97
    errors = [
        float((weight - flute.dequantize(QuantizedWeight(codes, scales, table, spec))).norm())
        for scales in (found, expected)
        for codes in [round_to_table(weight.view(*scales.shape, -1), scales, table)]
    ]
    assert errors[0] == pytest.approx(errors[1], rel=1e-4)


@pytest.mark.parametrize("method", ["gptq", "lnq", "lnq row"])
@pytest.mark.parametrize("num_bits", [2, 3, 4])
@pytest.mark.parametrize(
    ("N", "K", "group"), [(512, 512, 64), (100, 1280, 32), (70, 768, 256), (64, 77, -1)]
)
def test_methods_are_as_good_and_repeat(plainly, method, num_bits, N, K, group):
    weight, H = (tensor.to(CUDA) for tensor in problem(N, K))
    name, _, scope = method.partition(" ")
    options = {"method": name, "hessian": H, "table_scope": scope or "tensor"}
    found = flute.quantize(weight, num_bits, group, **options)
    again = flute.quantize(weight, num_bits, group, **options)
    assert torch.equal(found.codes, again.codes)
    assert torch.equal(found.scales, again.scales)
    expected = plainly(flute.quantize, weight, num_bits, group, **options)
    assert output_error(weight, H, found) < 1.02 * output_error(weight, H, expected)


def test_a_group_of_rows_with_its_own_hessian():
    weight, H = (tensor.to(CUDA) for tensor in problem(64, 256))
    both = flute.quantize(weight, 3, 64, method="lnq", hessian=torch.stack((H, H)))
    one = flute.quantize(weight, 3, 64, method="lnq", hessian=H)
    assert output_error(weight, H, both) < 1.05 * output_error(weight, H, one)


def test_a_launch_follows_the_current_stream():
    weight = torch.zeros(64, 256, device=CUDA)
    stream, table = torch.cuda.Stream(), get_table("nf", 4).to(CUDA)
    expected = torch.randn(64, 256, device=CUDA)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        weight.copy_(expected)
        scales = mse.group_scales(weight, table, QuantSpec(4, 64))
    torch.cuda.synchronize()
    assert torch.equal(scales, mse.group_scales(expected, table, QuantSpec(4, 64)))


def test_sums_by_rank_repeat():
    ranks = torch.randint(0, 16, (300, 1000), device=CUDA, dtype=torch.uint8)
    values = torch.randn(300, 1000, device=CUDA)
    sums = sum_by_rank(ranks, values, 16)
    assert torch.equal(sums, sum_by_rank(ranks, values, 16))
    exact = torch.stack([values.double()[ranks == i].sum() for i in range(16)])
    assert torch.allclose(sums.double(), exact, atol=1e-2)
