"""The specification against its equation, computed weight by weight in fp64 and numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import (
    DTYPES,
    TOLERANCE,
    exact_weight,
    generator,
    packed_weight,
    random_weight,
    relative_error,
    row_tables,
)

from flute import reference
from flute.format import PackedWeight, QuantizedWeight, QuantSpec
from flute.pack import pack_codes

BITS = (2, 3, 4)
SHAPES = [(32, 256), (64, 192), (128, 256), (256, 512), (-1, 96), (-1, 77), (-1, 1)]
"""(group size, K), among them rows that fill no whole word."""


def rounded(weight: QuantizedWeight, dtype: torch.dtype) -> torch.Tensor:
    """Table to ``dtype``, product in fp32, to ``dtype``: one weight at a time."""
    N, K = weight.shape
    length = K if weight.spec.group_size == -1 else weight.spec.group_size
    table = row_tables(weight.table.to(dtype).float().numpy(), N, weight.table_ends)
    scales, codes = weight.scales.float().numpy(), weight.codes.numpy()
    out = np.empty((N, K), dtype=np.float32)
    for n in range(N):
        for k in range(K):
            out[n, k] = np.float32(table[n, codes[n, k]]) * np.float32(scales[n, k // length])
    return torch.from_numpy(out).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize(("group_size", "K"), SHAPES)
@pytest.mark.parametrize("num_bits", BITS)
def test_dequantize_is_table_times_scale(num_bits, group_size, K, per_row, dtype):
    weight = random_weight(3, K, QuantSpec(num_bits, group_size), per_row=per_row)
    expected = rounded(weight, dtype)
    for value in (
        reference.dequantize(weight, dtype),
        reference.dequantize_packed(packed_weight(weight), dtype),
    ):
        assert value.dtype == dtype
        assert torch.equal(value, expected)
        assert relative_error(value, exact_weight(weight)) <= TOLERANCE[dtype]


ENDS = [(7,), (1, 7), (3, 4, 7), (1, 2, 3, 4, 5, 6, 7)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("num_bits", BITS)
@pytest.mark.parametrize("chunk", [1, 200, 1 << 24])
def test_a_table_per_range_of_rows(monkeypatch, chunk, num_bits, ends, dtype):
    monkeypatch.setattr(reference, "_CHUNK", chunk)
    weight = random_weight(7, 96, QuantSpec(num_bits, 32), table_ends=ends)
    for value in (
        reference.dequantize(weight, dtype),
        reference.dequantize_packed(packed_weight(weight), dtype),
    ):
        assert torch.equal(value, rounded(weight, dtype))
    x = torch.randn(3, 96, generator=generator(3)).to(dtype)
    out = reference.lut_gemm(x, packed_weight(weight), None)
    exact = x.double().numpy() @ exact_weight(weight, dtype).T
    assert relative_error(out, exact) <= TOLERANCE[dtype]


@pytest.mark.parametrize("scale_dtype", DTYPES)
def test_scales_are_not_rounded(scale_dtype):
    weight = random_weight(4, 64, QuantSpec(4, 32), scale_dtype=scale_dtype, seed=1)
    assert torch.equal(
        reference.dequantize(weight, torch.bfloat16), rounded(weight, torch.bfloat16)
    )


def test_dequantize_is_fp32_by_default():
    weight = random_weight(2, 32, QuantSpec(4, 32), scale_dtype=torch.float32)
    assert torch.equal(reference.dequantize(weight), rounded(weight, torch.float32))


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("num_bits", BITS)
@pytest.mark.parametrize("chunk", [1, 96, 200, 96 * 7])
def test_chunks_make_no_difference(monkeypatch, chunk, num_bits, per_row):
    weight = random_weight(7, 96, QuantSpec(num_bits, 32), per_row=per_row)
    monkeypatch.setattr(reference, "_CHUNK", chunk)
    value = reference.dequantize_packed(packed_weight(weight), torch.float32)
    assert torch.equal(value, rounded(weight, torch.float32))


@pytest.mark.parametrize("num_bits", BITS)
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize(
    ("N", "K", "group_size"), [(0, 64, 32), (3, 0, 32), (3, 0, -1), (0, 0, -1)]
)
def test_empty_weights(N, K, group_size, per_row, num_bits):
    weight = random_weight(N, K, QuantSpec(num_bits, group_size), per_row=per_row)
    assert reference.dequantize(weight).shape == (N, K)
    value = reference.dequantize_packed(packed_weight(weight), torch.float16)
    assert value.shape == (N, K)
    assert value.dtype == torch.float16
    bias = torch.arange(float(N))
    out = reference.lut_gemm(torch.zeros(2, K), packed_weight(weight), bias)
    assert torch.equal(out, bias.expand(2, N))


@pytest.mark.parametrize("per_row", [False, True])
def test_odd_strides_change_nothing(per_row):
    spec = QuantSpec(3, 32)
    weight = random_weight(6, 64, spec, per_row=per_row)
    packed = pack_codes(weight.codes, 3)
    strided = [t.T.contiguous().T for t in (packed, weight.scales, weight.table)]
    value = reference.dequantize_packed(PackedWeight(*strided, spec, 6, 64), torch.float32)
    assert torch.equal(value, rounded(weight, torch.float32))
    strided_weight = QuantizedWeight(weight.codes.T.contiguous().T, *strided[1:], spec)
    assert torch.equal(reference.dequantize(strided_weight), rounded(weight, torch.float32))


@pytest.mark.parametrize("num_bits", BITS)
def test_unusual_table_values_survive_the_wide_lookup(num_bits):
    """Pairs of floats travel as one double: no bit pattern may be normalised on the way."""
    values = torch.randint(-(1 << 31), 1 << 31, (1, 2**num_bits), generator=generator(num_bits))
    table = values.to(torch.int32).view(torch.float32).nan_to_num(-0.0, 1e-42, -3e38)
    spec = QuantSpec(num_bits, -1)
    codes = torch.arange(24).view(2, 12).remainder(2**num_bits).to(torch.uint8)
    weight = QuantizedWeight(codes, torch.ones(2, 1), table, spec)
    value = reference.dequantize_packed(packed_weight(weight), torch.float32)
    assert torch.equal(value.view(torch.int32), table[0][codes.long()].view(torch.int32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M", [0, 1, 5])
def test_lut_gemm_is_the_sum_in_fp64(M, dtype):
    spec = QuantSpec(3, 64)
    weight = random_weight(33, 256, spec)
    x = torch.randn(M, 256, generator=generator(M)).to(dtype)
    bias = torch.randn(33, generator=generator(1)).to(dtype)
    out = reference.lut_gemm(x, packed_weight(weight), bias)
    exact = x.double().numpy() @ exact_weight(weight).T + bias.double().numpy()
    assert out.shape == (M, 33)
    assert out.dtype == dtype
    assert relative_error(out, exact) <= TOLERANCE[dtype]
