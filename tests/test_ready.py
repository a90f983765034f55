"""The short way of a layer's call, on the CPU: a launcher that reads memory as a kernel would."""

from __future__ import annotations

import copy
import ctypes
import pickle
from contextlib import nullcontext

import pytest
import torch
import torch._dynamo.testing
from helpers import generator, random_weight, relative_error
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from flute import cuda, launchers, linear, lut_weight, ops
from flute.errors import UnsupportedProblemError
from flute.format import PackedWeight, QuantSpec
from flute.kernel_order import to_plain_order
from flute.linear import LutLinear
from flute.reference import lut_gemm

SPEC = QuantSpec(4, 32)
N, K = 20, 64


def memory(address: int, like: torch.Tensor) -> torch.Tensor:
    """A tensor over memory, of the shape and dtype of another."""
    size = like.numel() * like.element_size()
    buffer = (ctypes.c_char * size).from_address(address)
    return torch.frombuffer(buffer, dtype=like.dtype).view(like.shape)


class Kernel:
    """Stands for `Launcher`: multiplies what lies at the addresses it is given."""

    def __init__(self, weight: PackedWeight, M: int, dtype: torch.dtype, bound=()) -> None:
        self.weight, self.M, self.dtype, self.bound = weight, M, dtype, dict(bound)
        self.streams: list[int] = []

    def bind(self, pointers):
        bound = Kernel(self.weight, self.M, self.dtype, pointers)
        bound.streams = self.streams
        return bound

    def launch_mapped(self, stream, *at, regions):
        """As the batch kernel is: x by a map, no scratch."""
        ((offset, words),) = regions
        address, rows, columns, box = words
        assert (offset, rows, columns, box) == (0, self.M, self.weight.K, 16)
        bound = [self.bound[i] if i in self.bound else at[i] for i in range(4)]
        Kernel(self.weight, self.M, self.dtype).launch(stream, address, *bound, 0, at[-1])
        self.streams.append(stream)

    def launch_pair(self, stream, x, out):
        self.launch(stream, x, *(self.bound[i] for i in range(1, 6)), out)

    def launch(self, stream, *at, regions=()):
        if regions:
            return self.launch_mapped(stream, *at, regions=regions)
        self.streams.append(stream)
        w = self.weight
        packed, scales, table = (memory(at[i], t) for i, t in zip((1, 2, 3), w[:3], strict=True))
        packed, scales = to_plain_order(
            packed, scales, w.spec.num_bits, w.N, w.K, w.spec.num_groups(w.K)
        )
        plain = w._replace(packed=packed, scales=scales, table=table)
        bias = memory(at[4], torch.empty(w.N, dtype=self.dtype)) if at[4] else None
        x_MK = memory(at[0], torch.empty(self.M, w.K, dtype=self.dtype))
        assert at[0] % 16 == 0
        assert at[5] == 0
        result = lut_gemm(x_MK, plain, bias)
        memory(at[6], result).copy_(result)


@pytest.fixture
def kernels(monkeypatch):
    """Kernels made so far, on a CPU that counts as a GPU."""
    made: list[Kernel] = []

    def product(weight, M, dtype, device):
        made.append(Kernel(weight, M, dtype))
        return launchers.Product(None, made[-1])

    monkeypatch.setattr(launchers, "product", product)
    monkeypatch.setattr(cuda, "_current_stream", lambda device: 7)
    monkeypatch.setattr(cuda, "_current_device", lambda: None)  # a CPU's index
    monkeypatch.setattr(
        cuda, "_empty", lambda size, stride, dtype: torch.empty_strided(size, stride, dtype=dtype)
    )
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    for module in (ops, linear, lut_weight, cuda):
        monkeypatch.setattr(module, "why_not", lambda device: "")
    return made


def make(dtype=torch.float16, *, bias=True, **kwargs):
    """A layer in kernel order, and the same in plain order."""
    weight = random_weight(N, K, SPEC, **kwargs)
    b = torch.randn(N, generator=generator(N)).to(dtype) if bias else None
    layer, plain = (LutLinear.from_quantized(weight, b) for _ in range(2))
    plain = copy.deepcopy(plain)
    layer.to_kernel_order()
    layer._settled = True
    return layer, plain


def expected(plain, x):
    return lut_gemm(x.reshape(-1, K), plain.packed_weight(), plain.bias).view(*x.shape[:-1], N)


def draw(*shape, dtype=torch.float16):
    return torch.randn(shape, generator=generator(*shape)).to(dtype)


def launches(kernels):
    return sum(len(kernel.streams) for kernel in kernels)


