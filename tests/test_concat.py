"""Layers joined along N: one layer that says the same, with the fewest tables."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from helpers import DTYPES, generator, random_weight, relative_error
from safetensors.torch import load, save
from torch import nn

from flute.errors import FormatError
from flute.format import QuantizedWeight, QuantSpec
from flute.linear import LutLinear
from flute.reference import dequantize

SPEC = QuantSpec(3, 32)


def part(N, *, K=96, seed=0, bias=False, dtype=torch.float16, spec=SPEC, table=None, **kwargs):
    weight = random_weight(N, K, spec, seed=seed, **kwargs)
    if table is not None:
        weight = QuantizedWeight(weight.codes, weight.scales, table, spec)
    b = torch.randn(N, generator=generator(N, seed)).to(dtype) if bias else None
    return LutLinear.from_quantized(weight, b)


def parts(*sizes, **kwargs):
    return [part(N, seed=i, **kwargs) for i, N in enumerate(sizes)]


def check(fused, layers, dtype=torch.float32):
    """The weight and the products are those of the layers, side by side."""
    assert fused.out_features == sum(layer.out_features for layer in layers)
    dense = torch.cat([layer.dequantize(dtype) for layer in layers])
    assert torch.equal(fused.dequantize(dtype), dense)
    assert torch.equal(dequantize(fused.quantized_weight(), dtype), dense)
    x = torch.randn(3, fused.in_features, generator=generator(1)).to(dtype)
    expected = torch.cat([layer(x) for layer in layers], -1)
    assert relative_error(fused(x), expected) < 1e-3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("sizes", "ends"),
    [
        ((32, 16, 16), (32, 48, 64)),
        ((16, 7), (16, 23)),
        ((16,) * 8, tuple(range(16, 129, 16))),
        ((16,) * 9, ()),
        ((7, 16), ()),
    ],
)
def test_other_tables(sizes, ends, bias, dtype):
    layers = parts(*sizes, bias=bias, dtype=dtype)
    fused = LutLinear.concat(layers)
    assert fused.table_ends == ends
    assert len(fused.table) == (len(ends) or sum(sizes))
    check(fused, layers, dtype)
    if bias:
        assert torch.equal(fused.bias, torch.cat([layer.bias for layer in layers]))


def test_equal_tables_become_one():
    table = torch.randn(1, 8, generator=generator(8))
    layers = parts(5, 16, 9, table=table)
    fused = LutLinear.concat(layers)
    assert (fused.table_ends, fused.table.shape) == ((), (1, 8))
    check(fused, layers)
    layers = [*parts(16, 16, table=table), part(4)]
    fused = LutLinear.concat(layers)
    assert fused.table_ends == (32, 36)
    check(fused, layers)


def test_a_negative_zero_is_another_table():
    table = torch.arange(8.0)[None]
    other = table.clone()
    other[0, 0] = -0.0
    layers = [part(16, table=table), part(16, table=other)]
    fused = LutLinear.concat(layers)
    assert fused.table_ends == (16, 32)
    bits = fused.dequantize().view(torch.int32)
    parts_bits = [layer.dequantize().view(torch.int32) for layer in layers]
    assert torch.equal(bits, torch.cat(parts_bits))


def test_layers_that_have_ranges_or_a_table_per_row():
    inner = LutLinear.concat(parts(16, 32))
    fused = LutLinear.concat([inner, part(5, seed=7)])
    assert fused.table_ends == (16, 48, 53)
    check(fused, [inner, part(5, seed=7)])
    layers = [inner, part(16, per_row=True, seed=3)]
    fused = LutLinear.concat(layers)
    assert (fused.table_ends, len(fused.table)) == ((), 64)
    check(fused, layers)


def test_kernel_order_and_single_layers():
    layers = parts(16, 33)
    layers[0].to_kernel_order()
    fused = LutLinear.concat(layers)
    assert not fused.kernel_order
    check(fused, layers)
    check(LutLinear.concat(layers[:1]), layers[:1])
    fused.to_kernel_order()
    check(fused, layers)


def test_it_is_new_memory():
    layers = parts(16, 16, bias=True)
    fused = LutLinear.concat(layers[:1])
    before = layers[0].dequantize(), layers[0].bias.clone()
    with torch.no_grad():
        for parameter in fused.parameters():
            parameter.zero_()
    assert torch.equal(layers[0].dequantize(), before[0])
    assert torch.equal(layers[0].bias, before[1])


def test_a_missing_bias_is_zero():
    layers = [part(16), part(5, bias=True, seed=1)]
    fused = LutLinear.concat(layers)
    assert torch.equal(fused.bias, torch.cat((torch.zeros(16).half(), layers[1].bias)))
    assert fused.bias.dtype == torch.float16


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"K": 64}, "Layer 1 has K 64, layer 0 96; expected the same to join them."),
        ({"spec": QuantSpec(4, 32)}, "Layer 1 has spec QuantSpec(num_bits=4, group_size=32), lay"),
        ({"scale_dtype": torch.float16}, "Layer 1 has scales of torch.float16, layer 0 torch.bf"),
    ],
)
def test_layers_that_differ_are_refused(other, message):
    with pytest.raises(FormatError, match=re.escape(message)):
        LutLinear.concat([part(16), part(16, **other)])


def test_no_layers_are_refused():
    with pytest.raises(FormatError, match="expected at least one"):
        LutLinear.concat([])


def test_state_dict_of_a_fused_layer():
    fused = LutLinear.concat(parts(32, 16, bias=True))
    model = nn.Sequential(fused, nn.ReLU())
    stored = load(save(model.state_dict()))
    names = ["codes", "scales", "table", "bias", "table_ends"]
    assert sorted(stored) == sorted(f"0.{name}" for name in names)
    assert stored["0.table_ends"].dtype == torch.int32
    x = torch.randn(3, 96, generator=generator(5)).half()
    for device in ("cpu", "meta"):
        other = LutLinear(96, 48, SPEC, table_ends=(16, 48), dtype=torch.float16, device=device)
        nn.Sequential(other, nn.ReLU()).load_state_dict(stored, assign=device == "meta")
        assert other.table_ends == (32, 48)
        assert torch.equal(other(x), fused(x))
    assert torch.equal(copy.deepcopy(fused)(x), fused(x))
    fused.to_kernel_order()
    assert all(torch.equal(stored[k], v) for k, v in model.state_dict().items())


def test_a_state_dict_of_other_ranges_is_refused():
    stored = LutLinear.concat(parts(32, 16)).state_dict()
    plain = LutLinear(96, 48, SPEC, bias=False)
    with pytest.raises(
        RuntimeError, match=r"(?s)Unexpected key.*table_ends.*size mismatch for table"
    ):
        plain.load_state_dict(stored)
    three = LutLinear(96, 48, SPEC, bias=False, table_ends=(16, 32, 48))
    with pytest.raises(RuntimeError, match=r"(?s)table_ends: `table` has shape.*size mismatch"):
        three.load_state_dict(stored)
    with pytest.raises(RuntimeError, match=r'Missing key.*"table_ends"'):
        three.load_state_dict(LutLinear(96, 48, SPEC, bias=False).state_dict())
    stored["table_ends"] = torch.tensor([48, 32])
    two = LutLinear(96, 48, SPEC, bias=False, table_ends=(16, 48))
    with pytest.raises(RuntimeError, match=re.escape("`table_ends` is (48, 32); expected asc")):
        two.load_state_dict(stored)


def test_wrong_ranges_are_refused_at_once():
    with pytest.raises(FormatError, match="expected ascending rows, the last N=48"):
        LutLinear(96, 48, SPEC, table_ends=(16, 32))
    with pytest.raises(FormatError, match="expected one of them"):
        LutLinear(96, 48, SPEC, table_ends=(16, 48), table_per_row=True)


def test_compiled_and_exported():
    fused = LutLinear.concat(parts(32, 16, bias=True, dtype=torch.float32))
    torch._dynamo.reset()
    x = torch.randn(3, 96, generator=generator(6))
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), fused(x))
    assert torch.equal(torch.export.export(fused, (x,)).module()(x), fused(x))
