"""transformers: what is loaded, saved, quantised on load is what the package makes, bit for bit."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import sys
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import nn

import flute
from flute.errors import (
    CheckpointError,
    ChecksumError,
    FluteError,
    FormatError,
    UnsupportedProblemError,
)
from flute.format import CheckpointConfig
from flute.integrations import autoload
from flute.integrations.huggingface import FluteConfig, from_pretrained, register
from flute.linear import LutLinear
from flute.model import ModelPlan, QuantizeOptions
from flute.stream import quantize_checkpoint
from tests.helpers import DEMO_MODEL, edit_json, edit_tensors, run_python

AutoModelForCausalLM = transformers.AutoModelForCausalLM
SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "tie_word_embeddings": False},
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True, "mlp_bias": True},
    "gemma2": {"model_type": "gemma2", "head_dim": 16},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "mistral": {"model_type": "mistral"},
    "phi3": {"model_type": "phi3"},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 2},
}
IDS = torch.tensor([[1, 5, 9, 3, 7, 90]])
LAYER = "model.layers.0.mlp.down_proj"
CONFIG = {"num_bits": 4, "group_size": 32}


def save_dense(
    folder: Path, name: str = "llama", dtype: torch.dtype = torch.bfloat16, **changes: Any
) -> Path:
    config = transformers.AutoConfig.for_model(**{**SIZES, **ARCHITECTURES[name], **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.1)
    model.save_pretrained(folder)
    return folder


def load(folder: Path, **kwargs: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **kwargs)


def load_quantised(folder: Path, **kwargs: Any) -> Any:
    """Quantise on load; what is said about experts has a test of its own."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "2 tensors of MoE experts|.*MoE experts")
        return load(folder, quantization_config=FluteConfig(**{**CONFIG, **kwargs}))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits


def same_state(model: nn.Module, other: nn.Module) -> bool:
    state, expected = model.state_dict(), other.state_dict()
    return state.keys() == expected.keys() and all(
        value.dtype == expected[name].dtype and torch.equal(value, expected[name])
        for name, value in state.items()
    )


def written_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


@dataclass
class Case:
    """One architecture: dense files, quantised on load, quantised in memory, saved, reloaded."""

    dense: Path
    on_load: Any
    in_memory: Any
    plan: ModelPlan
    saved: Path
    reloaded: Any


