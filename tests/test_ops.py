"""The op: three oracles, messages, and what torch may do with it (compile, autocast, grad)."""

from __future__ import annotations

import re
import shutil
import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    DTYPES,
    TOLERANCE,
    exact_weight,
    generator,
    random_weight,
    relative_error,
    run_python,
)
from torch import Tensor

import flute
from flute import device, op_arguments, ops
from flute.errors import FormatError
from flute.format import QuantSpec
from flute.kernel_order import to_kernel_order
from flute.pack import pack_codes
from flute.reference import dequantize

BITS = (2, 3, 4)
SHAPES = [(32, 96), (64, 192), (128, 384), (256, 512), (-1, 256), (-1, 77), (-1, 1)]
"""(group size, K): rows of 3 groups, of 2, and one ragged whole row."""


def arguments(N, K, spec, dtype, *, M=3, bias=True, seed=0, **kwargs):
    """A random weight and the op's arguments for it."""
    weight = random_weight(N, K, spec, seed=seed, **kwargs)
    rng = generator(N, K, M, seed)
    x = torch.randn(M, K, generator=rng).to(dtype)
    b = torch.randn(N, generator=rng).to(dtype) if bias else None
    packed = pack_codes(weight.codes, spec.num_bits)
    args = (x, packed, weight.scales, weight.table, b, spec.num_bits, spec.group_size)
    return weight, (*args, None, weight.table_ends) if weight.table_ends else args


def call(x, packed, scales, table, bias, num_bits, group_size, out_features=None, ends=()):
    spec = QuantSpec(num_bits, group_size)
    return flute.lut_gemm(x, packed, scales, table, spec, bias, out_features, ends)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize(("group_size", "K"), SHAPES)
