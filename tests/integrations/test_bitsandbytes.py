"""bitsandbytes 4-bit: bit for bit against its own dequantisation, in memory and on disk."""

from __future__ import annotations

import copy
import json
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import flute
from flute.checkpoint import CheckpointReader
from flute.errors import CheckpointError, FormatError, UnsupportedProblemError
from flute.integrations import bitsandbytes as converter
from flute.integrations import bitsandbytes_checkpoint
from flute.integrations.convert import convert_checkpoint, detect_format
from tests.helpers import save_tiny

bnb = pytest.importorskip("bitsandbytes")
quantize_4bit = bnb.functional.quantize_4bit
LAYER = "model.layers.0.mlp.up_proj"


def random_weight(N: int, K: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(N * K)).to(dtype)


def absmax_of(state) -> torch.Tensor:
    if not state.nested:
        return state.absmax
    nested = state.state2
    return converter.unnest_absmax(
        state.absmax, nested.absmax, nested.code, nested.blocksize, float(state.offset)
    )


def own_dequantisation(packed: torch.Tensor, state, N: int, K: int) -> torch.Tensor:
    """What bitsandbytes makes of a weight, in fp32.

    It is shown the weight as one long row: its CPU kernel (0.50.2) takes each row to start a new
    block, unlike its own quantiser, and returns other weights where blocks straddle rows.
    """
    state = copy.copy(state)
    state.dtype, state.shape = torch.float32, torch.Size((1, N * K))
    return bnb.functional.dequantize_4bit(packed, state).view(N, K)


def by_hand(packed: torch.Tensor, absmax: torch.Tensor, code: torch.Tensor, N, K, blocksize):
    """The same, element by element, in fp32."""
    stream, out = packed.view(torch.uint8).flatten().tolist(), np.zeros(N * K, dtype=np.float32)
    scales, table = absmax.flatten().numpy(), code.numpy()
    for i in range(N * K):
        nibble = stream[i // 2] >> 4 if i % 2 == 0 else stream[i // 2] & 15
        out[i] = table[nibble] * scales[i // blocksize]
    return torch.from_numpy(out).view(N, K)


SHAPES = [  # (N, K, blocksize, group size of the result)
    (6, 512, 32, 32),
    (6, 512, 64, 64),
    (6, 512, 128, 128),
    (6, 512, 256, 256),
    (6, 512, 512, 256),
    (6, 1024, 1024, 256),
    (6, 768, 512, 256),
    (10, 96, 64, 32),
    (9, 192, 128, 64),
    (9, 64, 256, 64),
    (20, 16, 64, -1),
    (5, 16, 64, -1),
]


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quantised", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dequantised_values_equal_those_of_bitsandbytes_bit_for_bit(
    quant_type, double_quantised, dtype
):
    for N, K, blocksize, group_size in SHAPES:
        packed, state = quantize_4bit(
            random_weight(N, K, dtype),
            blocksize=blocksize,
            compress_statistics=double_quantised,
            quant_type=quant_type,
        )
        absmax = absmax_of(state)
        weight = converter.from_quant_state(packed, absmax, state.code, (N, K), blocksize)
        assert weight.spec.group_size == group_size
        found = flute.dequantize(weight)
        assert torch.equal(found, own_dequantisation(packed, state, N, K)), (N, K, blocksize)
        if not double_quantised:
            assert torch.equal(found, by_hand(packed, absmax, state.code, N, K, blocksize))


@pytest.mark.parametrize("blocksize", [2048, 4096])
def test_blocks_longer_than_rows_and_odd_sizes_equal_the_definition(blocksize):
    N, K = 7, 160
    packed, state = quantize_4bit(random_weight(N, K), blocksize=blocksize, quant_type="nf4")
    weight = converter.from_quant_state(packed, state.absmax, state.code, (N, K), blocksize)
    expected = by_hand(packed, state.absmax, state.code, N, K, blocksize)
    assert torch.equal(flute.dequantize(weight), expected)


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32])
def test_weights_stored_as_another_dtype_are_read_as_bytes(storage):
    dense = random_weight(8, 128)
    packed, state = quantize_4bit(dense, quant_type="nf4")
    stored, _ = quantize_4bit(dense, quant_type="nf4", quant_storage=storage)
    assert stored.dtype == storage
    found, expected = (
        converter.from_quant_state(p, state.absmax, state.code, (8, 128), 64)
        for p in (stored, packed)
    )
    assert torch.equal(found.codes, expected.codes)