@pytest.fixture(scope="module", params=ARCHITECTURES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp(request.param)
    dense = save_dense(folder / "dense", request.param)
    on_load, in_memory = load_quantised(dense), load(dense)
    plan = flute.quantize_model(in_memory, **CONFIG)
    on_load.save_pretrained(folder / "saved")
    return Case(dense, on_load, in_memory, plan, folder / "saved", load(folder / "saved"))


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return save_dense(tmp_path / "dense")


@pytest.fixture(scope="module")
def quantised_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantised")
    load_quantised(save_dense(folder / "dense", "qwen2")).save_pretrained(folder / "saved")
    return folder / "saved"


@pytest.fixture
def quantised(quantised_once: Path, tmp_path: Path) -> Path:
    """A fresh copy of a saved Qwen2 (with biases), to be spoilt."""
    for file in quantised_once.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


# --- what is loaded is what was quantised -------------------------------------------------------


def test_quantised_on_load_is_quantised_in_memory(case: Case) -> None:
    assert sum(isinstance(m, LutLinear) for m in case.on_load.modules()) == len(case.plan.shapes)
    assert same_state(case.on_load, case.in_memory)
    assert torch.equal(logits(case.on_load), logits(case.in_memory))
    assert not torch.equal(logits(case.on_load), logits(load(case.dense)))


def test_saved_and_reloaded_is_bitwise_equal(case: Case) -> None:
    assert type(case.reloaded) is type(case.on_load)
    assert same_state(case.reloaded, case.on_load)
    assert torch.equal(logits(case.reloaded), logits(case.on_load))


def test_written_config_is_that_of_the_plan(case: Case) -> None:
    assert written_config(case.saved) == case.plan.config.to_dict()
    for model in (case.on_load, case.reloaded):
        assert model.config.quantization_config.to_dict() == case.plan.config.to_dict()


def test_generates_the_same_text(case: Case) -> None:
    texts = [
        model.generate(IDS, max_new_tokens=4, do_sample=False)
        for model in (case.on_load, case.reloaded)
    ]
    assert texts[0].shape == (1, IDS.shape[1] + 4)
    assert torch.equal(*texts)


def test_no_parameter_of_a_quantised_layer_takes_a_gradient(case: Case) -> None:
    for model in (case.on_load, case.reloaded):
        layers = [m for m in model.modules() if isinstance(m, LutLinear)]
        assert not any(p.requires_grad for layer in layers for p in layer.parameters())
        assert not any(hasattr(layer, "weight") for layer in layers)


def test_fused_layers_of_phi3_stay_fused(tmp_path: Path) -> None:
    model = load_quantised(save_dense(tmp_path, "phi3"))
    assert isinstance(model.model.layers[0].self_attn.qkv_proj, LutLinear)
    assert model.model.layers[0].mlp.gate_up_proj.out_features == 2 * SIZES["intermediate_size"]


@pytest.mark.parametrize("name", ["llama-tied", "phi3", "mixtral"])
def test_a_checkpoint_written_from_disk_loads_as_quantised_on_load(
    tmp_path: Path, name: str
) -> None:
    folder = save_dense(tmp_path / "dense", name)
    quantize_checkpoint(folder, tmp_path / "written", QuantizeOptions(4, 32))
    assert same_state(load(tmp_path / "written"), load_quantised(folder))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    model = load_quantised(save_dense(tmp_path / "dense", "qwen2", dtype))
    scales = model.get_submodule(LAYER).scales
    assert scales.dtype == (torch.float16 if dtype == torch.float16 else torch.bfloat16)
    assert model.model.layers[0].self_attn.q_proj.bias.dtype == dtype
    model.save_pretrained(tmp_path / "saved")
    reloaded = load(tmp_path / "saved")
    assert reloaded.dtype == dtype
    assert same_state(reloaded, model)
    assert torch.equal(logits(reloaded), logits(model))


def test_a_checkpoint_loads_in_another_dtype_with_its_own_scales(quantised: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(quantised, dtype=torch.float16)
    layer = model.model.layers[0].self_attn.q_proj
    assert (layer.scales.dtype, layer.table.dtype) == (torch.bfloat16, torch.float32)
    assert layer.bias.dtype == logits(model).dtype == torch.float16


@pytest.mark.parametrize(
    "request_",
    [
        {"num_bits": 3, "group_size": -1},
        {"num_bits": 2, "method": "int"},
        {
            "method": "table",
            "table": [-1.0, -0.5, 0.5, 1.0],
            "num_bits": 2,
            "scale_dtype": "float32",
        },
    ],
)
def test_other_requests(tmp_path: Path, request_: dict[str, Any]) -> None:
    folder = save_dense(tmp_path / "dense")
    model, expected = load_quantised(folder, **request_), load(folder)
    flute.quantize_model(expected, **{**CONFIG, **request_})
    assert same_state(model, expected)
    model.save_pretrained(tmp_path / "saved")
    assert same_state(load(tmp_path / "saved"), expected)
    assert written_config(tmp_path / "saved")["num_bits"] == request_.get("num_bits", 4)


def test_one_table_per_row(tmp_path: Path) -> None:
    folder = save_dense(tmp_path / "dense")
    table = torch.randn(96, 16).sort(1).values
    only = {"table": table, "modules_to_not_convert": ["self_attn.*", "*.self_attn.*", "down_proj"]}
    model = load_quantised(folder, **only)
    assert model.model.layers[1].mlp.up_proj.table.shape == (96, 16)
    model.save_pretrained(tmp_path / "saved")
    assert written_config(tmp_path / "saved")["table_scope"] == "row"
    assert written_config(tmp_path / "saved")["table"] == "custom"
    assert same_state(load(tmp_path / "saved"), model)


def test_sharded_files(dense: Path, tmp_path: Path) -> None:
    model = load_quantised(dense)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model-00001-of-00004.safetensors").exists()
    assert flute.checkpoint.verify_checksums(tmp_path) == len(model.state_dict())
    assert same_state(load(tmp_path), model)


# --- what is special about a model --------------------------------------------------------------


def test_untied_head_stays_dense(tmp_path: Path) -> None:
    folder = save_dense(tmp_path / "dense", "llama")
    model, source = load_quantised(folder), load(folder)
    model.save_pretrained(tmp_path / "saved")
    reloaded = load(tmp_path / "saved")
    assert torch.equal(reloaded.lm_head.weight, source.lm_head.weight)
    assert not torch.equal(reloaded.lm_head.weight, reloaded.model.embed_tokens.weight)
    assert written_config(tmp_path / "saved")["modules_to_not_convert"] == ["lm_head"]


def test_tied_head_is_stored_once(tmp_path: Path) -> None:
    model = load_quantised(save_dense(tmp_path / "dense", "llama-tied"))
    model.save_pretrained(tmp_path / "saved")
    with safe_open(tmp_path / "saved/model.safetensors", framework="pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118
    reloaded = load(tmp_path / "saved")
    assert reloaded.lm_head.weight.data_ptr() == reloaded.model.embed_tokens.weight.data_ptr()


def test_biases_are_kept(tmp_path: Path) -> None:
    folder = save_dense(tmp_path / "dense", "qwen2")
    model, source = load_quantised(folder), load(folder)
    bias = source.model.layers[1].self_attn.k_proj.bias
    assert bias.abs().max() > 0.5
    assert torch.equal(model.model.layers[1].self_attn.k_proj.bias, bias)
    assert model.model.layers[1].self_attn.o_proj.bias is None


def test_modules_to_not_convert_are_patterns_and_recorded_by_full_name(tmp_path: Path) -> None:
    folder = save_dense(tmp_path / "dense")
    model = load_quantised(folder, modules_to_not_convert=["down_proj", "*.layers.0.self_attn.*"])
    model.save_pretrained(tmp_path / "saved")
    reloaded, source = load(tmp_path / "saved"), load(folder)
    names = written_config(tmp_path / "saved")["modules_to_not_convert"]
    assert len(names) == 4 + 2 + 1
    for name in names:
        assert type(reloaded.get_submodule(name)) is nn.Linear
        assert torch.equal(reloaded.get_submodule(name).weight, source.get_submodule(name).weight)
    assert isinstance(reloaded.model.layers[1].self_attn.q_proj, LutLinear)
    assert torch.equal(logits(reloaded), logits(model))


def test_a_row_that_the_group_does_not_divide_gets_a_smaller_group(tmp_path: Path) -> None:
    folder = save_dense(tmp_path / "dense")
    with pytest.warns(UserWarning, match=r"down_proj` \(K=96: 32\)"):
        model = load_quantised(folder, group_size=64)
    model.save_pretrained(tmp_path / "saved")
    assert written_config(tmp_path / "saved")["overrides"][LAYER] == {"group_size": 32}
    reloaded = load(tmp_path / "saved")
    layers = reloaded.model.layers[0].mlp
    assert (layers.down_proj.spec.group_size, layers.up_proj.spec.group_size) == (32, 64)
    assert torch.equal(logits(reloaded), logits(model))


def test_experts_left_dense_are_named_in_a_warning(tmp_path: Path) -> None:
    sizes = {"num_experts": 4, "num_experts_per_tok": 2}
    folder = save_dense(tmp_path, model_type="olmoe", **sizes)
    share = r"\d+% of the model's .*`model.layers.0.mlp.experts"
    with pytest.warns(UserWarning, match=rf"4 tensors of MoE experts stay dense, {share}"):
        model = load(folder, quantization_config=FluteConfig(**CONFIG))
    assert isinstance(model.model.layers[0].self_attn.q_proj, LutLinear)
    assert model.model.layers[0].mlp.experts.gate_up_proj.dtype == torch.bfloat16


def test_a_parent_that_initialises_its_childrens_weights(tmp_path: Path) -> None:
    sizes = {"n_embd": 64, "n_head": 4, "n_layer": 1, "n_inner": 96, "vocab_size": 96}
    config = transformers.GPTBigCodeConfig(n_positions=64, **sizes)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "d")
    model = load_quantised(tmp_path / "d")
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved")), logits(model))


def test_one_request_quantises_two_models(tmp_path: Path) -> None:
    request_ = FluteConfig(num_bits=4, group_size=64)
    folders = save_dense(tmp_path / "a"), save_dense(tmp_path / "b", intermediate_size=128)
    cls = transformers.LlamaForCausalLM  # the Auto classes copy what they are given
    with pytest.warns(UserWarning, match=r"smaller groups"):
        first = cls.from_pretrained(folders[0], quantization_config=request_)
    second = cls.from_pretrained(folders[1], quantization_config=request_)
    assert first.config.quantization_config.to_dict()["overrides"]
    assert not second.config.quantization_config.to_dict()["overrides"]
    assert request_.checkpoint is None


# --- the same checkpoint in other classes -------------------------------------------------------


def test_a_checkpoint_loads_as_base_model_and_back(tmp_path: Path) -> None:
    # 96 = 3 * 32: the overrides must be found under the names without "model." too.
    with pytest.warns(UserWarning, match=r"smaller groups"):
        whole = load_quantised(save_dense(tmp_path / "dense"), group_size=64)
    whole.save_pretrained(tmp_path / "saved")
    base = transformers.AutoModel.from_pretrained(tmp_path / "saved", dtype="auto")
    assert same_state(base, whole.model)
    base.save_pretrained(tmp_path / "base")
    again = transformers.AutoModel.from_pretrained(tmp_path / "base", dtype="auto")
    assert same_state(again, whole.model)
    assert same_state(load(tmp_path / "base").model, whole.model)


def test_a_new_head_stays_dense(quantised: Path) -> None:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        quantised, num_labels=3, dtype="auto"
    )
    assert type(model.score) is nn.Linear
    assert same_state(model.model, load(quantised).model)


def test_renamed_tensors_are_recognised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LLaVA is stored under other names than its modules have."""
    vision = transformers.CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        image_size=28,
        patch_size=14,
    )
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=transformers.LlamaConfig(**SIZES)
    )
    dense = transformers.LlavaForConditionalGeneration(config).to(torch.bfloat16)
    dense.save_pretrained(tmp_path / "dense")
    cls = transformers.AutoModelForImageTextToText
    model = cls.from_pretrained(
        tmp_path / "dense", quantization_config=FluteConfig(**CONFIG), dtype="auto"
    )
    model.save_pretrained(tmp_path / "saved")
    with safe_open(tmp_path / "saved/model.safetensors", framework="pt") as file:
        names = set(file.keys())
        assert set(json.loads(file.metadata()["flute_crc32"])) == names
    assert f"language_model.{LAYER}.codes" in names
    assert same_state(cls.from_pretrained(tmp_path / "saved", dtype="auto"), model)
    model.save_pretrained(tmp_path / "as-is", save_original_format=False)
    monkeypatch.setenv("FLUTE_VERIFY", "0")  # the checksums carry the names of the original format
    assert same_state(cls.from_pretrained(tmp_path / "as-is", dtype="auto"), model)


# --- accelerate and torch.compile ---------------------------------------------------------------


def test_device_map_auto(case: Case) -> None:
    model = load(case.saved, device_map="auto")
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert torch.equal(logits(model), logits(case.reloaded))


PARTS = ("embed_tokens", "layers.1", "norm", "rotary_emb")
MIXED = {"model.layers.0": "disk", "lm_head": "cpu", **{f"model.{part}": "cpu" for part in PARTS}}


@pytest.mark.parametrize("device_map", [{"": "disk"}, MIXED], ids=["all", "mixed"])
@pytest.mark.parametrize("on_load", [False, True], ids=["reloaded", "quantised on load"])
@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded")
def test_disk_offload(
    tmp_path: Path, dense: Path, device_map: dict[str, str], on_load: bool
) -> None:
    expected = load_quantised(dense)
    expected.save_pretrained(tmp_path / "saved")
    request_ = {"quantization_config": FluteConfig(**CONFIG)} if on_load else {}
    model = load(
        dense if on_load else tmp_path / "saved",
        device_map=device_map,
        offload_folder=tmp_path / "offload",
        **request_,
    )
    assert model.model.layers[0].mlp.down_proj.codes.device.type == "meta"
    assert torch.equal(logits(model), logits(expected))
    assert torch.equal(
        model.generate(IDS, max_new_tokens=2, do_sample=False),
        expected.generate(IDS, max_new_tokens=2, do_sample=False),
    )
    model.save_pretrained(tmp_path / "again")
    assert same_state(load(tmp_path / "again"), expected)


def test_cpu_offload_hooks(quantised: Path) -> None:
    from accelerate import cpu_offload

    model = load(quantised)
    expected = logits(model)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.model.layers[0].mlp.down_proj.codes.device.type == "meta"
    assert torch.equal(logits(model), expected)


def test_dense_weights_do_not_count_for_the_device_map(dense: Path) -> None:
    from transformers.integrations.accelerate import compute_module_sizes

    model = load_quantised(dense)
    seen = {}
    quantizer = model.hf_quantizer

    class Watch(type(quantizer)):  # type: ignore[misc]
        def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
            super()._process_model_before_weight_loading(model, **kwargs)
            seen["bytes"] = compute_module_sizes(model, self)[0][""]

    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(AUTO_QUANTIZER_MAPPING, "flute", Watch)
        load_quantised(dense)
    tensors = [*model.parameters(), *model.buffers()]
    assert seen["bytes"] == sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def test_compiled_forward(quantised: Path) -> None:
    model = load(quantised)
    assert model.hf_quantizer.is_compileable
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(IDS, use_cache=False).logits, logits(model))


def test_the_trainer_is_told_that_it_cannot_train(quantised: Path) -> None:
    assert load(quantised).hf_quantizer.is_trainable is False


# --- the config ---------------------------------------------------------------------------------


def test_a_dict_is_a_request_too(dense: Path) -> None:
    request_ = {"quant_method": "flute", **CONFIG, "modules_to_not_convert": ["down_proj"]}
    model = load(dense, quantization_config=request_)
    assert same_state(model, load_quantised(dense, modules_to_not_convert=["down_proj"]))


def test_a_request_survives_json(tmp_path: Path) -> None:
    request_ = FluteConfig(2, 32, "table", torch.tensor([-1.0, 0, 1, 2]), "float16", ["lm_head"])
    content = json.loads(request_.to_json_string())
    assert content["table"] == [[-1.0, 0.0, 1.0, 2.0]]
    assert FluteConfig.from_dict(content).to_dict() == request_.to_dict()


def test_a_checkpoint_config_survives_json(quantised: Path) -> None:
    content = written_config(quantised)
    assert FluteConfig.from_dict(content).to_dict() == content
    assert FluteConfig.from_dict(content).checkpoint == CheckpointConfig.from_dict(content)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"num_bits": 5}, "`num_bits` is 5"),
        ({"group_size": 48}, "`group_size` is 48"),
        ({"method": "magic"}, "`method` is 'magic'"),
        ({"table": [0.0, 1.0]}, "16 entries"),
        ({"scale_dtype": "int8"}, "`scale_dtype` is 'int8'"),
        ({"modules_to_not_convert": "lm_head"}, "expected a list of patterns: \\['lm_head'\\]"),
    ],
)
def test_bad_requests(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        FluteConfig(**bad)
    with pytest.raises(FormatError, match=message):
        FluteConfig.from_dict({"quant_method": "flute", **bad})


def test_unknown_keys_are_refused() -> None:
    with pytest.raises(FormatError, match=r"no `format_version`.*\['bits'\]"):
        FluteConfig.from_dict({"quant_method": "flute", "bits": 4})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "format version 2; this package reads up to 1"),
        ({"format_version": ...}, "no `format_version`"),
        ({"num_bits": 5}, "`num_bits` is 5"),
        ({"group_size": 48}, "`group_size` is 48"),
        ({"scale_dtype": "int8"}, "`scale_dtype` is 'int8'"),
        ({"table_scope": "column"}, "`table_scope` is 'column'"),
        ({"overrides": {LAYER: {"bits": 3}}}, "unknown keys \\['bits'\\]"),
    ],
)
def test_bad_checkpoint_configs(quantised: Path, changes: dict[str, Any], message: str) -> None:
    content = {**written_config(quantised), **changes}
    content = {key: value for key, value in content.items() if value is not ...}
    edit_json(quantised / "config.json", quantization_config=content)
    with pytest.raises(FormatError, match=message):
        load(quantised)


def test_the_plainest_config_without_a_version_is_refused(quantised: Path) -> None:
    edit_json(quantised / "config.json", quantization_config={"quant_method": "flute"})
    with pytest.raises(FormatError, match=r"`quantization_config` has no `format_version`"):
        load(quantised)


def test_the_config_of_a_checkpoint_does_not_quantise_a_dense_model(
    quantised: Path, dense: Path
) -> None:
    config = load(quantised).config.quantization_config
    with pytest.raises(
        FormatError, match=r"describes a quantised checkpoint, but the model is dense"
    ):
        load(dense, quantization_config=config)


# --- files that do not fit ----------------------------------------------------------------------


@pytest.mark.parametrize("tensor", ["codes", "scales", "table"])
def test_missing_tensors_are_named(quantised: Path, tensor: str) -> None:
    edit_tensors(quantised, {f"{LAYER}.{tensor}": None})
    with pytest.raises(CheckpointError, match=rf"lacks `{LAYER}.{tensor}` \(1 in all\)"):
        load(quantised)


def test_a_missing_bias_is_named(quantised: Path) -> None:
    bias = "model.layers.1.self_attn.k_proj.bias"
    edit_tensors(quantised, {bias: None})
    with pytest.raises(CheckpointError, match=bias):
        load(quantised)


def test_a_tensor_missing_from_a_state_dict_is_named(quantised: Path) -> None:
    state = load(quantised).state_dict()
    config = transformers.AutoConfig.from_pretrained(quantised)
    cls = transformers.Qwen2ForCausalLM
    whole = cls.from_pretrained(None, config=config, state_dict=dict(state))
    assert same_state(whole.bfloat16(), load(quantised))
    del state[f"{LAYER}.codes"]
    with pytest.raises(CheckpointError, match=rf"`{LAYER}.codes`"):
        cls.from_pretrained(None, config=config, state_dict=state)


@pytest.mark.parametrize(
    ("tensor", "value", "message"),
    [
        (
            "codes",
            torch.zeros(64, 11, dtype=torch.int32),
            "I32 of shape \\(64, 11\\).*\\(64, 12\\)",
        ),
        ("codes", torch.zeros(64, 12, dtype=torch.int64), "I64 of shape.*expected I32"),
        ("scales", torch.zeros(64, 3), "F32 of shape.*expected BF16"),
        ("scales", torch.zeros(64, 2).bfloat16(), "shape \\(64, 2\\).*\\(64, 3\\)"),
        ("table", torch.zeros(1, 16).half(), "F16 of shape.*expected F32"),
        ("table", torch.zeros(64, 16), "shape \\(64, 16\\).*\\(1, 16\\)"),
    ],
)
def test_wrong_tensors_are_refused(
    quantised: Path, tensor: str, value: torch.Tensor, message: str
) -> None:
    edit_tensors(quantised, {f"{LAYER}.{tensor}": value})
    with pytest.raises(FormatError, match=rf"`{LAYER}.{tensor}` is .*{message}"):
        load(quantised)


def test_a_config_of_other_bits_is_refused(quantised: Path) -> None:
    content = {**written_config(quantised), "num_bits": 3}
    edit_json(quantised / "config.json", quantization_config=content)
    with pytest.raises(FormatError, match=r"codes` is I32 .*num_bits=3"):
        load(quantised)


def test_codes_of_a_layer_called_dense_are_refused(quantised: Path) -> None:
    content = {**written_config(quantised), "modules_to_not_convert": ["lm_head", LAYER]}
    edit_json(quantised / "config.json", quantization_config=content)
    with pytest.raises(CheckpointError, match=rf"`{LAYER}.codes` is in the checkpoint, but"):
        load(quantised)


def test_a_truncated_file_is_named(quantised: Path) -> None:
    path = quantised / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model.safetensors` cannot be read"):
        load(quantised)


def test_saved_checksums_are_those_of_the_tensors(quantised: Path) -> None:
    with safe_open(quantised / "model.safetensors", framework="pt") as file:
        checksums = json.loads(file.metadata()["flute_crc32"])
        found = {
            name: f"{zlib.crc32(file.get_tensor(name).view(torch.uint8).numpy().tobytes()):08x}"
            for name in file.keys()  # noqa: SIM118
        }
    assert checksums == found


@pytest.mark.parametrize("tensor", [f"{LAYER}.codes", "model.embed_tokens.weight"])
def test_a_flipped_bit_is_found(
    quantised: Path, tensor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = quantised / "model.safetensors"
    content = bytearray(path.read_bytes())
    header = int.from_bytes(content[:8], "little")
    start, stop = json.loads(content[8 : 8 + header])[tensor]["data_offsets"]
    content[8 + header + (start + stop) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ChecksumError, match=rf"`{tensor}` in .* is corrupted"):
        load(quantised)
    monkeypatch.setenv("FLUTE_VERIFY", "0")
    load(quantised)


def test_checksums_of_experts_are_those_of_the_tensors_as_saved(case: Case) -> None:
    """Mixtral's fused experts are split when saved; what has a checksum must have the right one."""
    with safe_open(case.saved / "model.safetensors", framework="pt") as file:
        assert set(json.loads(file.metadata()["flute_crc32"])) <= set(file.keys())
    assert flute.checkpoint.verify_checksums(case.saved) > len(case.plan.shapes)


# --- dense models that cannot be quantised ------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_are_named(dense: Path, bad: float) -> None:
    weight = load(dense).get_submodule(LAYER).weight.detach().clone()
    weight[3, 5] = bad
    edit_tensors(dense, {f"{LAYER}.weight": weight})
    with pytest.raises(FormatError, match=rf"`{LAYER}.weight` holds NaN or Inf"):
        load_quantised(dense)


def test_a_missing_dense_weight_is_named(dense: Path) -> None:
    edit_tensors(dense, {f"{LAYER}.weight": None})
    with pytest.raises(CheckpointError, match=rf"`{LAYER}.weight`"):
        load_quantised(dense)


def test_a_weight_missing_from_a_state_dict_is_named(dense: Path) -> None:
    model = load(dense)
    state = model.state_dict()
    del state[f"{LAYER}.weight"]
    with pytest.raises(CheckpointError, match=rf"`{LAYER}.weight`"):
        type(model).from_pretrained(
            None,
            config=model.config,
            state_dict=state,
            quantization_config=FluteConfig(**CONFIG),
        )


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.zeros(64, 64).bfloat16(), "shape \\(64, 64\\).*\\(64, 96\\)"),
        (torch.zeros(64, 96, dtype=torch.int8), "is I8 .*expected F16 or BF16 or F32"),
    ],
)
def test_wrong_dense_weights_are_refused(dense: Path, weight: torch.Tensor, message: str) -> None:
    edit_tensors(dense, {f"{LAYER}.weight": weight})
    with pytest.raises(FormatError, match=message):
        load_quantised(dense)


