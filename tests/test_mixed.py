"""Mixed width: the choice of bits, what it is measured by, and checkpoints of several widths."""

from __future__ import annotations

import itertools
import json
import re

import huggingface_hub
import pytest
import torch
from helpers import DEMO_MODEL, generator, save_tiny, tiny_model
from transformers import AutoModelForCausalLM

import flute
from flute import LutLinear, quantize_model
from flute.cli import main
from flute.errors import FormatError
from flute.format import CheckpointConfig
from flute.integrations.vllm_layers import parts_of, spec_of_parts
from flute.mixed import Unit, choose_bits, measure_units, units_of
from flute.model import QuantizeOptions, plan_model
from flute.stream import quantize_checkpoint

MERGED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


def windows() -> torch.Tensor:
    return torch.randint(96, (5, 32), generator=generator(5))


def random_units(count: int, size: int = 0) -> list[Unit]:
    rng = generator(count)
    units = []
    for i in range(count):
        loss = float(torch.rand(1, generator=rng))
        weights = size or int(torch.randint(10, 50, (1,), generator=rng))
        units.append(Unit((f"layer{i}",), weights, {2: 16 * loss, 3: 4 * loss, 4: loss}))
    return units


def loss_of(units: list[Unit], bits: dict[str, int]) -> float:
    return sum(unit.losses[bits[unit.layers[0]]] for unit in units)


def size_of(units: list[Unit], bits: dict[str, int]) -> int:
    return sum(unit.num_weights * bits[name] for unit in units for name in unit.layers)


@pytest.mark.parametrize("mean_bits", [2.25, 2.5, 3.0, 3.25, 3.75])
def test_the_choice_is_the_best_of_all_where_units_have_one_size(mean_bits):
    units = random_units(6, size=10)
    chosen = choose_bits(units, mean_bits)
    budget = mean_bits * 60
    every = (
        dict(zip((u.layers[0] for u in units), bits, strict=True))
        for bits in itertools.product((2, 3, 4), repeat=6)
    )
    best = min(loss_of(units, bits) for bits in every if size_of(units, bits) <= budget)
    assert size_of(units, chosen) <= budget
    assert loss_of(units, chosen) == pytest.approx(best)


@pytest.mark.parametrize("mean_bits", [2.25, 3.1, 3.9])
def test_the_budget_is_kept_and_used(mean_bits):
    units = random_units(40)
    total = sum(unit.num_weights for unit in units)
    size = size_of(units, choose_bits(units, mean_bits))
    assert mean_bits * total - 50 <= size <= mean_bits * total


def test_the_ends_of_the_range():
    units = random_units(5)
    assert set(choose_bits(units, 2).values()) == {2}
    assert set(choose_bits(units, 4.0).values()) == {4}
    for wrong in (1.9, 4.1):
        with pytest.raises(
            FormatError, match=re.escape(f"`bits` is {wrong}; expected 2, 3, 4, or")
        ):
            choose_bits(units, wrong)


def test_units_are_the_layers_that_engines_fuse():
    model = tiny_model()
    plan = plan_model(model, QuantizeOptions(3, 32))
    units = units_of(model, list(plan.shapes), windows()[:1])
    leaves = [tuple(name.rpartition(".")[2] for name in unit) for unit in units]
    block = [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)]
    assert leaves == block * 2
    assert sorted(name for unit in units for name in unit) == sorted(plan.shapes)


def test_losses_are_measured_and_the_model_is_put_back():
    model = tiny_model(dtype=torch.float32)
    with torch.no_grad():  # what this layer does drowns all others
        model.model.layers[1].self_attn.o_proj.weight *= 100
        model.lm_head.weight *= 30
    before = {name: t.clone() for name, t in model.state_dict().items()}
    plan = plan_model(model, QuantizeOptions(3, 32))
    told: list[int] = []
    units = measure_units(model, plan, windows(), lambda count, _name: told.append(count))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert sum(told) == sum(N * K for N, K in plan.shapes.values())
    assert all(unit.losses[2] > unit.losses[3] > unit.losses[4] > 0 for unit in units)
    most = max(units, key=lambda unit: unit.losses[3] / unit.num_weights)
    assert most.layers == ("model.layers.1.self_attn.o_proj",)
    assert choose_bits(units, 2.5)["model.layers.1.self_attn.o_proj"] == 4


