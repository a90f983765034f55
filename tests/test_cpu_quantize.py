"""Quantising by the C library: every bit must be that of the PyTorch path."""

from __future__ import annotations

import pytest
import torch
from helpers import generator

import flute
from flute.cpu import library as cpu
from flute.cpu import quantize
from flute.format import QuantSpec
from flute.methods.mse import group_scales


@pytest.fixture
def both(monkeypatch):
    """Call a function by PyTorch, and by each variant of the library; return all results."""
    monkeypatch.delenv("FLUTE_CPU_VARIANT", raising=False)
    if cpu.why_not():
        pytest.skip(cpu.why_not())
    names = cpu._library().usable

    def run(function):
        results = []
        for name in ("none", *names):
            monkeypatch.setenv("FLUTE_CPU_VARIANT", name)
            results.append(function())
        return results

    return run


def weights():
    normal = torch.randn(24, 256, generator=generator(1))
    few = torch.randint(-2, 3, (24, 256), generator=generator(2)).float()  # many ties
    zeros = normal.clone()
    zeros[3], zeros[5, :128], zeros[7, 200:] = 0, 0, -0.0
    sizes = normal * 10.0 ** torch.linspace(-30, 30, 24)[:, None]
    heavy = normal**5
    return {"normal": normal, "ties": few, "zeros": zeros, "sizes": sizes, "heavy": heavy}


@pytest.mark.parametrize("kind", weights())
@pytest.mark.parametrize("group_size", [32, 64, 128, 256, -1])
@pytest.mark.parametrize("num_bits", [2, 3, 4])
def test_all_methods_give_the_same_bits(num_bits, group_size, kind, both):
    weight = weights()[kind]
    for method in ("mse", "nf", "int", "fp"):
        results = both(
            lambda method=method: flute.quantize(
                weight,
                method=method,
                num_bits=num_bits,
                group_size=group_size,
                scale_dtype=torch.float32,
            )
        )
        for result in results[1:]:
            assert torch.equal(result.scales, results[0].scales)
            assert torch.equal(result.codes, results[0].codes)


@pytest.mark.parametrize("method", ["mse", "table"])
@pytest.mark.parametrize("rows", [1, 24])
def test_tables_in_any_order_and_per_row(rows, method, both):
    weight = weights()["normal"]
    for num_bits in (2, 3, 4):
        table = torch.randn(rows, 1 << num_bits, generator=generator(num_bits))
        table[:, -1] = table[:, 0]  # an entry twice
        results = both(
            lambda table=table, num_bits=num_bits: flute.quantize(
                weight, method=method, table=table, num_bits=num_bits, group_size=64
            )
        )
        for result in results[1:]:
            assert torch.equal(result.scales, results[0].scales)
            assert torch.equal(result.codes, results[0].codes)


def test_long_rows_are_sorted_by_merging(both):
    weight = torch.randn(2, 4096 + 37, generator=generator(3))
    table = flute.get_table("nf", 4)
    results = both(lambda: group_scales(weight, table, QuantSpec(4, -1)))
    assert all(torch.equal(result, results[0]) for result in results[1:])


def test_equal_for_any_number_of_threads(both):
    weight = torch.randn(300, 512, generator=generator(4))
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            first, *others = both(lambda: flute.quantize(weight, num_bits=3, group_size=64))
            assert all(torch.equal(other.codes, first.codes) for other in others)
            assert all(torch.equal(other.scales, first.scales) for other in others)
    finally:
        torch.set_num_threads(1)


def test_what_the_library_does_not_take(both):
    weight = torch.randn(4, 64)
    takes = both(
        lambda: [
            quantize.takes(weight),
            quantize.takes(weight.T),
            quantize.takes(weight.double()),
            quantize.takes(weight[:0]),
            quantize.takes(weight.to("meta")),
        ]
    )
    assert takes[0] == [False] * 5
    assert takes[1:] == [[True, False, False, False, False]] * (len(takes) - 1)
