"""The original FLUTE's checkpoints: the unpacker against a packer written from the layout."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import flute
from flute.checkpoint import CheckpointReader
from flute.errors import CheckpointError, FormatError, UnsupportedProblemError
from flute.integrations import original, original_checkpoint
from flute.integrations.convert import convert_checkpoint, detect_format

SLICES = {2: 8, 3: 16, 4: 4}


def pack_original(codes: torch.Tensor, num_bits: int, tile: int) -> torch.Tensor:
    """Pack (N, K) codes as the layout's text says, one word at a time."""
    c = codes.tolist()
    N, K = codes.shape
    T, b, S = tile, num_bits, SLICES[num_bits]
    rows = N // S
    stored = np.zeros((N * b // 16, K), dtype=np.uint16)

    def put(row: int, k2: int, word: int) -> None:
        stored[row, 2 * k2] = word & 0xFFFF
        stored[row, 2 * k2 + 1] = word >> 16

    for p in range(rows):
        features = [(p // T) * S * T + s * T + p % T for s in range(S)]
        for k2 in range(K // 2):
            pairs = [(c[n][2 * k2] << b) | c[n][2 * k2 + 1] for n in features]
            if b != 3:
                put(p, k2, sum(pair << (2 * b * s) for s, pair in enumerate(pairs)))
                continue
            planes = [sum(pairs[i + 3 * j] << (6 * j) for j in range(5)) for i in range(3)]
            planes = [word | ((pairs[15] >> (2 * i)) & 3) << 30 for i, word in enumerate(planes)]
            put(p, k2, planes[0])
            for plane in (0, 1):
                row = rows + (p // T) * 2 * T + plane * T + p % T
                put(row, k2, planes[1 + plane])
    return torch.from_numpy(stored.view(np.int16))


def random_codes(N: int, K: int, num_bits: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1 << num_bits, (N, K), dtype=torch.uint8, generator=generator)


@settings(max_examples=20, deadline=None)
@given(
    num_bits=st.sampled_from([2, 3, 4]),
    tile=st.sampled_from([32, 64]),
    blocks=st.integers(1, 2),
    half_K=st.integers(1, 9),
    seed=st.integers(0, 2**32),
)
def test_unpacking_inverts_a_packer_written_from_the_layout(num_bits, tile, blocks, half_K, seed):
    tile = 32 if num_bits == 3 else tile
    codes = random_codes(blocks * tile * SLICES[num_bits], 2 * half_K, num_bits, seed)
    packed = pack_original(codes, num_bits, tile)
    assert torch.equal(original.unpack_original(packed, num_bits, tile), codes)


@pytest.mark.parametrize(
    ("num_bits", "tile", "n", "k", "code", "expected"),
    [  # {(stored row, int16 column): value}, worked out by hand from the layout
        (4, 32, 0, 0, 15, {(0, 0): 0x00F0}),
        (4, 32, 0, 1, 15, {(0, 0): 0x000F}),
        (4, 32, 33, 3, 9, {(1, 2): 0x0900}),
        (4, 32, 64, 0, 1, {(0, 1): 0x0010}),
        (4, 32, 128, 0, 15, {(32, 0): 0x00F0}),
        (4, 64, 128, 0, 15, {(0, 1): 0x00F0}),
        (2, 32, 32 * 5 + 7, 2, 3, {(7, 3): 0x00C0}),
        (3, 32, 0, 0, 7, {(0, 0): 0x0038}),
        (3, 32, 32 * 4, 0, 7, {(32, 0): 0x0E00}),
        (3, 32, 32 * 2 + 5, 1, 7, {(64 + 5, 0): 0x0007}),
        (3, 32, 32 * 15, 0, 7, {(32, 1): 0x8000, (64, 1): 0xC000}),
        (3, 32, 32 * 15, 1, 7, {(0, 1): 0xC000, (32, 1): 0x4000}),
    ],
)
def test_one_code_lands_on_the_bits_the_layout_says(num_bits, tile, n, k, code, expected):
    N = {2: 512, 3: 512, 4: 256}[num_bits]
    packed = np.zeros((N * num_bits // 16, 4), dtype=np.uint16)
    for where, value in expected.items():
        packed[where] = value
    codes = original.unpack_original(torch.from_numpy(packed.view(np.int16)), num_bits, tile)
    assert codes.nonzero().tolist() == [[n, k]]
    assert int(codes[n, k]) == code


def quantized(
    N: int, K: int, num_bits: int, group_size: int, method: str = "nf"
) -> flute.QuantizedWeight:
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(N + K + num_bits))
    return flute.quantize(weight, num_bits, group_size, method=method, scale_dtype=torch.float16)


@pytest.mark.parametrize("tile", [32, 64])
@pytest.mark.parametrize(("num_bits", "N"), [(4, 256), (2, 512)])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("method", ["nf", "mse"])
def test_the_tile_is_found_from_codes_and_scales(num_bits, N, tile, group_size, method):
    weight = quantized(N, 128, num_bits, group_size, method)
    packed = pack_original(weight.codes, num_bits, tile)
    assert original.find_tile(packed, weight.scales, weight.table[0]) == tile
    found = original.from_original(packed, weight.scales, weight.table[0])
    assert torch.equal(found.codes, weight.codes)
    assert torch.equal(flute.dequantize(found), flute.dequantize(weight))


def test_every_group_has_an_extreme_code_under_both_tiles():
    """Why absmax alone cannot tell the tile: it only permutes rows, and keeps every group whole."""
    weight = quantized(256, 64, 4, 32)
    packed = pack_original(weight.codes, 4, 32)
    for tile in (32, 64):
        groups = original.unpack_original(packed, 4, tile).view(256, -1, 32)
        assert bool(((groups == 0) | (groups == 15)).any(-1).all())


@pytest.mark.parametrize(("num_bits", "N"), [(4, 384), (2, 256), (3, 512)])
def test_the_tile_is_32_where_the_shape_admits_no_other(num_bits, N):
    codes = random_codes(N, 64, num_bits)
    table = torch.linspace(-1, 1, 1 << num_bits)
    packed = pack_original(codes, num_bits, 32)
    assert torch.equal(original.from_original(packed, torch.ones(N, 1), table).codes, codes)


def test_random_codes_do_not_tell_the_tile_and_a_given_one_is_used():
    codes = random_codes(256, 64, 4)
    packed = pack_original(codes, 4, 64)
    scales, table = torch.rand(256, 2) + 0.5, torch.linspace(-1, 1, 16)
    with pytest.raises(
        UnsupportedProblemError, match=r"`q`: the data do not tell the tile.*--tile"
    ):
        original.from_original(packed, scales, table, name="q")
    assert torch.equal(original.from_original(packed, scales, table, tile=64).codes, codes)


def test_data_that_fit_both_tiles_are_refused():
    repeated = torch.randn(32, 256, generator=torch.Generator().manual_seed(0)).repeat(8, 1)
    weight = flute.quantize(repeated, 4, 32, method="nf")  # both orders keep n % 32
    packed = pack_original(weight.codes, 4, 32)
    with pytest.raises(
        UnsupportedProblemError, match=r"by -0.[67]\d at tile 32, -0.[67]\d at tile 64"
    ):
        original.find_tile(packed, weight.scales, weight.table[0])


def test_a_given_tile_does_not_overrule_the_data():
    weight = quantized(256, 128, 4, 32)
    packed = pack_original(weight.codes, 4, 64)
    found = original.from_original(packed, weight.scales, weight.table[0], tile=32)
    assert torch.equal(found.codes, weight.codes)


@pytest.mark.parametrize(
    ("weight", "scales", "tables", "tile", "message"),
    [
        ((64, 64), (256, 2), (5,), None, r"`l`: `tables` has shape \(5,\); expected 4, 8 or 16"),
        ((64, 64), (256, 2), (16, 2), None, "HIGGS"),
        (
            (64, 64),
            (128, 2),
            (16,),
            None,
            r"`scales` has shape \(128, 2\); expected .* N=256, K=64",
        ),
        ((64, 64), (256, 3), (16,), None, r"`scales` has shape \(256, 3\)"),
        ((65, 64), (260, 2), (16,), None, "N a multiple of 128, K even"),
        ((64, 60), (256, 2), (16,), None, "`group_size` is 30"),
        ((64, 64), (256, 2), (16,), 48, r"`tile` is 48; expected one of \(32, 64\)"),
    ],
)
def test_shapes_that_contradict_the_layout_are_refused(weight, scales, tables, tile, message):
    with pytest.raises(FormatError, match=message):
        original.from_original(
            torch.zeros(weight, dtype=torch.int16),
            torch.ones(scales),
            torch.ones(tables),
            tile=tile,
            name="l",
        )


def test_nan_in_scales_is_refused_by_name():
    scales = torch.ones(128, 2)
    scales[3, 1] = float("nan")
    with pytest.raises(FormatError, match=r"`q`: `scales` holds NaN"):
        original.from_original(
            torch.zeros(32, 64, dtype=torch.int16), scales, torch.linspace(-1, 1, 16), name="q"
        )


def test_codes_of_another_dtype_and_an_impossible_tile_are_refused():
    with pytest.raises(FormatError, match=r"torch.int32 .*; expected torch.int16"):
        original.possible_tiles(torch.zeros(64, 64, dtype=torch.int32), 4)
    with pytest.raises(FormatError, match=r"cannot have tile=64; possible: \(32,\)"):
        original.unpack_original(torch.zeros(32, 64, dtype=torch.int16), 4, 64)


# ---------------------------------------------------------------------------------- checkpoints


def save_original(folder, num_bits: int, dtype: torch.dtype = torch.float32):
    """Save a tiny model as the original did; returns the dense model of the dequantised weights."""
    size = {4: 256, 2: 512, 3: 512}[num_bits]
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=size,
        intermediate_size=512,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=64,
        max_position_embeddings=64,
        dtype=dtype,
    )
    model = LlamaForCausalLM(config).to(dtype).eval()
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for i, name in enumerate(sorted(n for n in tensors if n.endswith("_proj.weight"))):
        tile = 32 if num_bits == 3 else (32, 64)[i % 2]
        dense = tensors.pop(name)
        weight = flute.quantize(dense, num_bits, 64, method="nf", scale_dtype=torch.float16)
        layer = name.removesuffix(".weight")
        table = weight.table[0].half()
        pairs = torch.cartesian_prod(table, table).view(1 << num_bits, 1 << num_bits, 2)
        tensors[name] = pack_original(weight.codes, num_bits, tile)
        tensors[f"{layer}.scales"] = weight.scales
        tensors[f"{layer}.tables"] = table
        tensors[f"{layer}.tables2"] = pairs.contiguous().view(torch.float32)
        exact = flute.QuantizedWeight(weight.codes, weight.scales, table.float()[None], weight.spec)
        model.get_submodule(layer).weight.data = flute.dequantize(exact, dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    told = {"version": "0.0.6", "num_sms": 108, "num_bits": num_bits, "group_size": 64}
    (folder / "flute_config.json").write_text(json.dumps(told))
    return model


@pytest.mark.parametrize("num_bits", [4, 3, 2])
def test_a_converted_checkpoint_gives_the_logits_of_its_dequantised_model(tmp_path, num_bits):
    dense = save_original(tmp_path / "zoo", num_bits)
    assert detect_format(tmp_path / "zoo") == "original"
    result = convert_checkpoint(tmp_path / "zoo", tmp_path / "out")
    assert result.format == "original"
    assert result.config.modules_to_not_convert == ("lm_head",)
    assert (result.config.num_bits, result.config.group_size) == (num_bits, 64)
    assert result.config.table == "nf"
    model = flute.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert isinstance(model.model.layers[0].mlp.up_proj, flute.LutLinear)
    tokens = torch.arange(24).view(2, 12)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, dense(tokens).logits, rtol=0, atol=2e-6)
    names = CheckpointReader(tmp_path / "out").names
    assert not [name for name in names if "tables" in name]
    assert not (tmp_path / "out" / "flute_config.json").exists()


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original") / "zoo"
    save_original(folder, 4)
    return folder


def edited(zoo, tmp_path, edit):
    """A copy of the checkpoint, its tensors changed by ``edit``."""
    tensors = load_file(zoo / "model.safetensors")
    edit(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for name in ("config.json", "flute_config.json"):
        (tmp_path / name).write_text((zoo / name).read_text())
    return CheckpointReader(tmp_path)


def test_each_layer_that_is_converted_is_the_models(tmp_path):
    dense = save_original(tmp_path / "zoo", 4)
    checkpoint = original_checkpoint.OriginalCheckpoint(CheckpointReader(tmp_path / "zoo"))
    assert len(checkpoint.shapes) == 7
    for name, shape in checkpoint.shapes.items():
        weight, expected = checkpoint.weight(name), dense.get_submodule(name).weight
        assert weight.shape == shape
        assert weight.scales.dtype == torch.float16
        assert torch.equal(flute.dequantize(weight, expected.dtype), expected)


def test_layers_of_other_groups_become_overrides_and_mixed_dtypes_fp32_scales(zoo, tmp_path):
    name = "model.layers.0.mlp.up_proj"

    def edit(tensors):
        halved = tensors[f"{name}.scales"].repeat_interleave(2, 1)
        tensors[f"{name}.scales"] = halved.to(torch.bfloat16)
        tensors[f"{name}._extra_state"] = torch.zeros(3)

    checkpoint = original_checkpoint.OriginalCheckpoint(edited(zoo, tmp_path, edit))
    assert checkpoint.config.overrides == {name: {"num_bits": 4, "group_size": 32}}
    assert checkpoint.config.scale_dtype == "float32"
    assert f"{name}._extra_state" in checkpoint.consumed


def test_a_table_of_its_own_is_called_custom(zoo, tmp_path):
    def edit(tensors):
        tensors["model.layers.0.mlp.up_proj.tables"][3] += 0.01

    assert (
        original_checkpoint.OriginalCheckpoint(edited(zoo, tmp_path, edit)).config.table == "custom"
    )


def test_a_missing_tensor_is_named(zoo, tmp_path):
    reader = edited(zoo, tmp_path, lambda t: t.pop("model.layers.0.mlp.up_proj.scales"))
    with pytest.raises(CheckpointError, match=r"lacks `model.layers.0.mlp.up_proj.scales`"):
        original_checkpoint.OriginalCheckpoint(reader)


def test_a_checkpoint_without_layers_of_the_original_is_refused(zoo, tmp_path):
    def edit(tensors):
        for name in [n for n in tensors if "_proj" in n]:
            del tensors[name]

    with pytest.raises(UnsupportedProblemError, match=r"no tensor `<layer>.tables`"):
        original_checkpoint.OriginalCheckpoint(edited(zoo, tmp_path, edit))


def test_a_config_that_contradicts_the_tensors_is_refused(zoo, tmp_path):
    reader = edited(zoo, tmp_path, lambda tensors: None)
    (tmp_path / "flute_config.json").write_text('{"num_bits": 3, "group_size": 64}')
    with pytest.raises(FormatError, match=r"says num_bits=3, but the tensors are of num_bits=4"):
        original_checkpoint.OriginalCheckpoint(reader)


def test_a_layer_of_a_wrong_shape_on_disk_is_named(zoo, tmp_path):
    def edit(tensors):
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(65, 256, dtype=torch.int16)

    with pytest.raises(FormatError, match=r"`model.layers.0.mlp.up_proj`: `scales` has shape"):
        original_checkpoint.OriginalCheckpoint(edited(zoo, tmp_path, edit))
