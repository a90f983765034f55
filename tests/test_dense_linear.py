"""Dense linear layers multiplied by the CPU's library: what they compute, when, and what stays."""

from __future__ import annotations

import copy
import pickle
import sys

import pytest
import torch
from helpers import DTYPES, generator, relative_error
from torch import nn

import flute
from flute import dense_linear
from flute.cpu import dense
from flute.cpu import library as cpu
from flute.dense_linear import DenseLinear, adopt

pytestmark = pytest.mark.usefixtures("cpu_kernels")
ERROR = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}
"""Of sums in fp32, and of rounding them."""


def weight_and_x(N, K, M, dtype, bias=True):
    rng = generator(N, K, M)
    drawn = [torch.randn(*shape, generator=rng).to(dtype) for shape in ((N, K), (M, K), (N,))]
    return drawn[0], drawn[1], drawn[2] if bias else None


def exact(x, weight, bias):
    out = x.double() @ weight.double().T
    return out if bias is None else out + bias.double()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("K", [1, 31, 32, 200])
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_by_all_variants_and_threads(dtype, K, bias, monkeypatch):
    threads = torch.get_num_threads()
    alone = []
    try:
        for M in range(1, dense.MAX_TOKENS + 1):
            weight, x, b = weight_and_x(2100, K, M, dtype, bias)
            found = []
            for variant in cpu._found().usable:
                monkeypatch.setenv("FLUTE_CPU_VARIANT", variant)
                for number in (1, 2):
                    torch.set_num_threads(number)
                    found.append(dense.multiply(x, weight, b))
            assert relative_error(found[0], exact(x, weight, b)) < ERROR[dtype]
            assert all(torch.equal(out, found[0]) for out in found)
            alone = [dense.multiply(x[m : m + 1], weight, b) for m in range(M)]
            assert torch.equal(torch.cat(alone), found[0])  # of how many tokens there are, neither
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values_and_strides(dtype):
    weight, x, bias = weight_and_x(40, 70, 4, dtype)
    spread = torch.zeros(4, 200, dtype=dtype)[:, 30:100]
    spread.copy_(x)
    across = x.T.contiguous().T
    expected = dense.multiply(x, weight, bias)
    assert torch.equal(dense.multiply(spread, weight, bias), expected)
    assert torch.equal(dense.multiply(across, weight, bias), expected)
    for value in (float("nan"), float("inf"), -float("inf")):
        for k in (0, 69):
            y, w = x.clone(), weight.clone()
            y[1, k] = value
            w[7, k] = value
            out, reference = dense.multiply(y, w, bias), exact(y, w, bias)
            assert torch.equal(out.isnan(), reference.isnan())
            assert torch.equal(out.isinf(), reference.isinf())
            kept = [0, 2, 3]
            assert torch.equal(dense.multiply(y, weight, bias)[kept], expected[kept])
    tiny = torch.full((1, 70), torch.finfo(dtype).smallest_normal / 4, dtype=dtype)
    assert tiny[0, 0] > 0
    one = torch.eye(3, 70, dtype=dtype)
    assert torch.equal(dense.multiply(tiny, one, None), tiny[:, :3])  # as weights and as x
    assert torch.equal(dense.multiply(one, tiny, None), tiny[:, :1].expand(3, 1))


# ---- layers


@pytest.fixture
def calls(monkeypatch):
    """Count the products that go by the library."""
    count = []

    def counted(*args):
        count.append(1)
        return multiply(*args)

    multiply = dense.multiply
    monkeypatch.setattr(dense, "multiply", counted)
    return count


def layer(dtype=torch.float32, bias=True):
    """A layer that is large enough, and one that it is compared with."""
    made = nn.Linear(1024, 1100, bias=bias).to(dtype).requires_grad_(False)
    own = copy.deepcopy(made)
    assert adopt(made) == 1
    return made, own


def x_of(*shape, dtype=torch.float32):
    return torch.randn(*shape, 1024, generator=generator(*shape)).to(dtype)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_layer_by_the_library(dtype, bias, calls):
    ours, own = layer(dtype, bias)
    for shape in ((), (1,), (1, 1), (1, 1, 1)):
        x = x_of(*shape, dtype=dtype)
        assert ours(x).shape == own(x).shape
        assert relative_error(ours(x), exact(x, own.weight, own.bias)) < ERROR[dtype]
    assert len(calls) == 8
    most = dense.most_tokens(dtype)
    assert most in (1, dense.MAX_TOKENS)
    ours(x_of(most, dtype=dtype))
    assert len(calls) == 9
    many = x_of(most + 1, dtype=dtype)
    assert torch.equal(ours(many), own(many))
    assert len(calls) == 9


def test_weights_may_change(calls):
    ours, own = layer()
    for change in (
        lambda linear: linear.weight.mul_(2),
        lambda linear: setattr(linear.weight, "data", -linear.weight.data),
        lambda linear: setattr(linear, "bias", None),
        lambda linear: linear.to(torch.bfloat16),
    ):
        change(ours), change(own)
        x = x_of(1, dtype=ours.weight.dtype)
        assert relative_error(ours(x), own(x).double()) < 4e-3
    assert len(calls) == 4


