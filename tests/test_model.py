"""Which layers are quantised, which are left dense and why, and the replacement in memory."""

from __future__ import annotations

import gc
import re
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from helpers import generator, tiny_model
from torch import nn

import flute
from flute.blockwise import quantize_weight
from flute.errors import FormatError, UnsupportedProblemError
from flute.experts import split_experts
from flute.format import CheckpointConfig, QuantSpec
from flute.linear import LutLinear
from flute.methods import CALIBRATED, METHODS, quantize
from flute.model import (
    QuantizeOptions,
    empty_lut_linear,
    matches,
    plan_model,
    quantize_model,
)

LLAMA_SHAPES = {
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (32, 64),
    "self_attn.v_proj": (32, 64),
    "self_attn.o_proj": (64, 64),
    "mlp.gate_proj": (128, 64),
    "mlp.up_proj": (128, 64),
    "mlp.down_proj": (64, 128),
}


def all_layers() -> dict[str, tuple[int, int]]:
    return {
        f"model.layers.{i}.{name}": shape for i in (0, 1) for name, shape in LLAMA_SHAPES.items()
    }


def on_meta(build):
    with torch.device("meta"):
        return build()


class Stack(nn.Module):
    """Linears by name."""

    def __init__(self, **linears: nn.Module) -> None:
        super().__init__()
        for name, module in linears.items():
            self.add_module(name, module)


# ---- the plan


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_plan_of_a_transformer(kind):
    plan = plan_model(tiny_model(kind), QuantizeOptions())
    assert plan.shapes == all_layers()
    assert plan.dense == {"lm_head": "output head"}
    assert plan.config == CheckpointConfig(table="custom", modules_to_not_convert=("lm_head",))


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_stays_dense_tied_or_not(tied):
    plan = plan_model(tiny_model(tie_word_embeddings=tied), QuantizeOptions())
    assert plan.shapes == all_layers()
    assert plan.config.modules_to_not_convert == ("lm_head",)


def test_a_plan_needs_no_weights():
    model = tiny_model()
    meta = plan_model(model.to("meta"), QuantizeOptions())
    assert meta == plan_model(tiny_model(), QuantizeOptions())


def test_experts_and_routers_are_named():
    plan = plan_model(tiny_model("mixtral"), QuantizeOptions())
    attention = {name: shape for name, shape in all_layers().items() if "self_attn" in name}
    assert plan.shapes == attention
    fused = "MoE experts fused into one tensor"
    expected = {"lm_head": "output head"}
    for i in (0, 1):
        expected[f"model.layers.{i}.mlp.experts.gate_up_proj"] = fused
        expected[f"model.layers.{i}.mlp.experts.down_proj"] = fused
    routers = {f"model.layers.{i}.mlp.gate" for i in (0, 1)}  # no nn.Linear in transformers 5
    assert {name: why for name, why in plan.dense.items() if name not in routers} == expected
    assert "lm_head" in plan.config.modules_to_not_convert


@pytest.mark.parametrize("name", ["gate", "router", "shared_expert_gate"])
def test_routers_stay_dense(name):
    model = Stack(**{name: nn.Linear(64, 4), "other": nn.Linear(64, 4)})
    plan = plan_model(model, QuantizeOptions())
    assert plan.dense == {name: "MoE router"}
    assert list(plan.shapes) == ["other"]


@pytest.mark.parametrize(
    ("skip", "num_skipped"),
    [
        (("down_proj",), 2),
        (("layers.1.mlp.down_proj",), 1),
        (("model.layers.1.mlp.down_proj",), 1),
        (("*.layers.0.*",), 7),
        (("*mlp*",), 6),
        (("*_proj",), 14),
        (("q_proj", "k_proj"), 4),
        (("?_proj",), 8),
    ],
)
def test_skip_patterns(skip, num_skipped):
    options = QuantizeOptions(skip=(*skip, "absent"))
    context = pytest.warns(UserWarning, match="`skip` pattern 'absent' matches no linear layer")
    if num_skipped == 14:
        with context, pytest.raises(UnsupportedProblemError, match="15 left dense: output head, s"):
            plan_model(tiny_model(), options)
        return
    with context:
        plan = plan_model(tiny_model(), options)
    skipped = [name for name, why in plan.dense.items() if why == "skipped by pattern"]
    assert len(skipped) == num_skipped
    assert set(plan.shapes) == set(all_layers()) - set(skipped)
    assert set(plan.config.modules_to_not_convert) == {*skipped, "lm_head"}


