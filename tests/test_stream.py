"""Quantising checkpoints on disk: equal to memory, killed, fed with every kind of broken source."""

from __future__ import annotations

import builtins
import json
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from helpers import (
    DEMO_MODEL,
    edit_json,
    edit_tensors,
    folder_bytes,
    generator,
    python,
    run_python,
    save_tiny,
    saved_tensors,
    tiny_model,
)
from safetensors.torch import load_file, save_file

from flute import stream
from flute.checkpoint import CheckpointReader, verify_checksums
from flute.errors import CheckpointError, ChecksumError, FormatError, UnsupportedProblemError
from flute.format import CheckpointConfig
from flute.model import QuantizeOptions, quantize_model
from flute.stream import find_source, plan_checkpoint, quantize_checkpoint

FAST = QuantizeOptions(4, 32, method="nf")


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(a, b)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny Llama on disk; not to be changed."""
    folder = tmp_path_factory.mktemp("saved") / "llama"
    save_tiny(folder)
    return folder


@pytest.fixture
def source(saved, tmp_path):
    """A copy of it, to be broken."""
    return Path(shutil.copytree(saved, tmp_path / "source"))


def refused(kind, source, out, message, options=FAST):
    """Quantise; it must fail with the message and leave nothing at all."""
    with pytest.raises(kind, match=message):
        quantize_checkpoint(source, out, options)
    assert not out.exists()
    assert not out.with_name(out.name + ".partial").exists()


# ---- the result


CASES = [
    ("llama", "5GB", torch.bfloat16, QuantizeOptions()),
    ("llama", "60KB", torch.float16, QuantizeOptions(3, 64, method="nf")),
    ("llama", "60KB", torch.float32, QuantizeOptions(2, -1)),
    ("llama", "5GB", torch.float16, QuantizeOptions(4, 32, scale_dtype="float32")),
    ("llama", "5GB", torch.bfloat16, QuantizeOptions(2, 32, table=[-1.5, -0.4, 0.4, 1.5])),
    ("llama", "5GB", torch.bfloat16, QuantizeOptions(4, 64, method="int", skip=("*.0.mlp.*",))),
    ("qwen2", "60KB", torch.bfloat16, QuantizeOptions(4, 64, method="fp")),
    ("mixtral", "60KB", torch.bfloat16, QuantizeOptions(4, 64)),
]


@pytest.mark.parametrize("block", [1000, 1 << 23])
@pytest.mark.parametrize(("kind", "shard", "dtype", "options"), CASES)
def test_disk_and_memory_give_the_same_bits(
    tmp_path, monkeypatch, kind, shard, dtype, options, block
):
    monkeypatch.setattr(stream, "_BLOCK_WEIGHTS", block)
    model = save_tiny(tmp_path / "source", kind, shard=shard, dtype=dtype)
    dense = saved_tensors(tmp_path / "source")
    plan = quantize_checkpoint(tmp_path / "source", tmp_path / "out", options)
    written = saved_tensors(tmp_path / "out")
    in_memory = quantize_model(
        model,
        options.num_bits,
        options.group_size,
        method=options.method,
        table=options.table,
        scale_dtype=options.scale_dtype,
        skip=options.skip,
    )
    assert plan.model_plan.config == in_memory.config
    assert set(plan.layers.values()) == set(in_memory.shapes)
    on_disk = {module: name.removesuffix(".weight") for name, module in plan.layers.items()}
    for module in in_memory.shapes:
        layer, name = model.get_submodule(module), on_disk[module]
        for key in ("codes", "scales", "table"):
            assert same(written.pop(f"{name}.{key}"), getattr(layer, key).data)
        del dense[f"{name}.weight"]
    assert set(written) == set(dense)
    for name, tensor in dense.items():
        assert same(written[name], tensor)
    assert verify_checksums(tmp_path / "out") == len(dense) + 3 * len(in_memory.shapes)


def test_tables_per_row(tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "_BLOCK_WEIGHTS", 700)
    model = save_tiny(tmp_path / "source")
    table = torch.randn(128, 16, generator=generator(1))
    skip = ("*_attn.*", "down_proj")
    quantize_checkpoint(
        tmp_path / "source", tmp_path / "out", QuantizeOptions(table=table, skip=skip)
    )
    quantize_model(model, table=table, skip=skip)
    written = saved_tensors(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["table_scope"] == "row"
    for name in ("model.layers.0.mlp.gate_proj", "model.layers.1.mlp.up_proj"):
        assert same(written[f"{name}.table"], table)
        for key in ("codes", "scales"):
            assert same(written[f"{name}.{key}"], getattr(model.get_submodule(name), key).data)


def test_rows_that_need_a_smaller_group(tmp_path):
    save_tiny(tmp_path / "source", intermediate_size=96)
    with pytest.warns(UserWarning, match=r"`model\.layers\.0\.mlp\.down_proj` \(K=96: 32\)"):
        quantize_checkpoint(tmp_path / "source", tmp_path / "out", QuantizeOptions())
    written = saved_tensors(tmp_path / "out")
    assert written["model.layers.0.mlp.down_proj.scales"].shape == (64, 3)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["overrides"]["model.layers.1.mlp.down_proj"] == {"group_size": 32}


def test_config_and_card_and_side_files(source, tmp_path):
    out = tmp_path / "out"
    plan = quantize_checkpoint(source, out, FAST)
    config = json.loads((out / "config.json").read_text())
    stored = config.pop("quantization_config")
    assert config == json.loads((source / "config.json").read_text())
    assert CheckpointConfig.from_dict(stored) == plan.model_plan.config
    assert stored["modules_to_not_convert"] == ["lm_head"]
    assert (out / "tokenizer_config.json").read_bytes() == (
        source / "tokenizer_config.json"
    ).read_bytes()
    card = (out / "README.md").read_text()
    assert card.index("import flute") < card.index("from transformers import")
    assert "14 linear layers at 4 bits, groups of 32, table `nf`, method" in card


@pytest.mark.parametrize("tied", [False, True])
def test_heads_and_embeddings_are_copied(tmp_path, tied):
    save_tiny(tmp_path / "source", tie_word_embeddings=tied)
    quantize_checkpoint(tmp_path / "source", tmp_path / "out", FAST)
    before, after = saved_tensors(tmp_path / "source"), saved_tensors(tmp_path / "out")
    assert ("lm_head.weight" in before) is not tied
    for name in set(before) & {"lm_head.weight", "model.embed_tokens.weight"}:
        assert same(after[name], before[name])


def without_prefix(tensors):
    return {name.removeprefix("model."): t for name, t in tensors.items()}


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "LlamaModel", None])
def test_a_checkpoint_of_the_base_model(source, tmp_path, architecture):
    """Its tensors lack the prefix `model.`; the names on disk stay as they are."""
    out, prefixed = tmp_path / "out", tmp_path / "prefixed"
    quantize_checkpoint(source, prefixed, FAST)
    tensors = without_prefix(load_file(source / "model.safetensors"))
    if architecture == "LlamaModel":
        del tensors["lm_head.weight"]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    edit_json(source / "config.json", architectures=[architecture] if architecture else None)
    plan = quantize_checkpoint(source, out, FAST)
    assert len(plan.layers) == 14
    written, expected = saved_tensors(out), without_prefix(saved_tensors(prefixed))
    assert set(written) == set(expected) - ({"lm_head.weight"} - set(tensors))
    for name, tensor in written.items():
        assert same(tensor, expected[name])


@pytest.mark.parametrize("num_bits", [2, 3, 4])
def test_size_is_that_of_codes_scales_and_dense_tensors(tmp_path, num_bits):
    options = QuantizeOptions(num_bits, 64, method="nf")
    plan = quantize_checkpoint(DEMO_MODEL, tmp_path / "out", options)
    reader = CheckpointReader(DEMO_MODEL)
    weights = sum(N * K for N, K in plan.model_plan.shapes.values())
    payload = weights * num_bits / 8 + weights / 64 * 2
    payload += sum(reader.num_bytes(name) for name in reader.names if name not in plan.layers)
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert weights > 4e6
    assert payload < size <= 1.01 * payload


def test_progress_counts_the_weights_quantised(source, tmp_path):
    class Recorder:
        events: list

        def start(self, total, done):
            self.events = [(total, done)]

        def advance(self, count, name):
            self.events.append((count, name))

    recorder = Recorder()
    plan = quantize_checkpoint(source, tmp_path / "out", FAST, progress=recorder)
    total = sum(N * K for N, K in plan.model_plan.shapes.values())
    assert recorder.events[0] == (total, 0)
    assert sum(count for count, _ in recorder.events[1:]) == total
    counts = {name: count for count, name in recorder.events[1:]}
    assert counts["model.layers.0.mlp.up_proj"] == 128 * 64
    assert counts["model.norm.weight"] == 0


def test_a_finished_run_is_recognised(source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    quantize_checkpoint(source, out, FAST)
    before = folder_bytes(out)
    monkeypatch.setattr(stream, "_quantize_rows", None)
    plan = quantize_checkpoint(source, out, FAST)
    assert len(plan.layers) == 14
    assert folder_bytes(out) == before


@pytest.mark.parametrize(
    "change", ["num_bits", "group_size", "method", "table", "skip", "weights", "config"]
)
def test_another_job_is_not_taken_for_it(source, tmp_path, change):
    out = tmp_path / "out"
    options = QuantizeOptions(4, 32, method="table", table="nf")
    quantize_checkpoint(source, out, options)
    arguments = {"num_bits": 4, "group_size": 32, "method": "table", "table": "nf"}
    if change == "weights":
        edit_tensors(source, {"model.norm.weight": torch.ones(64, dtype=torch.bfloat16)})
    elif change == "config":
        edit_json(source / "config.json", rope_scaling={"rope_type": "linear", "factor": 2.0})
    else:
        arguments |= {
            "num_bits": {"num_bits": 3},
            "group_size": {"group_size": 64},
            "method": {"method": "mse"},
            "table": {"table": "int"},
            "skip": {"skip": ("q_proj",)},
        }[change]
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        quantize_checkpoint(source, out, QuantizeOptions(**arguments))
    quantize_checkpoint(source, out, QuantizeOptions(**arguments), overwrite=True)


@pytest.mark.parametrize("where", ["the source", "its parent"])
def test_the_source_cannot_be_overwritten(source, where):
    before = folder_bytes(source)
    target = source if where == "the source" else source.parent
    with pytest.raises(CheckpointError, match=f"`{target}` is or holds the source `{source}`"):
        quantize_checkpoint(source, target, FAST, overwrite=True)
    assert folder_bytes(source) == before


# ---- kill -9

QUANTISE = """
import sys
from flute.model import QuantizeOptions
from flute.stream import quantize_checkpoint
class Told:
    def start(self, total, done): print("started", done, flush=True)
    def advance(self, count, name): pass
