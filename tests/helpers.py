"""Builders and oracles shared by the tests. Nothing here imports what it is meant to check, but for
the types and the packing: references are written in numpy and plain Python."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flute.format import PackedWeight, QuantizedWeight, QuantSpec
from flute.pack import pack_codes

ROOT = Path(__file__).resolve().parents[1]
DEMO_MODEL = ROOT / "examples" / "llama-demo-7m"
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1e-5}
"""Relative norm of the error against fp64, by dtype of the activations."""


def generator(*seed: int) -> torch.Generator:
    """A generator that depends on all the numbers given."""
    return torch.Generator().manual_seed(hash(seed) % (1 << 62))


def random_weight(
    N: int,
    K: int,
    spec: QuantSpec,
    *,
    per_row: bool = False,
    table_ends: tuple[int, ...] = (),
    scale_dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> QuantizedWeight:
    """All that is hard at once: an unsorted table, every code, negative and zero scales."""
    rng = generator(N, K, spec.num_bits, spec.group_size, int(per_row), seed)
    codes = torch.randint(0, spec.num_entries, (N, K), generator=rng, dtype=torch.uint8)
    if N and K:
        codes[0, 0] = codes[-1, -1] = spec.num_entries - 1
    scales = torch.randn(N, spec.num_groups(K), generator=rng) / 8
    if scales.numel() > 3:
        scales.view(-1)[scales.numel() // 2] = 0.0
    num_tables = len(table_ends) or (N if per_row else 1)
    table = torch.randn(num_tables, spec.num_entries, generator=rng)
    return QuantizedWeight(codes, scales.to(scale_dtype), table, spec, table_ends)


def packed_weight(weight: QuantizedWeight) -> PackedWeight:
    """The weight with its codes as stored."""
    packed = pack_codes(weight.codes, weight.spec.num_bits)
    rest = (weight.scales, weight.table, weight.spec, *weight.shape, weight.table_ends)
    return PackedWeight(packed, *rest)


def row_tables(table: np.ndarray, N: int, table_ends: tuple[int, ...]) -> np.ndarray:
    """The table of each row, (N, entries)."""
    if not table_ends:
        return np.broadcast_to(table, (N, table.shape[1]))
    return np.stack([table[sum(n >= end for end in table_ends)] for n in range(N)])


def exact_weight(weight: QuantizedWeight, dtype: torch.dtype = torch.float32) -> np.ndarray:
    """The equation in fp64, weight by weight: (N, K); the table first rounded to ``dtype``."""
    codes, scales = weight.codes.numpy(), weight.scales.double().numpy()
    N, K = codes.shape
    entries = weight.table.to(dtype).double().numpy()
    table = row_tables(entries, N, weight.table_ends)
    length = K if weight.spec.group_size == -1 else weight.spec.group_size
    out = np.zeros((N, K))
    for n in range(N):
        for k in range(K):
            out[n, k] = table[n, codes[n, k]] * scales[n, k // length]
    return out


def relative_error(value: Tensor, exact: np.ndarray | Tensor) -> float:
    """Norm of the error over the norm of the exact result."""
    exact = torch.as_tensor(exact).double()
    return float((value.double() - exact).norm() / exact.norm().clamp_min(1e-300))


def squared_error(weight: Tensor, quantized: QuantizedWeight) -> float:
    """Squared error over squared norm, in fp64, without the package's own dequantisation."""
    codes, table = quantized.codes.long(), quantized.table.double()
    values = table.expand(len(codes), -1).gather(1, codes)
    length = weight.shape[1] // max(1, quantized.scales.shape[1])
    values = values * quantized.scales.double().repeat_interleave(length, 1)
    dense = weight.detach().double()
    return float((values - dense).square().sum() / dense.square().sum())


TINY = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def tiny_model(kind: str = "llama", *, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Any:
    """A random transformers model of two small layers; ``kind`` is "llama", "qwen2", "mixtral"."""
    import transformers

    classes = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
        "mixtral": (transformers.MixtralConfig, transformers.MixtralForCausalLM),
        "qwen2_moe": (transformers.Qwen2MoeConfig, transformers.Qwen2MoeForCausalLM),
        "qwen3_moe": (transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM),
    }
    config_class, model_class = classes[kind]
    if kind == "mixtral":
        changes = {"num_local_experts": 2, **changes}
    torch.manual_seed(0)
    model = model_class(config_class(**{**TINY, "tie_word_embeddings": False, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.05)
    return model.to(dtype).eval()


def save_tiny(folder: Path, kind: str = "llama", *, shard: str = "5GB", **changes: Any) -> Any:
    """Save a `tiny_model` as transformers does, with a side file; returns the model."""
    model = tiny_model(kind, **changes)
    model.save_pretrained(folder, max_shard_size=shard)
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 64}')
    return model


def saved_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor in the safetensors files of a folder, by name."""
    return {k: t for path in folder.glob("*.safetensors") for k, t in load_file(path).items()}


def edit_tensors(folder: Path, changes: dict[str, Tensor | None]) -> None:
    """Replace (or, by None, remove) tensors in the one safetensors file of a folder."""
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    for name, tensor in changes.items():
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor.contiguous()
    save_file(tensors, path, metadata={"format": "pt"})


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON object in a file; a key set to `...` is removed."""
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """Every file under a folder, hidden ones included."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def python(code: str, *args: object, **environment: str) -> subprocess.Popen[str]:
    """Start a fresh interpreter on some code; its output and errors come together."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def run_python(code: str, *args: object, **environment: str) -> str:
    """Run code in a fresh interpreter and return what it printed; it must succeed."""
    process = python(code, *args, **environment)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output
