"""nfl: what is learned for one matrix, for a block, and through a whole model."""

from __future__ import annotations

import re

import pytest
import torch
from helpers import folder_bytes, generator, save_tiny, tiny_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import flute
from flute import layerwise, quantize_model
from flute.block_walk import BlockWalk
from flute.calibration import CalibrationError
from flute.errors import FormatError
from flute.methods.nfl import LearnedWeight
from flute.model import QuantizeOptions
from flute.stream import quantize_checkpoint
from flute.training import LearnOptions, learn_block, split_windows


def windows(count: int = 9) -> torch.Tensor:
    return torch.randint(96, (count, 32), generator=generator(5))


# ---- one matrix


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("hold_codes", [False, True])
def test_what_is_learned_starts_at_the_start(per_row, hold_codes):
    weight = torch.randn(6, 128, generator=generator(1))
    table = torch.randn(6 if per_row else 1, 8, generator=generator(2))
    start = flute.quantize(weight, 3, 32, table=table, scale_dtype=torch.float32)
    learned = LearnedWeight(weight, start, hold_codes=hold_codes)
    assert torch.equal(learned.dequantized(), flute.dequantize(start))
    for part in ("codes", "scales", "table"):
        assert torch.equal(getattr(learned.result(), part), getattr(start, part))


def test_gradients_are_those_of_the_product_with_codes_held():
    """d/ds of sum (t[c] s - w)^2 is sum 2 (t[c] s - w) t[c], of each group; d/dt likewise."""
    weight = torch.randn(4, 64, generator=generator(3))
    start = flute.quantize(weight, 2, 32, scale_dtype=torch.float32)
    learned = LearnedWeight(weight, start, hold_codes=False)
    (learned.dequantized() - weight).square().sum().backward()
    values = start.table[0][start.codes.int()].view(4, 2, 32)
    error = 2 * (values * start.scales[:, :, None] - weight.view(4, 2, 32))
    by_scale = (error * values).sum(2) * start.scales  # relative changes
    assert torch.allclose(learned.scale_change.grad, by_scale, atol=1e-5)
    by_entry = [
        float((error * start.scales[:, :, None])[(start.codes == i).view(4, 2, 32)].sum())
        for i in range(4)
    ]
    assert torch.allclose(learned.table_change.grad[0], torch.tensor(by_entry), atol=1e-4)


def test_codes_follow_the_scales_unless_they_are_held():
    weight = torch.randn(4, 64, generator=generator(4))
    start = flute.quantize(weight, 3, 32)
    free, held = (LearnedWeight(weight, start, hold_codes=hold) for hold in (False, True))
    for learned in (free, held):
        learned.scale_change.data.fill_(0.3)
    assert not torch.equal(free.result().codes, start.codes)
    assert torch.equal(held.result().codes, start.codes)
    again = flute.methods.absmax.round_to_table(
        weight.view(4, 2, 32), free.result().scales, start.table
    )
    assert torch.equal(free.result().codes, again)


# ---- a block


def at_first_block(model, layers, count: int = 9):
    walk = BlockWalk(model, layers, windows(count), keep_dense=True)
    block = walk.blocks[0]
    walk.advance_dense(block)
    weights = {name: model.get_parameter(f"{name}.weight").data for name in block.layers}
    start = {name: flute.quantize(weight, 2, 32) for name, weight in weights.items()}
    return walk, block, weights, start


def block_error(walk, block, quantized) -> float:
    values = {name: flute.dequantize(q) for name, q in quantized.items()}
    with torch.no_grad():
        errors = [
            (walk.output(block, i, values) - walk.target(i)).square().sum()
            for i in range(walk.num_windows)
        ]
    return float(sum(errors))


def layers_of(model) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lay" in n]


@pytest.mark.parametrize("tables", [False, True])
def test_a_block_loses_less_than_at_the_start(tables):
    model = tiny_model(dtype=torch.float32)
    walk, block, weights, start = at_first_block(model, layers_of(model))
    options = LearnOptions(steps=60, learning_rate=1e-2, tables=tables)
    learned = learn_block(walk, block, weights, start, options)
    assert block_error(walk, block, learned) < 0.9 * block_error(walk, block, start)
    name = block.layers[0]
    assert torch.equal(learned[name].table, start[name].table) is not tables