@pytest.mark.parametrize(
    ("name", "pattern", "expected"),
    [
        ("model.layers.0.mlp.gate", "gate", True),
        ("model.layers.0.mlp.gate_proj", "gate", False),
        ("model.layers.0.mlp.navigate", "gate", False),
        ("lm_head", "lm_head", True),
        ("model.layers.10.mlp", "*.layers.1.*", False),
        ("model.layers.1.mlp", "*.layers.1.*", True),
        ("model.layers.1.mlp", "layers.1", False),
    ],
)
def test_a_pattern_matches_whole_components(name, pattern, expected):
    assert matches(name, pattern) is expected


def test_rows_that_the_group_does_not_divide_take_a_smaller_one():
    model = Stack(a=nn.Linear(256, 4), b=nn.Linear(192, 4), c=nn.Linear(96, 4), d=nn.Linear(128, 4))
    message = re.escape(
        "group_size=128 does not divide the rows of 2 layers; they take smaller groups: "
        "`b` (K=192: 64), `c` (K=96: 32)"
    )
    with pytest.warns(UserWarning, match=message):
        plan = plan_model(model, QuantizeOptions(group_size=128))
    assert plan.config.overrides == {"b": {"group_size": 64}, "c": {"group_size": 32}}
    assert plan.config.spec_of("b") == QuantSpec(4, 64)
    with pytest.warns(UserWarning, match="smaller groups"):
        quantize_model(model, group_size=128)
    sizes = {name: module.spec.group_size for name, module in model.named_children()}
    assert sizes == {"a": 128, "b": 64, "c": 32, "d": 128}
    assert model.c.scales.shape == (4, 3)


def test_no_warning_where_all_is_well():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan_model(tiny_model(), QuantizeOptions())
        plan_model(Stack(a=nn.Linear(100, 4)), QuantizeOptions(group_size=-1))


def test_rows_that_no_group_divides_are_refused_by_name():
    model = Stack(a=nn.Linear(64, 4), b=nn.Linear(100, 4), c=nn.Linear(33, 4))
    message = re.escape(
        "No group of 32 .. 64 weights divides the rows of 2 layers: `b` (K=100), `c` (K=33). Use "
        "one scale per row (group size -1), or skip these layers."
    )
    with pytest.raises(FormatError, match=message):
        plan_model(model, QuantizeOptions())
    plan = plan_model(model, QuantizeOptions(group_size=-1))
    assert plan.shapes == {"a": (4, 64), "b": (4, 100), "c": (4, 33)}
    plan = plan_model(model, QuantizeOptions(skip=("b", "c")))
    assert list(plan.shapes) == ["a"]


def test_rows_too_short_for_any_group_stay_dense():
    plan = plan_model(Stack(a=nn.Linear(64, 4), b=nn.Linear(8, 4)), QuantizeOptions())
    assert plan.dense == {"b": "rows of 8 weights are too short"}


def test_tables_per_row_fit_layers_of_as_many_outputs():
    table = torch.randn(4, 16, generator=generator(1))
    model = Stack(a=nn.Linear(64, 4), b=nn.Linear(64, 6))
    message = re.escape(
        "`table` has 4 rows, one per output; 1 layers have another number of outputs: `b` (N=6). "
        "Skip them, or give one table for all rows."
    )
    with pytest.raises(FormatError, match=message):
        plan_model(model, QuantizeOptions(table=table))
    quantize_model(model, table=table, skip=("b",))
    assert model.a.table.shape == (4, 16)
    assert torch.equal(model.a.table.data, table)
    assert isinstance(model.b, nn.Linear)


@pytest.mark.parametrize("num_heads", [0, 1])
def test_nothing_to_quantise(num_heads):
    model = Stack(gate=nn.Linear(64, 4)) if num_heads else Stack(e=nn.Embedding(4, 64))
    why = "1 in all, 1 left dense: MoE router" if num_heads else "0 in all, 0 left dense: none foun"
    with pytest.raises(UnsupportedProblemError, match=f"Stack has no linear layer to qu.*{why}"):
        quantize_model(model)


def test_a_layer_alone_is_refused():
    with pytest.raises(UnsupportedProblemError, match=r"Use `LutLinear\.from_quantized"):
        quantize_model(nn.Linear(64, 64))


