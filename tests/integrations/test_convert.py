"""Conversion on disk: telling formats apart, refusing the others by name, resuming."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import flute
from flute.errors import CheckpointError, FormatError, UnsupportedProblemError
from flute.integrations import original, original_checkpoint
from flute.integrations.convert import convert_checkpoint, detect_format
from flute.stream import quantize_checkpoint
from tests.helpers import edit_json, edit_tensors, folder_bytes, save_tiny
from tests.integrations.test_original import save_original


def test_dense_and_own_checkpoints_are_told_apart_and_not_converted(tmp_path):
    save_tiny(tmp_path / "dense")
    quantize_checkpoint(tmp_path / "dense", tmp_path / "flute")
    assert detect_format(tmp_path / "dense") == "dense"
    assert detect_format(tmp_path / "flute") == "flute"
    with pytest.raises(UnsupportedProblemError, match=r"is not quantised: .*`flute quantize`"):
        convert_checkpoint(tmp_path / "dense", tmp_path / "out")
    with pytest.raises(UnsupportedProblemError, match="is a FLUTE checkpoint already"):
        convert_checkpoint(tmp_path / "flute", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_originals_later_configs_call_themselves_flute_too_and_convert(tmp_path, zoo):
    folder = copy_of(zoo, tmp_path / "copy")
    theirs = {"quant_method": "flute", "num_bits": 4, "group_size": 64, "num_sms_packed": 108}
    edit_json(folder / "config.json", quantization_config=theirs)
    (folder / "flute_config.json").unlink()
    assert detect_format(folder) == "original"
    convert_checkpoint(folder, tmp_path / "out")
    convert_checkpoint(zoo, tmp_path / "same")
    files = [(tmp_path / d / "model.safetensors").read_bytes() for d in ("out", "same")]
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("quantization", "name"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes 8-bit"),
        ({"quant_method": "higgs"}, "higgs"),
    ],
)
def test_other_formats_are_refused_by_the_name_in_the_config(tmp_path, quantization, name):
    save_tiny(tmp_path)
    edit_json(tmp_path / "config.json", quantization_config=quantization)
    with pytest.raises(UnsupportedProblemError, match=f"is a {name} checkpoint.*Convertible are"):
        detect_format(tmp_path)


@pytest.mark.parametrize(
    ("tensor", "name"),
    [
        ("qweight", "GPTQ or AWQ"),
        ("weight_packed", "compressed-tensors"),
        ("SCB", "bitsandbytes 8-bit"),
        ("weight_scale_inv", "block-scaled FP8"),
        ("codebooks", "AQLM"),
    ],
)
def test_other_formats_are_refused_by_their_tensors_where_the_config_is_silent(
    tmp_path, tensor, name
):
    save_tiny(tmp_path)
    edit_tensors(tmp_path, {f"model.layers.0.mlp.up_proj.{tensor}": torch.ones(2)})
    with pytest.raises(UnsupportedProblemError, match=f"is a {name} checkpoint"):
        detect_format(tmp_path)


def test_gguf_is_refused_as_a_file_and_as_a_folder(tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    for path in (file, tmp_path):
        with pytest.raises(UnsupportedProblemError, match=r"model.gguf` is a GGUF checkpoint"):
            detect_format(path)


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="is not a folder"):
        detect_format(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"config.json` does not exist"):
        detect_format(tmp_path)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("convert") / "zoo"
    save_original(folder, 4)
    return folder


def copy_of(zoo, folder):
    folder.mkdir()
    tensors = load_file(zoo / "model.safetensors")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for name in ("config.json", "flute_config.json"):
        (folder / name).write_text((zoo / name).read_text())
    return folder


def test_an_interrupted_conversion_goes_on_and_ends_byte_for_byte_the_same(
    tmp_path, zoo, monkeypatch
):
    convert_checkpoint(zoo, tmp_path / "whole")
    converted = []
    convert = original_checkpoint.OriginalCheckpoint.weight

    def interrupted(self, name):
        if len(converted) == 3:
            raise KeyboardInterrupt
        converted.append(name)
        return convert(self, name)

    with monkeypatch.context() as patch:
        patch.setattr(original_checkpoint.OriginalCheckpoint, "weight", interrupted)
        with pytest.raises(KeyboardInterrupt):
            convert_checkpoint(zoo, tmp_path / "resumed")
    assert not (tmp_path / "resumed").exists()
    again = []

    def counted(self, name):
        again.append(name)
        return convert(self, name)

    monkeypatch.setattr(original_checkpoint.OriginalCheckpoint, "weight", counted)
    convert_checkpoint(zoo, tmp_path / "resumed")
    assert len(again) == 7 - 3
    assert not set(again) & set(converted)
    assert folder_bytes(tmp_path / "resumed") == folder_bytes(tmp_path / "whole")


def test_the_config_says_what_the_tensors_are(tmp_path, zoo):
    convert_checkpoint(zoo, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["quantization_config"] == {
        "quant_method": "flute",
        "format_version": 1,
        "num_bits": 4,
        "group_size": 64,
        "method": "original",
        "table": "nf",
        "table_scope": "tensor",
        "scale_dtype": "float16",
        "modules_to_not_convert": ["lm_head"],
        "overrides": {},
    }


def test_a_layer_that_is_no_linear_of_the_model_is_refused(tmp_path, zoo):
    folder = copy_of(zoo, tmp_path / "copy")
    tensors = load_file(zoo / "model.safetensors")
    layer = "model.layers.0.mlp.up_proj"
    parts = {key: tensors[f"{layer}.{key}"] for key in ("weight", "scales", "tables", "tables2")}
    edit_tensors(folder, {f"model.layers.9.mlp.up_proj.{key}": t for key, t in parts.items()})
    with pytest.raises(UnsupportedProblemError, match=r"`model.layers.9.mlp.up_proj` is no nn.Lin"):
        convert_checkpoint(folder, tmp_path / "out")


def test_a_layer_of_another_shape_than_the_model_is_refused(tmp_path, zoo):
    folder = copy_of(zoo, tmp_path / "copy")
    edit_json(folder / "config.json", intermediate_size=1024)
    with pytest.raises(FormatError, match=r"is \(.*\); LlamaForCausalLM expects \(.*1024"):
        convert_checkpoint(folder, tmp_path / "out")


def test_a_model_with_a_layer_in_no_file_is_refused(tmp_path, zoo):
    folder = copy_of(zoo, tmp_path / "copy")
    edit_tensors(folder, {"lm_head.weight": None})
    with pytest.raises(CheckpointError, match=r"1 layers .* have no weight .* `lm_head.weight`"):
        convert_checkpoint(folder, tmp_path / "out")


def test_a_tied_output_head_needs_no_weight(tmp_path, zoo):
    folder = copy_of(zoo, tmp_path / "copy")
    edit_tensors(folder, {"lm_head.weight": None})
    edit_json(folder / "config.json", tie_word_embeddings=True)
    convert_checkpoint(folder, tmp_path / "out")
    model = flute.from_pretrained(tmp_path / "out")
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_the_tile_is_asked_for_where_the_data_do_not_tell_it(tmp_path, zoo):
    folder = copy_of(zoo, tmp_path / "copy")
    name = "model.layers.0.mlp.up_proj.weight"
    noise = torch.randint(-(2**15), 2**15, (128, 256), dtype=torch.int16)
    edit_tensors(folder, {name: noise})
    with pytest.raises(UnsupportedProblemError, match=r"`model.layers.0.mlp.up_proj`: the data do"):
        convert_checkpoint(folder, tmp_path / "out")
    convert_checkpoint(folder, tmp_path / "out", tile=64, overwrite=True)
    layer = flute.from_pretrained(tmp_path / "out").get_submodule(name.removesuffix(".weight"))
    expected = original.unpack_original(noise, 4, 64)
    assert torch.equal(layer.quantized_weight().codes, expected)


def test_overwriting_the_source_is_refused_and_nothing_is_lost(tmp_path, zoo):
    folder = copy_of(zoo, tmp_path / "copy")
    before = folder_bytes(folder)
    for destination in (folder, tmp_path):
        with pytest.raises(CheckpointError, match="is or holds the source"):
            convert_checkpoint(folder, destination, overwrite=True)
    assert folder_bytes(folder) == before