def watch_forward(linear):
    linear.register_forward_hook(lambda module, args, out: out + 1)


def replace_forward(linear):
    linear.forward = lambda x: x * 0


def cut_columns(linear):
    linear.weight = nn.Parameter(linear.weight.data.T.contiguous().T, requires_grad=False)


@pytest.mark.parametrize("change", [watch_forward, replace_forward, cut_columns])
def test_a_changed_layer_is_called_as_every_module_is(change, calls):
    ours, own = layer()
    change(ours), change(own)
    assert torch.equal(ours(x_of(1)), own(x_of(1)))
    assert not calls


def test_what_watches_a_call_gets_torch_s(calls):
    ours, own = layer()
    x = x_of(1)
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(x).dtype == torch.bfloat16
    with torch.device("meta"):
        assert torch.equal(ours(x), own(x))
    assert torch.equal(torch.func.vmap(ours)(x), torch.func.vmap(own)(x))
    assert torch.equal(torch.compile(ours, backend="eager")(x), own(x))
    with pytest.raises(RuntimeError, match="dtype"):
        ours(x.double())
    with pytest.raises(RuntimeError, match="shapes"):
        ours(x[:, :5])
    assert not calls
    ours.requires_grad_(True)
    ours(x).sum().backward()
    assert torch.equal(ours.weight.grad, x.expand(1100, 1024))
    y = x.clone().requires_grad_()
    ours.requires_grad_(False)(y).sum().backward()
    assert relative_error(y.grad, own.weight.double().sum(0, keepdim=True)) < 1e-5
    assert not calls
    with torch.no_grad():
        ours.requires_grad_(True)(y)
    assert calls


def test_copies_and_pickles_are_torch_s():
    ours, _ = layer()
    for other in (copy.copy(ours), copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(other) is nn.Linear
        assert torch.equal(other.weight, ours.weight)
    assert isinstance(ours, nn.Linear)
    assert list(ours.state_dict()) == ["weight", "bias"]


def test_small_layers_and_subclasses_stay_as_they_are(monkeypatch):
    class Own(nn.Linear):
        pass

    model = nn.ModuleList([nn.Linear(1023, 1024), Own(1024, 1024), nn.Linear(1024, 1024).double()])
    assert adopt(model) == 0
    assert [type(module) for module in model] == [nn.Linear, Own, nn.Linear]
    monkeypatch.setenv("FLUTE_CPU_VARIANT", "none")
    assert adopt(nn.Linear(1024, 1024)) == 0


def test_without_a_variant_torch_multiplies(monkeypatch, calls):
    ours, own = layer()
    for variant in ("none", "scalar"):
        monkeypatch.setenv("FLUTE_CPU_VARIANT", variant)
        assert torch.equal(ours(x_of(1)), own(x_of(1)))
    assert not calls


def test_a_weight_is_moved_if_nothing_shares_its_memory():
    both = torch.randn(2, 1024, 1024)
    model = nn.ModuleList(nn.Linear(1024, 1024, bias=False) for _ in range(4))
    model[0].weight.data, model[1].weight.data = both[0], both[1]
    model[2].weight.data.share_memory_()
    kept, before = copy.deepcopy(model), [layer.weight.data_ptr() for layer in model]
    parameters = list(model.parameters())
    assert adopt(model) == 4
    moved = [layer.weight.data_ptr() != at for layer, at in zip(model, before, strict=True)]
    assert moved == [False, False, False, True]
    if sys.platform == "linux":
        assert model[3].weight.data_ptr() % (2 << 20) == 0
    for layer, own, parameter in zip(model, kept, parameters, strict=True):
        assert torch.equal(layer.weight, own.weight)
        assert layer.weight is parameter
    at = model[3].weight.data_ptr()
    assert adopt(model) == 4
    assert model[3].weight.data_ptr() == at


def tiny_model():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=200, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).bfloat16().eval()


def test_prepare_adopts_a_tied_head(monkeypatch, calls):
    monkeypatch.setattr(dense_linear, "MIN_WEIGHTS", 64 * 200)
    model = tiny_model()
    flute.quantize_model(model, 4, 32, method="nf")
    off = copy.deepcopy(model)
    flute.prepare(off, dense=False)
    assert type(off.lm_head) is nn.Linear
    flute.prepare(model)
    assert type(model.lm_head) is DenseLinear
    assert model.lm_head.weight is model.model.embed_tokens.weight
    prompt = torch.arange(6)[None]
    with torch.inference_mode():
        texts = [m.generate(prompt, max_new_tokens=8, do_sample=False) for m in (model, off)]
    assert torch.equal(*texts)
    assert len(calls) == 8  # the prompt's last token, too


def test_adopted_layers_are_quantised_as_others_are(monkeypatch):
    monkeypatch.setattr(dense_linear, "MIN_WEIGHTS", 0)
    model = tiny_model()
    own = copy.deepcopy(model)
    assert adopt(model) == 8
    for each in (model, own):
        flute.quantize_model(each, 4, 32, method="nf", head_bits=4)
    assert isinstance(model.lm_head, flute.LutLinear)
    for name, tensor in own.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