def some_bits(names) -> dict[str, int]:
    widths = {"self_attn": 4, "gate_proj": 2, "up_proj": 2, "down_proj": 3}
    return {name: next(b for key, b in widths.items() if key in name) for name in names}


@pytest.mark.parametrize("method", ["mse", "gptq"])
def test_a_mixed_checkpoint_loads_everywhere(tmp_path, method):
    save_tiny(tmp_path / "source")
    bits = some_bits(plan_model(tiny_model(), QuantizeOptions(3, 32)).shapes)
    options = QuantizeOptions(3, 32, method, bits_by_layer=bits)
    calibration = windows() if method == "gptq" else None
    quantize_checkpoint(tmp_path / "source", tmp_path / "out", options, calibration=calibration)
    loaded = flute.from_pretrained(tmp_path / "out")
    layers = {n: m for n, m in loaded.named_modules() if isinstance(m, LutLinear)}
    assert {name: layer.spec.num_bits for name, layer in layers.items()} == bits
    memory = AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype="auto")
    quantize_model(memory, 3, 32, method=method, bits_by_layer=bits, calibration=calibration)
    for name in layers:
        expected = memory.get_submodule(name)
        assert torch.equal(layers[name].state_dict()["scales"], expected.state_dict()["scales"])
    saved = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    config = CheckpointConfig.from_dict(saved)
    for i in (0, 1):
        for leaf, width in (("self_attn.qkv_proj", 4), ("mlp.gate_up_proj", 2)):
            parts = parts_of(f"model.layers.{i}.{leaf}", config, MERGED)
            spec = spec_of_parts(parts, config)
            assert len(parts) > 1
            assert spec is not None
            assert spec.num_bits == width


def test_what_does_not_fit_is_named():
    with pytest.raises(FormatError, match=r"names `no\.such`, which is not quantised"):
        plan_model(tiny_model(), QuantizeOptions(3, 32, bits_by_layer={"no.such": 2}))
    with pytest.raises(FormatError, match="layers of several take a family"):
        QuantizeOptions(2, 32, table=[0.0, 1, 2, 3], bits_by_layer={"a": 3})


# ---- the command


def test_the_command(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("It was the best of times, it was the worst of times. " * 400)
    argv = ["quantize", str(DEMO_MODEL), str(tmp_path / "out"), "--bits", "2.5", "--device", "cpu"]
    assert main([*argv, "--json"]) == 1
    assert "--bits 2.5 measures how much each layer matters: give --calibration TEXT" in (
        capsys.readouterr().err
    )
    argv += ["--samples", "2", "--sequence", "64", "--calibration", str(text)]
    assert main([*argv, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    config = CheckpointConfig.from_dict(report["config"])
    model = flute.from_pretrained(tmp_path / "out")
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LutLinear)}
    sizes = {n: m.in_features * m.out_features for n, m in layers.items()}
    mean = sum(m.spec.num_bits * sizes[n] for n, m in layers.items()) / sum(sizes.values())
    assert 2.45 < mean <= 2.5
    assert {config.spec_of(name).num_bits for name in layers} > {2}
    for i in range(6):
        attention = f"model.layers.{i}.self_attn."
        assert len({config.spec_of(f"{attention}{p}_proj") for p in "qkv"}) == 1
    card = (tmp_path / "out" / "README.md").read_text()
    assert re.search(r"\d+ linear layers at 2 bits and \d+ linear layers at \d bits", card)


def test_every_step_of_the_command_takes_the_revision_that_was_asked_for(tmp_path, monkeypatch):
    asked = []

    def download(name, revision=None, **_):
        asked.append((name, revision))
        return str(DEMO_MODEL)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    text = tmp_path / "text.txt"
    text.write_text("It was the best of times, it was the worst of times. " * 400)
    argv = ["quantize", "team/model", str(tmp_path / "out"), "--bits", "2.5", "--device", "cpu"]
    argv += ["--samples", "1", "--sequence", "32", "--calibration", str(text)]
    assert main([*argv, "--revision", "v2"]) == 0
    assert set(asked) == {("team/model", "v2")}


@pytest.mark.parametrize("bits", ["5", "1.5", "4.5", "0"])
def test_bits_out_of_range_are_named(capsys, bits):
    with pytest.raises(SystemExit):
        main(["quantize", "model", "out", "--bits", bits])
    assert f"argument --bits: {bits} is not" in capsys.readouterr().err
