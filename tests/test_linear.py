"""LutLinear: drops in for nn.Linear, and its state dict is the checkpoint."""

from __future__ import annotations

import copy
import io
import re

import pytest
import torch
import torch.nn.functional as F
from helpers import DTYPES, TOLERANCE, exact_weight, generator, random_weight, relative_error
from safetensors.torch import load, save
from torch import nn

from flute.errors import FormatError
from flute.format import QuantSpec
from flute.linear import LutLinear
from flute.pack import pack_codes
from flute.reference import dequantize

SPECS = [QuantSpec(b, g) for b in (2, 3, 4) for g in (32, 64, 128, 256, -1)]


def layer_of(spec=SPECS[0], N=9, K=256, dtype=torch.float32, *, bias=True, **kwargs):
    weight = random_weight(N, K, spec, **kwargs)
    b = torch.randn(N, generator=generator(N)).to(dtype) if bias else None
    return weight, LutLinear.from_quantized(weight, b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_forward_by_the_three_oracles(spec, per_row, bias, dtype):
    K = 77 if spec.group_size == -1 else 256
    weight, layer = layer_of(spec, K=K, dtype=dtype, bias=bias, per_row=per_row)
    dense = dequantize(weight, dtype)
    b = layer.bias
    identity = layer(torch.eye(K, dtype=dtype)).T
    if not bias:
        assert torch.equal(identity, dense)
    addend = b.double().numpy() if bias else 0.0
    for shape in ((0, K), (1, K), (2, 3, K), (K,)):
        x = torch.randn(shape, generator=generator(len(shape))).to(dtype)
        out = layer(x)
        assert (out.shape, out.dtype) == ((*shape[:-1], 9), dtype)
        exact = x.double().numpy() @ exact_weight(weight).T + addend
        assert relative_error(out, exact) <= TOLERANCE[dtype]
        exact = x.double().numpy() @ exact_weight(weight, dtype).T + addend
        theirs = relative_error(F.linear(x, dense, b), exact)
        assert relative_error(out, exact) <= 1.5 * theirs + 1e-7


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_parameters_are_the_tensors_on_disk(spec, per_row):
    weight, layer = layer_of(spec, dtype=torch.float16, per_row=per_row)
    state = layer.state_dict()
    assert list(state) == ["codes", "scales", "table", "bias"]
    assert torch.equal(state["codes"], pack_codes(weight.codes, spec.num_bits))
    assert torch.equal(state["scales"], weight.scales)
    assert torch.equal(state["table"], weight.table)
    assert not any(p.requires_grad for p in layer.parameters())
    stored = sum(state[k].numel() * state[k].element_size() for k in ("codes", "scales", "table"))
    assert stored == weight.num_bytes


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_state_dict_round_trip(spec, per_row, bias):
    weight, layer = layer_of(
        spec, dtype=torch.float16, bias=bias, per_row=per_row, scale_dtype=torch.float16
    )
    stored = load(save(layer.state_dict()))
    for device in ("cpu", "meta"):
        other = LutLinear(
            256,
            9,
            spec,
            bias=bias,
            table_per_row=per_row,
            scale_dtype=torch.float16,
            dtype=torch.float16,
            device=device,
        )
        for name, parameter in other.named_parameters():
            assert (parameter.shape, parameter.dtype) == (stored[name].shape, stored[name].dtype)
        other.load_state_dict(stored, assign=device == "meta")
        x = torch.randn(3, 256, generator=generator(0)).half()
        assert torch.equal(other(x), layer(x))
        assert torch.equal(other.dequantize(), dequantize(weight))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_quantized_weight_comes_back(spec):
    K = 77 if spec.group_size == -1 else 256
    weight, layer = layer_of(spec, K=K)
    again = layer.quantized_weight()
    assert again.spec == spec
    for name in ("codes", "scales", "table"):
        assert torch.equal(getattr(again, name), getattr(weight, name))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_in_any_dtype(dtype):
    weight, layer = layer_of(per_row=True)
    assert torch.equal(layer.dequantize(dtype), dequantize(weight, dtype))


def test_defaults_are_those_of_linear():
    layer, dense = LutLinear(64, 3, QuantSpec()), nn.Linear(64, 3)
    assert (layer.in_features, layer.out_features) == (dense.in_features, dense.out_features)
    assert layer.bias.shape == dense.bias.shape
    assert layer.bias.dtype == dense.bias.dtype == torch.float32
    assert layer.scales.dtype == torch.bfloat16
    assert LutLinear(64, 3, QuantSpec(), bias=False).bias is None


def test_a_row_that_no_group_divides_is_refused():
    with pytest.raises(FormatError, match=r"K=65 is not a multiple of group_size=64\."):
        LutLinear(65, 3, QuantSpec())


@pytest.mark.parametrize(("K", "wrong"), [(40, 33), (40, 39), (64, 128), (64, 1)])
def test_x_of_other_features_is_refused(K, wrong):
    """Even where packed codes and scales would fit: 33 .. 40 codes take the same five words."""
    _, layer = layer_of(QuantSpec(4, -1), K=K)
    with pytest.raises(FormatError, match=re.escape(f"`x` has {wrong} features; expected K={K}.")):
        layer(torch.zeros(2, wrong))


def test_x_without_dimensions_is_refused():
    _, layer = layer_of()
    with pytest.raises(FormatError, match="`x` is a scalar"):
        layer(torch.tensor(1.0))


def test_x_of_another_dtype_is_refused():
    _, layer = layer_of()
    with pytest.raises(FormatError, match=r"`x` is torch\.float64"):
        layer(torch.zeros(2, 256, dtype=torch.float64))


CASTS = [
    (lambda m: m.half(), torch.float16),
    (lambda m: m.bfloat16(), torch.bfloat16),
    (lambda m: m.float(), torch.float32),
    (lambda m: m.to(torch.float16), torch.float16),
    (lambda m: m.to("cpu", torch.bfloat16), torch.bfloat16),
]


@pytest.mark.parametrize("scale_dtype", DTYPES)
@pytest.mark.parametrize(("cast", "dtype"), CASTS)
def test_casting_the_model_keeps_the_weight(cast, dtype, scale_dtype):
    """As users cast models; the numbers on disk stay what they are, the bias follows."""
    weight, layer = layer_of(scale_dtype=scale_dtype, seed=3)
    model = nn.Sequential(layer)
    cast(model)
    assert layer.bias.dtype == dtype
    for name in ("codes", "scales", "table"):
        before = getattr(weight, name) if name != "codes" else pack_codes(weight.codes, 2)
        assert getattr(layer, name).dtype == before.dtype
        assert torch.equal(getattr(layer, name), before)
        assert isinstance(getattr(layer, name), nn.Parameter)
    x = torch.randn(3, 256, generator=generator(1)).to(dtype)
    assert (
        relative_error(
            model(x), x.double().numpy() @ exact_weight(weight).T + layer.bias.double().numpy()
        )
        <= TOLERANCE[dtype]
    )


def test_moving_to_meta_and_casting_there():
    _, layer = layer_of()
    layer.to("meta").half()
    assert {p.device.type for p in layer.parameters()} == {"meta"}
    assert layer.table.dtype == torch.float32
    assert layer.to_empty(device="cpu").table.dtype == torch.float32


def test_copies_are_independent():
    _, layer = layer_of()
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    x = torch.randn(2, 256, generator=generator(2))
    expected = layer(x)
    copies = copy.deepcopy(layer), torch.load(buffer, weights_only=False)
    with torch.no_grad():
        layer.scales.zero_()
    for other in copies:
        assert torch.equal(other(x), expected)


def test_it_shares_scales_and_bias_but_no_graph():
    weight = random_weight(9, 64, QuantSpec(4, 32))
    bias = torch.ones(9, requires_grad=True)
    layer = LutLinear.from_quantized(weight, bias)
    assert layer.scales.data_ptr() == weight.scales.data_ptr()
    assert layer.bias.data_ptr() == bias.data_ptr()
    assert not layer.bias.requires_grad
    assert bias.requires_grad


def test_gradient_passes_through_a_stack():
    torch.manual_seed(0)
    layers = [layer_of(QuantSpec(4, 32), N=64, K=64, seed=i) for i in range(2)]
    stack = nn.Sequential(layers[0][1], nn.Tanh(), layers[1][1])
    x = torch.randn(3, 64, generator=generator(7), requires_grad=True)
    stack(x).square().sum().backward()
    y = x.detach().clone().requires_grad_()
    hidden = F.linear(y, dequantize(layers[0][0]), layers[0][1].bias).tanh()
    F.linear(hidden, dequantize(layers[1][0]), layers[1][1].bias).square().sum().backward()
    assert relative_error(x.grad, y.grad) <= 1e-5


@pytest.mark.parametrize(
    "ask",
    [
        lambda m: m.requires_grad_(True),
        lambda m: [p.requires_grad_() for p in m.parameters()],
        lambda m: [setattr(p, "requires_grad", True) for p in m.parameters()],
    ],
)
@pytest.mark.parametrize(
    "make",
    [
        lambda layer: layer,
        copy.deepcopy,
        lambda layer: layer.half().float(),
        lambda layer: layer.to("meta").to_empty(device="cpu"),
        lambda layer: torch.load(saved(layer), weights_only=False),
        lambda layer: assigned(layer),
        lambda layer: put_back(layer),
        lambda layer: loaded(layer),
    ],
)
def test_only_the_bias_ever_requires_a_gradient(make, ask):
    _, layer = layer_of(QuantSpec(4, 64))
    model = nn.Sequential(make(layer), nn.Linear(9, 2))
    ask(model)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names == {"0.bias", "1.weight", "1.bias"}
    model(torch.zeros(2, 256)).sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == names


def test_new_parameters_that_require_a_gradient_lose_it():
    _, layer = layer_of(QuantSpec(4, 64), bias=False)
    assert not assigned(layer)(torch.zeros(2, 256)).requires_grad


def saved(layer):
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return buffer


def assigned(layer):
    """New parameters of the kind that a loader makes: all but the codes require a gradient."""
    for name in ("codes", "scales", "table"):
        value = getattr(layer, name).data.clone()
        setattr(layer, name, nn.Parameter(value, requires_grad=value.is_floating_point()))
    return layer


def put_back(layer):
    """As accelerate does."""
    for name in ("codes", "scales", "table"):
        value = layer._parameters[name]
        layer._parameters[name] = type(value)(value, requires_grad=value.requires_grad)
    return layer


def loaded(layer):
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    other = LutLinear(256, 9, QuantSpec(4, 64), device="meta")
    other.load_state_dict(state, assign=True)
    return other


def test_compiled_in_one_graph():
    _, layer = layer_of(QuantSpec(4, 64))
    torch._dynamo.reset()
    model = nn.Sequential(layer, nn.ReLU())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for M in (1, 4, 7, 0):
        x = torch.randn(M, 256, generator=generator(M))
        assert torch.equal(compiled(x), model(x))


def test_exported():
    _, layer = layer_of(QuantSpec(4, 64))
    x = torch.randn(4, 256, generator=generator(0))
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: batch},))
    for M in (4, 9):
        x = torch.randn(M, 256, generator=generator(M))
        assert torch.equal(program.module()(x), layer(x))


def test_printed_as_linear_is():
    _, layer = layer_of(QuantSpec(3, 64))
    assert repr(layer) == (
        "LutLinear(in_features=256, out_features=9, bias=True, num_bits=3, group_size=64)"
    )
