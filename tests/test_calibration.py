"""Calibration: windows of text, Hessians block by block, in memory equal to disk, and resumed."""

from __future__ import annotations

import json
import lzma
import os
import re
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import DEMO_MODEL, edit_tensors, folder_bytes, generator, save_tiny, tiny_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

import flute
from flute import blockwise, layerwise
from flute.block_walk import BlockWalk, explain_out_of_memory, find_blocks
from flute.calibration import CalibrationError, read_documents, sample_windows
from flute.cli import main
from flute.errors import CheckpointError, FormatError, UnsupportedProblemError
from flute.linear import LutLinear
from flute.model import QuantizeOptions, quantize_model
from flute.stream import quantize_checkpoint

LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
GPTQ = QuantizeOptions(3, 32, method="gptq")


@pytest.fixture(autouse=True)
def one_thread():
    """On small matrices torch's threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Letters:
    """A tokenizer of one token per character; 0 is BOS."""

    bos_token_id: int | None = 0

    def __call__(self, text, **_options):
        return {"input_ids": [1 + ord(c) % 90 for c in text if not c.isspace()]}


def windows(samples: int = 4, sequence: int = 24, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 96, (samples, sequence), generator=generator(samples, seed))


# ---- text


def test_windows_are_cut_from_shuffled_pieces_and_open_with_bos():
    text = "".join(chr(33 + (i + i // 997) % 80) for i in range(40000))
    out = sample_windows([text], Letters(), samples=5, sequence=20, seed=1)
    assert out.shape == (5, 20)
    assert out.dtype == torch.int64
    assert bool((out[:, 0] == 0).all())
    steps = out[:, 1:].diff(dim=1)
    assert float((steps == 1).float().mean()) > 0.8  # running text within a window
    assert torch.equal(out, sample_windows([text], Letters(), 5, 20, 1))
    assert not torch.equal(out, sample_windows([text], Letters(), 5, 20, 3))


def test_a_tokenizer_without_bos():
    tokenizer = Letters()
    tokenizer.bos_token_id = None
    out = sample_windows(["abcdefghij"], tokenizer, samples=2, sequence=5)
    assert out.flatten().tolist() == tokenizer("abcdefghij")["input_ids"]


@pytest.mark.parametrize(
    ("texts", "samples", "sequence", "message"),
    [
        ([], 2, 8, "(0 characters) tokenises to nothing. Give another text."),
        (["  \n "], 2, 8, "(4 characters) tokenises to nothing. Give another text."),
        (
            ["abc"],
            2,
            8,
            "has 3 tokens; 2 samples of 8 take 14. Give more text, or fewer or shorter",
        ),
        (["abc"], 0, 8, "`samples` is 0 and `sequence` is 8; expected at least 1 and 2."),
        (["abc"], 1, 1, "`samples` is 1 and `sequence` is 1; expected at least 1 and 2."),
    ],
)
def test_text_that_does_not_suffice(texts, samples, sequence, message):
    with pytest.raises(CalibrationError, match=re.escape(message)):
        sample_windows(texts, Letters(), samples, sequence)


def test_documents_of_files_and_folders(tmp_path):
    (tmp_path / "a.txt").write_text("plain")
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n\n"two"\n')
    (tmp_path / "c.json").write_text('["three", {"text": "four"}]')
    (tmp_path / "d.txt.xz").write_bytes(lzma.compress(b"packed"))
    (tmp_path / "ignored.bin").write_bytes(b"\xff")
    assert read_documents(tmp_path) == ["plain", "one", "two", "three", "four", "packed"]
    assert read_documents(tmp_path / "a.txt") == ["plain"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.txt", b"\xff\xfe\xff", "cannot be read (UnicodeDecodeError"),
        ("bad.json", b"{", "cannot be read (JSONDecodeError"),
        ("bad.jsonl", b'{"body": "x"}', "cannot be read (KeyError"),
        ("number.json", b'[{"text": 3}]', "cannot be read (TypeError"),
        ("bad.xz", b"no", "cannot be read (LZMAError"),
    ],
)
def test_unreadable_text_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CalibrationError, match=re.escape(f"`{tmp_path / name}` {message}")):
        read_documents(tmp_path / name)


def test_missing_text_is_named(tmp_path):
    with pytest.raises(CalibrationError, match="does not exist; expected a text file or a folder"):
        read_documents(tmp_path / "none.txt")
    with pytest.raises(CalibrationError, match="holds no text: expected"):
        read_documents(tmp_path)


# ---- walking


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mixtral"])
def test_hessians_are_those_of_the_whole_model(kind):
    """The walk block by block sees what a forward pass of the whole model sees."""
    model = tiny_model(kind, dtype=torch.float32)
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and "layers" in n]
    expected: dict[str, torch.Tensor] = {}

    def hook(name):
        def add(_module, args):
            x = args[0].detach().flatten(0, -2).double()
            expected[name] = expected.get(name, 0) + x.T @ x

        return add

    hooks = [model.get_submodule(n).register_forward_pre_hook(hook(n)) for n in names]
    for row in windows():
        model(row[None])
    for handle in hooks:
        handle.remove()
    walk = BlockWalk(model, names, windows())
    found: dict[str, torch.Tensor] = {}
    for block in walk.blocks:
        found |= walk.hessians(block)
        walk.advance(block)
    assert found.keys() == expected.keys()
    for name in names:
        scale = expected[name].abs().max()
        assert torch.allclose(found[name].double(), expected[name], atol=1e-4 * float(scale)), name


def test_layers_of_one_input_share_a_hessian():
    model = tiny_model()
    names = [f"model.layers.{i}.{p}" for i in (0, 1) for p in _paths()]
    walk = BlockWalk(model, names, windows())
    found = walk.hessians(walk.blocks[0])
    parts = {name.rpartition(".")[2]: total for name, total in found.items()}
    assert parts["q_proj"] is parts["k_proj"] is parts["v_proj"]
    assert parts["gate_proj"] is parts["up_proj"]
    assert len({id(total) for total in parts.values()}) == 4


def _paths() -> list[str]:
    return [f"self_attn.{p}" for p in LAYERS[:4]] + [f"mlp.{p}" for p in LAYERS[4:]]


def test_nothing_of_the_model_changes_by_walking():
    model = tiny_model().train()
    model.model.layers[0].eval()
    modes = [m.training for m in model.modules()]
    before = {name: t.clone() for name, t in model.state_dict().items()}
    walk = BlockWalk(model, [f"model.layers.0.{p}" for p in _paths()], windows())
    walk.hessians(walk.blocks[0])
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert "forward" not in vars(model.model.layers[0])


def test_later_blocks_see_the_quantised_ones_before_them():
    """The second block's inputs are those of the model whose first block is quantised."""
    model = tiny_model(dtype=torch.float32)
    quantize_model(model, 2, 32, method="gptq", calibration=windows(), skip=("*.layers.1.*",))
    names = [f"model.layers.1.{p}" for p in _paths()]
    walk = BlockWalk(model, names, windows())
    walk.advance(walk.blocks[0])
    expected = walk.hessians(walk.blocks[1])
    other = tiny_model(dtype=torch.float32)
    seen: dict[str, torch.Tensor] = {}
    original = BlockWalk.hessians

    def spy(self, block):
        found = original(self, block)
        seen.update(found)
        return found

    BlockWalk.hessians = spy  # type: ignore[method-assign]
    try:
        quantize_model(other, 2, 32, method="gptq", calibration=windows())
    finally:
        BlockWalk.hessians = original  # type: ignore[method-assign]
    for name in names:
        assert torch.allclose(seen[name], expected[name], rtol=1e-3, atol=1e-3), name