@pytest.mark.parametrize("group_size", [32, 64])
def test_any_group_that_divides_the_block_is_exact(group_size):
    packed, state = quantize_4bit(random_weight(8, 256), blocksize=128, quant_type="fp4")
    weight = converter.from_quant_state(
        packed, state.absmax, state.code, (8, 256), 128, group_size=group_size
    )
    assert weight.spec.group_size == group_size
    expected = own_dequantisation(packed, state, 8, 256)
    assert torch.equal(flute.dequantize(weight), expected)


def test_a_group_wider_than_the_block_is_refused_and_the_right_one_named():
    packed, state = quantize_4bit(random_weight(8, 256), blocksize=64, quant_type="nf4")
    with pytest.raises(UnsupportedProblemError, match=r"`q` .* blocks of 64 .*Use group_size=64"):
        converter.from_quant_state(
            packed, state.absmax, state.code, (8, 256), 64, group_size=128, name="q"
        )


def test_blocks_that_straddle_every_group_are_refused_unless_requantised():
    dense = random_weight(16, 48, torch.float32)
    packed, state = quantize_4bit(dense, blocksize=64, quant_type="nf4")
    arguments = (packed, state.absmax, state.code, (16, 48), 64)
    with pytest.raises(UnsupportedProblemError, match=r"`q` .*K=48: no group .*--requantize"):
        converter.from_quant_state(*arguments, name="q")
    weight = converter.from_quant_state(*arguments, requantize=True)
    exact = own_dequantisation(packed, state, 16, 48)
    assert torch.equal(weight.table[0], state.code)
    assert (flute.dequantize(weight) - exact).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize(
    ("packed", "absmax", "code", "message"),
    [
        (255, 8, 16, r"`q` has 255 packed bytes; expected 256 for shape \(8, 64\), blocksize 64"),
        (256, 7, 16, "`q` has 7 absmax values; expected 8"),
        (256, 8, 15, "`q` has 15 table entries; expected 16"),
    ],
)
def test_sizes_that_contradict_the_shape_are_refused(packed, absmax, code, message):
    with pytest.raises(FormatError, match=message):
        converter.from_quant_state(
            torch.zeros(packed, dtype=torch.uint8),
            torch.ones(absmax),
            torch.ones(code),
            (8, 64),
            64,
            name="q",
        )


def test_nested_sizes_that_contradict_each_other_are_refused():
    absmax = torch.zeros(300, dtype=torch.uint8)
    with pytest.raises(
        FormatError, match=r"`q` has 1 nested absmax and 256 .*; expected 2 and 256"
    ):
        converter.unnest_absmax(absmax, torch.ones(1), torch.ones(256), 256, 0.0, name="q")


def test_nan_in_absmax_is_refused_by_name():
    absmax = torch.full((8,), float("nan"))
    with pytest.raises(FormatError, match=r"`q`: `scales` holds NaN"):
        converter.from_quant_state(
            torch.zeros(256, dtype=torch.uint8), absmax, torch.ones(16), (8, 64), 64, name="q"
        )


# ------------------------------------------------------------------------------------ live modules


def linear4bit(
    N: int, K: int, dtype: torch.dtype = torch.bfloat16, *, nested: bool = True, bias: bool = True
):
    layer = bnb.nn.Linear4bit(
        K, N, bias=bias, compress_statistics=nested, quant_type="nf4", compute_dtype=dtype
    )
    layer.weight = bnb.nn.Params4bit(
        random_weight(N, K, dtype), compress_statistics=nested, quant_type="nf4", module=layer
    )
    if bias:
        layer.bias = nn.Parameter(torch.linspace(-1, 1, N).to(dtype))
    return layer.to("cpu").eval()


@pytest.mark.parametrize("nested", [False, True])
def test_a_live_layer_converts_exactly(nested):
    layer = linear4bit(32, 128, nested=nested)
    weight = converter.from_module(layer)
    state = layer.weight.quant_state
    expected = own_dequantisation(layer.weight.data, state, 32, 128)
    assert torch.equal(flute.dequantize(weight), expected)
    assert weight.scales.dtype == (torch.float32 if nested else torch.bfloat16)


