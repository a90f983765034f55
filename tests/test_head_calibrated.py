"""The output head by methods that read a text: its Hessian, blocks of rows, resuming."""

from __future__ import annotations

import pytest
import torch
from helpers import edit_tensors, folder_bytes, generator, save_tiny, saved_tensors, tiny_model
from torch import nn

import flute
from flute import blockwise, stream
from flute.calibration import CalibrationError
from flute.errors import FormatError
from flute.format import CheckpointConfig, QuantSpec
from flute.mixed import measure_units
from flute.model import QuantizeOptions, plan_model, quantize_model
from flute.stream import quantize_checkpoint
from flute.training import LearnOptions

pytest.importorskip("transformers")

HEAD = {"head_bits": 4, "head_group_size": 32}
IDS = torch.arange(40)[None]


@torch.no_grad()
def logits(model):
    return nn.Module.float(model)(IDS).logits


def windows(count=6):
    return torch.randint(0, 96, (count, 32), generator=generator(3))


CALIBRATED = {
    "gptq": {"method": "gptq"},
    "lnq, table per row": {"method": "lnq", "table_scope": "row"},
    "nfl": {"method": "nfl", "learn": LearnOptions(steps=2)},
    "nfl, end to end": {"method": "nfl", "learn": LearnOptions(steps=2, end_to_end=True)},
    "gptq, guided, rotated": {"method": "gptq", "guided": True, "hadamard": True},
}


@pytest.mark.parametrize("name", CALIBRATED)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_disk_and_memory_give_the_same_head(tmp_path, name, tied):
    source, out = tmp_path / "source", tmp_path / "out"
    save_tiny(source, tie_word_embeddings=tied)
    options = {**CALIBRATED[name], **HEAD}
    quantize_checkpoint(source, out, QuantizeOptions(3, 64, **options), calibration=windows())
    tensors = saved_tensors(out)
    model = flute.from_pretrained(source)
    quantize_model(model, 3, 64, calibration=windows(), **options)
    state = model.state_dict()
    assert tensors.keys() == state.keys()
    heads = [key for key in state if key.startswith("lm_head")]
    assert all(torch.equal(tensors[key], state[key]) for key in heads)
    assert tensors["lm_head.table"].shape == (96 if "row" in name else 1, 16)
    again = flute.from_pretrained(out, dtype=torch.float32)
    assert torch.equal(logits(again), logits(model))
    if "nfl" in name:  # no Hessian: as without data
        key = "model.embed_tokens.weight" if tied else "lm_head.weight"
        expected = flute.quantize(saved_tensors(source)[key], 4, 32, method="mse")
        assert torch.equal(tensors["lm_head.scales"], expected.scales)


def by_hessian(dense, quantized, hessian):
    """Squared error of a head's logits."""
    error = dense.double() - flute.dequantize(quantized).double()
    return float(((error @ hessian.double()) * error).sum())


@pytest.mark.parametrize("method", ["gptq", "lnq"])
def test_the_head_s_error_is_fed_back_by_what_enters_it(tmp_path, method):
    """The Hessian is that of the final norm's outputs, the blocks being quantised."""
    source, out = tmp_path / "source", tmp_path / "out"
    save_tiny(source, tie_word_embeddings=True)
    with torch.no_grad():  # so that columns count differently
        norm = torch.linspace(0.1, 4, 64).bfloat16()
        edit_tensors(source, {"model.norm.weight": norm})
    options = QuantizeOptions(3, 64, method=method, head_bits=2, head_group_size=32)
    quantize_checkpoint(source, out, options, calibration=windows(16))
    model, hessian = flute.from_pretrained(out), torch.zeros(64, 64)
    with torch.no_grad():
        for ids in windows(16):
            x = model.model(ids[None]).last_hidden_state[0].float()
            hessian += x.T @ x
    dense = saved_tensors(source)["model.embed_tokens.weight"]
    ours = by_hessian(dense, model.lm_head.quantized_weight(), hessian)
    oracle = flute.quantize(dense, 2, 32, method="gptq", hessian=hessian)
    assert ours == pytest.approx(by_hessian(dense, oracle, hessian), rel=0.05)
    assert ours < 0.8 * by_hessian(dense, flute.quantize(dense, 2, 32), hessian)


@pytest.mark.parametrize("per_row", [False, True], ids=["one table", "a table per row"])
def test_a_head_in_blocks_of_rows(monkeypatch, per_row):
    weight = torch.randn(96, 64, generator=generator(1)).bfloat16()
    x = torch.randn(500, 64, generator=generator(2)) * torch.linspace(0.1, 3, 64)
    table = torch.randn(96, 16, generator=generator(3)) if per_row else None
    config = CheckpointConfig(4, 32, method="gptq", table_scope="row" if per_row else "tensor")

    def quantized():
        arguments = (weight.shape, "lm_head", config, table, x.T @ x)
        return list(blockwise.quantize_head(lambda a, b: weight[a:b], *arguments))

    (whole,) = quantized()
    monkeypatch.setattr(blockwise, "_HEAD_WEIGHTS", 64 * 7)
    parts = quantized()
    assert len(parts) == 14
    both = blockwise.joined(parts)
    assert torch.equal(both.table, whole.table)
    assert float((both.codes != whole.codes).float().mean()) < 0.01  # sums of other shapes round
    expected = flute.quantize(weight, 4, 32, method="gptq", table=table, hessian=x.T @ x)
    assert torch.equal(whole.codes, expected.codes)
    weight[90, 5] = torch.nan
    with pytest.raises(FormatError, match=r"`lm_head\.weight` holds NaN"):
        quantized()


def test_an_interrupted_run_with_a_hessian_goes_on(tmp_path, monkeypatch):
    """After the last block: the blocks are read back, and the head is quantised as it would be."""
    source, out = tmp_path / "source", tmp_path / "out"
    save_tiny(source, tie_word_embeddings=True)
    options = QuantizeOptions(3, 64, method="gptq", **HEAD)
    quantize_checkpoint(source, tmp_path / "expected", options, calibration=windows())
    produce = stream._calibrated_head

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(stream, "_calibrated_head", stop)
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(source, out, options, calibration=windows())
    monkeypatch.setattr(stream, "_calibrated_head", produce)
    quantize_checkpoint(source, out, options, calibration=windows())
    assert folder_bytes(out) == folder_bytes(tmp_path / "expected")


def test_inputs_of_a_head_that_are_no_numbers(tmp_path):
    model = tiny_model()
    model.model.norm.weight.data[3] = torch.inf
    with pytest.raises(CalibrationError, match="`lm_head` is given NaN or Inf by the calibration"):
        quantize_model(model, 3, 64, method="gptq", calibration=windows(), **HEAD)


def test_mixed_widths_leave_the_head_its_own():
    model = tiny_model()
    dense = QuantizeOptions(3, 64)
    units = measure_units(model, plan_model(model, dense), windows())
    assert all("lm_head" not in unit.layers for unit in units)
    bits = {name: 2 for unit in units for name in unit.layers}
    config = plan_model(model, QuantizeOptions(3, 64, bits_by_layer=bits, **HEAD)).config
    assert config.spec_of("lm_head") == QuantSpec(4, 32)
    assert config.spec_of("model.layers.0.mlp.up_proj") == QuantSpec(2, 64)