def test_activations_of_nan_are_named():
    model = tiny_model(dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[3] = torch.nan
    message = "`model.layers.1.self_attn.q_proj` is given NaN or Inf by the calibration text"
    with pytest.raises(CalibrationError, match=re.escape(message)):
        quantize_model(model, 4, 32, method="gptq", calibration=windows())


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (None, "method='gptq' needs calibration text"),
        (torch.zeros(3), "`calibration` is torch.float32 of shape (3,); expected int64"),
        (torch.zeros(1, 80, dtype=torch.int64), "have 80 tokens; the model's context is 64"),
        (torch.full((1, 8), 96), "The tokenizer gives id 96; the model knows 96 tokens."),
    ],
)
def test_windows_that_do_not_fit_are_named(calibration, message):
    with pytest.raises(CalibrationError, match=re.escape(message)):
        quantize_model(tiny_model(), 4, 32, method="gptq", calibration=calibration)


def test_calibration_without_use_is_named():
    with pytest.raises(CalibrationError, match="method='mse' uses no calibration text"):
        quantize_model(tiny_model(), 4, 32, calibration=windows())
    with pytest.raises(FormatError, match="method='lnq' needs calibration text, which a model"):
        flute.FluteConfig(method="lnq")


def test_a_layer_outside_of_blocks_is_named():
    model = nn.Sequential(nn.Linear(64, 64))
    with pytest.raises(UnsupportedProblemError, match="`0` is in no decoder block of Sequential"):
        find_blocks(model, ["0"])


