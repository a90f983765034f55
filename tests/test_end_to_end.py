"""nfl, end to end: the loss, what is learned on it, and whole models in memory and on disk."""

from __future__ import annotations

import contextlib
import re
from types import SimpleNamespace

import pytest
import torch
from helpers import DEMO_MODEL, folder_bytes, generator, save_tiny, tiny_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import flute
from flute import end_to_end, quantize_model, stream
from flute.calibration import CalibrationError
from flute.cli import main
from flute.divergence import kl_divergence
from flute.end_to_end import learn_model
from flute.model import QuantizeOptions
from flute.stream import quantize_checkpoint
from flute.training import LearnOptions


def windows(count: int = 9) -> torch.Tensor:
    return torch.randint(96, (count, 32), generator=generator(9))


def sharp_model():
    """A model whose output depends on its layers: the other one's norms are near zero."""
    model = tiny_model(dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.ones_like(parameter) if "norm" in name else 2 * parameter)
    return model


def at_start(model):
    layers = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lay" in n]
    weights = {name: model.get_parameter(f"{name}.weight").data for name in layers}
    start = {name: flute.quantize(weight, 2, 32, method="nf") for name, weight in weights.items()}
    return weights, start


@torch.no_grad()
def loss(model, quantized) -> float:
    """Divergence on all windows, by other functions than those under test."""
    ids = windows()
    reference = model(input_ids=ids).logits.log_softmax(2).flatten(0, 1)
    kept = {name: model.get_parameter(f"{name}.weight").data.clone() for name in quantized}
    for name, q in quantized.items():
        model.get_parameter(f"{name}.weight").data.copy_(flute.dequantize(q))
    own = model(input_ids=ids).logits.log_softmax(2).flatten(0, 1)
    for name, weight in kept.items():
        model.get_parameter(f"{name}.weight").data.copy_(weight)
    return float(kl_divergence(reference, own).mean())


@pytest.mark.parametrize("tables", [False, True])
@pytest.mark.parametrize(("start_method", "share"), [("nf", 0.95), ("gptq", 0.8)])
def test_the_model_loses_less_than_at_the_start(tables, start_method, share):
    model = sharp_model()
    weights, start = at_start(model)
    options = LearnOptions(
        start_method, steps=40, learning_rate=1e-2, tables=tables, end_to_end=True
    )
    said: list[str] = []
    learned = learn_model(model, weights, start, windows(), options, said.append)
    assert loss(model, learned) < share * loss(model, start)
    assert len(said) == 40
    name = next(iter(start))
    assert torch.equal(learned[name].table, start[name].table) is not tables
    held = torch.equal(learned[name].codes, start[name].codes)
    assert held is (start_method == "gptq")


def test_the_first_step_follows_the_gradient_of_the_divergence():
    """Adam's first step is the learning rate times the sign of each gradient."""
    model = sharp_model()
    weights, start = at_start(model)
    options = LearnOptions(steps=1, batch=2, learning_rate=1e-3, end_to_end=True)
    start = {  # scales in fp32, so that a step shows
        name: flute.quantize(weight, 2, 32, scale_dtype=torch.float32)
        for name, weight in weights.items()
    }
    learned = learn_model(model, weights, start, windows(), options)
    name = "model.layers.1.mlp.up_proj"
    scales = start[name].scales.clone().requires_grad_()
    values = start[name].table[0][start[name].codes.int()].view(*scales.shape, 32)
    own = {f"{n}.weight": flute.dequantize(q) for n, q in start.items()}
    own[f"{name}.weight"] = (values * scales[:, :, None]).flatten(1)
    ids = windows()[1:3]  # the first is held back
    reference = model(input_ids=ids).logits.log_softmax(2).flatten(0, 1).detach()
    logits = torch.func.functional_call(model, own, (), {"input_ids": ids}).logits
    kl_divergence(reference, logits.log_softmax(2).flatten(0, 1)).mean().backward()
    by_change = scales.grad * scales.detach()
    sure = by_change.abs() > 1e-3 * by_change.abs().max()
    moved = (learned[name].scales / start[name].scales - 1)[sure]
    assert torch.allclose(moved, -1e-3 * by_change.sign()[sure], rtol=0.02, atol=0)