@pytest.mark.parametrize("ends", [(), (16, 20)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_calls_of_a_shape_share_a_product(kernels, dtype, bias, ends):
    layer, plain = make(dtype, bias=bias, table_ends=ends)
    for shape in ((1, K), (8, K), (1, 1, K), (2, 3, K), (K,)):
        for seed in range(3):
            x = draw(*shape, dtype=dtype) + seed
            out = layer(x)
            assert out.dtype == dtype
            assert torch.equal(out, expected(plain, x))
    assert len(kernels) == 5
    assert [kernel.streams for kernel in kernels] == [[7] * 3] * 5


def test_x_that_a_kernel_cannot_read_is_copied(kernels):
    layer, plain = make()
    layer(draw(2, K))
    wide, flat = draw(2, 2 * K + 1), draw(2 * K + 1)
    for x in (wide[:, 1 : K + 1], wide[:, ::2][:, :K], flat[1:].view(2, K), draw(K, 2).T):
        assert torch.equal(layer(x), expected(plain, x))
    assert len(kernels) == 1
    assert launches(kernels) == 5


def test_a_move_elsewhere_changes_nothing(kernels):
    layer, plain = make()
    x = draw(1, K)
    layer(x)
    make()[0].to_plain_order()  # other constants get other memory
    assert torch.equal(layer(x), expected(plain, x))
    assert len(kernels) == 1


def test_in_place_changes_are_seen(kernels):
    layer, plain = make()
    x = draw(1, K)
    layer(x)
    for each in (layer, plain):
        each.table.data.mul_(2)
        each.bias.data.add_(1)
    assert torch.equal(layer(x), expected(plain, x))
    assert len(kernels) == 1


def new_data(layer, name, value):
    getattr(layer, name).data = value


def new_parameter(layer, name, value):
    setattr(layer, name, nn.Parameter(value, requires_grad=False))


def behind_its_back(layer, name, value):
    layer._parameters[name] = nn.Parameter(value, requires_grad=False)


def other_memory(layer, name, value):
    with torch.no_grad():
        getattr(layer, name).set_(value)


@pytest.mark.parametrize("replace", [new_data, new_parameter, behind_its_back, other_memory])
@pytest.mark.parametrize("name", ["codes", "scales", "table", "bias"])
def test_replaced_parameters_are_seen(kernels, name, replace):
    layer, _ = make()
    other, _ = make(seed=5)
    if name == "bias":
        other.bias.data.add_(1)
    x = draw(3, K)
    layer(x)
    value = getattr(other, name).data.clone()
    before = getattr(layer, name).data_ptr()
    replace(layer, name, value)
    assert value.data_ptr() != before  # the old memory is still held
    out = layer(x)
    layer.to_plain_order()
    assert torch.equal(out, expected(layer, x))
    assert len(kernels) == 2


def test_another_dtype_of_the_bias_at_the_same_place_is_seen(kernels):
    layer, plain = make()
    x = draw(1, K)
    layer(x)
    values = layer.bias.data.float()
    layer.bias.data = torch.empty(0)
    layer.bias.data = values.bfloat16()
    plain.bias.data = values.bfloat16()
    assert torch.equal(layer(x), expected(plain, x))


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.to_plain_order(),
        lambda layer: layer.load_state_dict(make(seed=5)[1].state_dict()),
        lambda layer: layer.load_state_dict(make(seed=5)[1].state_dict(), assign=True),
        lambda layer: layer.bfloat16(),
    ],
)
def test_products_are_dropped_when_the_layer_changes(kernels, change):
    layer, _ = make()
    layer(draw(1, K))
    assert layer._ready
    change(layer)
    assert not layer._ready


def test_copies_and_pickles_make_their_own(kernels):
    layer, plain = make()
    x = draw(1, K)
    layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert not other._ready
        other.to_kernel_order()
        with torch.no_grad():
            other.bias.add_(1)
        assert torch.equal(layer(x), expected(plain, x))
        assert not torch.equal(other(x), layer(x))


def test_a_gradient_takes_the_op(kernels):
    layer, plain = make()
    layer(draw(2, K))
    x = draw(2, K).requires_grad_()
    count = launches(kernels)
    layer.to_plain_order()
    layer(x).sum().backward()
    exact = plain.dequantize(torch.float32).sum(0).expand(2, K)
    assert relative_error(x.grad, exact) < 2e-3
    layer.to_kernel_order()
    layer.bias.requires_grad_()
    with torch.no_grad():
        assert torch.equal(layer(draw(2, K)), expected(plain, draw(2, K)))
    assert launches(kernels) == count + 1
    for _ in range(2):
        layer(draw(2, K)).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((N,), 4.0).half())