@pytest.mark.parametrize("num_bits", BITS)
def test_an_identity_reproduces_the_weight_bit_for_bit(num_bits, group_size, K, per_row, dtype):
    spec = QuantSpec(num_bits, group_size)
    weight, args = arguments(9, K, spec, dtype, bias=False, per_row=per_row)
    out = call(torch.eye(K, dtype=dtype), *args[1:])
    assert out.dtype == dtype
    assert torch.equal(out.T, dequantize(weight, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize(("group_size", "K"), SHAPES)
@pytest.mark.parametrize("num_bits", BITS)
def test_error_against_fp64_and_against_torch(num_bits, group_size, K, per_row, dtype):
    spec = QuantSpec(num_bits, group_size)
    for M, N in ((1, 33), (5, 7)):
        weight, args = arguments(N, K, spec, dtype, M=M, per_row=per_row)
        x, bias = args[0], args[4]
        out, theirs = call(*args), F.linear(x, dequantize(weight, dtype), bias)
        exact = x.double().numpy() @ exact_weight(weight).T + bias.double().numpy()
        assert relative_error(out, exact) <= TOLERANCE[dtype]
        exact = x.double().numpy() @ exact_weight(weight, dtype).T + bias.double().numpy()
        assert relative_error(out, exact) <= 1.5 * relative_error(theirs, exact) + 1e-7


ENDS = [(9,), (1, 9), (3, 4, 9), tuple(range(1, 10))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("num_bits", BITS)
def test_a_table_per_range_of_rows(num_bits, ends, dtype):
    weight, args = arguments(9, 96, QuantSpec(num_bits, 32), dtype, M=4, table_ends=ends)
    exact = args[0].double().numpy() @ exact_weight(weight).T + args[4].double().numpy()
    out = call(*args)
    assert relative_error(out, exact) <= TOLERANCE[dtype]
    assert torch.equal(out, torch.ops.flute.lut_gemm(*args))
    identity = call(torch.eye(96, dtype=dtype), *args[1:4], None, *args[5:])
    assert torch.equal(identity.T, dequantize(weight, dtype))
    for start, end, table in zip((0, *ends), ends, weight.table, strict=False):
        part = slice(start, end)
        alone = (args[0], args[1][part], args[2][part], table[None], args[4][part])
        expected = call(*alone, *args[5:7])
        assert relative_error(out[:, part], expected) <= TOLERANCE[dtype] / 10


@pytest.mark.parametrize("ends", [(16, 20), (3, 20)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_ranges_in_kernel_order_without_kernels(dtype, ends):
    weight, args = arguments(20, 64, QuantSpec(3, 32), dtype, table_ends=ends)
    ordered = to_kernel_order(*args[1:3], 3, 64)
    out = call(args[0], *ordered, *args[3:7], 20, ends)
    assert torch.equal(out, call(*args))
    value = torch.ops.flute.dequantize(*ordered, args[3], 3, 32, 64, dtype, 20, ends)
    assert torch.equal(value, dequantize(weight, dtype))


@pytest.mark.parametrize("scale_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_of_any_dtype(dtype, scale_dtype):
    weight, args = arguments(5, 64, QuantSpec(4, 32), dtype, scale_dtype=scale_dtype)
    exact = args[0].double().numpy() @ exact_weight(weight).T + args[4].double().numpy()
    assert relative_error(call(*args), exact) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(0, 64), (2, 0, 64), (0, 0, 64), (64,), (2, 3, 64), (1, 1, 1, 64)]
)
def test_any_leading_shape(shape, dtype):
    weight, args = arguments(7, 64, QuantSpec(3, 32), dtype)
    x = torch.randn(shape, generator=generator(len(shape))).to(dtype)
    out = call(x, *args[1:])
    assert out.shape == (*shape[:-1], 7)
    assert out.dtype == dtype
    rows = call(x.reshape(-1, 64), *args[1:]).reshape(out.shape)
    assert torch.equal(out, rows)
    exact = x.double().numpy() @ exact_weight(weight).T + args[4].double().numpy()
    assert relative_error(out, exact) <= TOLERANCE[dtype]


@pytest.mark.parametrize(("N", "K"), [(0, 64), (5, 0)])
def test_weights_without_elements(N, K):
    _, args = arguments(N, K, QuantSpec(4, 32), torch.float32)
    out = call(*args)
    assert out.shape == (3, N)
    assert torch.equal(out, args[4].expand(3, N))


def test_x_of_odd_strides():
    _, args = arguments(7, 64, QuantSpec(4, 32), torch.float32, M=4)
    x = args[0]
    expected = call(*args)
    wide = torch.stack((x, torch.full_like(x, torch.nan)), -1)
    for strided in (x.T.contiguous().T, wide[..., 0], x.flip(0).flip(0)):
        assert relative_error(call(strided, *args[1:]), expected) <= 1e-6
    cube = torch.randn(64, 3, 2, generator=generator(5)).permute(2, 1, 0)
    assert relative_error(call(cube, *args[1:]), call(cube.contiguous(), *args[1:])) <= 1e-6
    one = x[:1].expand(4, 64)
    assert relative_error(call(one, *args[1:]), expected[:1].expand(4, 7)) <= 1e-6


def test_arguments_are_left_alone():
    _, args = arguments(7, 64, QuantSpec(4, 32), torch.float32)
    before = [t.clone() for t in args[:5]]
    call(*args).zero_()
    for tensor, kept in zip(args[:5], before, strict=True):
        assert torch.equal(tensor, kept)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_inf_and_nan_travel_as_in_torch(value, dtype):
    weight, args = arguments(40, 64, QuantSpec(2, 32), dtype, M=3)
    x = args[0].clone()
    x[1, 17] = value
    out = call(x, *args[1:])
    dense = F.linear(x, dequantize(weight, dtype), args[4])
    assert torch.equal(out.isnan(), dense.isnan())
    assert torch.equal(out.isinf(), dense.isinf())
    assert torch.equal(out[out.isinf()], dense[dense.isinf()])
    assert not bool(torch.isfinite(out[1]).any())
    assert bool(torch.isfinite(out[[0, 2]]).all())


def test_fp16_overflows_to_inf_as_in_torch():
    weight, args = arguments(8, 64, QuantSpec(4, 32), torch.float16)
    x = torch.full((1, 64), 60000.0, dtype=torch.float16)
    out, dense = call(x, *args[1:]), F.linear(x, dequantize(weight, torch.float16), args[4])
    assert bool(out.isinf().any())
    assert torch.equal(out.isinf(), dense.isinf())
    assert torch.equal(out.sign(), dense.sign())


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_from_run_to_run(dtype):
    _, args = arguments(37, 384, QuantSpec(3, 128), dtype, M=5)
    first = call(*args)
    for _ in range(5):
        assert torch.equal(call(*args), first)


OPCHECK = [
    (torch.float16, 4, 32, 64, 3, True, False),
    (torch.bfloat16, 3, -1, 13, 1, False, True),
    (torch.float32, 2, 64, 128, 0, True, True),
    (torch.float32, 4, -1, 1, 2, False, False),
]


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize(("dtype", "num_bits", "group_size", "K", "M", "bias", "per_row"), OPCHECK)
def test_opcheck_lut_gemm(dtype, num_bits, group_size, K, M, bias, per_row, requires_grad):
    spec = QuantSpec(num_bits, group_size)
    _, args = arguments(5, K, spec, dtype, M=M, bias=bias, per_row=per_row)
    if requires_grad:
        args = tuple(
            a.requires_grad_() if i in (0, 4) and a is not None else a for i, a in enumerate(args)
        )
    result = torch.library.opcheck(torch.ops.flute.lut_gemm.default, args)
    assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_bits", BITS)
def test_opcheck_dequantize(num_bits, dtype):
    weight, args = arguments(5, 64, QuantSpec(num_bits, 32), dtype)
    result = torch.library.opcheck(
        torch.ops.flute.dequantize.default, (*args[1:4], num_bits, 32, 64, dtype)
    )
    assert set(result.values()) == {"SUCCESS"}
    value = torch.ops.flute.dequantize(*args[1:4], num_bits, 32, 64, dtype)
    assert torch.equal(value, dequantize(weight, dtype))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck_with_ranges(requires_grad):
    weight, args = arguments(5, 64, QuantSpec(4, 32), torch.float32, table_ends=(2, 5))
    x = args[0].requires_grad_(requires_grad)
    result = torch.library.opcheck(torch.ops.flute.lut_gemm.default, (x, *args[1:]))
    assert set(result.values()) == {"SUCCESS"}
    args = (*args[1:4], 4, 32, 64, torch.float16, None, (2, 5))
    result = torch.library.opcheck(torch.ops.flute.dequantize.default, args)
    assert set(result.values()) == {"SUCCESS"}
    assert torch.equal(torch.ops.flute.dequantize(*args), dequantize(weight, torch.float16))


def test_compiled_gradients_with_ranges():
    weight, args = arguments(7, 64, QuantSpec(4, 32), torch.float32, table_ends=(3, 7))
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: call(x, *args[1:]), fullgraph=True, backend="aot_eager")
    exact = torch.from_numpy(exact_weight(weight)).sum(0).expand(3, 64)
    for function in (compiled, lambda x: call(x, *args[1:])):
        x = args[0].clone().requires_grad_()
        function(x).sum().backward()
        assert relative_error(x.grad, exact) <= 1e-6


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_in_one_graph_for_any_batch(dynamic):
    _, args = arguments(7, 64, QuantSpec(4, 32), torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: call(x * 2, *args[1:]).relu(),
        fullgraph=True,
        backend="aot_eager",
        dynamic=dynamic,
    )
    for M in (2, 5, 1, 0, 9):
        x = torch.randn(M, 64, generator=generator(M))
        assert torch.equal(compiled(x), call(x * 2, *args[1:]).relu())
    cube = torch.randn(2, 3, 64, generator=generator(9))
    assert torch.equal(compiled(cube), call(cube * 2, *args[1:]).relu())


def test_compiled_gradients():
    _, args = arguments(7, 64, QuantSpec(4, 32), torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, b: call(x, *args[1:4], b, *args[5:]).square(), fullgraph=True, backend="aot_eager"
    )
    grads = []
    for function in (compiled, lambda x, b: call(x, *args[1:4], b, *args[5:]).square()):
        x, b = (args[i].clone().requires_grad_() for i in (0, 4))
        function(x, b).sum().backward()
        grads.append((x.grad, b.grad))
    for compiled_grad, eager_grad in zip(*grads, strict=True):
        assert torch.equal(compiled_grad, eager_grad)


def test_compiled_with_a_varying_batch_is_not_compiled_again():
    _, args = arguments(7, 64, QuantSpec(4, 32), torch.float32)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(lambda x: call(x, *args[1:]), fullgraph=True, backend=counter)
    for M in range(2, 12):
        compiled(torch.zeros(M, 64))
    assert counter.frame_count <= 2


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_compiled_by_inductor():
    _, args = arguments(7, 64, QuantSpec(4, 32), torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: call(x + 1, *args[1:]), fullgraph=True)
    assert torch.equal(compiled(args[0]), call(args[0] + 1, *args[1:]))


@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_autocast(dtype, autocast_dtype):
    _, args = arguments(7, 64, QuantSpec(4, 32), dtype)
    expected = call(args[0].to(autocast_dtype), *args[1:])
    with torch.autocast("cpu", dtype=autocast_dtype):
        out = call(*args)
        with torch.autocast("cpu", enabled=False):
            plain = call(*args)
    assert out.dtype == autocast_dtype
    assert torch.equal(out, expected)
    assert plain.dtype == dtype


def test_autocast_does_as_linear_does():
    weight, args = arguments(7, 64, QuantSpec(4, 32), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        dense = F.linear(args[0], dequantize(weight), args[4])
        out = call(*args)
    assert out.dtype == dense.dtype == torch.bfloat16
    weight_NK = exact_weight(weight, torch.bfloat16)
    exact = args[0].double().numpy() @ weight_NK.T + args[4].double().numpy()
    assert relative_error(out, exact) <= 1.5 * relative_error(dense, exact)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64])
def test_autocast_lets_no_other_dtype_through(dtype):
    _, args = arguments(7, 64, QuantSpec(4, 32), torch.float32)
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(FormatError, match=f"`x` is {dtype} of shape"),
    ):
        call(torch.ones(2, 64, dtype=dtype), *args[1:])


def test_autocast_compiled_and_with_gradient():
    _, args = arguments(7, 64, QuantSpec(4, 32), torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: call(x, *args[1:]), fullgraph=True, backend="aot_eager")
    grads, outs = [], []
    for function in (compiled, lambda x: call(x, *args[1:])):
        x = args[0].clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outs.append(function(x))
        outs[-1].sum().backward()
        grads.append(x.grad)
    assert outs[0].dtype == torch.bfloat16
    assert torch.equal(*outs)
    assert grads[0].dtype == torch.float32
    assert torch.equal(*grads)


@pytest.mark.parametrize("bias_dtype", [None, torch.float32])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 64), (2, 3, 64), (0, 64)])
def test_gradients_are_those_of_the_dense_layer(shape, dtype, bias_dtype):
    weight, args = arguments(7, 64, QuantSpec(3, 32), dtype)
    x = torch.randn(shape, generator=generator(3)).to(dtype).requires_grad_()
    bias = args[4].to(bias_dtype or dtype).clone().requires_grad_()
    out = call(x, *args[1:4], bias, *args[5:])
    seed = torch.randn(out.shape, generator=generator(4)).to(dtype)
    out.backward(seed)
    flat = seed.double().reshape(-1, 7)
    exact_x = (flat @ torch.from_numpy(exact_weight(weight))).view(shape)
    assert (x.grad.dtype, bias.grad.dtype) == (dtype, bias.dtype)
    assert relative_error(x.grad, exact_x) <= TOLERANCE[dtype]
    assert relative_error(bias.grad, flat.sum(0)) <= TOLERANCE[bias.dtype]  # summed in fp32


