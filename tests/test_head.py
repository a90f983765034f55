"""The quantised output head: which it is, its bits and groups, tied to the embedding or not."""

from __future__ import annotations

import json
import re

import pytest
import torch
from helpers import edit_tensors, folder_bytes, generator, save_tiny, tiny_model
from safetensors.torch import load_file
from torch import nn

import flute
from flute import blockwise, stream
from flute.blockwise import quantize_weight
from flute.calibration import CalibrationError
from flute.checkpoint import CheckpointReader
from flute.cli import main
from flute.dense import check_head, output_head, tied_embedding, untied, why_dense
from flute.errors import CheckpointError, FormatError, UnsupportedProblemError
from flute.format import CheckpointConfig, QuantSpec
from flute.linear import LutLinear
from flute.mixed import measure_units
from flute.model import QuantizeOptions, plan_model, quantize_model
from flute.stream import quantize_checkpoint
from flute.training import LearnOptions

transformers = pytest.importorskip("transformers")

HEAD = {"head_bits": 4, "head_group_size": 32}
FAST = {"method": "nf", **HEAD}
IDS = torch.arange(40)[None]


def loaded(folder):
    return load_file(folder / "model.safetensors")


@torch.no_grad()
def logits(model):
    return nn.Module.float(model)(IDS).logits


def windows(count=6):
    return torch.randint(0, 96, (count, 32), generator=generator(3))


# ---- the plan


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_is_planned_if_it_has_bits(tied):
    model = tiny_model(tie_word_embeddings=tied)
    plan = plan_model(model, QuantizeOptions(3, 64, **HEAD))
    assert plan.head == plan.config.quantized_head == "lm_head"
    assert plan.shapes["lm_head"] == (96, 64)
    assert plan.dense == {}
    assert set(plan.shapes) - set(plan.body) == {"lm_head"}
    assert plan.config.spec_of("lm_head") == QuantSpec(4, 32)
    assert plan.config.overrides == {"lm_head": {"num_bits": 4, "group_size": 32}}
    assert {plan.config.spec_of(name) for name in plan.body} == {QuantSpec(3, 64)}
    assert (tied_embedding(model) == "model.embed_tokens.weight") is tied


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"head_bits": 4}, {}),
        ({"head_bits": 2}, {"num_bits": 2}),
        ({"head_bits": 4, "head_group_size": 32}, {"group_size": 32}),
        ({"head_bits": 3, "head_group_size": -1}, {"num_bits": 3, "group_size": -1}),
    ],
)
def test_the_config_says_how_the_head_differs(options, expected):
    config = plan_model(tiny_model(), QuantizeOptions(4, 64, **options)).config
    assert config.overrides == ({"lm_head": expected} if expected else {})
    assert CheckpointConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_config_without_a_quantised_head_is_as_it_was():
    assert "quantized_head" not in CheckpointConfig().to_dict()
    config = CheckpointConfig(quantized_head="lm_head").to_dict()
    assert config["quantized_head"] == "lm_head"
    for bad in ({"quantized_head": True}, {"modules_to_not_convert": ["lm_head"]}):
        with pytest.raises(FormatError, match=r"`quantized_head` is .* the name of the output"):
            CheckpointConfig.from_dict({**config, **bad})


