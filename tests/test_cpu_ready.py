"""Products made ready on the CPU: when one holds, and which layers are multiplied together."""

from __future__ import annotations

import copy
import pickle
import threading
import time

import pytest
import torch
from helpers import DTYPES, generator, random_weight
from torch import nn

import flute
from flute.cpu import library as cpu
from flute.cpu import products
from flute.cpu.ready import open_scope
from flute.format import QuantSpec
from flute.linear import LutLinear

pytestmark = pytest.mark.usefixtures("cpu_kernels")
K = 256
SPEC = QuantSpec(4, 64)


def make(N=21, *, bias=True, **kwargs):
    weight = random_weight(N, K, SPEC, **kwargs)
    return LutLinear.from_quantized(
        weight, torch.randn(N, generator=generator(N)) if bias else None
    )


def expected(layer, x):
    """What the library gives when it looks at each call."""
    flat = x.reshape(-1, K)
    return products.multiply(flat, layer.packed_weight(), layer.bias).view(*x.shape[:-1], -1)


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


# ---- siblings


@pytest.fixture
def two_threads():
    """With one, layers are multiplied one by one."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


class Attention(nn.Module):
    """Three layers of one x, and one of their sum; counts the library's calls by `calls`."""

    def __init__(self, between=None, **kwargs):
        super().__init__()
        self.q, self.k = make(48, **kwargs), make(16, bias=False, seed=1)
        self.v, self.o = make(16, seed=2), make(16, seed=3)
        self.between = between

    def forward(self, x):
        q = self.q(x)
        if self.between is not None:
            x = self.between(self, x)
        return torch.cat((q, self.k(x), self.v(x), self.o(x * 2)), -1)


def alone(module, x):
    return torch.cat([expected(getattr(module, n), x * (1 + (n == "o"))) for n in "qkvo"], -1)


@pytest.fixture
def calls(monkeypatch):
    """The numbers of weights of the calls of the library."""
    counts = []

    def counted(self, weights, results, count, tokens):
        counts.append(count)
        return call(self, weights, results, count, tokens)

    call = cpu.Entry.__call__
    monkeypatch.setattr(cpu.Entry, "__call__", counted)
    return counts


def run(module, x, calls):
    """The result, and the numbers of weights of the calls."""
    calls.clear()
    with torch.no_grad():
        out = module(x)
    return out, list(calls)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("dtype", DTYPES)
def test_siblings_are_multiplied_together_from_the_second_call_on(dtype, calls):
    module = Attention()
    names = [name for name, _ in module.named_modules()]
    before = {name: value.clone() for name, value in module.state_dict().items()}
    assert flute.prepare(module, together=True) == 4
    assert flute.prepare(module, together=True) == 4  # hooks are not added twice
    assert len(module._forward_pre_hooks) == len(module._forward_hooks) == 1
    for shape in ((1, K), (2, 3, K)):
        for i in range(4):
            x = draw(*shape, dtype=dtype) + i
            out, counts = run(module, x, calls)
            assert torch.equal(out, alone(module, x))
            watched = i == 0  # of a new shape the first sibling finds the others not ready
            assert counts == ([1, 1, 1, 1] if watched else [3, 1])
    assert [name for name, _ in module.named_modules()] == names
    after = module.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def shared(between=None, **kwargs):
    module = Attention(**kwargs)
    flute.prepare(module, together=True)
    with torch.no_grad():
        for _ in range(2):
            module(draw(1, K))
    module.between = between
    return module


def changed_x(module, x):
    return x + 1


def changed_x_in_place(module, x):
    return x.add_(1)


def other_dtype(module, x):
    return torch.zeros(1, K, dtype=torch.bfloat16)


def changed_weight(module, x):
    module.k.scales.data = module.k.scales.data * 2
    return x


def changed_bias(module, x):
    module.v.bias = nn.Parameter(module.v.bias.data + 1)
    return x


def loaded(module, x):
    module.v.load_state_dict(make(16, seed=7).state_dict())
    return x


def hooked(module, x):
    module.k.register_forward_pre_hook(lambda _, args: (args[0] * 3,))
    return x


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize(
    "change",
    [changed_x, changed_x_in_place, other_dtype, changed_weight, changed_bias, loaded, hooked],
)
def test_what_changes_between_siblings_counts(change, inference):
    module, plain = shared(change), Attention(change)  # the second is never prepared
    with torch.inference_mode(inference), torch.no_grad():
        for _ in range(3):
            plain_x = draw(1, K)
            assert torch.equal(module(plain_x.clone()), plain(plain_x.clone()))


