"""Reading checkpoints: every block of rows, every broken folder, every flipped bit."""

from __future__ import annotations

import json
import re
import shutil
import zlib

import pytest
import torch
from helpers import edit_json, edit_tensors, generator
from safetensors.torch import save_file

from flute.checkpoint import (
    CHECKSUM_METADATA,
    INDEX_NAME,
    CheckpointReader,
    is_hub_name,
    read_json,
    tensor_bytes,
    verify_checksums,
)
from flute.errors import CheckpointError, ChecksumError, reason_of

TENSORS = {
    "b.weight": torch.randn(70, 33, generator=generator(1)).bfloat16(),
    "a.weight": torch.randn(5, 8, generator=generator(2)).half(),
    "a.bias": torch.randn(5, generator=generator(3)),
    "count": torch.tensor(7),
    "empty": torch.zeros(0, 4),
    "cube": torch.randn(4, 3, 2, generator=generator(4)).double(),
    "flags": torch.tensor([True, False]),
    "eight": torch.randn(6, 2, generator=generator(5)).to(torch.float8_e4m3fn),
    "bytes": torch.arange(9, dtype=torch.uint8),
}
SHARDS = (
    ("b.weight", "count", "empty"),
    ("a.weight", "a.bias", "cube"),
    ("flags", "eight", "bytes"),
)


@pytest.fixture
def single(tmp_path):
    """One file."""
    folder = tmp_path / "single"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    save_file(TENSORS, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def sharded(tmp_path):
    """Three files and an index."""
    folder = tmp_path / "sharded"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    weight_map = {}
    for i, names in enumerate(SHARDS):
        file = f"model-{i + 1:05d}-of-00003.safetensors"
        save_file({name: TENSORS[name] for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.fixture(params=["single", "sharded"])
def folder(request):
    return request.getfixturevalue(request.param)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (a.shape, a.dtype) == (b.shape, b.dtype) and bytes(tensor_bytes(a)) == bytes(
        tensor_bytes(b)
    )


def test_everything_is_read(folder):
    reader = CheckpointReader(folder)
    assert set(reader.names) == set(TENSORS)
    assert reader.config == {"model_type": "llama"}
    for name, tensor in TENSORS.items():
        assert reader.dtype(name) == tensor.dtype
        assert reader.shape(name) == tuple(tensor.shape)
        assert reader.num_bytes(name) == tensor.numel() * tensor.element_size()
        assert same(reader.tensor(name), tensor)


def test_names_come_file_by_file(sharded):
    names = [name for shard in SHARDS for name in sorted(shard)]
    assert CheckpointReader(sharded).names == names
    assert [path.name for path in CheckpointReader(sharded).files] == [
        f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)
    ]


@pytest.mark.parametrize("max_bytes", [1, 66, 67, 200, 1 << 24])
@pytest.mark.parametrize("name", TENSORS)
def test_blocks_cover_a_tensor_in_order(folder, name, max_bytes):
    blocks = list(CheckpointReader(folder).blocks(name, max_bytes))
    tensor = TENSORS[name]
    whole = torch.cat(blocks) if tensor.ndim else blocks[0]
    assert same(whole, tensor)
    row_bytes = tensor[:1].numel() * tensor.element_size() if tensor.ndim else 8
    assert all(b.numel() * b.element_size() <= max(max_bytes, row_bytes) for b in blocks)
    assert len(blocks) > 1 or tensor.numel() * tensor.element_size() <= max(max_bytes, row_bytes)


def test_rows(folder):
    reader = CheckpointReader(folder)
    assert same(reader.rows("b.weight", 3, 68), TENSORS["b.weight"][3:68])
    assert same(reader.rows("cube", 1, 2), TENSORS["cube"][1:2])


def test_a_single_file_counts_before_an_index(single, sharded):
    """As in transformers."""
    shutil.copy(sharded / INDEX_NAME, single)
    assert [path.name for path in CheckpointReader(single).files] == ["model.safetensors"]


def test_tensor_bytes_are_those_of_the_file():
    tensor = torch.tensor([[1.0, -2.0], [3.0, 4.0]])
    assert bytes(tensor_bytes(tensor.T)) == tensor.T.contiguous().numpy().tobytes()
    assert bytes(tensor_bytes(torch.tensor(1, dtype=torch.int16))) == b"\x01\x00"
    assert bytes(tensor_bytes(torch.zeros(0, 3))) == b""
    assert bytes(tensor_bytes(torch.ones(1, requires_grad=True))) == b"\x00\x00\x80\x3f"


# ---- broken folders


def raises(message: str):
    return pytest.raises(CheckpointError, match=re.escape(message))


def test_no_folder(tmp_path):
    with raises(f"`{tmp_path / 'none'}` is not a folder; expected a model checkpoint, or the name"):
        CheckpointReader(tmp_path / "none")
    file = tmp_path / "file"
    file.write_text("")
    with raises(f"`{file}` is not a folder"):
        CheckpointReader(file)


def test_no_config(single):
    (single / "config.json").unlink()
    with raises(f"`{single / 'config.json'}` does not exist; expected a model checkpoint there."):
        CheckpointReader(single)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"model_type": ', "cannot be read as JSON: Expecting value"),
        (b"", "cannot be read as JSON: Expecting value"),
        (b"\xff\xfe\x00", "cannot be read as JSON: 'utf-8' codec"),
        (b"[1]", "holds list; expected a JSON object."),
        (b"null", "holds NoneType; expected a JSON object."),
    ],
)
def test_broken_json(single, content, message):
    path = single / "config.json"
    path.write_bytes(content)
    for read in (lambda: CheckpointReader(single), lambda: read_json(path)):
        with raises(f"`{path}` {message}"):
            read()