def test_an_expert_that_no_token_reaches_is_quantised_without_data():
    block = nn.Module()
    block.used, block.unused = nn.Linear(64, 64), nn.Linear(64, 32)
    block.forward = lambda x: x + block.used(x)  # type: ignore[method-assign]
    walk = BlockWalk.__new__(BlockWalk)
    model = nn.Module()
    model.blocks = nn.ModuleList([block])
    names = ["blocks.0.used", "blocks.0.unused"]
    walk.blocks, walk._device = find_blocks(model, names), torch.device("cpu")
    walk._arguments, walk._hidden = [((), {})], [torch.randn(1, 5, 64, generator=generator(1))]
    found = walk.hessians(walk.blocks[0])
    assert float(found["blocks.0.used"].diagonal().min()) > 0
    assert float(found["blocks.0.unused"].abs().max()) == 0


# ---- whole models


@pytest.mark.parametrize(
    ("method", "scope"), [("gptq", "tensor"), ("lnq", "tensor"), ("lnq", "row")]
)
def test_a_model_in_memory(method, scope):
    model = tiny_model()
    told: list[str] = []
    plan = quantize_model(
        model,
        3,
        32,
        method=method,
        table_scope=scope,
        calibration=windows(),
        progress=lambda name, _count: told.append(name),
    )
    assert sorted(told) == sorted(plan.shapes)
    assert plan.config.table_scope == scope
    layer = model.get_submodule("model.layers.0.mlp.down_proj")
    assert isinstance(layer, LutLinear)
    assert layer.table.shape == ((64 if scope == "row" else 1), 8)
    assert bool(torch.isfinite(model(windows()).logits).all())


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_disk_equals_memory(tmp_path, kind):
    save_tiny(tmp_path / "source", kind)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype="auto")
    quantize_checkpoint(tmp_path / "source", tmp_path / "out", GPTQ, calibration=windows())
    quantize_model(model, 3, 32, method="gptq", calibration=windows())
    written = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in model.state_dict().items():
        assert torch.equal(written[name], tensor.detach()), name
    loaded = flute.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded(windows()).logits, model(windows()).logits)


def test_blocks_are_loaded_one_at_a_time(tmp_path, monkeypatch):
    save_tiny(tmp_path / "source")
    most = 0
    advance = BlockWalk.advance

    def spy(self, block):
        nonlocal most
        loaded = [b for b in self.blocks if not next(b.module.parameters()).is_meta]
        most = max(most, len(loaded))
        advance(self, block)

    monkeypatch.setattr(BlockWalk, "advance", spy)
    quantize_checkpoint(tmp_path / "source", tmp_path / "out", GPTQ, calibration=windows())
    assert most == 1


def test_a_killed_run_goes_on_and_ends_byte_for_byte(tmp_path, monkeypatch):
    save_tiny(tmp_path / "source", num_hidden_layers=3)
    out, expected = tmp_path / "out", tmp_path / "expected"
    quantize_checkpoint(tmp_path / "source", expected, GPTQ, calibration=windows())
    real = layerwise.quantize_block
    calls: list[int] = []

    def dying(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(layerwise, "quantize_block", dying)
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(tmp_path / "source", out, GPTQ, calibration=windows())
    assert not out.exists()
    quantize_checkpoint(tmp_path / "source", out, GPTQ, calibration=windows())
    assert len(calls) == 4  # two blocks, the one that died, and that one again
    assert folder_bytes(out) == folder_bytes(expected)


def test_killed_at_random_moments(tmp_path):
    save_tiny(tmp_path / "source", num_hidden_layers=3)
    out, expected = tmp_path / "out", tmp_path / "expected"
    begin = time.monotonic()
    quantize_checkpoint(tmp_path / "source", expected, GPTQ, calibration=windows())
    duration = time.monotonic() - begin
    for share in (0.3, 0.5, 0.7):
        pid = os.fork()
        if pid == 0:
            try:
                quantize_checkpoint(tmp_path / "source", out, GPTQ, calibration=windows())
            finally:
                os._exit(0)
        time.sleep(share * duration)
        os.kill(pid, 9)
        os.waitpid(pid, 0)
    quantize_checkpoint(tmp_path / "source", out, GPTQ, calibration=windows())
    assert folder_bytes(out) == folder_bytes(expected)


def test_an_interrupted_run_of_another_text_is_refused(tmp_path, monkeypatch):
    save_tiny(tmp_path / "source")

    def die(*_args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(layerwise, "quantize_block", die)
        with pytest.raises(KeyboardInterrupt):
            quantize_checkpoint(tmp_path / "source", tmp_path / "out", GPTQ, calibration=windows())
    other = windows(seed=1)
    with pytest.raises(CheckpointError, match="holds an interrupted run of another job"):
        quantize_checkpoint(tmp_path / "source", tmp_path / "out", GPTQ, calibration=other)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "Use shorter samples (`--sequence`)."),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "Use shorter samples"),
    ],
)
def test_out_of_memory_in_a_block_says_what_needs_less(monkeypatch, error, message):
    def refuse(*_args, **_kwargs):
        raise error

    monkeypatch.setattr(torch.func, "functional_call", refuse)
    told = f"Out of memory in a decoder block on cpu with 24 tokens at a time. {message}"
    with pytest.raises(CalibrationError, match=re.escape(told)):
        quantize_model(tiny_model(), 4, 32, method="gptq", calibration=windows())


