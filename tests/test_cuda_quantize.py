"""Quantising by GPU kernels: compiled for every GPU by NVRTC, and run on the host by an emulator.

What is checked here is all but speed and what a GPU's arithmetic does: tests/gpu/ has that.
"""

from __future__ import annotations

import pytest
import torch
from emulated import compile_for_host, needs_compiler, run_on_host
from helpers import generator
from test_calibrated_methods import output_error, problem
from test_config import GPUS
from test_kernels import check_report

import flute
from flute import cuda_quantize
from flute.format import QuantSpec
from flute.jit import launch
from flute.jit.compiler import compile_cubin
from flute.methods import gptq, lnq, mse
from flute.methods.hessian import damped
from flute.methods.nearest import midpoints
from flute.tables import get_table

SOURCES = [cuda_quantize.feedback_source(), *map(cuda_quantize.search_source, (2, 3, 4))]


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.arch)
def test_the_kernels_compile_without_spills(gpu):
    for source in SOURCES:
        check_report(compile_cubin(source, gpu.arch).log)


@pytest.fixture
def emulated(monkeypatch, tmp_path):
    """CPU tensors go to the kernels, emulated; returns how often each was launched."""
    libraries, launches = {}, {}

    def function(name, source, device):
        kind = "Feedback" if "feedback" in source.name else "ScaleSearch"
        folder = tmp_path / kind
        folder.mkdir(exist_ok=True)
        params = f"flute::{kind}Params"
        libraries[name] = compile_for_host(source.text, source.name, params, folder)
        return 1

    def launched(launcher, tensors, device):
        launches[launcher.name] = launches.get(launcher.name, 0) + 1
        pointers = [0 if t is None else t.data_ptr() for t in tensors]
        run_on_host(libraries[launcher.name], launcher, pointers)

    monkeypatch.setattr(launch, "_driver", lambda: {"cuLaunchKernelEx": lambda *a: 0})
    monkeypatch.setattr(cuda_quantize, "takes", lambda weight: weight.dtype == torch.float32)
    monkeypatch.setattr(cuda_quantize, "_launchers", {})
    monkeypatch.setattr(cuda_quantize, "_function", function)
    monkeypatch.setattr(cuda_quantize, "_launch", launched)
    monkeypatch.setattr(mse.quantize_by_library, "takes", lambda weight: False)
    return launches