def test_a_wrong_shape_in_a_state_dict_is_refused(dense: Path) -> None:
    model = load(dense)
    state = {**model.state_dict(), f"{LAYER}.weight": torch.zeros(96, 64)}
    with pytest.raises(FormatError, match=rf"`{LAYER}.weight` has shape \(96, 64\)"):
        type(model).from_pretrained(
            None,
            config=model.config,
            state_dict=state,
            quantization_config=FluteConfig(**CONFIG),
        )


def test_a_model_without_linear_layers_is_refused(tmp_path: Path) -> None:
    config = transformers.GPT2Config(n_embd=32, n_head=2, n_layer=1, vocab_size=96, n_positions=16)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedProblemError, match=r"no linear layer to quantise"):
        load_quantised(tmp_path)


# --- from_pretrained ----------------------------------------------------------------------------


def test_from_pretrained_loads_quantised_and_dense(quantised: Path, dense: Path) -> None:
    assert same_state(from_pretrained(quantised), load(quantised))
    assert same_state(from_pretrained(str(dense)), load(dense))
    model = from_pretrained(dense, quantization_config=FluteConfig(**CONFIG))
    assert same_state(model, load_quantised(dense))
    assert from_pretrained(quantised, dtype=torch.float32).dtype == torch.float32
    assert flute.from_pretrained is from_pretrained
    assert flute.FluteConfig is FluteConfig


