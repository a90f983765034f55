"""Which layer is the output head, its bits and groups, and heads that cannot be quantised."""

from __future__ import annotations

import json
import re

import pytest
import torch
from helpers import tiny_model
from torch import nn

from flute.dense import check_head, output_head, tied_embedding, untied, why_dense
from flute.errors import FormatError, UnsupportedProblemError
from flute.format import CheckpointConfig, QuantSpec
from flute.model import QuantizeOptions, plan_model, quantize_model

transformers = pytest.importorskip("transformers")

HEAD = {"head_bits": 4, "head_group_size": 32}


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
