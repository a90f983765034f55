"""Products made ready on the CPU: when one holds, and which layers are multiplied together."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from helpers import DTYPES, generator, random_weight
from torch import nn

from flute.cpu import library as cpu
from flute.format import QuantSpec
from flute.linear import LutLinear

K = 256
SPEC = QuantSpec(4, 64)


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """Switch the kernels on, in fixed point."""
    monkeypatch.delenv("FLUTE_CPU_VARIANT", raising=False)
    monkeypatch.delenv("FLUTE_CPU_EXACT", raising=False)
    if cpu.why_not():
        pytest.skip(cpu.why_not())


def make(N=21, *, bias=True, **kwargs):
    weight = random_weight(N, K, SPEC, **kwargs)
    return LutLinear.from_quantized(
        weight, torch.randn(N, generator=generator(N)) if bias else None
    )


def expected(layer, x):
    """What the library gives when it looks at each call."""
    flat = x.reshape(-1, K)
    return cpu.multiply(flat, layer.packed_weight(), layer.bias).view(*x.shape[:-1], -1)


def draw(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=generator(*shape)).to(dtype)


@pytest.mark.parametrize("tables", [{}, {"per_row": True}, {"table_ends": (16, 21)}])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_product_is_kept_for_each_shape_and_dtype(dtype, tables):
    layer = make(**tables)
    with torch.no_grad():
        for shape in ((K,), (1, K), (1, 1, K), (2, 3, K), (32, K)):
            for repeat in range(2):
                x = draw(*shape, dtype=dtype) + repeat
                out = layer(x)
                assert (out.dtype, out.shape) == (dtype, (*shape[:-1], 21))
                assert torch.equal(out, expected(layer, x))
        assert len(layer._ready) == 5
        layer(draw(33, K, dtype=dtype))  # more than one call of the library takes
        assert len(layer._ready) == 5
        x = draw(K, 2, dtype=dtype).T
        assert torch.equal(layer(x), expected(layer, x.contiguous()))


def test_a_product_holds_no_longer_than_its_layer_stays_the_same(monkeypatch):
    layer, x = make(), draw(2, K)

    def check():
        with torch.no_grad():
            for _ in range(2):
                out = layer(x)
                assert torch.equal(out, expected(layer, x))
        return out

    outs = [check()]
    layer.scales.data.mul_(2)  # in place: the same memory
    outs.append(check())
    layer.scales = nn.Parameter(layer.scales.data / 4, requires_grad=False)
    layer.to_cpu_order()
    outs.append(check())
    layer.table.data = layer.table.data * 3
    outs.append(check())
    layer.bias = nn.Parameter(layer.bias.data + 1)
    outs.append(check())
    layer.bias.data = layer.bias.data.double() + 1
    outs.append(check())
    layer.bias = None
    outs.append(check())
    for i, out in enumerate(outs):
        assert not any(torch.equal(out, other) for other in outs[:i])
    monkeypatch.setenv("FLUTE_CPU_VARIANT", "scalar")
    assert torch.equal(check(), outs[-1])
    assert layer._ready[x.shape, x.dtype, x.device].call.variant == len(cpu._library().variants) - 1
    monkeypatch.setenv("FLUTE_CPU_EXACT", "1")
    assert not torch.equal(check(), outs[-1])


def test_gradients_of_the_bias_go_past_what_is_ready():
    layer, x = make(), draw(2, K)
    with torch.no_grad():
        layer(x)
    layer.bias.requires_grad_()
    layer(x).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((21,), 2.0))


def test_threads_share_a_product():
    layer = make()
    xs = [draw(2, K) + i for i in range(4)]
    wanted = [expected(layer, x) for x in xs] if layer.cpu_order else [layer(x) for x in xs]
    failures = []

    def work(x, out):
        failures.extend(1 for _ in range(200) if not torch.equal(layer(x), out))

    threads = [threading.Thread(target=work, args=pair) for pair in zip(xs, wanted, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_copy_has_no_product_of_the_original():
    layer, x = make(), draw(2, K)
    out = layer(x)
    other = copy.deepcopy(layer)
    assert not other._ready
    layer.scales.data.zero_()
    assert torch.equal(other(x), out)