def spoil_missing(folder: Path) -> Path:
    return folder / "nowhere"


def spoil_config(folder: Path) -> Path:
    (folder / "config.json").unlink()
    return folder


def spoil_json(folder: Path) -> Path:
    (folder / "config.json").write_text("{")
    return folder


def spoil_type(folder: Path) -> Path:
    edit_json(folder / "config.json", model_type="llama9")
    return folder


def spoil_task(folder: Path) -> Path:
    edit_json(folder / "config.json", model_type="vit", architectures=["ViTModel"])
    return folder


def spoil_weights(folder: Path) -> Path:
    (folder / "model.safetensors").unlink()
    return folder


def spoil_end(folder: Path) -> Path:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    return folder


def spoil_shard(folder: Path) -> Path:
    weight_map = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(weight_map))
    return folder


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (spoil_missing, CheckpointError, "nowhere` is not a folder"),
        (spoil_config, CheckpointError, "config.json` does not exist"),
        (spoil_json, CheckpointError, "config.json` cannot be read as JSON"),
        (spoil_type, UnsupportedProblemError, "model_type 'llama9', which transformers 5"),
        (spoil_task, UnsupportedProblemError, "is a vit model; expected a causal language model"),
        (spoil_weights, CheckpointError, "neither `model.safetensors` nor"),
        (spoil_end, CheckpointError, "model.safetensors` cannot be read"),
        (spoil_shard, CheckpointError, "model-00001-of-00002.safetensors"),
    ],
)
def test_bad_folders(quantised: Path, spoil: Any, error: type[FluteError], message: str) -> None:
    with pytest.raises(error, match=message):
        from_pretrained(spoil(quantised))