def test_what_does_not_hold_on_other_windows_is_dropped_and_the_model_is_left_alone():
    model = sharp_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights, start = at_start(model)
    options = LearnOptions(steps=1, learning_rate=0.99, end_to_end=True)
    learned = learn_model(model, weights, start, windows(), options)
    assert all(torch.equal(learned[name].scales, q.scales) for name, q in start.items())
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("start", "guided", "tied", "hadamard"),
    [("mse", False, False, False), ("lnq", True, True, False), ("gptq", True, True, True)],
)
def test_disk_equals_memory(tmp_path, start, guided, tied, hadamard):
    save_tiny(tmp_path / "source", tie_word_embeddings=tied)
    learn = LearnOptions(start, steps=3, end_to_end=True)
    options = QuantizeOptions(3, 32, "nfl", learn=learn, guided=guided, hadamard=hadamard)
    said: list[str] = []
    progress = SimpleNamespace(
        start=lambda total, done: None, advance=lambda count, name: said.append(name)
    )
    quantize_checkpoint(
        tmp_path / "source", tmp_path / "out", options, calibration=windows(), progress=progress
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype="auto")
    options = {"learn": learn, "guided": guided, "hadamard": hadamard}
    quantize_model(model, 3, 32, method="nfl", calibration=windows(), **options)
    written = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in model.state_dict().items():
        if name in written or not name.startswith("lm_head"):
            assert torch.equal(written[name], tensor.detach()), name
    assert any(text.startswith("learning, step 3 of 3, KL ") for text in said)


def test_a_killed_run_learns_again_and_ends_byte_for_byte(tmp_path, monkeypatch):
    save_tiny(tmp_path / "source")
    out, expected = tmp_path / "out", tmp_path / "expected"
    options = QuantizeOptions(3, 32, "nfl", learn=LearnOptions(steps=2, end_to_end=True))
    quantize_checkpoint(tmp_path / "source", expected, options, calibration=windows())
    real = end_to_end.learn_model

    def dying(*args):
        real(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(end_to_end, "learn_model", dying)
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(tmp_path / "source", out, options, calibration=windows())
    assert not out.exists()
    monkeypatch.setattr(end_to_end, "learn_model", real)
    quantize_checkpoint(tmp_path / "source", out, options, calibration=windows())
    assert folder_bytes(out) == folder_bytes(expected)


def test_a_loss_that_is_nan_is_named():
    model = sharp_model()
    weights, start = at_start(model)
    model.lm_head.weight.data[0, 0] = torch.nan
    message = "The divergence from the dense model is nan at step 1. Use a smaller `learning_rate`"
    with pytest.raises(CalibrationError, match=re.escape(message)):
        learn_model(model, weights, start, windows(), LearnOptions(steps=2, end_to_end=True))


# ---- the command


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--learn-end-to-end"], (True, False, "mse")),
        (["--learn-from", "gptq", "--guided"], (False, True, "gptq")),
        (["--learn-from", "lnq", "--guided", "--learn-end-to-end"], (True, True, "lnq")),
    ],
)
def test_the_command_passes_on_what_is_asked_for(tmp_path, monkeypatch, arguments, expected):
    text = tmp_path / "text.txt"
    text.write_text("It was the best of times, it was the worst of times. " * 40)
    asked = []

    def keep(source, out, options, **rest):
        asked.append(options)
        raise KeyboardInterrupt

    monkeypatch.setattr(stream, "quantize_checkpoint", keep)
    argv = ["quantize", str(DEMO_MODEL), str(tmp_path / "out"), "--method", "nfl", *arguments]
    argv += ["--calibration", str(text), "--samples", "2", "--sequence", "32", "--device", "cpu"]
    with contextlib.suppress(KeyboardInterrupt):
        main(argv)
    learn = asked[0].learn
    assert (learn.end_to_end, asked[0].guided, learn.start) == expected


def test_the_command_refuses_guided_weighting_of_other_methods(tmp_path, capsys):
    argv = ["quantize", str(DEMO_MODEL), str(tmp_path / "out"), "--guided"]
    assert main(argv) == 1
    message = "`guided` weights Hessians, which 'mse' has none of: use one of ('gptq', 'lnq')"
    assert message in capsys.readouterr().err