@pytest.mark.parametrize("which", ["x", "bias"])
def test_only_what_needs_a_gradient_gets_one(which):
    _, args = arguments(7, 64, QuantSpec(3, 32), torch.float32)
    x, bias = args[0].clone(), args[4].clone()
    {"x": x, "bias": bias}[which].requires_grad_()
    call(x, *args[1:4], bias, *args[5:]).sum().backward()
    assert (x.grad is not None, bias.grad is not None) == (which == "x", which == "bias")


def test_no_gradient_no_graph():
    _, args = arguments(7, 64, QuantSpec(3, 32), torch.float32)
    expected = call(*args)
    assert not expected.requires_grad
    with torch.no_grad():
        assert not call(args[0].clone().requires_grad_(), *args[1:]).requires_grad
    with torch.inference_mode():
        assert torch.equal(call(*args), expected)


def change(args: tuple, **changes: object) -> tuple:
    names = ("x", "packed", "scales", "table", "bias", "num_bits", "group_size")
    changed = [changes.get(name, value) for name, value in zip(names, args, strict=True)]
    return (*changed, None, changes["ends"]) if "ends" in changes else tuple(changed)


MESSAGES = [
    ({"x": torch.zeros(2, 64, dtype=torch.float64)}, "`x` is torch.float64 of shape (2, 64); exp"),
    ({"x": torch.zeros(2, 64, dtype=torch.int8)}, "`x` is torch.int8 of shape (2, 64); expected"),
    ({"x": torch.zeros(2, 96)}, "`codes` is torch.int32 of shape (7, 8); expected torch.int32 (N,"),
    ({"packed": torch.zeros(7, 8)}, "`codes` is torch.float32 of shape (7, 8); expected torch.i"),
    ({"packed": torch.zeros(7, 9, dtype=torch.int32)}, "`codes` is torch.int32 of shape (7, 9)"),
    ({"packed": torch.zeros(56, dtype=torch.int32)}, "`codes` is torch.int32 of shape (56,)"),
    (
        {"scales": torch.ones(7, 3)},
        "`scales` has shape (7, 3); expected (N, K / group) = (7, 2) for N=7, K=64, group_size=32.",
    ),
    ({"scales": torch.ones(7, 2, dtype=torch.int32)}, "`scales` is torch.int32; expected float16"),
    ({"table": torch.ones(1, 8)}, "`table` has shape (1, 8); expected (1, 16) or (7, 16)"),
    ({"table": torch.ones(16)}, "`table` has shape (16,); expected (1, 16) or (7, 16)"),
    ({"table": torch.ones(1, 16).half()}, "`table` is torch.float16; expected torch.float32."),
    (
        {"ends": (3, 7)},
        "`table` has shape (1, 16); expected (2, 16), a row for each of `table_ends`",
    ),
    ({"table": torch.ones(2, 16)}, "`table` has shape (2, 16); expected (1, 16) or (7, 16)"),
    ({"ends": (3, 8)}, "`table_ends` is (3, 8); expected ascending rows, the last N=7."),
    ({"ends": (3, 3, 7)}, "`table_ends` is (3, 3, 7); expected ascending rows, the last N=7."),
    ({"ends": (0, 7)}, "`table_ends` is (0, 7); expected ascending rows, the last N=7."),
    ({"bias": torch.ones(8)}, "`bias` has shape (8,); expected (N,) = (7,)."),
    ({"bias": torch.ones(1, 7)}, "`bias` has shape (1, 7); expected (N,) = (7,)."),
    ({"bias": torch.ones(7, dtype=torch.int64)}, "`bias` is torch.int64; expected a floating"),
    ({"num_bits": 5}, "`num_bits` is 5; expected one of (2, 3, 4)."),
    ({"group_size": 48}, "`group_size` is 48; expected one of (32, 64, 128, 256), or -1"),
    ({"group_size": 128}, "K=64 is not a multiple of group_size=128."),
    ({"packed": torch.zeros(7, 8, dtype=torch.int32, device="meta")}, "`packed` is on meta; exp"),
    ({"bias": torch.zeros(7, device="meta")}, "`bias` is on meta; expected cpu, where `x` is."),
]