def test_a_group_that_does_not_divide_the_hidden_size():
    model = tiny_model(hidden_size=96, intermediate_size=96, head_dim=16)
    with pytest.warns(UserWarning, match=r"`lm_head` \(K=96: 32\)"):
        plan = plan_model(model, QuantizeOptions(4, 32, head_bits=4, head_group_size=64))
    assert plan.config.spec_of("lm_head") == QuantSpec(4, 32)
    model = tiny_model(hidden_size=80, intermediate_size=80, head_dim=20)
    options = QuantizeOptions(4, -1, head_bits=4, head_group_size=128)
    message = (
        "No group of 32 .. 128 weights divides the K=80 input features of the output head "
        "`lm_head`. Use one scale per row for it (`head_group_size` -1, `--head-group-size row`), "
        "or leave it dense (no `--head-bits`)."
    )
    with pytest.raises(FormatError, match=re.escape(message)):
        plan_model(model, options)
    plan = plan_model(model, QuantizeOptions(4, -1, head_bits=4))
    assert plan.config.spec_of("lm_head") == QuantSpec(4, -1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_bits": 5}, r"Of the output head: `num_bits` is 5; expected one of \(2, 3, 4\)"),
        ({"head_bits": 4, "head_group_size": 48}, "Of the output head: `group_size` is 48"),
        ({"head_group_size": 32}, r"the output head stays dense: give `head_bits` \(`--head-bits`"),
        ({"head_bits": 3, "table": [0.0] * 15 + [1.0]}, "layers of several take a family"),
        ({"head_bits": 4, "skip": ("lm_head",)}, "leaves the output head `lm_head` dense, and"),
        ({"head_bits": 4, "bits_by_layer": {"lm_head": 3}}, "Its bits are `head_bits`"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(FormatError, match=message):
        plan_model(tiny_model(), QuantizeOptions(4, 64, **options))


class Stack(nn.Module):
    """A linear layer and a head, of a class that may be more than a linear layer."""

    def __init__(self, head: nn.Module | None, name: str = "head") -> None:
        super().__init__()
        self.body = nn.Linear(64, 64)
        self.add_module(name, head)
        self.get_output_embeddings = lambda: head


class Scaled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


@pytest.mark.parametrize(
    ("head", "name", "why"),
    [
        (None, "head", "Stack has no output head to quantise"),
        (Scaled(64, 8), "head", "cannot be quantised: Scaled is more than a linear layer"),
        (nn.Linear(8, 8), "head", "cannot be quantised: rows of 8 weights are too short"),
        (nn.Linear(64, 8), "gate", "cannot be quantised: MoE router"),
        (nn.Bilinear(64, 64, 8), "head", "cannot be quantised: it is a Bilinear"),
    ],
)
def test_heads_that_cannot_be_quantised(head, name, why):
    with pytest.raises(UnsupportedProblemError, match=re.escape(why)) as error:
        plan_model(Stack(head, name), QuantizeOptions(4, 64, head_bits=4))
    assert str(error.value).endswith("Leave `head_bits` (`--head-bits`) out.")


def small(kind, **changes):
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 96}
    with torch.device("meta"):
        config = transformers.AutoConfig.for_model(kind, **{**sizes, **changes})
        return transformers.AutoModel.from_config(config), config


def test_an_encoder_without_a_head():
    model, config = small("bert", intermediate_size=64)
    with pytest.raises(UnsupportedProblemError, match="BertModel has no output head to quantise"):
        quantize_model(model, head_bits=4)
    with torch.device("meta"):
        masked = transformers.BertForMaskedLM(config)
    with pytest.raises(UnsupportedProblemError, match=r"its model ties `cls\.predictions\.dec"):
        check_head(masked)


def test_a_model_that_ties_more_than_its_head():
    with torch.device("meta"):
        config = transformers.T5Config(d_model=64, d_kv=16, d_ff=64, num_layers=1, vocab_size=96)
        model = transformers.T5ForConditionalGeneration(config)
    assert output_head(model) == "lm_head"
    with pytest.raises(UnsupportedProblemError, match=r"its model ties `(en|de)coder\.embed_tok"):
        check_head(model)


def test_a_head_alone_is_no_model():
    with pytest.raises(UnsupportedProblemError, match="has no linear layer to quantise"):
        plan_model(tiny_model(), QuantizeOptions(4, 64, skip=("*_proj",), head_bits=4))


def test_only_the_head_s_own_tie_is_undone():
    config = {"tie_word_embeddings": True, "text_config": {"tie_word_embeddings": True, "a": 1}}
    text = {"tie_word_embeddings": False, "a": 1}
    assert untied(config) == {"tie_word_embeddings": False, "text_config": text}
    assert untied({"text_config": {"a": 1}})["text_config"] == {"a": 1}
    assert config["tie_word_embeddings"]
    assert why_dense(tiny_model(tie_word_embeddings=True)) == {"lm_head": "output head"}


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
    tensors = loaded(out)
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
        embedding = loaded(source)["model.embed_tokens.weight"]
        assert torch.equal(tensors["model.embed_tokens.weight"], embedding)
        dense = embedding if tied else loaded(source)["lm_head.weight"]
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
    assert "lm_head.weight" not in loaded(tmp_path / "saved")
    again = flute.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert torch.equal(logits(again), before)
    assert again.lm_head.spec == QuantSpec(4, 32)


def test_a_tied_model_may_be_stored_under_either_name_or_both(tmp_path):
    source = tmp_path / "source"
    save_tiny(source, tie_word_embeddings=True)
    quantize_checkpoint(source, tmp_path / "by-embedding", QuantizeOptions(4, 64, **FAST))
    expected = loaded(tmp_path / "by-embedding")
    embedding = loaded(source)["model.embed_tokens.weight"]
    edit_tensors(source, {"lm_head.weight": embedding})
    quantize_checkpoint(source, tmp_path / "both", QuantizeOptions(4, 64, **FAST))
    edit_tensors(source, {"model.embed_tokens.weight": None})
    quantize_checkpoint(source, tmp_path / "by-head", QuantizeOptions(4, 64, **FAST))
    for name in ("both", "by-head"):
        found = loaded(tmp_path / name)
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


# ---- with calibration


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
    tensors = loaded(out)
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
        expected = flute.quantize(loaded(source)[key], 4, 32, method="mse")
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
    dense = loaded(source)["model.embed_tokens.weight"]
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


# ---- products


@pytest.mark.parametrize("num_tokens", [1, 5, 32])
def test_a_head_on_a_cpu_takes_kernels_and_is_not_dequantised(monkeypatch, num_tokens):
    from flute import reference
    from flute.cpu import library

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

        monkeypatch.setattr(library, "_dequantize_into", forbidden)
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
    assert loaded(out)["lm_head.scales"].shape == (96, 1)


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
        (["--head-bits", "4", "--head-group-size", "48"], "Of the output head: `group_size` is 48"),
    ],
)
def test_failures_are_one_line(source, tmp_path, capsys, arguments, message):
    assert main(["quantize", str(source), str(tmp_path / "out"), *arguments]) == 1
    printed = capsys.readouterr().err
    assert message in printed
    assert "Traceback" not in printed
    assert not (tmp_path / "out").exists()