def test_a_folder_in_place_of_the_config(single):
    (single / "config.json").unlink()
    (single / "config.json").mkdir()
    with raises("cannot be read as JSON: [Errno 21]"):
        CheckpointReader(single)


def test_no_weights(single):
    (single / "model.safetensors").unlink()
    with raises(f"`{single}` has neither `model.safetensors` nor `{INDEX_NAME}`."):
        CheckpointReader(single)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights(single, name):
    (single / "model.safetensors").unlink()
    torch.save({"a": torch.ones(2)}, single / name)
    with raises(f"`{single / name}` holds pickled weights, which are not read here. Save the mod"):
        CheckpointReader(single)


def test_a_missing_shard(sharded):
    path = sharded / "model-00002-of-00003.safetensors"
    path.unlink()
    with raises(f"1 of 3 weight files are missing, such as `{path}`. Download the checkpoint ag"):
        CheckpointReader(sharded)


def test_a_tensor_missing_in_its_shard(sharded):
    save_file({"a.bias": TENSORS["a.bias"]}, sharded / "model-00002-of-00003.safetensors")
    with raises(f"`{INDEX_NAME}` lists 2 tensors that are not in their files, such as `a.weight`."):
        CheckpointReader(sharded)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": {}}', '{"weight_map": ["a"]}'])
def test_an_index_without_files(sharded, content):
    (sharded / INDEX_NAME).write_text(content)
    with raises(f"`{sharded / INDEX_NAME}` has no `weight_map`. Download it again."):
        CheckpointReader(sharded)


def test_an_index_with_a_number_for_a_file(sharded):
    edit_json(sharded / INDEX_NAME, weight_map={"a": 3})
    with raises(f"`{sharded / INDEX_NAME}` names no file for `a`. Download it again."):
        CheckpointReader(sharded)


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1])
def test_a_truncated_file(folder, keep):
    path = CheckpointReader(folder).files[-1]
    path.write_bytes(path.read_bytes()[:keep])
    message = re.escape(f"`{path}` cannot be read as safetensors (") + ".*may be truncated. Copy or"
    with pytest.raises(CheckpointError, match=message):
        CheckpointReader(folder)


@pytest.mark.parametrize(
    "content", [b"garbage" * 40, b"\x00" * 64, b"\xff" * 64, b"version https://git-lfs.github.com"]
)
def test_a_garbage_file(folder, content):
    path = CheckpointReader(folder).files[0]
    path.write_bytes(content)
    with raises(f"`{path}` cannot be read as safetensors"):
        CheckpointReader(folder)


def test_a_file_that_vanishes_later(folder):
    reader = CheckpointReader(folder)
    for path in reader.files:
        path.unlink()
    with raises("cannot be read as safetensors"):
        reader.tensor("b.weight")