def feedback_plainly(aims, base, scales, table, effect, first, length):
    """The kernel's equation, in fp64: ranks and changes."""
    aims = aims.double().clone()
    ranks, changes = torch.empty(aims.shape, dtype=torch.int64), torch.empty_like(aims)
    for i in range(aims.shape[1]):
        s = scales[:, (first + i) // length].double()
        values = table.double() * s[:, None]
        x = torch.where(s == 0, 0, aims[:, i] / s)
        ranks[:, i] = (midpoints(table).double().expand(len(x), -1) < x[:, None]).sum(1)
        value = values.expand(len(x), -1).gather(1, ranks[:, i : i + 1])[:, 0]
        changes[:, i] = (aims[:, i] if base is None else base[:, i].double()) - value
        aims[:, i + 1 :] += changes[:, i : i + 1] * effect[i, i + 1 :].double()
    return ranks, changes


@needs_compiler
@pytest.mark.parametrize(
    ("num_bits", "count", "first", "length", "per_row", "has_base"),
    [
        (4, 64, 0, 64, False, False),
        (3, 128, 0, 32, False, True),
        (2, 77, 51, 128, True, True),
        (4, 33, 0, 33, True, False),
        (3, 1, 0, 32, False, False),
    ],
)
def test_feedback(emulated, num_bits, count, first, length, per_row, has_base):
    rng, N = generator(num_bits, count), 6
    aims, base = torch.randn(2, N, count + 3, generator=rng)[..., :count]
    scales = torch.randn(N, (first + count - 1) // length + 1, generator=rng)
    scales[1] = 0
    table = torch.randn(N if per_row else 1, 1 << num_bits, generator=rng).sort(1)[0]
    effect = torch.randn(count + 5, count, generator=rng)[:count] / count**0.5
    ranks = torch.full((N + 2, count + 1), 99, dtype=torch.uint8)
    kept = aims.clone()
    changes = cuda_quantize.feedback(
        *(aims, base if has_base else None, scales, table, midpoints(table), effect),
        ranks[1:-1, :count],
        first=first,
        length=length,
    )
    assert torch.equal(aims, kept)
    expected = feedback_plainly(
        aims, base if has_base else None, scales, table, effect, first, length
    )
    same = (ranks[1:-1, :count] == expected[0]).all(1)
    assert same.double().mean() > 0.8  # a near tie is settled otherwise in fp64: its row differs
    assert torch.allclose(changes[same].double(), expected[1][same], atol=1e-4)
    assert bool((ranks[[0, -1]] == 99).all())
    assert bool((ranks[:, count] == 99).all())


@needs_compiler
@pytest.mark.parametrize("num_bits", [2, 3, 4])
@pytest.mark.parametrize(("K", "group"), [(128, 32), (192, 64), (256, 128), (77, -1)])
@pytest.mark.parametrize("per_row", [False, True])
def test_scales_are_those_of_the_other_paths(emulated, num_bits, K, group, per_row, monkeypatch):
    rng, N = generator(num_bits, K), 5
    weight = torch.randn(N, K, generator=rng)
    weight[0], weight[1] = 0, weight[1] * 1e30
    weight[2, : K // 2] = 0
    table = get_table("nf", num_bits) * (1 + 0.1 * torch.rand(N if per_row else 1, 1))
    spec = QuantSpec(num_bits, group)
    found = mse.group_scales(weight, table, spec)
    assert emulated == {f"search of {num_bits} bits": 1}
    monkeypatch.setattr(cuda_quantize, "takes", lambda weight: False)
    expected = mse.group_scales(weight, table, spec)
    assert torch.equal(found[0], torch.zeros_like(found[0]))
    # Another order of sums may choose another of two scales that are as good.
    close = torch.isclose(found, expected, rtol=1e-5)
    assert close.double().mean() > 0.85
    length = spec.group_length(K)
    for n, g in (~close).nonzero().tolist():
        w = weight[n, g * length : (g + 1) * length].double()
        own = table[n if per_row else 0].double()
        errors = [
            float((w[:, None] - own * s[n, g].double()).abs().amin(1).square().sum())
            for s in (found, expected)
        ]
        assert errors[0] == pytest.approx(errors[1], rel=1e-4)


@needs_compiler
@pytest.mark.parametrize("method", ["gptq", "lnq", "lnq row"])
@pytest.mark.parametrize(("num_bits", "K", "group"), [(2, 256, 64), (3, 160, 32), (4, 77, -1)])
def test_methods_by_kernels_are_as_good(emulated, method, num_bits, K, group, monkeypatch):
    """Near ties are settled otherwise, and change what follows: errors are compared."""
    name, _, scope = method.partition(" ")
    weight, H = problem(8, K)
    options = {"method": name, "hessian": H, "table_scope": scope or "tensor"}
    found = flute.quantize(weight, num_bits, group, **options)
    assert emulated["feedback"] >= K // 128
    monkeypatch.setattr(cuda_quantize, "takes", lambda weight: False)
    expected = flute.quantize(weight, num_bits, group, **options)
    assert output_error(weight, H, found) < 1.03 * output_error(weight, H, expected)


@needs_compiler
def test_error_feedback_by_kernels_rounds_the_same_weights(emulated):
    """Of one group, with one scale: what follows a near tie is all that may differ."""
    weight, H = problem(16, 128)
    entries = get_table("nf", 3).sort(1)[0]
    upper = torch.linalg.cholesky(torch.linalg.inv(damped(H).double())).T.float()
    by_kernels = gptq._round_by_kernels(weight.clone(), upper, entries, 128, 3, torch.float32)
    plainly = gptq._round_columns(weight.clone(), upper, entries, 128, 3, torch.float32)
    assert torch.allclose(by_kernels[1], plainly[1], rtol=1e-5)
    assert (by_kernels[0] == plainly[0]).double().mean() > 0.99


@needs_compiler
def test_a_descent_by_kernels_changes_the_same_codes(emulated):
    weight, H = problem(16, 192)
    start = gptq.quantize(weight, H, QuantSpec(4, 64), None, torch.float32)
    part = lnq.Part(slice(0, 16), weight, damped(H))
    state = (start.table, start.codes.long(), start.scales)
    by_kernels = lnq._descend_by_kernels(part, *state)
    plainly = lnq._descend_by_columns(part, *state)
    assert not torch.equal(plainly, state[1])
    assert (by_kernels == plainly).double().mean() > 0.99


def test_other_tensors_take_torchs_way():
    assert not cuda_quantize.takes(torch.zeros(2, 64))
    assert not cuda_quantize.takes(torch.zeros(2, 64, dtype=torch.float64))