@pytest.mark.usefixtures("two_threads")
def test_parts_that_nobody_takes_end_the_sharing(calls):
    module = shared(changed_x)
    assert run(module, draw(1, K), calls)[1] == [3, 1, 1, 1]
    module.between = None
    out, counts = run(module, draw(1, K), calls)
    assert counts == [1, 1, 1, 1]
    assert torch.equal(out, alone(module, draw(1, K)))


@pytest.mark.usefixtures("two_threads")
def test_a_part_lives_no_longer_than_the_forward(calls, monkeypatch):
    def fail(module, x):
        raise ValueError("stop")

    def interrupt(module, x):
        raise KeyboardInterrupt("stop")

    x = draw(1, K)
    for between, error in ((fail, ValueError), (interrupt, KeyboardInterrupt)):
        module = shared(between)
        with torch.no_grad(), pytest.raises(error, match="stop"):
            module(x)
        if error is KeyboardInterrupt:  # no hook ran: what was left behind grows old
            later = time.monotonic() + 2
            monkeypatch.setattr(time, "monotonic", lambda later=later: later)
        module.k.scales.data.mul_(2)
        with torch.no_grad():
            assert torch.equal(module.k(x), expected(module.k, x))
    open_scope(None)


@pytest.mark.usefixtures("two_threads")
def test_siblings_of_different_kinds_go_apart(calls):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            for i, spec in enumerate((SPEC, QuantSpec(3, 64), SPEC, QuantSpec(3, 64))):
                weight = random_weight(16, K, spec, seed=i)
                setattr(self, f"a{i}", LutLinear.from_quantized(weight))

        def forward(self, x):
            return torch.cat([getattr(self, f"a{i}")(x) for i in range(4)], -1)

    module, x = Mixed(), draw(2, K)
    wanted = copy.deepcopy(module)(x)
    flute.prepare(module, together=True)
    for counts in ([1] * 4, [2, 2], [2, 2]):
        out, found = run(module, x, calls)
        assert found == counts
        assert torch.equal(out, wanted)


@pytest.mark.usefixtures("two_threads")
def test_hooks_of_siblings_run(calls):
    module, seen = shared(), []
    module.k.register_forward_hook(lambda layer, args, out: seen.append(out) or out + 1)
    x = draw(1, K)
    out, counts = run(module, x, calls)
    wanted = alone(module, x)
    wanted[:, 48:64] += 1
    assert counts == [3, 1]
    assert len(seen) == 1
    assert torch.equal(out, wanted)


@pytest.mark.usefixtures("two_threads")
def test_copies_pickles_threads_gradients_and_offloading(calls):
    module, x = shared(), draw(1, K)
    out, counts = run(module, x, calls)
    assert counts == [3, 1]
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        other.q.scales.data.mul_(2)
        assert not torch.equal(run(other, x, calls)[0], out)
        assert torch.equal(run(module, x, calls)[0], out)
    failures = []

    def work(i):
        mine = draw(1, K) + i
        wanted = alone(module, mine)
        with torch.no_grad():
            failures.extend(1 for _ in range(100) if not torch.equal(module(mine), wanted))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    x.requires_grad_()
    module(x).sum().backward()
    assert x.grad is not None
    assert torch.equal(run(module, x, calls)[0], out)
    accelerate = pytest.importorskip("accelerate")
    accelerate.cpu_offload(module, execution_device=torch.device("cpu"))
    moved = run(module, x, calls)[0]
    assert calls == []
    assert torch.allclose(moved, out, rtol=1e-2, atol=1e-2)


@pytest.mark.usefixtures("two_threads")
def test_compiled_modules_of_siblings():
    module, x = shared(), draw(1, K)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        wanted = module(x)
        for _ in range(2):
            assert torch.equal(compiled(x), wanted)
            assert torch.equal(module(x), wanted)
    program = torch.export.export(module, (x,))
    assert torch.equal(program.module()(x), wanted)


def test_one_thread_multiplies_layers_one_by_one(calls):
    module = Attention()
    flute.prepare(module, together=True)
    for _ in range(3):
        assert run(module, draw(1, K), calls)[1] == [1, 1, 1, 1]
