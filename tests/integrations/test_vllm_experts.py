"""Quantised MoE experts in vLLM: loaded, cut over ranks, multiplied; and whole models served."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import DEMO_MODEL, random_weight, tiny_model
from torch import nn
from vllm_engine import serve

import flute
from flute.errors import CheckpointError, FormatError, UnsupportedProblemError
from flute.experts import SplitExperts
from flute.format import CheckpointConfig, QuantSpec
from flute.integrations.vllm_layers import cut_rows
from flute.linear import LutLinear
from flute.model import QuantizeOptions
from flute.pack import pack_codes
from flute.stream import quantize_checkpoint

pytest.importorskip("vllm")

NAME = "model.layers.3.mlp.experts"
E, H, INNER = 4, 128, 256
SHARDS = ("w1", "w3", "w2")
PROMPTS = [[5, 9, 20, 31, 7, 77, 3, 50], [1, 2, 3]]


class Block(nn.Module):
    """What a method looks at of vLLM's layer."""

    activation = "silu"
    apply_router_weight_on_input = False

    def _map_global_expert_id_to_local_expert_id(self, expert):
        return expert


@pytest.fixture(autouse=True)
def vllm_config():
    from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config

    with set_current_vllm_config(VllmConfig(device_config=DeviceConfig(device="cpu"))):
        yield


def rank_of(rank, size, **changes):
    return SimpleNamespace(**{"tp_rank": rank, "tp_size": size, "has_bias": False, **changes})


def made(spec, rank=0, size=1, *, per_row=False, layer=None):
    from flute.integrations.vllm_experts import FluteExpertsMethod

    scope = "row" if per_row else "tensor"
    config = CheckpointConfig(
        spec.num_bits, spec.group_size, table_scope=scope, quantized_experts=True
    )
    layer = layer or Block()
    layer.method = FluteExpertsMethod(NAME, config, rank_of(rank, size))
    layer.method.create_weights(layer, E, H, INNER // size, torch.float32)
    return layer


def tensors(weight):
    codes = pack_codes(weight.codes, weight.spec.num_bits)
    return {"codes": codes, "scales": weight.scales, "table": weight.table}


def fill(layer, weights, skip=(), change=None):
    for e, expert in enumerate(weights):
        for shard, weight in zip(SHARDS, expert, strict=True):
            stem = "w2" if shard == "w2" else "w13"
            for key, tensor in tensors(weight).items():
                if (e, shard, key) == skip:
                    continue
                tensor = change(tensor) if change else tensor
                parameter = getattr(layer, f"{stem}_{key}")
                name = f"{NAME}.{stem}_{key}"
                assert parameter.weight_loader(parameter, tensor, name, shard, e, True)
    layer.method.process_weights_after_loading(layer)


def random_experts(spec, per_row=False):
    shapes = ((INNER, H), (INNER, H), (H, INNER))
    return [
        [random_weight(*s, spec, per_row=per_row, seed=3 * e + i) for i, s in enumerate(shapes)]
        for e in range(E)
    ]


def reference(weights, x, topk_weights, topk_ids):
    dense = [[flute.dequantize(w) for w in expert] for expert in weights]
    gate_up = torch.stack([torch.cat(expert[:2]) for expert in dense])
    down = torch.stack([expert[2] for expert in dense])
    experts = SplitExperts(("gate_proj", "up_proj", "down_proj"), F.silu, gate_up, down)
    return experts(x, topk_ids, topk_weights)


@pytest.mark.parametrize("per_row", [False, True], ids=["tensor", "row"])
@pytest.mark.parametrize("spec", [QuantSpec(4, 64), QuantSpec(3, 32), QuantSpec(2, -1)], ids=str)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_together_compute_the_block(size, spec, per_row):
    weights = random_experts(spec, per_row)
    x = torch.randn(7, H)
    topk_ids = torch.stack([torch.randperm(E)[:2] for _ in range(7)])
    topk_weights = torch.rand(7, 2)
    total = torch.zeros(7, H)
    for rank in range(size):
        layer = made(spec, rank, size, per_row=per_row)
        fill(layer, weights)
        total += layer.method.apply(layer, x, topk_weights, topk_ids)
    expected = reference(weights, x, topk_weights, topk_ids)
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-3)


def test_experts_of_other_ranks_are_left_out():
    spec = QuantSpec(4, 64)
    weights = random_experts(spec)
    layer = made(spec)
    fill(layer, weights)
    layer.expert_map = torch.tensor([0, -1, 2, -1])
    x, topk_weights = torch.randn(3, H), torch.rand(3, 2)
    topk_ids = torch.tensor([[0, 1], [3, 2], [1, 3]])
    out = layer.method.apply(layer, x, topk_weights, topk_ids)
    kept = topk_weights * torch.isin(topk_ids, torch.tensor([0, 2]))
    torch.testing.assert_close(out, reference(weights, x, kept, topk_ids), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("size", [1, 2])
def test_a_captured_graph_computes_the_block_too(size, monkeypatch):
    """Both ways that a graph can hold; some experts' gate and up have the same table."""
    from flute.integrations import expert_stack, vllm_experts

    spec = QuantSpec(4, 64)
    weights = random_experts(spec)
    weights[1][1] = replace(weights[1][1], table=weights[1][0].table)
    monkeypatch.setattr(vllm_experts, "is_captured", lambda x: True)
    for cost in (0, 100):  # of a copy: nothing, so that experts are copied; or a lot
        monkeypatch.setattr(expert_stack, "COPY_COST", cost)
        x, topk_weights = torch.randn(3, H), torch.rand(3, 2)
        topk_ids = torch.tensor([[0, 1], [3, 2], [1, 3]])
        total = torch.zeros(3, H)
        for rank in range(size):
            layer = made(spec, rank, size)
            fill(layer, weights)
            total += layer.method.apply(layer, x, topk_weights, topk_ids)
        expected = reference(weights, x, topk_weights, topk_ids)
        torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-3)


