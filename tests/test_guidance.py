"""Guided weighting: gradients against autograd, what they mean, Hessians, whole models."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from helpers import generator, save_tiny, tiny_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from flute import quantize_model
from flute.block_walk import BlockWalk
from flute.calibration import CalibrationError
from flute.divergence import kl_divergence
from flute.errors import FormatError, UnsupportedProblemError
from flute.guidance import output_weights
from flute.model import QuantizeOptions
from flute.stream import quantize_checkpoint
from flute.training import LearnOptions

LAYER = "model.layers.0.mlp.down_proj"


def windows(count: int = 3) -> torch.Tensor:
    return torch.randint(96, (count, 32), generator=generator(6))


def test_weights_are_squared_gradients_at_the_outputs_averaged_over_groups():
    model = tiny_model(dtype=torch.float32)
    weights = output_weights(model, [LAYER], windows(2), groups=3, seed=7)[LAYER]
    assert weights.shape == (2, 32, 3)
    outputs = []
    model.get_submodule(LAYER).register_forward_hook(
        lambda module, args, out: (out.retain_grad(), outputs.append(out))[0]
    )
    rng = torch.Generator().manual_seed(7)
    for i, ids in enumerate(windows(2)):
        log_p = model(input_ids=ids[None], use_cache=False).logits[0].log_softmax(1)
        drawn = torch.multinomial(log_p.detach().exp(), 1, generator=rng)
        (-log_p.gather(1, drawn).sum()).backward()
        squares = outputs[i].grad[0].square()
        N = squares.shape[1]
        edges = [0, -(-N // 3), -(-N // 3) + -(-(N - -(-N // 3)) // 2), N]
        for g, (a, b) in enumerate(itertools.pairwise(edges)):
            assert torch.allclose(weights[i, :, g], squares[:, a:b].mean(1), rtol=1e-4)


def test_weights_say_what_an_error_of_the_output_costs():
    """Errors of random signs cost sum_t weight_t |e_t|^2 / 2 nats of KL divergence."""
    model = tiny_model(dtype=torch.float64)
    ids = windows(1)
    weights = sum(output_weights(model, [LAYER], ids, 1, seed)[LAYER] for seed in range(48)) / 48
    noise = [torch.zeros(())]
    model.get_submodule(LAYER).register_forward_hook(lambda module, args, out: out + noise[0])
    with torch.no_grad():
        reference = model(input_ids=ids, use_cache=False).logits[0].log_softmax(1)
        costs = []
        for seed in range(48):
            signs = torch.randint(0, 2, (1, 32, 64), generator=generator(seed)) * 2 - 1
            noise[0] = 1e-3 * signs.double()
            moved = model(input_ids=ids, use_cache=False).logits[0].log_softmax(1)
            costs.append(float(kl_divergence(reference, moved).sum()))
    expected = float(weights.sum()) * 64 * 1e-6 / 2
    assert sum(costs) / len(costs) == pytest.approx(expected, rel=0.2)


def test_hessians_are_weighted_by_token():
    model = tiny_model(dtype=torch.float32)
    weights = {
        name: torch.rand(3, 32, 2, generator=generator(8, i))
        for i, name in enumerate(("model.layers.0.self_attn.q_proj", LAYER))
    }
    plain = BlockWalk(model, list(weights), windows())
    guided = BlockWalk(model, list(weights), windows(), token_weights=weights)
    block = guided.blocks[0]
    shared = plain.hessians(block)
    inputs = {name: [] for name in weights}
    for name, kept in inputs.items():
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, kept=kept: kept.append(args[0][0].double())
        )
    for name, found in guided.hessians(block).items():
        x, w = torch.cat(inputs[name]), weights[name].flatten(0, 1).double()
        expected = torch.stack([x.T @ (x * w[:, g : g + 1]) for g in range(2)])
        assert torch.allclose(found.double(), expected, rtol=1e-4, atol=1e-6)
        assert shared[name].shape == found.shape[1:]


def test_the_model_is_left_as_it_was():
    model = tiny_model().train()
    frozen = model.get_parameter(f"{LAYER}.weight").requires_grad_(False)
    output_weights(model, [LAYER], windows(1))
    assert model.training
    assert not frozen.requires_grad
    others = [p for p in model.parameters() if p is not frozen]
    assert all(p.requires_grad and p.grad is None for p in others)
    assert not model.get_input_embeddings()._forward_hooks


@pytest.mark.parametrize(
    ("method", "learn"),
    [("gptq", None), ("lnq", None), ("nfl", LearnOptions("gptq", steps=2))],
)
def test_disk_equals_memory(tmp_path, method, learn):
    save_tiny(tmp_path / "source")
    options = QuantizeOptions(3, 32, method, guided=True, learn=learn)
    quantize_checkpoint(tmp_path / "source", tmp_path / "out", options, calibration=windows())
    written = load_file(tmp_path / "out" / "model.safetensors")
    models = []
    for guided in (True, False):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype="auto")
        options = {"learn": learn, "guided": guided}
        quantize_model(model, 3, 32, method=method, calibration=windows(), **options)
        models.append(model.state_dict())
    for name, tensor in models[0].items():
        assert torch.equal(written[name], tensor.detach()), name
    assert any(not torch.equal(models[1][name], tensor) for name, tensor in models[0].items())


# ---- what is refused


def test_methods_without_hessians_are_refused():
    for method, learn in (("mse", None), ("nfl", None), ("nfl", LearnOptions("nf"))):
        with pytest.raises(FormatError, match=r"`guided` weights Hessians, which '(mse|nf)' has"):
            QuantizeOptions(method=method, learn=learn, guided=True)


def test_gradients_that_are_nan_are_named():
    model = tiny_model(dtype=torch.float32)
    model.get_submodule(LAYER).register_full_backward_hook(
        lambda module, inputs, outputs: (inputs[0] * torch.nan,)
    )
    names = ["model.layers.0.mlp.gate_proj", LAYER]
    message = "The loss's gradient at the output of `model.layers.0.mlp.gate_proj` is NaN"
    with pytest.raises(CalibrationError, match=re.escape(message)):
        output_weights(model, names, windows(1))


def test_a_layer_that_sees_other_tokens_is_named():
    model = tiny_model(dtype=torch.float32)
    layer = model.get_submodule(LAYER)
    inner = layer.forward
    layer.forward = lambda x: inner(x.flatten(0, 1))
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, out: out.unsqueeze(0))
    message = f"`{LAYER}` gives (32,) outputs for (1, 32) tokens: guided weighting needs layers"
    with pytest.raises(UnsupportedProblemError, match=re.escape(message)):
        output_weights(model, [LAYER], windows(1))