def test_a_layer_repacked_for_cpus_converts_to_the_weight_it_computes_with():
    layer = linear4bit(64, 128, nested=False)
    expected = converter.from_module(layer)
    layer.weight.data, layer.weight.quant_state = bnb.functional._convert_weight_packed_for_cpu(
        layer.weight.data, layer.weight.quant_state
    )
    found = converter.from_module(layer)
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.scales, expected.scales)  # absmax of bf16 weights: bf16 holds it


def test_a_layer_that_is_not_quantised_yet_is_refused():
    layer = bnb.nn.Linear4bit(64, 32, bias=False)
    with pytest.raises(UnsupportedProblemError, match=r"`q` .* not quantised yet.*first"):
        converter.from_module(layer, name="q")


def test_a_layer_on_the_meta_device_is_refused():
    layer = linear4bit(32, 64)
    layer.weight = nn.Parameter(layer.weight.data.to("meta"), requires_grad=False)
    with pytest.raises(UnsupportedProblemError, match=r"`q` .* offloaded by accelerate"):
        converter.from_module(layer, name="q")


# ------------------------------------------------------------------------------------- checkpoints


def save_bnb(folder, quant_type="nf4", nested=True, blocksize=64, dtype=torch.float32, **changes):
    """Save a tiny model the way transformers saves bitsandbytes models.

    Returns the dense fp32 model of the dequantised weights.
    """
    model = save_tiny(folder, dtype=dtype, **changes)
    tensors, exact = load_file(folder / "model.safetensors"), {}
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        dense = tensors.pop(name)
        N, K = dense.shape
        packed, state = quantize_4bit(
            dense, blocksize=blocksize, compress_statistics=nested, quant_type=quant_type
        )
        parts = {k: v.clone() for k, v in state.as_dict(packed=True).items()}
        tensors |= {f"{name}.{key}": value for key, value in parts.items()}
        tensors[name] = packed
        exact[name] = own_dequantisation(packed, state, N, K)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    model.float().load_state_dict(exact, strict=False)
    return model


@pytest.mark.parametrize(
    ("quant_type", "nested", "blocksize", "dtype", "scale_dtype"),
    [
        ("nf4", True, 64, torch.float32, "float32"),
        ("nf4", False, 64, torch.bfloat16, "bfloat16"),
        ("fp4", False, 128, torch.float16, "float16"),
        ("fp4", True, 512, torch.float32, "float32"),
    ],
)
def test_a_converted_checkpoint_gives_the_logits_of_the_dequantised_model(
    tmp_path, monkeypatch, quant_type, nested, blocksize, dtype, scale_dtype
):
    dense = save_bnb(tmp_path / "bnb", quant_type, nested, blocksize, dtype)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # an import of it would fail
    result = convert_checkpoint(tmp_path / "bnb", tmp_path / "out")
    assert (result.format, result.config.scale_dtype) == ("bitsandbytes", scale_dtype)
    assert result.config.table == ("nf" if quant_type == "nf4" else "custom")
    assert result.config.modules_to_not_convert == ("lm_head",)
    assert len(result.shapes) == 14
    model = flute.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert isinstance(model.get_submodule(LAYER), flute.LutLinear)
    checkpoint = bitsandbytes_checkpoint.BitsandbytesCheckpoint(CheckpointReader(tmp_path / "bnb"))
    for name in checkpoint.shapes:
        weight = checkpoint.weight(name)
        expected = dense.get_submodule(name).weight
        assert torch.equal(flute.dequantize(weight), expected), name
        assert torch.equal(model.get_submodule(name).dequantize(), expected), name
    tokens = torch.arange(24).view(2, 12)
    with torch.no_grad():
        found, wanted = model(tokens).logits, dense(tokens).logits
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


def test_what_transformers_itself_saves_converts(tmp_path):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    save_tiny(tmp_path / "dense", dtype=torch.float32)
    asked = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=asked, dtype=torch.float32
    )
    loaded.save_pretrained(tmp_path / "bnb")
    assert detect_format(tmp_path / "bnb") == "bitsandbytes"
    convert_checkpoint(tmp_path / "bnb", tmp_path / "out")
    model = flute.from_pretrained(tmp_path / "out")
    for name, layer in loaded.named_modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            state, (N, K) = layer.weight.quant_state, layer.weight.quant_state.shape
            expected = own_dequantisation(layer.weight.data, state, N, K)
            assert torch.equal(model.get_submodule(name).dequantize(), expected), name


