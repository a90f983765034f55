"""Tuning on a GPU: what is found is right, kept, and used by the next call."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

import flute
from flute import launchers, tune, tuning
from flute.candidates import candidates
from flute.cli import main
from flute.config import Problem
from flute.device import gpu_of
from flute.format import QuantizedWeight, QuantSpec
from flute.timing import capture, rotated_copies, time_graphs_us, time_us

DEVICE = torch.device("cuda", 0)
SHAPE = (512, 1024)


@pytest.fixture(autouse=True)
def results(tmp_path, monkeypatch):
    """A folder of tuned plans of its own; the kernels' cache stays where it is."""
    folder = tmp_path / "tuning"
    monkeypatch.setattr(tuning, "user_folder", lambda: folder)
    tuning.forget()
    launchers._products.clear()
    yield folder
    tuning.forget()
    launchers._products.clear()


def problem(m, **changes):
    return Problem(4, 128, "float16", "float16", False, m, *SHAPE)._replace(**changes)


def test_tuned_plans_are_written_and_used(results, capsys):
    argv = ["tune", "--shape", "512x1024", "--group-size", "128", "--dtype", "float16"]
    argv += ["--tokens", "1", "16", "40", "--top", "3", "--json"]
    assert main(argv) == 0
    report = json.loads(capsys.readouterr().out)
    assert [r["m"] for r in report["results"]] == [1, 16, 40]
    assert report["worst_ratio"] >= 0.98
    path = results / tuning.file_name(gpu_of(DEVICE))
    assert report["output"] == str(path)
    store = tuning.read(path)
    assert set(store[problem(0)]) == {1, 16, 40}
    assert tuning.lookup(problem(1), gpu_of(DEVICE)) is not None


def test_a_call_takes_the_tuned_plan(results):
    gpu = gpu_of(DEVICE)
    other = candidates(problem(1), gpu)[4]
    record = tuning.Record(tuning.encode(other), 1.0)
    tuning.write(results / tuning.file_name(gpu), gpu, {problem(0): {1: record}})
    codes = torch.randint(0, 16, SHAPE, device=DEVICE, dtype=torch.uint8)
    scales = torch.rand(SHAPE[0], SHAPE[1] // 128, device=DEVICE).half()
    table = torch.randn(1, 16, device=DEVICE)
    layer = flute.LutLinear.from_quantized(QuantizedWeight(codes, scales, table, QuantSpec(4, 128)))
    layer.to_kernel_order()
    x = torch.randn(1, SHAPE[1], device=DEVICE).half()
    out = layer(x)
    (product,) = launchers._products.values()
    assert product.plan == other
    exact = x.double() @ layer.dequantize().double().T
    assert ((out.double() - exact).norm() / exact.norm()).item() < 1e-3


@pytest.mark.parametrize("change", [{}, {"group_size": 0}, {"row_tables": True, "num_bits": 2}])
def test_all_candidates_agree_with_the_dequantised_product(change):
    tuner = tune.Tuner([problem(m, **change) for m in (1, 5, 16, 24, 70)], DEVICE, top=4)
    tuner.compile(lambda done, total: None)
    (found,) = tuner.measure()
    assert [r.problem.m for r in found] == [1, 5, 16, 24, 70]
    for result in found:
        wrong = [why for why in result.refused.values() if "local memory" not in why]
        assert wrong == []
        assert 0 < result.us <= result.default_us * tune.CLOSE
    times = [r.us for r in found]
    assert all(b >= a / tune.CLOSE for a, b in itertools.pairwise(times))


def test_a_wrong_plan_is_never_kept(monkeypatch):
    tuner = tune.Tuner([problem(1)], DEVICE, top=2)
    tuner.compile(lambda done, total: None)
    wrong = tuner.plans[problem(1)][1]
    right = launchers.product_of

    def half(function, plan, asked, *rest):
        rows = asked.n // 2 if plan == wrong else asked.n
        return right(function, plan, asked._replace(n=rows), *rest)

    monkeypatch.setattr(tune, "product_of", half)
    ((result,),) = tuner.measure()
    assert result.best != wrong
    assert "wrong: it differs" in result.refused[wrong]


def test_no_weight_is_begun_after_the_deadline():
    tuner = tune.Tuner([problem(1)], DEVICE, top=1)
    tuner.compile(lambda done, total: None)
    assert list(tuner.measure(deadline=0.0)) == []


def test_the_clock_measures_the_gpu():
    x = torch.randn(2048, 2048, device=DEVICE)
    y = torch.empty_like(x)
    once = time_us([lambda: torch.mm(x, x, out=y)])
    thrice = time_us([lambda: [torch.mm(x, x, out=y) for _ in range(3)]])
    assert 2.5 < thrice / once < 3.5
    graphs = [capture([lambda: torch.mm(x, x, out=y)] * n) for n in (1, 4)]
    one, four = time_graphs_us(graphs, 5)
    assert 3 < four / one < 5
    assert rotated_copies(1e12) == 2
    assert rotated_copies(1e6) * 1e6 > 2 * torch.cuda.get_device_properties(0).L2_cache_size
