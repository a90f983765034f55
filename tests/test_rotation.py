"""The rotation: orthogonal, exact, the same on disk as in memory, else refused."""

from __future__ import annotations

import json
import re

import pytest
import torch
from helpers import edit_tensors, generator, save_tiny, tiny_model
from safetensors.torch import load_file

import flute
from flute import LutLinear
from flute.cli import main
from flute.errors import UnsupportedProblemError
from flute.methods.hadamard import random_signs, rotate_columns, rotate_rows
from flute.model import QuantizeOptions, quantize_model
from flute.rotation import RotatedReader, rotate_model
from flute.stream import quantize_checkpoint


def windows() -> torch.Tensor:
    return torch.randint(96, (4, 32), generator=generator(5))


@pytest.mark.parametrize(("d", "n"), [(64, 64), (48, 48), (16, 64), (7, 14)])
def test_the_rotation_is_orthogonal(d, n):
    R = rotate_rows(torch.eye(n, dtype=torch.float64), random_signs(d, 3))
    assert torch.allclose(R @ R.T, torch.eye(n, dtype=torch.float64), atol=1e-12)
    x = torch.randn(5, n, dtype=torch.float64, generator=generator(n))
    assert torch.allclose(rotate_rows(x, random_signs(d, 3)), x @ R)
    assert torch.allclose(rotate_columns(x.T, random_signs(d, 3)), R.T @ x.T)


def test_a_spike_is_spread_evenly():
    spread = rotate_rows(torch.eye(64)[:1], random_signs(64, 0))
    assert torch.allclose(spread.abs(), torch.full((1, 64), 1 / 8))


def with_norms(model):
    """Norms and biases that are not ones and zeros."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.copy_(1 + 0.5 * torch.randn(p.shape, generator=generator(len(name))))
    return model


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("qwen2", {}),
    ],
)
def test_a_rotated_model_computes_the_same(kind, changes):
    model = with_norms(tiny_model(kind, dtype=torch.float32, **changes))
    before = model(windows()).logits
    first = model.model.layers[0].mlp.up_proj.weight.clone()
    rotate_model(model)
    assert torch.allclose(model(windows()).logits, before, atol=2e-5)
    assert not torch.allclose(model.model.layers[0].mlp.up_proj.weight, first, atol=1e-2)
    assert bool((model.model.norm.weight == 1).all())


def test_outliers_cost_less_after_rotation():
    """One wide column in each group takes the others' accuracy; rotated, all count alike."""
    model = tiny_model(dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[:, ::32] *= 20
    weight = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    error = (flute.dequantize(flute.quantize(weight, 3, 32)) - weight).square()
    ordinary = [k for k in range(64) if k % 32]
    assert float(error[:, ordinary].sum() / weight[:, ordinary].square().sum()) > 0.1
    rotate_model(model)
    rotated = model.model.layers[0].mlp.up_proj.weight.detach()
    error = (flute.dequantize(flute.quantize(rotated, 3, 32)) - rotated).square()
    assert float(error.sum() / rotated.square().sum()) < 0.035


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("method", ["mse", "gptq"])
def test_disk_equals_memory(tmp_path, tied, method):
    save_tiny(tmp_path / "source", tie_word_embeddings=tied)
    options = QuantizeOptions(4, 32, method, hadamard=True)
    calibration = windows() if method == "gptq" else None
    quantize_checkpoint(tmp_path / "source", tmp_path / "out", options, calibration=calibration)
    model = flute.from_pretrained(tmp_path / "source")
    quantize_model(model, 4, 32, method=method, hadamard=True, calibration=calibration)
    written = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in model.state_dict().items():
        assert torch.equal(written[name], tensor.detach()), name
    loaded = flute.from_pretrained(tmp_path / "out")
    assert loaded.config.tie_word_embeddings is False
    assert isinstance(loaded.model.layers[0].mlp.up_proj, LutLinear)
    assert torch.equal(loaded(windows()).logits, model(windows()).logits)


def test_a_rotated_checkpoint_is_read_as_the_rotated_model(tmp_path):
    model = save_tiny(tmp_path / "source", dtype=torch.float32, tie_word_embeddings=True)
    rotate_model(model)
    reader = RotatedReader(tmp_path / "source")
    assert sorted(reader.names) == sorted(model.state_dict())
    for name, tensor in model.state_dict().items():
        assert torch.equal(reader.tensor(name), tensor), name
        assert torch.equal(reader.rows(name, 1, 3), tensor[1:3])
        assert torch.equal(torch.cat(list(reader.blocks(name, 256))), tensor)


def test_the_command(tmp_path, capsys):
    save_tiny(tmp_path / "source")
    argv = ["quantize", str(tmp_path / "source"), str(tmp_path / "out"), "--group-size", "32"]
    assert main([*argv, "--hadamard", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layers"] == 14


def test_other_models_are_refused(tmp_path):
    model = tiny_model("mixtral")
    with pytest.raises(UnsupportedProblemError, match="model_type 'mixtral' exactly; expected"):
        rotate_model(model)
    save_tiny(tmp_path / "source")
    edit_tensors(tmp_path / "source", {"model.layers.0.adapter.weight": torch.ones(2, 2)})
    message = "This llama model has `model.layers.0.adapter.weight`, so no rotation can be folded"
    with pytest.raises(UnsupportedProblemError, match=re.escape(message)):
        RotatedReader(tmp_path / "source")