def test_biases_and_dense_layers_are_kept(tmp_path):
    save_bnb(tmp_path / "bnb", kind="qwen2")
    convert_checkpoint(tmp_path / "bnb", tmp_path / "out")
    source, out = (CheckpointReader(tmp_path / folder) for folder in ("bnb", "out"))
    kept = [n for n in source.names if "weight." not in n and source.dtype(n) != torch.uint8]
    assert any(name.endswith("q_proj.bias") for name in kept)
    for name in kept:
        assert torch.equal(source.tensor(name), out.tensor(name))
    assert not [name for name in out.names if "absmax" in name or "quant" in name]


def test_layers_of_other_groups_become_overrides(tmp_path):
    save_bnb(tmp_path / "bnb", intermediate_size=96, blocksize=64)
    config = convert_checkpoint(tmp_path / "bnb", tmp_path / "out").config
    assert config.group_size == 64
    assert config.overrides == {
        f"model.layers.{i}.mlp.down_proj": {"group_size": 32} for i in (0, 1)
    }
    assert flute.from_pretrained(tmp_path / "out").get_submodule(LAYER).spec.group_size == 64


def test_layers_that_no_group_fits_are_named_and_requantised_only_if_asked(tmp_path):
    dense = save_bnb(tmp_path / "bnb", intermediate_size=48)
    with pytest.raises(UnsupportedProblemError, match=r"0.mlp.down_proj.weight` .*layers.1"):
        convert_checkpoint(tmp_path / "bnb", tmp_path / "out")
    config = convert_checkpoint(tmp_path / "bnb", tmp_path / "out", requantize=True).config
    name = "model.layers.1.mlp.down_proj"
    assert config.overrides[name] == {"group_size": -1}
    found = flute.from_pretrained(tmp_path / "out").get_submodule(name).dequantize()
    exact = dense.get_submodule(name).weight.float()
    assert (found - exact).norm() < 0.15 * exact.norm()


def edited(tmp_path, edit) -> CheckpointReader:
    save_bnb(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    edit(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return CheckpointReader(tmp_path)


STATE = f"{LAYER}.weight.quant_state.bitsandbytes__nf4"


def as_bytes(text: str) -> torch.Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (
            lambda t: t.pop(f"{LAYER}.weight.absmax"),
            CheckpointError,
            rf"lacks `{LAYER}.weight.absmax`",
        ),
        (
            lambda t: t.pop(f"{LAYER}.weight.nested_quant_map"),
            CheckpointError,
            r"lacks .*nested_quant_map",
        ),
        (
            lambda t: t.update({STATE: as_bytes("{")}),
            CheckpointError,
            r"no quantisation state of bitsandbytes \(JSONDecodeError",
        ),
        (
            lambda t: t.update({STATE: as_bytes('{"shape": [128, 64], "dtype": "float32"}')}),
            CheckpointError,
            r"no quantisation state of bitsandbytes \(KeyError: 'blocksize'\)",
        ),
        (
            lambda t: t.update(
                {STATE: as_bytes('{"shape": [2, 4, 8], "dtype": "float32", "blocksize": 64}')}
            ),
            UnsupportedProblemError,
            r"has shape \(2, 4, 8\); only matrices",
        ),
        (
            lambda t: t.update({STATE.replace("nf4", "af4"): t.pop(STATE)}),
            UnsupportedProblemError,
            r"quantisation type 'af4'",
        ),
    ],
)
def test_damaged_checkpoints_are_refused_by_tensor(tmp_path, edit, error, message):
    with pytest.raises(error, match=message):
        bitsandbytes_checkpoint.BitsandbytesCheckpoint(edited(tmp_path, edit))


def test_a_checkpoint_without_4bit_layers_is_refused(tmp_path):
    save_tiny(tmp_path)
    with pytest.raises(UnsupportedProblemError, match="no 4-bit layer"):
        bitsandbytes_checkpoint.BitsandbytesCheckpoint(CheckpointReader(tmp_path))