def test_a_model_that_the_hub_does_not_have() -> None:
    with pytest.raises(CheckpointError, match=r"`flute-tests/nowhere` cannot be loaded"):
        from_pretrained("flute-tests/nowhere")


# --- import flute is enough ---------------------------------------------------------------------

WAITING = "isinstance(f, flute.integrations.autoload._Finder) for f in sys.meta_path"
REGISTERED = f"""
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, AUTO_QUANTIZATION_CONFIG_MAPPING
assert "flute" in AUTO_QUANTIZER_MAPPING and "flute" in AUTO_QUANTIZATION_CONFIG_MAPPING
assert not any({WAITING})
"""
LOAD = """
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
assert type(model.get_submodule(sys.argv[2])).__name__ == "LutLinear"
"""


def test_import_flute_then_transformers(quantised: Path) -> None:
    code = f"""
import sys, flute
flute.integrations.autoload.install()
assert "transformers" not in sys.modules
assert sum({WAITING}) == 1
import transformers
assert not transformers.utils.is_flute_available()  # 0.1.0 < 0.4.1: HIGGS looks for the original
from transformers.quantizers import auto
assert "exec_module" not in vars(auto.__spec__.loader)
"""
    run_python(code + REGISTERED + LOAD, quantised, LAYER)


@pytest.mark.parametrize(
    "first",
    ["transformers.modeling_utils, flute", "flute.integrations.huggingface_quantizer"],
)
def test_imports_in_any_order(first: str) -> None:
    assert run_python(f"import sys, {first}" + REGISTERED) == ""


