"""Models of a real model's shapes with random weights, dense and quantised, for serving benchmarks.

    folder   config.json + tokenizer, no weights: vLLM fills them itself (`--load-format dummy`)
    memory   a transformers model on a device, its linear layers dense or `LutLinear`

Speed depends on shapes and bits, not on values, so nothing of these models needs to be stored.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers

import flute
from flute.format import CheckpointConfig, QuantSpec
from flute.linear import LutLinear
from flute.tables import get_table

GROUP_SIZE = 128
HEAD = QuantSpec(4, 64)
"""Of the output head, where it is quantised: 4 bits whatever the layers have, in small groups."""
SHAPES: dict[str, dict[str, int]] = {  # hidden, intermediate, layers, heads, kv heads, vocabulary
    "llama-3-8b": {"h": 4096, "i": 14336, "l": 32, "a": 32, "kv": 8, "v": 128256},
    "llama-3-70b": {"h": 8192, "i": 28672, "l": 80, "a": 64, "kv": 8, "v": 128256},
    "tiny": {"h": 256, "i": 768, "l": 2, "a": 4, "kv": 2, "v": 8192},
}
VARIANTS: dict[str, int] = {"fp16": 16, "w4": 4, "w3": 3, "w2": 2, "gptq": 4}
VARIANTS |= {"w4h": 4, "w3h": 3, "w2h": 2}
"""What is compared -> bits per weight; gptq is int4 in GPTQ's format, multiplied by the engine; of
those with an h the output head is quantised too."""


def linear_shapes(shape: str) -> dict[str, tuple[int, int]]:
    """Return the linear layers of a decoder block of one of `SHAPES`: name in it -> (N, K)."""
    s = SHAPES[shape]
    kv = s["kv"] * s["h"] // s["a"]
    return {
        "self_attn.q_proj": (s["h"], s["h"]),
        "self_attn.k_proj": (kv, s["h"]),
        "self_attn.v_proj": (kv, s["h"]),
        "self_attn.o_proj": (s["h"], s["h"]),
        "mlp.gate_proj": (s["i"], s["h"]),
        "mlp.up_proj": (s["i"], s["h"]),
        "mlp.down_proj": (s["h"], s["i"]),
    }


def llama_config(shape: str, layers: int | None = None) -> transformers.LlamaConfig:
    """Return the config of a Llama of one of `SHAPES`, cut to a number of layers."""
    s = SHAPES[shape]
    return transformers.LlamaConfig(
        hidden_size=s["h"],
        intermediate_size=s["i"],
        num_hidden_layers=layers or s["l"],
        num_attention_heads=s["a"],
        num_key_value_heads=s["kv"],
        vocab_size=s["v"],
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        dtype="float16",
    )


def quantization_config(variant: str) -> dict[str, Any] | None:
    """Return what config.json says under ``quantization_config``."""
    bits = VARIANTS[variant]
    if variant == "fp16":
        return None
    if variant == "gptq":
        return {
            "quant_method": "gptq",
            "bits": bits,
            "group_size": GROUP_SIZE,
            "desc_act": False,
            "sym": True,
            "lm_head": False,
            # Why: without a list vLLM looks into the files for what is quantised, and where there
            # are none it takes every layer for dense (vLLM 0.26, auto_gptq.py; not so in 0.32).
            "modules_in_block_to_quantize": list(linear_shapes("tiny")),
        }
    common = {"scale_dtype": "float16"}
    if has_quantized_head(variant):
        own = {"num_bits": HEAD.num_bits, "group_size": HEAD.group_size}
        head = {"quantized_head": "lm_head", "overrides": {"lm_head": own}}
        return CheckpointConfig(bits, GROUP_SIZE, **common, **head).to_dict()
    dense = {"modules_to_not_convert": ("lm_head",)}
    return CheckpointConfig(bits, GROUP_SIZE, **common, **dense).to_dict()


def has_quantized_head(variant: str) -> bool:
    """Tell whether a variant's output head is quantised."""
    return variant.startswith("w") and variant.endswith("h")


def weight_bytes(variant: str, shape: str, layers: int | None = None) -> int:
    """Return the bytes of a variant's matrices: codes with scales, or fp16 where it is dense."""

    def size(N: int, K: int, spec: QuantSpec | None) -> int:
        return N * (4 * spec.num_words(K) + 2 * spec.num_groups(K)) if spec else 2 * N * K

    s = SHAPES[shape]
    body = None if variant == "fp16" else QuantSpec(VARIANTS[variant], GROUP_SIZE)
    head = HEAD if has_quantized_head(variant) else None
    block = sum(size(N, K, body) for N, K in linear_shapes(shape).values())
    ends = size(s["v"], s["h"], None) + size(s["v"], s["h"], head)
    return (layers or s["l"]) * block + ends


def is_served_dense(variant: str, shape: str, layers: int | None, loaded: float) -> bool:
    """Tell whether a variant that should be quantised takes as much memory as a dense model.

    Args:
        variant: of `VARIANTS`.
        shape: of `SHAPES`.
        layers: what the model was cut to, or None.
        loaded: bytes that its parameters take on all GPUs.
    """
    dense = weight_bytes("fp16", shape, layers)
    return variant != "fp16" and loaded > (dense + weight_bytes(variant, shape, layers)) / 2


def write_folder(
    folder: Path, variant: str, shape: str, layers: int | None, tokenizer: Path
) -> None:
    """Write a model's folder without weights: config.json and another model's tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    config = llama_config(shape, layers).to_dict() | {"architectures": ["LlamaForCausalLM"]}
    if (quantised := quantization_config(variant)) is not None:
        config["quantization_config"] = quantised
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, folder / name)


def random_model(
    variant: str, shape: str, layers: int | None, device: torch.device
) -> transformers.PreTrainedModel:
    """Return a model in memory whose linear layers are quantised, the output head if asked for."""
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(
            llama_config(shape, layers), dtype=torch.float16
        )
    model.eval()
    if variant == "fp16":
        return model
    spec = QuantSpec(VARIANTS[variant], GROUP_SIZE)
    linears = [(n, m) for n, m in model.model.named_modules() if isinstance(m, torch.nn.Linear)]
    for name, linear in linears:
        model.model.set_submodule(name, _random_layer(linear, spec, device))
    if has_quantized_head(variant):
        model.set_submodule("lm_head", _random_layer(model.lm_head, HEAD, device))
    flute.prepare(model)
    return model


def load_model(folder: Path, device: torch.device) -> transformers.PreTrainedModel:
    """Return a folder's model as it is, dense or quantised."""
    model = flute.from_pretrained(folder, dtype="auto", device_map=str(device))
    return model.eval()


def _random_layer(linear: torch.nn.Linear, spec: QuantSpec, device: torch.device) -> LutLinear:
    N, K = linear.out_features, linear.in_features
    layer = LutLinear(
        K, N, spec, bias=False, scale_dtype=torch.float16, dtype=torch.float16, device=device
    )
    low, high = -(2**31), 2**31 - 1
    layer.codes.data.copy_(torch.randint(low, high, layer.codes.shape, device=device))
    layer.scales.data.uniform_(0.02, 0.06)
    layer.table.data.copy_(get_table("nf", spec.num_bits))
    return layer