@pytest.mark.parametrize(("changes", "message"), MESSAGES)
def test_messages(changes, message):
    _, args = arguments(7, 64, QuantSpec(4, 32), torch.float32)
    call(*args)  # what was found right must not be taken for what is asked now
    args = change(args, **changes)
    with pytest.raises(FormatError, match=re.escape(message)):
        call(*args)
    with pytest.raises(FormatError, match=re.escape(message)):
        torch.ops.flute.lut_gemm(*args)


def test_x_without_dimensions_is_named():
    _, args = arguments(7, 64, QuantSpec(4, 32), torch.float32)
    with pytest.raises(FormatError, match=re.escape("`x` is a scalar; expected shape (..., K).")):
        call(torch.tensor(1.0), *args[1:])


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (0, torch.zeros(5, 7, dtype=torch.int32), "expected torch.int32 (N, 8) for K=64"),
        (1, torch.ones(5, 3), "`scales` has shape (5, 3)"),
        (2, torch.ones(3, 16), "`table` has shape (3, 16)"),
        (3, 7, "`num_bits` is 7"),
        (5, 65, "expected torch.int32 (N, 9) for K=65"),
        (6, torch.float64, "`dtype` is torch.float64; expected fp16, bf16 or fp32."),
    ],
)
def test_dequantize_names_what_is_wrong(index, value, message):
    _, args = arguments(5, 64, QuantSpec(4, 32), torch.float32)
    values: list = [*args[1:4], 4, 32, 64, torch.float32]
    values[index] = value
    with pytest.raises(FormatError, match=re.escape(message)):
        torch.ops.flute.dequantize(*values)