def test_tied_layers_stay_dense_together():
    shared, tied = nn.Linear(64, 64), nn.Linear(64, 64)
    model = Stack(a=shared, b=shared, c=nn.Linear(64, 64), d=tied, e=nn.Embedding(64, 64))
    model.e.weight = tied.weight
    plan = quantize_model(model)
    assert list(plan.shapes) == ["c"]
    assert dict(plan.dense) == dict.fromkeys(("a", "b", "d"), "tied to another layer")
    assert set(plan.config.modules_to_not_convert) == {"a", "b", "d"}
    assert model.a is model.b
    assert isinstance(model.a, nn.Linear)
    assert model.d.weight is model.e.weight


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Named(nn.Linear):
    """Only renames."""


def test_subclasses_with_their_own_forward_stay_dense():
    model = Stack(a=Doubled(64, 64), b=nn.Linear(64, 64), c=Named(64, 64))
    x = torch.randn(2, 64, generator=generator(0))
    expected = model.a(x)
    plan = quantize_model(model)
    assert plan.dense == {"a": "Doubled is more than a linear layer"}
    assert torch.equal(model.a(x), expected)
    assert isinstance(model.c, LutLinear)


def test_attention_of_torch_still_works():
    """Its output projection is an nn.Linear whose weight is read, never called."""
    model = Stack(attention=nn.MultiheadAttention(64, 2), b=nn.Linear(64, 64))
    x = torch.randn(3, 1, 64, generator=generator(0))
    expected = model.attention(x, x, x)[0]
    quantize_model(model)
    assert torch.equal(model.attention(x, x, x)[0], expected)
    assert isinstance(model.b, LutLinear)


def test_a_prefix_is_put_before_every_name():
    plan = plan_model(
        Stack(a=nn.Linear(64, 4), gate=nn.Linear(64, 4)), QuantizeOptions(), prefix="x.y."
    )
    assert list(plan.shapes) == ["x.y.a"]
    assert list(plan.dense) == ["x.y.gate"]
    assert plan.config.modules_to_not_convert == ("x.y.gate",)


@pytest.mark.parametrize(
    ("dtype", "asked", "expected"),
    [
        (torch.float16, None, "float16"),
        (torch.bfloat16, None, "bfloat16"),
        (torch.float32, None, "bfloat16"),
        (torch.float16, "float32", "float32"),
        (torch.bfloat16, "float16", "float16"),
    ],
)
def test_scales_take_the_models_own_dtype(dtype, asked, expected):
    model = Stack(a=nn.Linear(64, 4, dtype=dtype))
    plan = quantize_model(model, scale_dtype=asked)
    assert plan.config.scale_dtype == expected
    assert model.a.scales.dtype == getattr(torch, expected)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, "custom"),
        ({"method": "bof-s"}, "bof-s"),
        ({"table": "nf4"}, "nf"),
        ({"table": "int"}, "int"),
        ({"method": "fp"}, "fp"),
        ({"method": "table", "table": "int4"}, "int"),
        ({"table": list(range(16))}, "custom"),
        ({"table": torch.arange(16.0)}, "custom"),
    ],
)
def test_the_name_of_the_table(arguments, expected):
    assert QuantizeOptions(**arguments).table_name == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_bits": 6}, "`num_bits` is 6"),
        ({"group_size": 100}, "`group_size` is 100"),
        ({"method": "magic"}, f"`method` is 'magic'; expected one of {(*METHODS, *CALIBRATED)}."),
        ({"table": "nf3"}, "`table` is 'nf3'; expected one of"),
        ({"table": [1.0, 2.0]}, "`table` has shape (1, 2); expected 16 entries"),
        ({"method": "table"}, "method='table' needs `table`"),
        ({"scale_dtype": "half"}, "`scale_dtype` is 'half'; expected one of ('float16', 'bfloat16"),
        ({"skip": "lm_head"}, "`skip` is 'lm_head'; expected a list of patterns."),
    ],
)
def test_bad_options_are_named(arguments, message):
    with pytest.raises(FormatError, match=re.escape(message)):
        QuantizeOptions(**arguments)


