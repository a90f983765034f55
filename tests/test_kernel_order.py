"""Kernel order: invertible, and where each code lands; layers in it behave as in plain order."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from helpers import generator, random_weight, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st

from flute.errors import FormatError
from flute.format import QuantSpec
from flute.kernel_order import (
    order_codes,
    order_scales,
    plain_codes,
    plain_scales,
    to_kernel_order,
    to_plain_order,
)
from flute.linear import LutLinear
from flute.ops import lut_gemm
from flute.pack import pack_codes

SPECS = [QuantSpec(bits, group) for bits in (2, 3, 4) for group in (32, 64, 128, 256, -1)]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([2, 3, 4]), st.integers(1, 50), st.integers(1, 20), st.integers(0, 99))
def test_codes_come_back(num_bits, N, K32, seed):
    codes = torch.randint(0, 2**num_bits, (N, 32 * K32), generator=generator(seed))
    codes = codes.to(torch.uint8)
    codes[0, 0] = codes[-1, -1] = 2**num_bits - 1
    ordered = order_codes(codes, num_bits)
    assert ordered.is_contiguous()
    assert ordered.numel() * 32 == -(-N // 16) * 16 * -(-K32 // 8) * 256 * num_bits
    assert torch.equal(plain_codes(ordered, num_bits, N, 32 * K32), codes)
    packed, scales = pack_codes(codes, num_bits), torch.randn(N, 1)
    both = to_kernel_order(packed, scales, num_bits, 32 * K32)
    assert torch.equal(both[0], ordered)
    again = to_plain_order(*both, num_bits, N, 32 * K32, 1)
    assert torch.equal(again[0], packed)
    assert torch.equal(again[1], scales)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([32, 64, 128, 256]), st.integers(1, 50), st.integers(1, 9))
def test_scales_come_back(group, N, groups):
    scales = torch.randn(N, groups)
    ordered = order_scales(scales, group * groups)
    assert ordered.is_contiguous()
    assert torch.equal(plain_scales(ordered, N, groups), scales)


@pytest.mark.parametrize("num_bits", [2, 3, 4])
def test_one_code_lands_where_the_docstring_says(num_bits):
    """One code at a time, against the figure in words: lane, word, bit."""
    for row, k in [(0, 0), (1, 1), (9, 8), (15, 63), (3, 49), (8, 22), (12, 35)]:
        codes = torch.zeros(16, 256, dtype=torch.uint8)
        codes[row, 64 + k] = 1
        words = order_codes(codes, num_bits)[0, 1].tolist()
        h, g = divmod(row, 8)
        step, half, q, e = k // 16, k // 8 % 2, k // 2 % 4, k % 2
        lane, i = g * 4 + q, half * 2 + h
        if num_bits == 4:
            at, bit = lane * 4 + step, 8 * i + 4 * e
        elif num_bits == 2:
            at, bit = lane * 2 + step // 2, 16 * (step % 2) + 4 * (half * 2 + e) + 2 * h
        elif step < 3:
            at, bit = (lane * 2 + step if step < 2 else 64 + lane), 8 * (2 * h + half) + 4 * e
        else:  # bit 0 of the code: in word 2, above that of step 2
            at, bit = 64 + lane, 8 * (2 * h + half) + 4 * e + 3
        expected = [0] * len(words)
        expected[at] = 1 << bit if bit < 31 else -(1 << 31)
        assert words == expected


def test_rows_of_other_lengths_are_refused():
    with pytest.raises(FormatError, match="K=40 is not a multiple of 32"):
        to_kernel_order(torch.zeros(1, 5, dtype=torch.int32), torch.ones(1, 1), 4, 40)


def ordered_layer(spec, N=33, K=512, **kwargs):
    weight = random_weight(N, K, spec, **kwargs)
    bias = torch.randn(N, generator=generator(N))
    plain = LutLinear.from_quantized(weight, bias)
    layer = LutLinear.from_quantized(weight, bias)
    layer.to_kernel_order()
    assert layer.kernel_order
    return plain, layer


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_layer_in_kernel_order_is_the_same_layer(spec, per_row):
    plain, layer = ordered_layer(spec, per_row=per_row)
    x = torch.randn(2, 3, 512, generator=generator(1), requires_grad=True)
    y = x.detach().clone().requires_grad_()
    assert torch.equal(layer(x), plain(y))
    layer(x).square().sum().backward()
    plain(y).square().sum().backward()
    assert relative_error(x.grad, y.grad) <= 1e-6
    assert torch.equal(layer.dequantize(torch.float16), plain.dequantize(torch.float16))
    assert torch.equal(layer.quantized_weight().codes, plain.quantized_weight().codes)
    state, expected = layer.state_dict(), plain.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    layer.to_plain_order()
    assert torch.equal(layer.codes, plain.codes)
    assert torch.equal(layer.scales, plain.scales)


def test_loading_copying_pickling_and_moving_give_plain_layers():
    plain, layer = ordered_layer(QuantSpec(3, 64))
    _, other = ordered_layer(QuantSpec(3, 64), seed=5)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(layer), torch.load(buffer, weights_only=False)]
    other.load_state_dict(layer.state_dict())
    for copied in (*copies, other):
        assert not copied.kernel_order
        assert torch.equal(copied.codes, plain.codes)
        assert torch.equal(copied.scales, plain.scales)
    assert layer.half().kernel_order  # casts leave it alone
    assert layer.scales.dtype == torch.bfloat16
    assert layer.to("meta").codes.shape == plain.codes.shape
    assert not layer.kernel_order


def test_compiled_in_one_graph_in_kernel_order():
    plain, layer = ordered_layer(QuantSpec(4, 64))
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for M in (1, 4, 0):
        x = torch.randn(M, 512, generator=generator(M))
        assert torch.equal(compiled(x), plain(x))


def test_op_in_kernel_order_passes_opcheck():
    _, layer = ordered_layer(QuantSpec(4, 64))
    x = torch.randn(3, 512, requires_grad=True)
    parts = (layer.codes.data, layer.scales.data, layer.table.data)
    result = torch.library.opcheck(
        torch.ops.flute.lut_gemm.default, (x, *parts, None, 4, 64), {"out_features": 33}
    )
    assert set(result.values()) == {"SUCCESS"}


def test_wrong_shapes_in_kernel_order_are_refused():
    _, layer = ordered_layer(QuantSpec(4, 64))
    x, spec = torch.randn(2, 512), QuantSpec(4, 64)
    codes, scales, table = layer.codes.data, layer.scales.data, layer.table.data
    with pytest.raises(FormatError, match=r"expected contiguous int32 \(4, 8, 128\) in kernel"):
        lut_gemm(x, codes, scales, table, spec, out_features=50)
    with pytest.raises(FormatError, match=r"`scales` has shape .*\(3, 8, 8, 2\) in kernel order"):
        lut_gemm(x, codes, scales[:2], table, spec, out_features=33)
