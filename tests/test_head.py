"""The quantised output head, tied or not: in memory, on disk, products, commands."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import edit_tensors, folder_bytes, generator, save_tiny, saved_tensors, tiny_model
from torch import nn

import flute
from flute import blockwise, stream
from flute.blockwise import quantize_weight
from flute.checkpoint import CheckpointReader
from flute.cli import main
from flute.errors import CheckpointError
from flute.format import CheckpointConfig, QuantSpec
from flute.linear import LutLinear
from flute.model import QuantizeOptions, quantize_model
from flute.stream import quantize_checkpoint

pytest.importorskip("transformers")

HEAD = {"head_bits": 4, "head_group_size": 32}
FAST = {"method": "nf", **HEAD}
IDS = torch.arange(40)[None]


@torch.no_grad()
def logits(model):
    return nn.Module.float(model)(IDS).logits


# ---- in memory and on disk


@pytest.mark.parametrize("hadamard", [False, True], ids=["", "rotated"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_disk_and_memory_give_the_same_bits(tmp_path, tied, hadamard):
    source, out = tmp_path / "source", tmp_path / "out"
    save_tiny(source, tie_word_embeddings=tied)
    model = flute.from_pretrained(source)
    options = {**FAST, "hadamard": hadamard}
    quantize_checkpoint(source, out, QuantizeOptions(3, 64, **options))
    quantize_model(model, 3, 64, **options)
    assert isinstance(model.lm_head, LutLinear)
    assert not model.config.tie_word_embeddings
    tensors = saved_tensors(out)
    state = model.state_dict()
    assert tensors.keys() == state.keys()
    assert all(torch.equal(tensors[name], state[name]) for name in state)
    assert "lm_head.weight" not in tensors
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    card = (out / "README.md").read_text()
    assert (
        "14 linear layers at 3 bits, groups of 64, output head at 4 bits and groups of 32" in card
    )
    if not hadamard:
        embedding = saved_tensors(source)["model.embed_tokens.weight"]
        assert torch.equal(tensors["model.embed_tokens.weight"], embedding)
        dense = embedding if tied else saved_tensors(source)["lm_head.weight"]
        expected = flute.quantize(dense, 4, 32, method="nf")
        assert torch.equal(tensors["lm_head.scales"], expected.scales)
        assert torch.equal(model.lm_head.quantized_weight().codes, expected.codes)
    again = flute.from_pretrained(out, dtype=torch.float32)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_what_was_quantised_in_memory_is_saved_and_loads(tmp_path, tied):
    save_tiny(tmp_path / "source", tie_word_embeddings=tied)
    model = flute.from_pretrained(tmp_path / "source")
    quantize_model(model, 4, 64, **FAST)
    before = logits(model)
    model.tie_weights()
    model.save_pretrained(tmp_path / "saved")
    assert "lm_head.weight" not in saved_tensors(tmp_path / "saved")
    again = flute.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert torch.equal(logits(again), before)
    assert again.lm_head.spec == QuantSpec(4, 32)


def test_a_tied_model_may_be_stored_under_either_name_or_both(tmp_path):
    source = tmp_path / "source"
    save_tiny(source, tie_word_embeddings=True)
    quantize_checkpoint(source, tmp_path / "by-embedding", QuantizeOptions(4, 64, **FAST))
    expected = saved_tensors(tmp_path / "by-embedding")
    embedding = saved_tensors(source)["model.embed_tokens.weight"]
    edit_tensors(source, {"lm_head.weight": embedding})
    quantize_checkpoint(source, tmp_path / "both", QuantizeOptions(4, 64, **FAST))
    edit_tensors(source, {"model.embed_tokens.weight": None})
    quantize_checkpoint(source, tmp_path / "by-head", QuantizeOptions(4, 64, **FAST))
    for name in ("both", "by-head"):
        found = saved_tensors(tmp_path / name)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    source, out = tmp_path / "source", tmp_path / "out"
    save_tiny(source, tie_word_embeddings=True)
    options = QuantizeOptions(4, 64, **FAST)
    quantize_checkpoint(source, tmp_path / "expected", options)
    rows, done = stream._quantize_rows, []

    def stop(reader, name, *rest):
        if len(done) == 5:
            raise KeyboardInterrupt
        done.append(name)
        yield from rows(reader, name, *rest)

    monkeypatch.setattr(stream, "_quantize_rows", stop)
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(source, out, options)
    monkeypatch.setattr(stream, "_quantize_rows", rows)
    assert "lm_head.weight" in done
    dense = QuantizeOptions(4, 64, method="nf")
    with pytest.raises(CheckpointError, match="interrupted run of another job"):
        quantize_checkpoint(source, out, dense)
    quantize_checkpoint(source, out, options)
    assert folder_bytes(out) == folder_bytes(tmp_path / "expected")


@pytest.mark.parametrize("method", ["mse", "nf", "int"])
@pytest.mark.parametrize("scope", ["tensor", "row"])
def test_a_large_matrix_is_quantised_in_blocks_of_rows(monkeypatch, method, scope):
    weight = torch.randn(96, 64, generator=generator(1)).bfloat16()
    config = CheckpointConfig(4, 32, method=method, table_scope=scope)
    whole = quantize_weight(weight, "lm_head", config, None)
    monkeypatch.setattr(blockwise, "_MAX_WEIGHTS", 64 * 7)
    parts = quantize_weight(weight, "lm_head", config, None)
    assert torch.equal(parts.codes, whole.codes)
    assert torch.equal(parts.scales, whole.scales)
    assert torch.equal(parts.table, whole.table)
    assert len(whole.table) == (96 if scope == "row" else 1)


def test_rows_with_tables_of_their_own_in_blocks(monkeypatch):
    weight = torch.randn(10, 64, generator=generator(1))
    table = torch.randn(10, 16, generator=generator(2))
    config = CheckpointConfig(4, 32, method="table", table_scope="row")
    whole = quantize_weight(weight, "lm_head", config, table)
    monkeypatch.setattr(blockwise, "_MAX_WEIGHTS", 64 * 3)
    parts = quantize_weight(weight, "lm_head", config, table)
    assert torch.equal(parts.codes, whole.codes)
    assert torch.equal(parts.table, table)


# ---- products


@pytest.mark.parametrize("num_tokens", [1, 5, 32])
def test_a_head_on_a_cpu_takes_kernels_and_is_not_dequantised(monkeypatch, num_tokens):
    from flute import reference
    from flute.cpu import library, products

    monkeypatch.delenv("FLUTE_CPU_VARIANT")
    if library.why_not():
        pytest.skip(library.why_not())
    model = tiny_model(vocab_size=1000)
    quantize_model(model, 4, 64, method="nf", head_bits=4, head_group_size=32)
    ids = torch.arange(num_tokens)[None]
    with torch.no_grad():
        expected = model.lm_head.dequantize(torch.bfloat16)
        hidden = model.model(ids).last_hidden_state
        flute.prepare(model)
        assert model.lm_head.cpu_order

        def forbidden(*args, **kwargs):
            raise AssertionError("a weight is dequantised")

        monkeypatch.setattr(products, "_dequantize_into", forbidden)
        monkeypatch.setattr(reference, "dequantize_packed", forbidden)
        out = model.lm_head(hidden)
    exact = hidden.double() @ expected.double().T
    assert float((out.double() - exact).norm() / exact.norm()) < 5e-3


def test_generating_asks_the_head_for_the_last_token_only():
    model = tiny_model()
    quantize_model(model, 4, 64, **FAST)
    seen = []
    model.lm_head.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    model.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert seen == [1, 1, 1]


# ---- commands


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("head") / "dense"
    save_tiny(folder, tie_word_embeddings=True)
    return folder


def test_quantize_and_inspect_name_the_head(source, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["quantize", str(source), str(out), "--bits", "3", "--method", "nf"]
    assert main([*command, "--head-bits", "4", "--head-group-size", "32"]) == 0
    printed = capsys.readouterr().out
    assert "head: lm_head" in printed
    assert "96 x 64, 4 bits, 32, nf" in printed
    assert "3, 64, nf, nf" in printed  # the widths are those of the other layers
    before = sum(map(CheckpointReader(source).num_bytes, CheckpointReader(source).names))
    assert f"{before / 1e6:.2f} MB ->" in printed
    assert main(["inspect", str(out), "--dense", str(source), "--json"]) == 0
    layers = {layer["layer"]: layer for layer in json.loads(capsys.readouterr().out)["layers"]}
    head = layers["lm_head"]
    assert (head["num_bits"], head["group_size"], head["shape"]) == (4, 32, [96, 64])
    assert 0 < head["error"] < 0.02 < layers["model.layers.0.mlp.up_proj"]["error"]


def test_a_row_long_group_and_calibration(source, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["quantize", str(source), str(out), "--head-bits", "3", "--head-group-size", "row"]
    assert main([*command, "--method", "nf"]) == 0
    assert "96 x 64, 3 bits, row, nf" in capsys.readouterr().out
    assert saved_tensors(out)["lm_head.scales"].shape == (96, 1)


def test_tune_asks_for_the_head_s_shape(source, tmp_path):
    from flute.cli.tune import problems_of

    quantize_checkpoint(source, tmp_path / "out", QuantizeOptions(3, 64, **FAST))
    from argparse import Namespace

    common = {"dtype": None, "row_tables": False, "tokens": [range(1, 2)], "scale_dtype": None}
    problems = problems_of(Namespace(model=str(tmp_path / "out"), **common))
    assert [(p.num_bits, p.group_size) for p in problems if p.n == 96] == [(4, 32)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--head-group-size", "32"], "the output head stays dense: give `head_bits`"),
        (["--head-bits", "4", "--skip", "lm_head"], "leaves the output head `lm_head` dense"),
    ],
)
def test_failures_are_one_line(source, tmp_path, capsys, arguments, message):
    assert main(["quantize", str(source), str(tmp_path / "out"), *arguments]) == 1
    printed = capsys.readouterr().err
    assert message in printed
    assert "Traceback" not in printed
    assert not (tmp_path / "out").exists()
