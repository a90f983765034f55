"""The plugin in the real vLLM's engine, on a CPU: its text is that of transformers."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from helpers import DEMO_MODEL, edit_json, edit_tensors
from safetensors.torch import load_file, save_file
from vllm_engine import PROMPTS, serve

import flute
from flute.model import QuantizeOptions
from flute.stream import quantize_checkpoint

pytest.importorskip("vllm")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_max": 4,
    "prompt_lookup_min": 2,
}


@pytest.fixture(scope="module")
def quantised(tmp_path_factory):
    folders = {}
    for num_bits in (4, 3):
        folders[num_bits] = tmp_path_factory.mktemp("vllm") / f"{num_bits}bit"
        options = QuantizeOptions(num_bits, 64, method="nf")
        quantize_checkpoint(DEMO_MODEL, folders[num_bits], options)
    return folders


def transformers_tokens(folder, change=lambda model: None):
    from transformers import AutoTokenizer

    model = flute.from_pretrained(folder, dtype=torch.float32).eval()
    change(model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        out = model.generate(ids, max_new_tokens=24, min_new_tokens=24, do_sample=False)
        tokens.append(out[0, ids.shape[1] :].tolist())
    return tokens


@pytest.mark.parametrize(
    ("num_bits", "options"),
    [
        (4, {"enforce_eager": True}),
        (3, {}),
        (4, {"enforce_eager": True, "tensor_parallel_size": 2}),
        (4, {"enforce_eager": True, "max_num_batched_tokens": 32, "enable_prefix_caching": True}),
        (4, {"enforce_eager": True, "speculative_config": NGRAM}),
    ],
    ids=["eager", "compiled", "two ranks", "chunked prefill", "speculative"],
)
def test_greedy_text_is_that_of_transformers(quantised, tmp_path, num_bits, options):
    """In float32: in bfloat16 the two round differently, and one of the texts has a near tie."""
    served = serve(quantised[num_bits], tmp_path, dtype="float32", **options)
    assert served == transformers_tokens(quantised[num_bits])


def test_greedy_text_by_the_kernels_of_a_cpu_is_that_of_transformers(
    quantised, tmp_path, monkeypatch
):
    monkeypatch.delenv("FLUTE_CPU_VARIANT")
    served = serve(quantised[4], tmp_path, dtype="float32")
    assert served == transformers_tokens(quantised[4])


@pytest.fixture(scope="module")
def with_heads(tmp_path_factory):
    """The demo model, whose head is tied, and the same untied, both with a head of 4 bits."""
    folder = tmp_path_factory.mktemp("heads")
    untied = shutil.copytree(DEMO_MODEL, folder / "dense-untied")
    embedding = load_file(untied / "model.safetensors")["model.embed_tokens.weight"]
    edit_tensors(untied, {"lm_head.weight": embedding.flip(1)})
    edit_json(untied / "config.json", tie_word_embeddings=False)
    options = QuantizeOptions(3, 64, method="nf", head_bits=4, head_group_size=32)
    for name, source in (("tied", DEMO_MODEL), ("untied", untied)):
        quantize_checkpoint(source, folder / name, options)
    return folder


HEADS = [
    ("tied", {"enforce_eager": True}),
    ("untied", {}),
    ("tied", {"enforce_eager": True, "tensor_parallel_size": 2}),
    ("tied", {"enforce_eager": True, "speculative_config": NGRAM}),
]


@pytest.mark.parametrize(
    ("name", "options"), HEADS, ids=["tied", "untied, compiled", "two ranks", "speculative"]
)
def test_greedy_text_by_a_quantised_head_is_that_of_transformers(
    with_heads, tmp_path, name, options
):
    served = serve(with_heads / name, tmp_path, dtype="float32", **options)
    assert served == transformers_tokens(with_heads / name)


def test_a_quantised_head_by_the_kernels_of_a_cpu(with_heads, tmp_path, monkeypatch):
    monkeypatch.delenv("FLUTE_CPU_VARIANT")
    served = serve(with_heads / "untied", tmp_path, dtype="float32")
    assert served == transformers_tokens(with_heads / "untied")


def test_a_tied_head_is_quantised_while_the_model_loads(with_heads, tmp_path):
    request = {"FLUTE_BITS": "3", "FLUTE_METHOD": "nf"}
    request |= {"FLUTE_HEAD_BITS": "4", "FLUTE_HEAD_GROUP_SIZE": "32"}
    options = {"dtype": "float32", "enforce_eager": True, "quantization": "flute"}
    served = serve(DEMO_MODEL, tmp_path, request, **options)
    assert served == transformers_tokens(with_heads / "tied")
    served = serve(with_heads / "dense-untied", tmp_path, request, **options)
    assert served == transformers_tokens(with_heads / "untied")


def test_a_checkpoint_without_its_head_is_refused(with_heads, tmp_path):
    folder = shutil.copytree(with_heads / "tied", tmp_path / "headless")
    for file in folder.glob("*.index.json"):
        file.unlink()
    edit_tensors(folder, dict.fromkeys(("lm_head.codes", "lm_head.scales", "lm_head.table")))
    printed = serve(folder, tmp_path, enforce_eager=True)
    assert "The checkpoint lacks `lm_head.codes`" in printed
    assert "Loading safetensors" not in printed


class Adapted(torch.nn.Module):
    """A layer with a LoRA adapter, as its paper has it."""

    def __init__(self, layer, down, up, scale):
        super().__init__()
        self.layer, self.down, self.up, self.scale = layer, down, up, scale

    def forward(self, x):
        return self.layer(x) + self.scale * (x @ self.down.T @ self.up.T)


def test_lora_adapters_go_on_top(quantised, with_heads, tmp_path):
    """Of merged layers (q and v, not k) and of a row-parallel one."""
    config = json.loads((quantised[4] / "config.json").read_text())
    hidden, rank = config["hidden_size"], 8
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.v_proj": (kv, hidden),
        "mlp.down_proj": (hidden, config["intermediate_size"]),
    }
    generator, tensors = torch.Generator().manual_seed(0), {}
    for i in range(config["num_hidden_layers"]):
        for name, (N, K) in shapes.items():
            for part, shape in (("A", (rank, K)), ("B", (N, rank))):
                key = f"base_model.model.model.layers.{i}.{name}.lora_{part}.weight"
                tensors[key] = torch.randn(shape, generator=generator) * 0.02
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file(tensors, adapter / "adapter_model.safetensors")
    names = [name.partition(".")[2] for name in shapes]
    about = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": names}
    (adapter / "adapter_config.json").write_text(json.dumps(about | {"bias": "none"}))

    def adapt(model):
        for key in [k for k in tensors if "lora_A" in k]:
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            up = tensors[key.replace("lora_A", "lora_B")]
            model.set_submodule(name, Adapted(model.get_submodule(name), tensors[key], up, 2.0))

    options = {"dtype": "float32", "enforce_eager": True, "enable_lora": True}
    for folder in (quantised[4], with_heads / "tied"):
        served = serve(folder, tmp_path, adapter=adapter, max_lora_rank=rank, **options)
        assert served == transformers_tokens(folder, adapt)
        assert served != transformers_tokens(folder)


def test_a_checkpoint_without_a_tensor_is_refused(quantised, tmp_path):
    folder = shutil.copytree(quantised[4], tmp_path / "broken")
    for file in folder.glob("*.index.json"):
        file.unlink()
    edit_tensors(folder, {"model.layers.3.self_attn.k_proj.scales": None})
    printed = serve(folder, tmp_path, enforce_eager=True)
    assert "The checkpoint lacks `model.layers.3.self_attn.k_proj.scales`" in printed
    assert "Loading safetensors" not in printed


def test_configs_are_refused_before_the_engine_starts(quantised, tmp_path):
    folder = shutil.copytree(quantised[4], tmp_path / "newer")
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    edit_json(folder / "config.json", quantization_config={**config, "format_version": 99})
    assert "format version 99; this package reads up to 1" in serve(folder, tmp_path)
    printed = serve(DEMO_MODEL, tmp_path, quantization="flute")
    line = next(line for line in printed.splitlines() if "The model is dense" in line)
    assert "FLUTE_BITS=4" in line
    assert "flute quantize MODEL OUT" in line
    assert "Loading weights" not in printed


def test_a_dense_model_is_quantised_while_it_loads(quantised, tmp_path):
    """By the environment and by --hf-overrides: the text is that of the quantised checkpoint."""
    expected = transformers_tokens(quantised[4])
    common = {"dtype": "float32", "enforce_eager": True, "quantization": "flute"}
    by_environment = {"FLUTE_BITS": "4", "FLUTE_METHOD": "nf"}
    assert serve(DEMO_MODEL, tmp_path, by_environment, **common) == expected
    request = {"quant_method": "flute", "bits": 4, "group_size": 64, "method": "nf"}
    overrides = {"hf_overrides": {"quantization_config": request}}
    assert serve(DEMO_MODEL, tmp_path, **common, **overrides) == expected