def test_meta_tensors_give_shapes():
    _, args = arguments(7, 64, QuantSpec(4, 32), torch.float16, M=3)
    meta = tuple(a.to("meta") if isinstance(a, Tensor) else a for a in args)
    out = call(*meta)
    assert (out.shape, out.dtype, out.device.type) == ((3, 7), torch.float16, "meta")


def test_a_weight_that_is_not_ready_is_told_once(monkeypatch):
    monkeypatch.setattr(ops, "why_not", lambda device: "")
    device.warn_unprepared.cache_clear()
    _, args = arguments(7, 64, QuantSpec(4, 32), torch.float16)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: call(x, *args[1:]), fullgraph=True, backend="aot_eager")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        call(args[0].float(), *args[1:])  # takes no kernel
        assert not seen
        compiled(args[0])
        compiled(args[0])
        call(*args)
    texts = [str(w.message) for w in seen if "flute.prepare" in str(w.message)]
    assert len(texts) == 1
    assert texts[0].startswith("A product on cpu takes the slow path (PyTorch, in float32)")
    device.warn_unprepared.cache_clear()


def test_what_was_checked_is_bounded(monkeypatch):
    monkeypatch.setattr(op_arguments, "_MAX_CHECKED", 4)
    for N in range(1, 20):
        _, args = arguments(N, 32, QuantSpec(4, 32), torch.float32)
        assert call(*args).shape == (3, N)
        assert len(op_arguments._checked) <= 4 or N < 4


RELOAD = """
import importlib, sys
import torch, flute
from flute.format import QuantSpec
weight = flute.quantize(torch.eye(32), group_size=32)
x = torch.eye(32, requires_grad=True)
layer = flute.LutLinear.from_quantized(weight)
before = layer(x)
import flute.ops
for _ in range(2):
    importlib.reload(flute.ops)
for name in [n for n in sys.modules if n.split(".")[0] == "flute"]:
    del sys.modules[name]
import gc, flute, flute.ops
gc.collect()
for module in (layer, flute.LutLinear.from_quantized(flute.quantize(torch.eye(32), group_size=32))):
    assert torch.equal(module(x), before)
    torch.autograd.grad(module(x).sum(), x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module(x).dtype == torch.bfloat16
meta = [t.to("meta") for t in (x, layer.codes, layer.scales, layer.table)]
assert torch.ops.flute.lut_gemm(*meta, None, 4, 32).shape == (32, 32)
print("fine")
"""


def test_a_second_import_is_harmless():
    assert run_python(RELOAD) == "fine\n"