def test_a_dtype_nobody_knows(single):
    header = {"t": {"dtype": "U16", "shape": [2], "data_offsets": [0, 4]}}
    text = json.dumps(header).encode()
    path = single / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"\x00" * 4)
    with raises(f"`t` in `{path}` is U16: unknown."):
        CheckpointReader(single)


# ---- checksums


def record_in_index(folder):
    tensors = {name: f"{zlib.crc32(tensor_bytes(t)):08x}" for name, t in TENSORS.items()}
    weight_map = dict.fromkeys(TENSORS, "model.safetensors")
    index = {"metadata": {"checksums": {"tensors": tensors}}, "weight_map": weight_map}
    (folder / INDEX_NAME).write_text(json.dumps(index))


def record_in_header(folder):
    tensors = {name: f"{zlib.crc32(tensor_bytes(t)):08x}" for name, t in TENSORS.items()}
    metadata = {"format": "pt", CHECKSUM_METADATA: json.dumps(tensors)}
    save_file(TENSORS, folder / "model.safetensors", metadata=metadata)


RECORD = [record_in_index, record_in_header]


def start_of(path, name) -> int:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return 8 + length + json.loads(content[8 : 8 + length])[name]["data_offsets"][0]


def test_without_checksums_nothing_is_verified(folder):
    assert CheckpointReader(folder).checksums() == {}
    assert verify_checksums(folder) == 0


@pytest.mark.parametrize("metadata", [..., None, {}, {"checksums": None}, {"checksums": {}}])
def test_an_index_with_no_checksums(sharded, metadata):
    edit_json(sharded / INDEX_NAME, metadata=metadata)
    assert verify_checksums(sharded) == 0


@pytest.mark.parametrize("record", RECORD)
def test_intact_tensors_verify(single, record):
    record(single)
    assert verify_checksums(single) == len(TENSORS)
    reader = CheckpointReader(single)
    for name, tensor in TENSORS.items():
        assert reader.crc32(name) == f"{zlib.crc32(tensor_bytes(tensor)):08x}"


@pytest.mark.parametrize("record", RECORD)
@pytest.mark.parametrize("name", [name for name, t in TENSORS.items() if t.numel()])
def test_one_flipped_bit_is_found(single, record, name):
    record(single)
    path = single / "model.safetensors"
    content = bytearray(path.read_bytes())
    at = start_of(path, name) + TENSORS[name].numel() * TENSORS[name].element_size() - 1
    content[at] ^= 1 if name == "flags" else 16
    path.write_bytes(content)
    message = re.escape(f"`{name}` in `{path}` is corrupted: crc32 ")
    with pytest.raises(ChecksumError, match=message + ".*Copy or download the file again"):
        verify_checksums(single)


def test_a_large_tensor_is_summed_in_blocks(single, monkeypatch):
    record_in_index(single)
    reader = CheckpointReader(single)
    blocks = CheckpointReader.blocks
    monkeypatch.setattr(CheckpointReader, "blocks", lambda self, name: blocks(self, name, 40))
    assert {name: reader.crc32(name) for name in TENSORS} == reader.checksums()
    assert verify_checksums(single) == len(TENSORS)


def test_a_tensor_that_is_gone_has_a_checksum_still(single):
    record_in_index(single)
    edit_tensors(single, {"cube": None})
    with pytest.raises(
        ChecksumError, match=f"`cube` has a checksum but is missing from `{single}`"
    ):
        verify_checksums(single)


def test_checksum_errors_are_checkpoint_errors():
    assert issubclass(ChecksumError, CheckpointError)


@pytest.mark.parametrize(
    ("name", "is_on_the_hub"),
    [
        ("team/model", True),
        ("model", False),
        ("a/b/c", False),
        ("./model", False),
        ("~/model", False),
        ("here/model", False),
        ("/model", False),
        ("model/", False),
    ],
)
def test_names_on_the_hub(tmp_path, monkeypatch, name, is_on_the_hub):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "model").mkdir(parents=True)
    assert is_hub_name(name) is is_on_the_hub


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("\n  one thing.\n\nanother"), "one thing"),
        (KeyError(), "KeyError"),
        (OSError(" \n"), "OSError"),
    ],
)
def test_what_others_say_is_one_line(error, expected):
    assert reason_of(error) == expected


def test_more_lines_of_what_others_say():
    assert reason_of(ValueError("for field 'a':\n  expected int\nmore"), 2) == (
        "for field 'a': expected int"
    )