def test_out_of_memory_in_a_layer_names_it(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(blockwise, "quantize_calibrated", refuse)
    told = r"Out of memory in quantising `model\.layers\.0\.\S+` on cpu\. Leave the layer dense"
    with pytest.raises(CalibrationError, match=told):
        quantize_model(tiny_model(), 4, 32, method="gptq", calibration=windows())


def test_other_failures_are_passed_on():
    with (
        pytest.raises(RuntimeError, match="shapes differ"),
        explain_out_of_memory("anything", "Wait."),
    ):
        raise RuntimeError("shapes differ")


def test_nan_activations_keep_the_finished_layers(tmp_path):
    save_tiny(tmp_path / "source")
    weights = load_file(tmp_path / "source" / "model.safetensors")
    norm = weights["model.layers.1.input_layernorm.weight"]
    edit_tensors(
        tmp_path / "source",
        {"model.layers.1.input_layernorm.weight": torch.full_like(norm, 3e38)},
    )
    with pytest.raises(CalibrationError, match=r"`model\.layers\.1\.\S+` is given NaN or Inf"):
        quantize_checkpoint(tmp_path / "source", tmp_path / "out", GPTQ, calibration=windows())
    journal = (tmp_path / "out.partial" / ".flute-journal").read_text()
    assert "model.layers.0.mlp.down_proj" in journal


# ---- the command


def test_the_command(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("It was the best of times, it was the worst of times. " * 400)
    argv = ["quantize", str(DEMO_MODEL), str(tmp_path / "out"), "--bits", "3", "--method", "gptq"]
    argv += ["--samples", "2", "--sequence", "64", "--device", "cpu"]
    assert main([*argv, "--calibration", str(text), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["config"]["method"] == "gptq"
    assert flute.from_pretrained(tmp_path / "out") is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "gptq", "calibration": None}, "needs calibration text: give `calibration`"),
        ({"method": "nf"}, "method='nf' uses no calibration text: drop it"),
        ({"method": "gptq", "calibration": "none.txt"}, "`none.txt` does not exist"),
        ({"method": "gptq"}, "samples of 64 take"),
    ],
)
def test_the_command_names_what_is_wrong(tmp_path, capsys, arguments, message):
    (tmp_path / "short.txt").write_text("Too short.")
    given = SimpleNamespace(**{"calibration": str(tmp_path / "short.txt"), **arguments})
    argv = ["quantize", str(DEMO_MODEL), str(tmp_path / "out"), "--sequence", "64"]
    argv += ["--method", given.method]
    argv += ["--calibration", given.calibration] if given.calibration else []
    assert main(argv) == 1
    assert message in capsys.readouterr().err
    assert not Path(tmp_path / "out.partial").exists()


def test_a_model_without_tokenizer(tmp_path, capsys):
    save_tiny(tmp_path / "model")
    (tmp_path / "text.txt").write_text("Some text.")
    argv = ["quantize", str(tmp_path / "model"), str(tmp_path / "out"), "--method", "gptq"]
    assert main([*argv, "--calibration", str(tmp_path / "text.txt")]) == 1
    assert "has no tokenizer that can be loaded" in capsys.readouterr().err