def test_what_does_not_fit_is_named():
    spec = QuantSpec(4, 64)
    weights = random_experts(spec)
    with pytest.raises(CheckpointError, match=rf"lacks `scales` of the up .* 2 of `{NAME}`"):
        fill(made(spec), weights, skip=(2, "w3", "scales"))
    with pytest.raises(FormatError, match=rf"`codes` of the gate .* expert 0 of `{NAME}`"):
        fill(made(spec), weights, change=lambda t: t[:, :-1])
    with pytest.raises(UnsupportedProblemError, match=r"experts\.down`: a tensor parallel size"):
        made(spec, 0, 8)
    assert cut_rows("down", spec, INNER, 4).K == 64
    other = Block()
    other.activation = "swigluoai"
    with pytest.raises(UnsupportedProblemError, match=r"this block has swigluoai.*--skip"):
        made(spec, layer=other)


def test_a_vllm_with_other_moe_classes_serves_dense_experts_only(monkeypatch):
    from flute.integrations import vllm_config

    class RoutedExperts(nn.Module):
        moe_config = rank_of(0, 1)

    monkeypatch.setattr(vllm_config, "vllm_experts", None)
    make = vllm_config.FluteQuantizationConfig.from_config
    dense = make(CheckpointConfig().to_dict())
    assert dense.get_quant_method(RoutedExperts(), NAME) is None
    skipped = make({"bits": 4, "modules_to_not_convert": ["*.experts.*"]})
    assert skipped.get_quant_method(RoutedExperts(), NAME) is None
    for config in (CheckpointConfig(quantized_experts=True).to_dict(), {"bits": 4}):
        with pytest.raises(UnsupportedProblemError, match=r"other classes for MoE.*--skip"):
            make(config).get_quant_method(RoutedExperts(), NAME)


def test_groups_of_blocks_follow_the_checkpoint_s_overrides():
    from flute.integrations.vllm_experts import expert_spec

    config = CheckpointConfig(
        3, 128, overrides={"model.layers.3.block_sparse_moe.experts.0.w2": {"group_size": 32}}
    )
    assert expert_spec(config, NAME, ("down_proj", "w2")) == QuantSpec(3, 32)
    assert expert_spec(config, NAME, ("gate_proj", "w1")) == QuantSpec(3, 128)
    assert expert_spec(config, "model.layers.13.mlp.experts", ("w2",)) == QuantSpec(3, 128)


def test_dense_experts_are_quantised_as_they_are_on_disk():
    from flute.integrations.vllm_experts import FluteOnlineExpertsMethod

    options = QuantizeOptions(3, 64)
    layer = Block()
    layer.method = FluteOnlineExpertsMethod(NAME, options, rank_of(0, 1))
    loader = {"weight_loader": lambda *_: None}
    layer.method.create_weights(layer, E, H, INNER, torch.bfloat16, **loader)
    assert layer.w13_weight.device.type == "meta"
    gate_up, down = torch.randn(E, 2 * INNER, H).bfloat16(), torch.randn(E, H, INNER).bfloat16()
    for name, dense in (("w13_weight", gate_up), ("w2_weight", down)):
        setattr(layer, name, nn.Parameter(dense, requires_grad=False))
    layer.method.process_weights_after_loading(layer)
    layer.method.process_weights_after_loading(layer)  # vLLM calls it again at the end
    assert not hasattr(layer, "w13_weight")
    for e in range(E):
        parts = [*gate_up[e].chunk(2), down[e]]
        done = [tensors(flute.quantize(part, 3, 64)) for part in parts]
        assert torch.equal(layer.w13_codes[e], torch.cat([d["codes"] for d in done[:2]]))
        assert torch.equal(layer.w13_scales[e], torch.cat([d["scales"] for d in done[:2]]))
        assert torch.equal(layer.w2_codes[e], done[2]["codes"])


# ---- the engine


KINDS = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "decoder_sparse_step": 1,
        "head_dim": 32,
    },
}


@pytest.mark.parametrize("online", [False, True], ids=["checkpoint", "while it loads"])
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_text_of_a_moe_model_is_that_of_transformers(kind, online, tmp_path):
    sizes = {"vocab_size": 8192, "hidden_size": 128, "intermediate_size": 128}
    model = tiny_model(kind, **sizes, **KINDS[kind]).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    dense, folder = tmp_path / "dense", tmp_path / "q"
    model.save_pretrained(dense)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (dense / name).write_bytes((DEMO_MODEL / name).read_bytes())
    quantize_checkpoint(dense, folder, QuantizeOptions(4, 32, method="nf"))
    quantised = flute.from_pretrained(folder, dtype=torch.float32).eval()
    assert any(isinstance(m, LutLinear) and "experts" in n for n, m in quantised.named_modules())
    expected = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        common = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0}
        out = quantised.generate(ids, max_new_tokens=12, min_new_tokens=12, **common)
        expected.append(out[0, ids.shape[1] :].tolist())
    options = {"enforce_eager": True, **({"quantization": "flute"} if online else {})}
    asked = {"FLUTE_BITS": "4", "FLUTE_GROUP_SIZE": "32", "FLUTE_METHOD": "nf"} if online else {}
    options |= {"prompts": PROMPTS, "num_tokens": 12, "max_model_len": 48, "dtype": "float32"}
    assert serve(dense if online else folder, tmp_path, asked, **options) == expected
