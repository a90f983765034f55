"""Products with an output head: far more rows than any other layer has, whole or cut over ranks."""

from __future__ import annotations

import pytest
import torch

from flute.format import QuantSpec
from flute.linear import LutLinear
from flute.reference import dequantize_packed

K, VOCABULARY = 4096, 128_256
ROWS = 8192
"""Rows that are compared at a time: in fp64 a block of them takes 0.27 GB."""


def random_head(num_rows, spec):
    layer = LutLinear(K, num_rows, spec, bias=False, scale_dtype=torch.float16, device="cuda")
    generator = torch.Generator("cuda").manual_seed(num_rows)
    low, high = -(2**31), 2**31 - 1
    codes = torch.randint(low, high, layer.codes.shape, generator=generator, device="cuda")
    layer.codes.data.copy_(codes)
    layer.scales.data.normal_(generator=generator)
    layer.table.data.normal_(generator=generator)
    return layer


@pytest.mark.parametrize("num_rows", [VOCABULARY, VOCABULARY // 8, 32_000, 50_257])
@pytest.mark.parametrize("spec", [QuantSpec(4, 64), QuantSpec(3, 32), QuantSpec(2, 128)], ids=str)
def test_each_logit_is_that_of_the_equation(num_rows, spec):
    layer = random_head(num_rows, spec)
    plain = layer._plain()
    generator = torch.Generator("cuda").manual_seed(0)
    for num_tokens in (1, 5, 16, 128, 300):
        x = torch.randn(num_tokens, K, generator=generator, device="cuda").half()
        out = layer(x)
        assert out.shape == (num_tokens, num_rows)
        for start in range(0, num_rows, ROWS):
            rows = slice(start, start + ROWS)
            part = plain._replace(
                packed=plain.packed[rows],
                scales=plain.scales[rows],
                N=len(plain.packed[rows]),
            )
            exact = x.double() @ dequantize_packed(part, torch.float32).double().T
            error = (out[:, rows].double() - exact).norm() / exact.norm()
            assert error < 1e-3, (num_tokens, start)