def test_what_does_not_hold_on_other_windows_is_dropped():
    model = tiny_model(dtype=torch.float32)
    walk, block, weights, start = at_first_block(model, layers_of(model))
    learned = learn_block(walk, block, weights, start, LearnOptions(steps=1, learning_rate=0.99))
    assert all(torch.equal(learned[name].scales, q.scales) for name, q in start.items())


def test_windows_held_back():
    assert split_windows(17) == ([0, 8, 16], [i for i in range(17) if i % 8])
    assert split_windows(1) == ([0], [0])


# ---- a model


NFL = QuantizeOptions(3, 32, "nfl", learn=LearnOptions(steps=3))


@pytest.mark.parametrize("start", ["mse", "nf", "gptq", "lnq"])
def test_disk_equals_memory(tmp_path, start):
    save_tiny(tmp_path / "source")
    learn = LearnOptions(start, steps=3)
    options = QuantizeOptions(3, 32, "nfl", learn=learn)
    quantize_checkpoint(tmp_path / "source", tmp_path / "out", options, calibration=windows())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype="auto")
    plan = quantize_model(model, 3, 32, method="nfl", learn=learn, calibration=windows())
    written = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in model.state_dict().items():
        assert torch.equal(written[name], tensor.detach()), name
    assert plan.config.method == "nfl"
    assert plan.config.table == ("nf" if start == "nf" else "custom")


def test_a_killed_run_goes_on_and_ends_byte_for_byte(tmp_path, monkeypatch):
    save_tiny(tmp_path / "source", num_hidden_layers=3)
    out, expected = tmp_path / "out", tmp_path / "expected"
    quantize_checkpoint(tmp_path / "source", expected, NFL, calibration=windows())
    real = layerwise.quantize_block
    calls: list[int] = []

    def dying(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(layerwise, "quantize_block", dying)
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(tmp_path / "source", out, NFL, calibration=windows())
    quantize_checkpoint(tmp_path / "source", out, NFL, calibration=windows())
    assert len(calls) == 4
    assert folder_bytes(out) == folder_bytes(expected)


# ---- what is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"start": "int"}, "`start` is 'int'; expected one of ('mse', 'nf', 'gptq', 'lnq')"),
        ({"steps": 0}, "`steps` is 0 and `batch` is 1; expected at least 1."),
        ({"learning_rate": 2.0}, "`learning_rate` is 2; expected a number between 0 and 1"),
    ],
)
def test_bad_options_are_named(arguments, message):
    with pytest.raises(FormatError, match=re.escape(message)):
        LearnOptions(**arguments)


def test_learning_that_ends_in_nan_is_named():
    model = tiny_model(dtype=torch.float32)
    walk, block, weights, start = at_first_block(model, layers_of(model))
    walk._dense[1] = torch.full_like(walk._dense[1], torch.nan)
    message = "The loss of `model.layers.0` is nan at step 1. Use a smaller `learning_rate`"
    with pytest.raises(CalibrationError, match=re.escape(message)):
        learn_block(walk, block, weights, start, LearnOptions(steps=8))


def test_options_of_other_methods_are_refused():
    with pytest.raises(FormatError, match=re.escape("is for method 'nfl'; `method` is 'gptq'.")):
        QuantizeOptions(method="gptq", learn=LearnOptions())
    with pytest.raises(FormatError, match="`table_scope` is 'row'; only 'lnq' learns a table per"):
        QuantizeOptions(method="nfl", table_scope="row")
    QuantizeOptions(method="nfl", table_scope="row", learn=LearnOptions("lnq"))
    with pytest.raises(FormatError, match="method='nfl' learns on text, with whole blocks"):
        flute.quantize(torch.randn(4, 64), method="nfl")
    with pytest.raises(CalibrationError, match="method='nfl' needs calibration text"):
        quantize_model(tiny_model(), 3, 32, method="nfl")
