"""Products by slices of dequantised weight: their parts of the result, in place."""

from __future__ import annotations

import pytest
import torch
from helpers import packed_weight, random_weight
from torch.nn.functional import linear

from flute import cuda
from flute.format import QuantSpec
from flute.kernel_order import TILE_N
from flute.reference import dequantize

N, K = 200, 256


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("slice_bytes", [1, 3 * TILE_N * K * 2, 1 << 20])
def test_slices_write_their_part_of_the_result(monkeypatch, slice_bytes, has_bias):
    quantized = random_weight(N, K, QuantSpec(4, 64))
    dense = dequantize(quantized, torch.bfloat16)

    def fill(out, weight, first_tile):
        out.copy_(dense[first_tile * TILE_N :][: len(out)])

    monkeypatch.setattr(cuda, "_dequantize_into", fill)
    x = torch.randn(7, K).bfloat16()
    bias = torch.randn(N).bfloat16() if has_bias else None
    expected = linear(x, dense, bias)
    out = cuda.multiply_dense(x, packed_weight(quantized), bias, slice_bytes)
    assert (out.dtype, out.shape, out.is_contiguous()) == (x.dtype, (7, N), True)
    torch.testing.assert_close(out, expected)