def test_import_is_silent_and_needs_no_transformers() -> None:
    code = "import sys; sys.modules['transformers'] = None; import flute"
    assert run_python(code) == ""


def test_registering_again_changes_nothing() -> None:
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    before = AUTO_QUANTIZER_MAPPING["flute"]
    finders = list(sys.meta_path)
    register()
    autoload.install()
    assert AUTO_QUANTIZER_MAPPING["flute"] is before
    assert sys.meta_path == finders


def test_a_failing_registration_only_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise ImportError("cannot import name 'ConversionOps'")

    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.warns(UserWarning, match=r"could not register .*ConversionOps.* >= 5.16"):
        autoload.install()


def test_the_original_package_beside_ours_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    version = importlib.metadata.version
    versions = {"flute-kernel": "0.4.2"}
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: versions.get(name) or version(name)
    )
    with pytest.warns(UserWarning, match=r"flute-kernel 0.4.2.*pip uninstall flute-kernel"):
        autoload.install()


# --- a trained model ----------------------------------------------------------------------------


@pytest.mark.skipif(not DEMO_MODEL.exists(), reason="the shipped model is not there yet")
def test_the_shipped_model_keeps_its_quality(tmp_path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO_MODEL)
    text = "The city was founded in the nineteenth century and is the capital of the province ."
    ids = tokenizer(text, return_tensors="pt").input_ids

    @torch.no_grad()
    def loss(model: Any) -> float:
        return float(model(ids, labels=ids).loss)

    def quantised(num_bits: int, method: str = "mse") -> Any:
        config = FluteConfig(num_bits, method=method)
        return from_pretrained(DEMO_MODEL, quantization_config=config)

    model = quantised(4)
    model.save_pretrained(tmp_path)
    assert torch.equal(from_pretrained(tmp_path)(ids).logits, model(ids).logits)
    dense = loss(from_pretrained(DEMO_MODEL))
    assert dense != loss(model) < dense + 0.25
    assert dense + 0.15 < loss(quantised(2)) < dense + 0.5 < loss(quantised(2, "nf"))