# ---- the replacement


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mixtral"])
@pytest.mark.parametrize("num_bits", [2, 3, 4])
def test_quantised_model_equals_the_dense_one_with_dequantised_weights(kind, num_bits):
    model, dense = tiny_model(kind, dtype=torch.float32), tiny_model(kind, dtype=torch.float32)
    split_experts(model)
    split_experts(dense)
    before = {name: linear.weight.data.clone() for name, linear in linears(model).items()}
    plan = quantize_model(model, num_bits, 32)
    for name in plan.shapes:
        layer = model.get_submodule(name)
        assert isinstance(layer, LutLinear)
        expected = quantize(before[name], num_bits, 32)
        again = layer.quantized_weight()
        assert torch.equal(again.codes, expected.codes)
        assert torch.equal(again.scales, expected.scales)
        weight = dense.get_submodule(name).weight
        weight.data.copy_(layer.dequantize())
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, dense(ids).logits, atol=1e-5, rtol=1e-4)
    assert set(linears(model)) == {n for n in plan.dense if n in before}


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}


@pytest.mark.parametrize("training", [False, True])
def test_biases_and_modes_survive(training):
    model = tiny_model("qwen2").train(training)
    bias = model.model.layers[0].self_attn.q_proj.bias.clone()
    quantize_model(model)
    layer = model.model.layers[0].self_attn.q_proj
    assert torch.equal(layer.bias, bias)
    assert layer.training is training
    assert model.model.layers[0].self_attn.o_proj.bias is None


def test_the_model_is_changed_in_place_and_its_weights_freed():
    model = tiny_model()
    weight = weakref.ref(model.model.layers[0].mlp.up_proj.weight)
    calls = []
    plan = quantize_model(model, progress=lambda name, count: calls.append((name, count)))
    assert calls == [(name, N * K) for name, (N, K) in plan.shapes.items()]
    gc.collect()
    assert weight() is None
    stored = sum(p.numel() * p.element_size() for p in model.parameters())
    assert stored < sum(p.numel() * p.element_size() for p in tiny_model().parameters())


def test_generation_goes_on():
    model = tiny_model()
    flute.quantize_model(model, 4, 32)
    out = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False)
    assert out.shape == (1, 7)
    again = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False)
    assert torch.equal(out, again)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_bad_weights_are_named_with_their_layer(value):
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[5, 9] = value
    message = re.escape("`model.layers.1.mlp.up_proj.weight` holds NaN or Inf (1 found), the first")
    with pytest.raises(FormatError, match=message + r".*at \(5, 9\)"):
        quantize_model(model)


def test_scales_out_of_range_are_named_with_their_layer():
    model = Stack(a=nn.Linear(64, 4), b=nn.Linear(64, 4))
    model.b.weight.data.mul_(1e8)
    with pytest.raises(FormatError, match=r"`b\.weight`: A group needs the scale"):
        quantize_model(model, scale_dtype="float16")


def test_another_dtype_is_named():
    with pytest.raises(FormatError, match=r"`a\.weight` is torch\.float64; expected float16"):
        quantize_model(Stack(a=nn.Linear(64, 4, dtype=torch.float64)))


def test_a_strided_weight():
    model, other = Stack(a=nn.Linear(64, 32)), Stack(a=nn.Linear(64, 32))
    weight = torch.randn(64, 32, generator=generator(3)).T
    model.a.weight = nn.Parameter(weight)
    other.a.weight = nn.Parameter(weight.contiguous())
    quantize_model(model)
    quantize_model(other)
    assert torch.equal(model.a.codes, other.a.codes)


def test_quantising_twice_finds_nothing_left():
    model = tiny_model()
    quantize_model(model)
    with pytest.raises(UnsupportedProblemError, match="has no linear layer to quantise"):
        quantize_model(model)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scope", ["tensor", "row"])
def test_an_empty_layer_takes_the_tensors_of_a_full_one(scope, bias):
    linear = nn.Linear(96, 6, bias=bias, dtype=torch.float16)
    config = CheckpointConfig(
        3, 64, table_scope=scope, scale_dtype="float16", overrides={"a": {"group_size": 32}}
    )
    table = torch.randn(6 if scope == "row" else 1, 8, generator=generator(1))
    weight = quantize_weight(linear.weight.data, "a", config, table)
    full = LutLinear.from_quantized(weight, linear.bias)
    empty = empty_lut_linear(linear, "a", config)
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    for (name, have), (other, want) in zip(
        empty.named_parameters(), full.named_parameters(), strict=True
    ):
        assert (name, have.shape, have.dtype) == (other, want.shape, want.dtype)
    empty.load_state_dict(full.state_dict(), assign=True)
    x = torch.randn(2, 96, generator=generator(2)).half()
    assert torch.equal(empty(x), full(x))
    dense = F.linear(x, full.dequantize(torch.float16), linear.bias)
    assert torch.allclose(full(x), dense, atol=1e-2)