options = QuantizeOptions(4, 64, method="nf")
quantize_checkpoint(sys.argv[1], sys.argv[2], options, progress=Told())
print("done", flush=True)
"""


def test_kill_minus_nine_of_a_real_process(tmp_path):
    out, expected = tmp_path / "out", tmp_path / "expected"
    quantize_checkpoint(DEMO_MODEL, expected, QuantizeOptions(4, 64, method="nf"))
    process = python(QUANTISE, DEMO_MODEL, out)
    try:
        assert process.stdout.readline().startswith("started")
        time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not out.exists()
    assert (tmp_path / "out.partial").exists()
    quantize_checkpoint(DEMO_MODEL, out, QuantizeOptions(4, 64, method="nf"))
    assert folder_bytes(out) == folder_bytes(expected)
    assert not (tmp_path / "out.partial").exists()


def test_killed_at_random_moments(tmp_path):
    """Forked processes start at once, so the moments fall into the work itself."""
    out, expected = tmp_path / "out", tmp_path / "expected"
    options = QuantizeOptions(4, 64, method="nf")
    begin = time.monotonic()
    quantize_checkpoint(DEMO_MODEL, expected, options)
    duration = time.monotonic() - begin
    rng = random.Random(0)
    for _ in range(6):
        pid = os.fork()
        if pid == 0:
            try:
                quantize_checkpoint(DEMO_MODEL, out, options)
            finally:
                os._exit(0)
        time.sleep(rng.uniform(0, 0.7) * duration)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        if out.exists():
            assert verify_checksums(out) > 0
    quantize_checkpoint(DEMO_MODEL, out, options)
    assert folder_bytes(out) == folder_bytes(expected)


def test_an_interrupted_run_of_other_options_is_refused(source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    rows = stream._quantize_rows

    def stop(reader, name, *args):
        if "layers.1" in name:
            raise KeyboardInterrupt
        return rows(reader, name, *args)

    monkeypatch.setattr(stream, "_quantize_rows", stop)
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(source, out, FAST)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="holds an interrupted run of another job"):
        quantize_checkpoint(source, out, QuantizeOptions(3, 32, method="nf"))
    quantize_checkpoint(source, out, FAST)
    quantize_checkpoint(source, tmp_path / "expected", FAST)
    assert folder_bytes(out) == folder_bytes(tmp_path / "expected")


# ---- bad sources


def test_no_such_source(tmp_path):
    for name in (tmp_path / "none", "./none", "none"):
        refused(CheckpointError, name, tmp_path / "out", "is not a folder; expected a model chec")


def test_a_model_that_the_hub_does_not_have(tmp_path):
    message = "`no-such-team/no-such-model` is no folder here, and cannot be had from the Hub"
    refused(CheckpointError, "no-such-team/no-such-model", tmp_path / "out", message)


def test_find_source_expands_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_source("~/models") == tmp_path / "models"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file(source, tmp_path, name):
    (source / name).unlink()
    refused(CheckpointError, source, tmp_path / "out", re.escape(str(source)))


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty"])
def test_a_damaged_file(source, tmp_path, damage):
    path = source / "model.safetensors"
    content = path.read_bytes()
    broken = {"truncated": content[:-1000], "garbage": b"<html>" * 999, "empty": b""}[damage]
    path.write_bytes(broken)
    message = re.escape(f"`{path}` cannot be read as safetensors")
    refused(CheckpointError, source, tmp_path / "out", message)


def test_a_missing_shard(tmp_path):
    source = tmp_path / "source"
    save_tiny(source, shard="60KB")
    shards = sorted(source.glob("*.safetensors"))
    assert len(shards) > 2
    shards[1].unlink()
    message = re.escape(f"weight files are missing, such as `{shards[1]}`")
    refused(CheckpointError, source, tmp_path / "out", message)


def test_pickles_only(source, tmp_path):
    (source / "model.safetensors").unlink()
    torch.save({}, source / "pytorch_model.bin")
    refused(CheckpointError, source, tmp_path / "out", "holds pickled weights, which are not read")


@pytest.mark.parametrize("content", ["{", "[]", ""])
def test_a_broken_config(source, tmp_path, content):
    (source / "config.json").write_text(content)
    refused(CheckpointError, source, tmp_path / "out", re.escape(str(source / "config.json")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "no_such"}, "cannot build model_type 'no_such', architectures"),
        ({"model_type": ...}, "cannot build model_type None, architectures"),
        ({"num_attention_heads": "many"}, "cannot build model_type 'llama'"),
    ],
)
def test_a_model_that_transformers_cannot_build(source, tmp_path, changes, message):
    edit_json(source / "config.json", **changes)
    refused(UnsupportedProblemError, source, tmp_path / "out", re.escape(message))


def test_code_in_a_checkpoint_is_neither_run_nor_asked_about(source, tmp_path, monkeypatch):
    asked: list[str] = []
    monkeypatch.setattr(builtins, "input", lambda prompt="": asked.append(prompt) or "n")
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\n"
    (source / "configuration_evil.py").write_text(code)
    (source / "modeling_evil.py").write_text(code)
    auto_map = {
        "AutoConfig": "configuration_evil.EvilConfig",
        "AutoModelForCausalLM": "modeling_evil.EvilModel",
    }
    edit_json(
        source / "config.json", model_type="evil", architectures=["EvilModel"], auto_map=auto_map
    )
    refused(UnsupportedProblemError, source, tmp_path / "out", "cannot build model_type 'evil'")
    assert asked == []
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.0.input_layernorm.weight",
        "model.norm.weight",
        "model.embed_tokens.weight",
        "lm_head.weight",
    ],
)
def test_a_missing_tensor(source, tmp_path, name):
    edit_tensors(source, {name: None})
    message = re.escape(
        f"1 parameters of LlamaForCausalLM are not in `{source}`, such as `{name}`. The checkpoint"
    )
    refused(CheckpointError, source, tmp_path / "out", message)


def test_a_tied_head_may_be_stored_under_either_name(tmp_path):
    source = tmp_path / "source"
    save_tiny(source, tie_word_embeddings=True)
    embedding = saved_tensors(source)["model.embed_tokens.weight"]
    edit_tensors(source, {"model.embed_tokens.weight": None, "lm_head.weight": embedding})
    quantize_checkpoint(source, tmp_path / "out", FAST)
    assert same(saved_tensors(tmp_path / "out")["lm_head.weight"], embedding)


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2, torch.float64]
)
def test_a_weight_of_another_dtype(source, tmp_path, dtype):
    name = "model.layers.0.self_attn.q_proj.weight"
    edit_tensors(source, {name: torch.zeros(64, 64).to(dtype)})
    message = re.escape(f"`{name}` is {dtype}; expected float16, bfloat16 or float32.")
    refused(FormatError, source, tmp_path / "out", message)


@pytest.mark.parametrize("shape", [(64, 32), (32, 64), (64,), (64, 64, 1), (0, 64)])
def test_a_weight_of_another_shape(source, tmp_path, shape):
    name = "model.layers.0.self_attn.q_proj.weight"
    edit_tensors(source, {name: torch.ones(shape, dtype=torch.bfloat16)})
    message = re.escape(f"`{name}` has shape {shape}; LlamaForCausalLM expects (64, 64).")
    refused(FormatError, source, tmp_path / "out", message)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("position", [(0, 0), (9, 63), (10, 0), (63, 5)])
def test_nan_in_a_linear_weight_is_named_with_its_place(
    source, tmp_path, monkeypatch, value, position
):
    """Blocks of 10 rows: the place is that in the whole tensor."""
    monkeypatch.setattr(stream, "_BLOCK_WEIGHTS", 640)
    name = "model.layers.1.self_attn.o_proj.weight"
    weight = saved_tensors(source)[name].clone()
    weight[position] = value
    edit_tensors(source, {name: weight})
    message = re.escape(
        f"`{name}` holds NaN or Inf (1 found), the first ({float(value)}) at {position}."
    )
    refused(FormatError, source, tmp_path / "out", message)


@pytest.mark.parametrize(
    ("name", "position", "place"),
    [
        ("model.norm.weight", (5,), "(5,)"),
        ("model.embed_tokens.weight", (95, 1), "(95, 1)"),
        ("model.embed_tokens.weight", (3, 0), "(3, 0)"),
    ],
)
def test_nan_in_a_dense_tensor_is_named_with_its_place(
    source, tmp_path, monkeypatch, name, position, place
):
    blocks = CheckpointReader.blocks
    monkeypatch.setattr(CheckpointReader, "blocks", lambda self, name: blocks(self, name, 1280))
    tensor = saved_tensors(source)[name].clone()
    tensor[position] = torch.nan
    edit_tensors(source, {name: tensor})
    message = re.escape(f"`{name}` holds NaN or Inf (1 found), the first (nan) at {place}.")
    refused(FormatError, source, tmp_path / "out", message)


def test_a_repaired_source_is_accepted_at_once(source, tmp_path):
    name = "model.layers.1.self_attn.o_proj.weight"
    weight = saved_tensors(source)[name].clone()
    broken = weight.clone()
    broken[0, 0] = torch.nan
    edit_tensors(source, {name: broken})
    refused(FormatError, source, tmp_path / "out", "holds NaN")
    edit_tensors(source, {name: weight})
    quantize_checkpoint(source, tmp_path / "out", FAST)
    assert verify_checksums(tmp_path / "out") > 0


@pytest.mark.parametrize(
    ("config", "method"),
    [({"quant_method": "gptq", "bits": 4}, "'gptq'"), ({"bits": 4}, "'unknown'"), ("fp8", "'?'")],
)
def test_a_quantised_source(source, tmp_path, config, method):
    edit_json(source / "config.json", quantization_config=config)
    message = f"is quantised already \\(quant_method {re.escape(method)}\\). Quantise the dense"
    refused(UnsupportedProblemError, source, tmp_path / "out", message)


def test_our_own_output_is_not_quantised_again(source, tmp_path):
    quantize_checkpoint(source, tmp_path / "once", FAST)
    message = r"is quantised already \(quant_method 'flute'\)"
    refused(UnsupportedProblemError, tmp_path / "once", tmp_path / "twice", message)


def test_null_is_no_quantisation(source, tmp_path):
    edit_json(source / "config.json", quantization_config=None)
    quantize_checkpoint(source, tmp_path / "out", FAST)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "flute"


def test_a_row_that_no_group_divides(tmp_path):
    save_tiny(tmp_path / "source", intermediate_size=72)
    message = re.escape(
        "No group of 32 .. 64 weights divides the rows of 2 layers: "
        "`model.layers.0.mlp.down_proj` (K=72), `model.layers.1.mlp.down_proj` (K=72)."
    )
    refused(FormatError, tmp_path / "source", tmp_path / "out", message, QuantizeOptions())


def test_scales_out_of_range_are_named(tmp_path):
    source = tmp_path / "source"
    save_tiny(source, dtype=torch.float32)
    name = "model.layers.0.mlp.up_proj.weight"
    edit_tensors(source, {name: saved_tensors(source)[name] * 1e9})
    message = re.escape(f"`{name}`: A group needs the scale")
    options = QuantizeOptions(4, 32, method="nf", scale_dtype="float16")
    refused(FormatError, source, tmp_path / "out", message, options)


@pytest.mark.parametrize("name", ["up_proj.codes", "down_proj.scales", "q_proj.table"])
def test_a_flipped_bit_in_the_result_is_found(source, tmp_path, name):
    out = tmp_path / "out"
    quantize_checkpoint(source, out, FAST)
    verify_checksums(out)
    path = out / "model.safetensors"
    content = bytearray(path.read_bytes())
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    full = next(key for key in sorted(header) if key.endswith(name))
    content[8 + length + header[full]["data_offsets"][0]] ^= 2
    path.write_bytes(content)
    with pytest.raises(ChecksumError, match=re.escape(f"`{full}` in `{path}` is corrupted: crc32")):
        verify_checksums(out)


def test_a_plan_reads_no_weights(saved, monkeypatch):
    monkeypatch.setattr(CheckpointReader, "tensor", None)
    monkeypatch.setattr(CheckpointReader, "rows", None)
    plan = plan_checkpoint(saved, FAST)
    assert plan.layers["model.layers.0.mlp.up_proj.weight"] == "model.layers.0.mlp.up_proj"
    assert len(plan.layers) == 14


# ---- memory

MEMORY = """
import re, sys
import torch
def peak():
    return re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]
