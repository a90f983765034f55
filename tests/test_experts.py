"""MoE experts: split, quantised, stored as a matrix each, and loaded again."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import tiny_model
from safetensors import safe_open

import flute
from flute.cli import main
from flute.errors import UnsupportedProblemError
from flute.experts import PROJECTIONS, SplitExperts, split_experts
from flute.linear import LutLinear
from flute.model import QuantizeOptions
from flute.stream import quantize_checkpoint

QWEN = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
KINDS = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"decoder_sparse_step": 1, **QWEN},
    "qwen2_moe": {"decoder_sparse_step": 1, "shared_expert_intermediate_size": 64, **QWEN},
}
IDS = torch.tensor([[5, 9, 20, 31, 7, 77, 3, 50]])


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def dequantised(model, quantised):
    """Put the quantised model's weights, dequantised, into a dense model with fused experts."""
    state = model.state_dict()
    for name, module in quantised.named_modules():
        if isinstance(module, SplitExperts):
            parts = [
                [module.get_submodule(f"{e}.{n}").dequantize() for n in module.names]
                for e in range(module.num_experts)
            ]
            state[f"{name}.gate_up_proj"].copy_(torch.stack([torch.cat(p[:2]) for p in parts]))
            state[f"{name}.down_proj"].copy_(torch.stack([p[2] for p in parts]))
        elif isinstance(module, LutLinear) and f"{name}.weight" in state:
            state[f"{name}.weight"].copy_(module.dequantize())
    return model


def test_split_experts_compute_what_fused_ones_do(kind):
    model = tiny_model(kind, **KINDS[kind]).float()
    before = logits(model)
    assert split_experts(model) == [f"model.layers.{i}.mlp.experts" for i in range(2)]
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
    assert split_experts(model) == []


def test_a_checkpoint_with_experts_round_trips(kind, tmp_path):
    dense = tiny_model(kind, **KINDS[kind]).float()
    dense.save_pretrained(tmp_path / "dense")
    plan = quantize_checkpoint(tmp_path / "dense", tmp_path / "q", QuantizeOptions(4, 32))
    config = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    assert config["quantized_experts"] is True
    with safe_open(tmp_path / "q" / "model.safetensors", "pt") as file:
        names = set(file.keys())
    parent = "block_sparse_moe" if kind == "mixtral" else "mlp"
    for projection in PROJECTIONS[kind]:
        for tensor in ("codes", "scales", "table"):
            assert f"model.layers.1.{parent}.experts.3.{projection}.{tensor}" in names
    assert sum("experts" in name for name in plan.model_plan.shapes) == 2 * 4 * 3
    loaded = flute.from_pretrained(tmp_path / "q", dtype=torch.float32)
    experts = loaded.model.layers[0].mlp.experts
    assert all(isinstance(experts.get_submodule(f"2.{n}"), LutLinear) for n in PROJECTIONS[kind])
    expected = logits(dequantised(dense, loaded))
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-4)
    loaded.save_pretrained(tmp_path / "again")
    again = flute.from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert torch.equal(logits(again), logits(loaded))


def test_a_model_in_memory_is_quantised_alike(kind, tmp_path):
    dense = tiny_model(kind, **KINDS[kind]).float()
    dense.save_pretrained(tmp_path / "dense")
    quantize_checkpoint(tmp_path / "dense", tmp_path / "q", QuantizeOptions(3, 32))
    loaded = flute.from_pretrained(tmp_path / "q", dtype=torch.float32)
    flute.quantize_model(dense, num_bits=3, group_size=32)
    here, there = dense.state_dict(), loaded.state_dict()
    assert here.keys() == there.keys()
    assert all(torch.equal(here[name], there[name]) for name in here)


def test_experts_are_quantised_all_or_none(tmp_path):
    model = tiny_model("mixtral", **KINDS["mixtral"])
    model.save_pretrained(tmp_path / "dense")
    some = QuantizeOptions(4, 32, skip=("*.0.mlp.experts.*.w2",))
    with pytest.raises(UnsupportedProblemError, match=r"4 of 24 expert matrices would stay dense"):
        quantize_checkpoint(tmp_path / "dense", tmp_path / "q", some)
    options = QuantizeOptions(4, 32, skip=("*.experts.*",))
    quantize_checkpoint(tmp_path / "dense", tmp_path / "q", options)
    loaded = flute.from_pretrained(tmp_path / "q", dtype=torch.float32)
    assert not any(isinstance(m, SplitExperts) for m in loaded.modules())
    fused = loaded.model.layers[0].mlp.experts.gate_up_proj
    assert torch.equal(fused, model.model.layers[0].mlp.experts.gate_up_proj.float())


def test_inspect_finds_the_groups_of_ragged_experts(tmp_path, capsys):
    model = tiny_model("mixtral", intermediate_size=96, num_local_experts=2)
    model.save_pretrained(tmp_path / "dense")
    with pytest.warns(UserWarning, match="does not divide the rows of 4 layers"):
        quantize_checkpoint(tmp_path / "dense", tmp_path / "q", QuantizeOptions(4, 64))
    assert main(["inspect", str(tmp_path / "q"), "--json"]) == 0
    layers = {layer["layer"]: layer for layer in json.loads(capsys.readouterr().out)["layers"]}
    name = "model.layers.1.block_sparse_moe.experts.1.w{}"
    down, gate = layers[name.format(2)], layers[name.format(1)]
    assert (down["shape"], down["group_size"]) == ([64, 96], 32)
    assert (gate["shape"], gate["group_size"]) == ([96, 64], 64)


def test_a_tensor_of_an_expert_that_is_missing_is_named(tmp_path):
    from helpers import edit_tensors

    tiny_model("qwen3_moe", **KINDS["qwen3_moe"]).save_pretrained(tmp_path / "dense")
    quantize_checkpoint(tmp_path / "dense", tmp_path / "q", QuantizeOptions(4, 32))
    for file in (tmp_path / "q").glob("*.index.json"):
        file.unlink()
    edit_tensors(tmp_path / "q", {"model.layers.1.mlp.experts.3.up_proj.scales": None})
    with pytest.raises(flute.errors.CheckpointError, match=r"experts\.3\.up_proj\.scales"):
        flute.from_pretrained(tmp_path / "q")