class Watch(TorchDispatchMode):
    """Notes the ops that pass by."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.seen.append(str(op))
        return op(*args, **(kwargs or {}))


def test_modes_see_the_op(kernels, monkeypatch):
    layer, plain = make()
    x = draw(2, K)
    layer(x)
    monkeypatch.setattr(cuda, "multiply", lambda x, weight, bias: expected(plain, x))
    count = launches(kernels)
    with Watch() as watch:
        layer(x)
    assert watch.seen == ["flute.lut_gemm.default"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    traced = torch.jit.trace(layer, x, check_trace=False)
    assert "flute::lut_gemm" in str(traced.graph)
    torch.func.vmap(layer)(x)
    assert launches(kernels) == count


def test_a_tangent_is_not_dropped(kernels):
    layer, plain = make()
    x = draw(2, K)
    layer(x)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(UnsupportedProblemError, match="forward-mode"):
            layer(dual)
        assert torch.equal(layer(x), expected(plain, x))
    with pytest.raises(UnsupportedProblemError, match="forward-mode"):
        torch.func.jvp(plain, (x,), (x,))


@pytest.mark.parametrize(
    "watch",
    [
        lambda layer, seen: layer.register_forward_hook(lambda *a: seen.append(1)),
        lambda layer, seen: layer.register_forward_pre_hook(lambda *a: seen.append(1)),
        lambda layer, seen: nn.modules.module.register_module_forward_hook(
            lambda *a: seen.append(1)
        ),
        lambda layer, seen: nn.modules.module.register_module_forward_pre_hook(
            lambda *a: seen.append(1)
        ),
    ],
)
def test_hooks_are_called(kernels, watch):
    layer, plain = make()
    x, seen = draw(1, K), []
    layer(x)
    hook = watch(layer, seen)
    for _ in range(3):
        assert torch.equal(layer(x), expected(plain, x))
    assert len(seen) == 3
    hook.remove()
    assert torch.equal(layer(x), expected(plain, x))
    assert (len(seen), len(kernels), launches(kernels)) == (3, 1, 5)


def test_a_replaced_forward_is_called(kernels):
    layer, plain = make()
    x = draw(1, K)
    layer(x)
    forward = layer.forward
    layer.forward = lambda x: forward(x) + 1
    assert torch.equal(layer(x), expected(plain, x) + 1)
    del layer.forward
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    layer.compile(backend=counter, fullgraph=True)
    assert torch.equal(layer(x), expected(plain, x))
    assert counter.frame_count == 1


def test_called_by_keyword(kernels):
    layer, plain = make()
    x = draw(1, K)
    for _ in range(2):
        assert torch.equal(layer(x=x), expected(plain, x))


def test_what_is_kept_is_bounded(kernels):
    layer, plain = make()
    for i in range(3 * linear._MAX_READY):
        x = draw(*[1] * (i % 60), 1 + i % 16, K)
        assert torch.equal(layer(x), expected(plain, x))
        assert len(layer._ready) <= linear._MAX_READY


@pytest.mark.parametrize("shape", [(257, K), (0, K), (65, 4, K)])
def test_other_numbers_of_tokens_take_the_op(kernels, monkeypatch, shape):
    layer, plain = make()
    calls = []
    monkeypatch.setattr(
        cuda, "multiply", lambda x, w, b: calls.append(x.shape) or expected(plain, x)
    )
    layer(draw(*shape))
    assert calls == [(draw(*shape).numel() // K, K)]
    assert not layer._ready
    assert launches(kernels) == 0


@pytest.mark.parametrize("shape", [(9, K), (3, 4, K), (256, K)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_kernel_that_takes_x_by_a_map(kernels, monkeypatch, shape, bias):
    from flute.jit import launch

    made = launchers.product

    def product(*args):
        return made(*args)._replace(map_tokens=16)

    def tensor_map(address, rows, columns, box_rows, dtype):
        assert dtype == "float16"
        return [address, rows, columns, box_rows]

    monkeypatch.setattr(launchers, "product", product)
    monkeypatch.setattr(launch, "tensor_map", tensor_map)
    layer, plain = make(bias=bias)
    x = draw(*shape)
    for _ in range(2):
        assert torch.equal(layer(x), expected(plain, x))
    unaligned = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(shape).copy_(x)
    assert torch.equal(layer(unaligned), expected(plain, x))
    assert len(layer._ready) == 1
    assert len(kernels) == 1
