"""transformers: a model's quantised output head, read from a checkpoint or made while one loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file

import flute
from flute.errors import CheckpointError, FormatError, UnsupportedProblemError
from flute.format import QuantSpec
from flute.integrations.huggingface import FluteConfig
from flute.linear import LutLinear
from flute.model import QuantizeOptions
from flute.stream import quantize_checkpoint
from tests.helpers import edit_json, edit_tensors, save_tiny

AutoModelForCausalLM = transformers.AutoModelForCausalLM
IDS = torch.tensor([[1, 5, 9, 3, 7, 90]])
REQUEST = {"num_bits": 3, "group_size": 64, "method": "nf", "head_bits": 4, "head_group_size": 32}
OPTIONS = QuantizeOptions(3, 64, method="nf", head_bits=4, head_group_size=32)
TIED = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits


def save_dense(folder: Path, *, tied: bool, **changes: Any) -> Path:
    save_tiny(folder, tie_word_embeddings=tied, **changes)
    return folder


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def names(folder: Path) -> set[str]:
    found: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found |= set(file.keys())
    return {name for name in found if "layers" not in name}


EXPECTED = {"model.embed_tokens.weight", "model.norm.weight"} | {
    f"lm_head.{part}" for part in ("codes", "scales", "table")
}


@TIED
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_on_load_is_as_from_disk(tmp_path: Path, tied: bool, dtype: torch.dtype) -> None:
    """Scales are of the dtype that is asked for, so it is said; the embedding is cast to it."""
    dense = save_dense(tmp_path / "dense", tied=tied)
    options = QuantizeOptions(
        3, 64, method="nf", head_bits=4, head_group_size=32, scale_dtype="bfloat16"
    )
    quantize_checkpoint(dense, tmp_path / "disk", options)
    request = FluteConfig(**REQUEST, scale_dtype="bfloat16")
    model = load(dense, dtype=dtype, quantization_config=request)
    expected = load(tmp_path / "disk", dtype=dtype)
    assert isinstance(model.lm_head, LutLinear)
    assert model.lm_head.spec == QuantSpec(4, 32)
    assert model.model.embed_tokens.weight.dtype == dtype
    state, other = model.state_dict(), expected.state_dict()
    assert state.keys() == other.keys()
    assert all(torch.equal(state[key], other[key]) for key in state)
    assert torch.equal(logits(model), logits(expected))
    model.tie_weights()
    model.save_pretrained(tmp_path / "saved")
    assert names(tmp_path / "saved") == names(tmp_path / "disk") == EXPECTED
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert config["quantization_config"]["quantized_head"] == "lm_head"
    again = load(tmp_path / "saved", dtype=dtype)
    assert torch.equal(logits(again), logits(model))
    assert torch.equal(
        again.generate(IDS, max_new_tokens=8, do_sample=False),
        expected.generate(IDS, max_new_tokens=8, do_sample=False),
    )


@TIED
def test_sharded_files_and_a_device_map(tmp_path: Path, tied: bool) -> None:
    dense = save_dense(tmp_path / "dense", tied=tied, shard="20KB")
    model = load(dense, quantization_config=FluteConfig(**REQUEST), device_map="auto")
    quantize_checkpoint(dense, tmp_path / "disk", OPTIONS)
    assert torch.equal(logits(model), logits(load(tmp_path / "disk")))


@TIED
@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded")
def test_disk_offload(tmp_path: Path, tied: bool) -> None:
    dense = save_dense(tmp_path / "dense", tied=tied)
    expected = load(dense, quantization_config=FluteConfig(**REQUEST))
    model = load(
        dense,
        quantization_config=FluteConfig(**REQUEST),
        device_map={"": "disk"},
        offload_folder=tmp_path / "offload",
    )
    assert model.lm_head.codes.device.type == "meta"
    assert torch.equal(logits(model), logits(expected))


def test_a_tied_model_that_stores_its_head_too(tmp_path: Path) -> None:
    """Where the two differ, transformers leaves them apart; the head is quantised from its own."""
    dense = save_dense(tmp_path / "dense", tied=True)
    embedding = load_file(dense / "model.safetensors")["model.embed_tokens.weight"]
    for head in (embedding, embedding.flip(0)):
        edit_tensors(dense, {"lm_head.weight": head})
        model = load(dense, quantization_config=FluteConfig(**REQUEST))
        expected = flute.quantize(head, 4, 32, method="nf")
        assert torch.equal(model.lm_head.quantized_weight().codes, expected.codes)
        assert torch.equal(model.model.embed_tokens.weight, embedding)
        quantize_checkpoint(dense, tmp_path / "out", OPTIONS, overwrite=True)
        assert torch.equal(logits(load(tmp_path / "out")), logits(model))
    edit_tensors(dense, {"model.embed_tokens.weight": None})
    with pytest.raises(UnsupportedProblemError, match=r"as `lm_head\.weight`, which cannot be tak"):
        load(dense, quantization_config=FluteConfig(**REQUEST))


def test_a_config_that_ties_the_head_all_the_same(tmp_path: Path) -> None:
    """As someone may write it: the codes count, and the embedding stays."""
    dense = save_dense(tmp_path / "dense", tied=True)
    quantize_checkpoint(dense, tmp_path / "out", OPTIONS)
    expected = logits(load(tmp_path / "out"))
    edit_json(tmp_path / "out" / "config.json", tie_word_embeddings=True)
    model = load(tmp_path / "out")
    assert torch.equal(logits(model), expected)
    assert not model.config.tie_word_embeddings


def test_other_classes_leave_the_head_out(tmp_path: Path) -> None:
    dense = save_dense(tmp_path / "dense", tied=True)
    quantize_checkpoint(dense, tmp_path / "out", OPTIONS)
    base = transformers.AutoModel.from_pretrained(tmp_path / "out")
    whole = load(tmp_path / "out")
    with torch.no_grad():
        hidden = whole.model(IDS).last_hidden_state
        assert torch.equal(base(IDS).last_hidden_state, hidden)
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out", num_labels=3
    )
    assert isinstance(classifier.score, torch.nn.Linear)


def test_a_request_survives_json() -> None:
    request = FluteConfig.from_dict(json.loads(json.dumps(FluteConfig(**REQUEST).to_dict())))
    assert (request.options.head_bits, request.options.head_group_size) == (4, 32)


# ---- what cannot be


@pytest.mark.parametrize("part", ["codes", "scales", "table"])
def test_a_missing_tensor_of_the_head_is_named(tmp_path: Path, part: str) -> None:
    quantize_checkpoint(save_dense(tmp_path / "dense", tied=True), tmp_path / "out", OPTIONS)
    edit_tensors(tmp_path / "out", {f"lm_head.{part}": None})
    with pytest.raises(CheckpointError, match=rf"lacks `lm_head\.{part}`"):
        load(tmp_path / "out")


def test_a_checkpoint_without_any_of_the_head(tmp_path: Path) -> None:
    """A head that is new to a class stays dense; that which the config names may not be missing."""
    quantize_checkpoint(save_dense(tmp_path / "dense", tied=False), tmp_path / "out", OPTIONS)
    parts = ("codes", "scales", "table")
    edit_tensors(tmp_path / "out", dict.fromkeys(f"lm_head.{part}" for part in parts))
    with pytest.raises(CheckpointError, match=r"lacks `lm_head\.codes`, `lm_head\.scales`, `lm_he"):
        load(tmp_path / "out")


def test_a_head_of_other_bits_than_the_config_says(tmp_path: Path) -> None:
    quantize_checkpoint(save_dense(tmp_path / "dense", tied=True), tmp_path / "out", OPTIONS)
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())["quantization_config"]
    edit_json(path, quantization_config={**config, "overrides": {}})
    with pytest.raises(FormatError, match=r"`lm_head\.\w+` is .* do not belong together"):
        load(tmp_path / "out")


def test_an_encoder_without_a_head(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.BertConfig(**sizes, intermediate_size=64, vocab_size=96)
    transformers.BertModel(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedProblemError, match="BertModel has no output head to quantise"):
        transformers.AutoModel.from_pretrained(tmp_path, quantization_config=FluteConfig(**REQUEST))
    with pytest.raises(UnsupportedProblemError, match="BertModel has no output head to quantise"):
        quantize_checkpoint(tmp_path, tmp_path / "out", OPTIONS)


def test_nan_in_the_embedding_that_a_head_is_tied_to(tmp_path: Path) -> None:
    dense = save_dense(tmp_path / "dense", tied=True)
    embedding = load_file(dense / "model.safetensors")["model.embed_tokens.weight"].clone()
    embedding[7, 3] = float("nan")
    edit_tensors(dense, {"model.embed_tokens.weight": embedding})
    with pytest.raises(FormatError, match=r"`lm_head\.weight` holds NaN.*at \(7, 3\)"):
        load(dense, quantization_config=FluteConfig(**REQUEST))
