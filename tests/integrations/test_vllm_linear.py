"""The plugin's linear layers in the real vLLM, by its own loaders, on a CPU; and its config."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch
from helpers import DEMO_MODEL, random_weight
from vllm_weights import check, fill, packed, quantization, rows_of

import flute
from flute.concat import concat_weights
from flute.errors import CheckpointError, FormatError, UnsupportedProblemError
from flute.format import CheckpointConfig, QuantSpec
from flute.ops import lut_gemm

pytest.importorskip("vllm")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

SPECS = [
    QuantSpec(2, 32),
    QuantSpec(3, 64),
    QuantSpec(4, 128),
    QuantSpec(3, -1),
    QuantSpec(4, 256),
]


@pytest.mark.parametrize("per_row", [False, True], ids=["tensor", "row"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_loaders_give_each_rank_its_slice(ranks, size, spec, per_row):
    from vllm.model_executor.layers.linear import (
        MergedColumnParallelLinear,
        QKVParallelLinear,
        RowParallelLinear,
    )

    scope = {"table_scope": "row" if per_row else "tensor"}
    K, heads, kv_heads, head_size = 256, 8, 2, 16
    q, k, v = (
        packed(random_weight(n * head_size, K, spec, per_row=per_row, seed=i))
        for i, n in enumerate((heads, kv_heads, kv_heads))
    )
    gate, up = (packed(random_weight(128, K, spec, per_row=per_row, seed=i)) for i in (3, 4))
    down = packed(random_weight(48, 2048, spec, per_row=per_row, seed=5))
    for rank in range(size):
        ranks(rank, size)
        common = {"bias": False, "quant_config": quantization(spec, **scope)}
        qkv = QKVParallelLinear(K, head_size, heads, kv_heads, prefix="l.qkv_proj", **common)
        fill(qkv, (q, k, v), ("q", "k", "v"))
        mine = heads // size * head_size
        kv = max(1, kv_heads // size) * head_size
        replica = rank // max(1, size // kv_heads)
        cut = [slice(rank * mine, (rank + 1) * mine)]
        cut += [slice(replica * kv, (replica + 1) * kv)] * 2
        parts = [rows_of(w, s) for w, s in zip((q, k, v), cut, strict=True)]
        check(qkv, concat_weights(parts), K)

        both = MergedColumnParallelLinear(K, [128, 128], prefix="l.gate_up_proj", **common)
        fill(both, (gate, up), (0, 1))
        rows = slice(rank * 128 // size, (rank + 1) * 128 // size)
        check(both, concat_weights([rows_of(gate, rows), rows_of(up, rows)]), K)

        if 2048 % (size * max(32, spec.group_size)) == 0:
            row = RowParallelLinear(2048, 48, prefix="l.down_proj", **common)
            fill(row, (down,), (None,))
            words, groups = (t.shape[1] // size for t in (down.packed, down.scales))
            groups = groups or 1
            first = 0 if spec.group_size == -1 else rank * groups
            expected = down._replace(
                packed=down.packed[:, rank * words : (rank + 1) * words],
                scales=down.scales[:, first : first + groups],
                K=2048 // size,
            )
            check(row, expected, 2048 // size)


def test_layers_merged_on_disk_are_cut_too(ranks):
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear

    spec = QuantSpec(3, 64)
    whole = packed(random_weight(128, 256, spec))
    ranks(1, 2)
    config = quantization(spec)
    config.packed_modules_mapping = {"gate_up_proj": ["gate_up_proj"]}
    layer = MergedColumnParallelLinear(
        256, [64, 64], bias=False, quant_config=config, prefix="l.gate_up_proj"
    )
    fill(layer, (whole,), (None,))
    parts = [rows_of(whole, slice(32, 64)), rows_of(whole, slice(96, 128))]
    check(layer, concat_weights(parts), 256)


def test_kernel_order_of_merged_layers(ranks, monkeypatch):
    """As on a GPU, but for the compiling; the op takes the order back on a CPU."""
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear

    from flute.integrations import vllm_order

    monkeypatch.setattr(vllm_order, "takes_kernels", lambda *_: True)
    monkeypatch.setattr(
        "flute.integrations.vllm_linear.in_device_order", vllm_order.in_kernel_order
    )
    compiled = []
    monkeypatch.setattr(
        vllm_order, "compile_kernels", lambda problems, *_: compiled.append(problems)
    )
    ranks(0, 1)
    spec = QuantSpec(3, 64)
    gate, up = (packed(random_weight(64, 128, spec, seed=i)) for i in (0, 1))
    layer = MergedColumnParallelLinear(
        128,
        [64, 64],
        bias=False,
        params_dtype=torch.bfloat16,
        quant_config=quantization(spec),
        prefix="l.gate_up_proj",
    )
    fill(layer, (gate, up), (0, 1))
    assert [(p.n, p.k, p.num_bits) for ((p, _),) in compiled] == [(128, 128, 3)]
    assert compiled[0][0][1] == (64, 128)
    assert layer.quant_method.out_features == 128
    assert layer.quant_method.table_ends == (64, 128)
    assert layer.codes.ndim == 3
    whole = concat_weights([gate, up])
    x = torch.randn(2, 5, 128, dtype=torch.bfloat16)
    bias = torch.randn(128, dtype=torch.bfloat16)
    weight = (whole.packed, whole.scales, whole.table, spec)
    expected = lut_gemm(x, *weight, bias, table_ends=whole.table_ends)
    assert torch.equal(layer.quant_method.apply(layer, x, bias), expected)


def test_merged_layers_take_the_kernels_of_a_cpu(ranks, monkeypatch):
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear

    monkeypatch.delenv("FLUTE_CPU_VARIANT")
    ranks(0, 1)
    spec = QuantSpec(3, 64)
    gate, up = (packed(random_weight(64, 128, spec, seed=i)) for i in (0, 1))
    layer = MergedColumnParallelLinear(
        128, [64, 64], bias=False, quant_config=quantization(spec), prefix="l.gate_up_proj"
    )
    fill(layer, (gate, up), (0, 1))
    assert layer.codes.dtype == torch.uint8
    assert layer.quant_method.out_features == 128
    whole = concat_weights([gate, up])
    x = torch.randn(3, 128)
    weight = (whole.packed, whole.scales, whole.table, spec)
    expected = lut_gemm(x, *weight, table_ends=whole.table_ends)
    error = (layer.quant_method.apply(layer, x) - expected).norm() / expected.norm()
    assert 0 < error < 5e-4


def test_an_uneven_shard_is_refused_by_name(ranks):
    from vllm.model_executor.layers.linear import RowParallelLinear

    ranks(0, 4)
    with pytest.raises(UnsupportedProblemError, match=r"`l\.0\.down_proj`: a tensor parallel size"):
        RowParallelLinear(
            256,
            64,
            bias=False,
            quant_config=quantization(QuantSpec(4, 128)),
            prefix="l.0.down_proj",
        )


def test_a_missing_or_foreign_tensor_is_named(ranks):
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear

    ranks(0, 1)
    spec = QuantSpec(4, 64)
    gate = packed(random_weight(64, 128, spec))

    def layer():
        return MergedColumnParallelLinear(
            128, [64, 64], bias=False, quant_config=quantization(spec), prefix="l.gate_up_proj"
        )

    with pytest.raises(CheckpointError, match=r"lacks `l\.up_proj\.codes`"):
        fill(layer(), (gate,), (0,))
    for name, changed in (
        ("codes", gate._replace(packed=gate.packed.long())),
        ("codes", gate._replace(packed=gate.packed[:, :-1])),
        ("scales", gate._replace(scales=gate.scales.half())),
        ("table", gate._replace(table=gate.table[:, :8])),
    ):
        with pytest.raises(FormatError, match=rf"`l\.up_proj\.{name}` is .* do not belong"):
            fill(layer(), (gate, changed), (0, 1))


def test_what_is_dense_stays_vllm_s_own(ranks):
    from vllm.model_executor.layers.linear import ReplicatedLinear, UnquantizedLinearMethod

    ranks(0, 1)
    config = quantization(QuantSpec(), modules_to_not_convert=("l.skipped",))
    for name in ("l.skipped", "l.mlp.gate"):
        layer = ReplicatedLinear(64, 8, quant_config=config, prefix=name)
        assert isinstance(layer.quant_method, UnquantizedLinearMethod)
    assert config.get_quant_method(torch.nn.Embedding(4, 4), "lm_head") is None


# ---- quantised while they load


@pytest.mark.parametrize("method", ["nf", "mse"])
def test_a_layer_quantised_while_it_loads_is_that_of_the_checkpoint(ranks, method):
    """Where a method fits a table, each of several ranks fits it to its part."""
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear, RowParallelLinear

    from flute.integrations.vllm_config import FluteQuantizationConfig

    request = {"quant_method": "flute", "bits": 3, "group_size": 64, "method": method}
    config = FluteQuantizationConfig.from_config(request)
    config.packed_modules_mapping = {"gate_up_proj": ["gate_proj", "up_proj"]}
    dense = [torch.randn(64, 256, dtype=torch.bfloat16) for _ in range(3)]
    whole = [packed(flute.quantize(w, 3, 64, method=method)) for w in dense]

    def half(i, dim):
        """What rank 1 of 2 has of a weight."""
        part = dense[i].chunk(2, dim)[1]
        if method == "mse":
            return packed(flute.quantize(part, 3, 64, method=method))
        if dim == 0:
            return rows_of(whole[i], slice(32, 64))
        columns = {"packed": whole[i].packed[:, 12:], "scales": whole[i].scales[:, 2:]}
        return whole[i]._replace(**columns, K=128)

    ranks(0, 1)
    alone = RowParallelLinear(
        256, 64, prefix="l.o_proj", bias=False, quant_config=config, params_dtype=torch.bfloat16
    )
    alone.weight.weight_loader(alone.weight, dense[2])
    check(alone, whole[2], 256)
    ranks(1, 2)
    common = {"bias": False, "quant_config": config, "params_dtype": torch.bfloat16}
    both = MergedColumnParallelLinear(256, [64, 64], prefix="l.gate_up_proj", **common)
    assert both.weight.device.type == "meta"
    for i in range(2):
        both.weight.weight_loader(both.weight, dense[i], i)
    check(both, concat_weights([half(i, 0) for i in range(2)]), 256)
    row = RowParallelLinear(256, 64, prefix="l.down_proj", **common)
    row.weight.weight_loader(row.weight, dense[2])
    check(row, half(2, 1), 128)
    row.quant_method.process_weights_after_loading(row)  # vLLM calls it again at the end
    check(row, half(2, 1), 128)
    ranks(0, 8)
    with pytest.raises(
        UnsupportedProblemError, match=r"`l\.down_proj`: a tensor parallel size of 8"
    ):
        RowParallelLinear(256, 64, prefix="l.down_proj", **common)


def test_a_dense_weight_that_is_missing_or_wrong_is_named(ranks):
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear

    from flute.integrations.vllm_config import FluteQuantizationConfig

    config = FluteQuantizationConfig.from_config({"quant_method": "flute", "bits": 4})
    config.packed_modules_mapping = {"gate_up_proj": ["gate_proj", "up_proj"]}
    ranks(0, 1)

    def layer():
        return MergedColumnParallelLinear(
            256, [64, 64], bias=False, quant_config=config, prefix="l.gate_up_proj"
        )

    made = layer()
    made.weight.weight_loader(made.weight, torch.randn(64, 256), 0)
    with pytest.raises(CheckpointError, match=r"lacks `l\.up_proj\.weight`"):
        made.quant_method.process_weights_after_loading(made)
    made = layer()
    made.weight.weight_loader(made.weight, torch.randn(64, 256), 0)
    with pytest.raises(FormatError, match=r"`l\.up_proj\.weight`.*NaN"):
        made.weight.weight_loader(made.weight, torch.full((64, 256), float("nan")), 1)


# ---- the config


def test_configs_that_cannot_be_served_say_so_in_a_line():
    from flute.integrations.vllm_config import FluteQuantizationConfig

    config = CheckpointConfig().to_dict()
    with pytest.raises(FormatError, match="format version 99; this package reads up to 1"):
        FluteQuantizationConfig.from_config({**config, "format_version": 99})
    with pytest.raises(UnsupportedProblemError, match=r"The model is dense.*flute quantize MODEL"):
        FluteQuantizationConfig.from_config({"quant_method": "flute", "group_size": 64})
    with pytest.raises(UnsupportedProblemError, match="set FLUTE_BITS=4"):
        FluteQuantizationConfig().maybe_update_config(str(DEMO_MODEL))
    with pytest.raises(UnsupportedProblemError, match="set FLUTE_BITS=4"):
        FluteQuantizationConfig().get_quant_method(torch.nn.Identity(), "a")


def test_a_checkpoint_of_the_original_is_not_called_dense(tmp_path):
    from flute.integrations.vllm_config import FluteQuantizationConfig

    (tmp_path / "flute_config.json").write_text("{}")
    with pytest.raises(UnsupportedProblemError, match="Run `flute convert"):
        FluteQuantizationConfig().maybe_update_config(str(tmp_path))


def test_names_follow_vllm_s_renaming():
    config = quantization(
        QuantSpec(),
        modules_to_not_convert=("a.head",),
        overrides={"a.x": {"group_size": 32}},
    )
    config.apply_vllm_mapper(
        SimpleNamespace(apply_list=lambda names: [n.replace("a.", "b.") for n in names])
    )
    assert config.checkpoint.modules_to_not_convert == ("b.head",)
    assert config.checkpoint.overrides == {"b.x": {"group_size": 32}}
    assert config.checkpoint.quantized_head == ""
    config = quantization(QuantSpec(), quantized_head="a.head")
    config.apply_vllm_mapper(SimpleNamespace(apply_list=lambda names: ["b.head"] * len(names)))
    assert config.checkpoint.quantized_head == "b.head"