torchs = peak()
from flute.model import QuantizeOptions
from flute.stream import quantize_checkpoint
source, out, method, *skip = sys.argv[1:]
quantize_checkpoint(source, out, QuantizeOptions(4, 64, method=method, skip=skip))
print(torchs, peak())
"""
"""Prints the peak after importing torch, and at the end. Not `ru_maxrss`: a child's starts at what
its parent had when it was started."""


@pytest.mark.parametrize(("method", "rows"), [("nf", 24576), ("mse", 8192)])
def test_peak_memory(tmp_path, method, rows):
    """One layer's MLP and the embedding are large; one of those tensors is quantised."""
    source = tmp_path / "source"
    small = {"num_hidden_layers": 1, "hidden_size": 1024, "num_attention_heads": 8}
    tiny_model(**small, tie_word_embeddings=True).save_pretrained(source)
    edit_json(source / "config.json", intermediate_size=rows, vocab_size=rows)
    row = torch.randn(1024, generator=generator(0)).bfloat16()
    tensors = load_file(source / "model.safetensors")
    for name in ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "embed_tokens"):
        tall = row.expand(rows, 1024).contiguous()
        key = next(key for key in tensors if f"{name}.weight" in key)
        tensors[key] = tall.view(1024, rows) if name == "mlp.down_proj" else tall
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    largest = rows * 1024 * 2
    skip = ("*_attn.*", "gate_proj", "down_proj")
    printed = run_python(MEMORY, source, tmp_path / "out", method, *skip)
    torchs, peak = (1024 * int(number) for number in printed.split())
    peak -= max(0, torchs - 250_000_000)  # a CUDA build takes some 400 MB before anything happens
    assert (tmp_path / "out" / "model.safetensors").stat().st_size > 3 * largest
    assert peak <= 3 * largest + 700e6
    assert peak <= 700e6, "blocks bound the memory, whatever the tensor's size"
