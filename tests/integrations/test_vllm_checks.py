"""What cannot be served is refused in one line, before an engine starts and takes memory."""

from __future__ import annotations

import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from helpers import DEMO_MODEL, edit_json, edit_tensors
from safetensors.torch import load_file

from flute.errors import CheckpointError, FormatError, UnsupportedProblemError
from flute.format import CheckpointConfig
from flute.integrations import vllm as plugin
from flute.model import QuantizeOptions
from flute.stream import quantize_checkpoint

transformers = pytest.importorskip("transformers")

from flute.integrations.vllm_checks import (  # noqa: E402 (after the skip)
    check_is_not_original,
    check_served,
    find_files,
)

LAYER = "model.layers.3.mlp.down_proj"


@pytest.fixture(scope="module")
def quantised(tmp_path_factory):
    """The demo model in groups of 128: K = 256 and 768, so 4 ranks cut groups."""
    folder = tmp_path_factory.mktemp("checks") / "w4"
    quantize_checkpoint(DEMO_MODEL, folder, QuantizeOptions(4, 128, method="nf"))
    return folder


@pytest.fixture
def broken(quantised, tmp_path):
    """A copy to change, without an index that would not fit any more."""
    folder = shutil.copytree(quantised, tmp_path / "broken")
    for file in folder.glob("*.index.json"):
        file.unlink()
    return folder


def served(folder, ranks=1, **options):
    config = transformers.AutoConfig.from_pretrained(folder)
    about = json.loads((folder / "config.json").read_text())["quantization_config"]
    check_served(config, find_files(folder), CheckpointConfig.from_dict(about), ranks, **options)


# ---- what the checks find; none of it needs vLLM


def test_a_whole_checkpoint_passes(quantised):
    served(quantised)
    served(quantised, 2)


ARCHITECTURES = {
    "Llama": {},
    "Mistral": {},
    "Gemma2": {"head_dim": 32},
    "Qwen2": {"tie_word_embeddings": True},
    "Qwen3": {"head_dim": 32},
    "Phi3": {},
    "Mixtral": {"num_local_experts": 2},
    "Qwen2Moe": {"num_experts": 2, "moe_intermediate_size": 64, "decoder_sparse_step": 1},
    "Qwen3Moe": {"num_experts": 2, "moe_intermediate_size": 64, "decoder_sparse_step": 1},
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_nothing_is_refused_that_can_be_served(name, tmp_path):
    """Dense and quantised, with what each architecture ties, merges or renames."""
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "num_hidden_layers": 2, "vocab_size": 96, "pad_token_id": 0}
    config = getattr(transformers, f"{name}Config")(**sizes, **more, **ARCHITECTURES[name])
    model = getattr(transformers, f"{name}ForCausalLM")(config).bfloat16()
    model.save_pretrained(tmp_path / "dense")
    read = transformers.AutoConfig.from_pretrained(tmp_path / "dense")
    check_served(read, find_files(tmp_path / "dense"), QuantizeOptions(4, 32), 2)
    with_head = QuantizeOptions(4, 32, method="nf", head_bits=4, head_group_size=64)
    check_served(read, find_files(tmp_path / "dense"), with_head, 2)
    quantize_checkpoint(tmp_path / "dense", tmp_path / "q", QuantizeOptions(4, 32, method="nf"))
    quantize_checkpoint(tmp_path / "dense", tmp_path / "h", with_head)
    for folder in (tmp_path / "q", tmp_path / "h"):
        served(folder)
        served(folder, 2)


@pytest.mark.parametrize("part", ["codes", "scales", "table"])
def test_a_missing_tensor_of_the_head_is_named(tmp_path, part):
    folder = tmp_path / "q"
    options = QuantizeOptions(4, 64, method="nf", head_bits=4)
    quantize_checkpoint(DEMO_MODEL, folder, options)
    for file in folder.glob("*.index.json"):
        file.unlink()
    edit_tensors(folder, {f"lm_head.{part}": None})
    with pytest.raises(CheckpointError, match=rf"lacks `lm_head\.{part}`"):
        served(folder)
    edit_tensors(folder, dict.fromkeys(f"lm_head.{key}" for key in ("codes", "scales", "table")))
    with pytest.raises(CheckpointError, match=r"lacks `lm_head\.codes` \(3 tensors in all\)"):
        served(folder)


def test_ranks_that_cut_groups_are_refused_by_name(quantised):
    with pytest.raises(UnsupportedProblemError) as error:
        served(quantised, 4)
    assert str(error.value) == (
        "`model.layers.0.self_attn.o_proj`: a tensor parallel size of 4 cuts its K=256 input "
        "features into parts of 64; expected a multiple of 128, its group. Use a tensor parallel "
        "size of 1 or 2, or a checkpoint quantised with --group-size 32 or 64 or -1."
    )


@pytest.mark.parametrize("ranks", [2, 4, 8, 16])
@pytest.mark.parametrize(
    ("hidden", "inner", "heads"), [(4096, 14336, 32), (8192, 28672, 64), (4096, 11008, 32)]
)
def test_any_shape_is_judged_from_the_config_alone(hidden, inner, heads, ranks):
    """As for a model on the Hub, whose files are not here yet."""
    config = transformers.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=8,
        num_hidden_layers=2,
        vocab_size=128,
    )
    config.architectures = ["LlamaForCausalLM"]
    for quantization in (CheckpointConfig(3, 128), QuantizeOptions(3, 128)):
        if inner % (ranks * 128) == 0:
            check_served(config, [], quantization, ranks)
            continue
        with pytest.raises(UnsupportedProblemError, match=rf"`model\.layers\.0\.mlp.*K={inner}"):
            check_served(config, [], quantization, ranks)


def test_experts_are_cut_unless_ranks_have_them_whole():
    config = transformers.Qwen3MoeConfig(
        hidden_size=256,
        moe_intermediate_size=96,
        num_hidden_layers=1,
        num_experts=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
    )
    config.architectures = ["Qwen3MoeForCausalLM"]
    about = CheckpointConfig(4, 32, quantized_experts=True)
    with pytest.raises(UnsupportedProblemError, match=r"experts\.0\.down_proj`: a tensor parallel"):
        check_served(config, [], about, 2)
    check_served(config, [], about, 2, cuts_experts=False)


@pytest.mark.parametrize(
    "tensor", [f"{LAYER}.scales", "model.norm.weight", "model.embed_tokens.weight"]
)
def test_a_missing_tensor_is_named(broken, tensor):
    edit_tensors(broken, {tensor: None})
    with pytest.raises(CheckpointError, match=f"lacks `{tensor}`"):
        served(broken)


def test_a_missing_layer_is_named(broken):
    names = [f"{LAYER}.{key}" for key in ("codes", "scales", "table")]
    edit_tensors(broken, dict.fromkeys(names))
    with pytest.raises(CheckpointError, match=rf"lacks `{LAYER}\.codes` \(3 tensors in all\)"):
        served(broken)


def test_a_missing_file_is_named(broken):
    (broken / "model.safetensors").rename(broken / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "gone.safetensors"}}
    (broken / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"1 of 2 weight files are missing.*gone\.safeten"):
        find_files(broken)


def test_a_tensor_of_another_shape_or_dtype_is_named(broken):
    tensors = load_file(broken / "model.safetensors")
    edit_tensors(broken, {f"{LAYER}.scales": tensors[f"{LAYER}.scales"][:, :2].contiguous()})
    with pytest.raises(FormatError, match=rf"`{LAYER}\.scales` is BF16 of shape \(256, 2\)"):
        served(broken)
    edit_tensors(broken, {f"{LAYER}.scales": tensors[f"{LAYER}.scales"].float()})
    with pytest.raises(FormatError, match=rf"`{LAYER}\.scales` is F32"):
        served(broken)


def test_a_dense_model_is_checked_too():
    config = transformers.AutoConfig.from_pretrained(DEMO_MODEL)
    files = find_files(DEMO_MODEL)
    check_served(config, files, QuantizeOptions(4, 64), 4)
    with pytest.raises(UnsupportedProblemError, match="a tensor parallel size of 4"):
        check_served(config, files, QuantizeOptions(4, 128), 4)
    check_served(config, files, QuantizeOptions(4, 128, skip=("*.o_proj", "*.down_proj")), 4)
    config.intermediate_size = 704
    with pytest.raises(FormatError, match=r"gate_proj\.weight` is BF16 of shape \(768, 256\)"):
        check_served(config, files, QuantizeOptions(4, 64))


def test_a_model_that_transformers_does_not_know_is_left_to_the_loaders():
    check_served(SimpleNamespace(architectures=["Unheard"]), [], CheckpointConfig(), 3)
    config = transformers.LlamaConfig(num_hidden_layers=1)
    config.architectures = ["LlamaForCausalLMEagle3"]
    check_served(config, find_files(DEMO_MODEL), CheckpointConfig(), 3)


def test_a_checkpoint_of_the_original_flute_is_sent_to_convert(tmp_path):
    check_is_not_original(tmp_path)
    (tmp_path / "flute_config.json").write_text("{}")
    with pytest.raises(UnsupportedProblemError, match=r"Run `flute convert .* OUT`"):
        check_is_not_original(tmp_path)


# ---- in vLLM, which asks for them while it makes its config


def engine_config(folder, **options):
    pytest.importorskip("vllm")
    from vllm import EngineArgs

    plugin.register()
    return EngineArgs(model=str(folder), max_model_len=64, **options).create_engine_config()


@pytest.fixture
def one_gpu(monkeypatch):
    """Make the plugin believe in an NVIDIA GPU of some capability."""
    pytest.importorskip("vllm")
    from flute.integrations import vllm_config

    def be(major, minor, **kind):
        told = {"is_cpu": False, "is_unspecified": False, "is_cuda": True, **kind}
        platform = SimpleNamespace(
            device_name="a stand-in",
            get_device_capability=lambda: SimpleNamespace(major=major, minor=minor),
            **{name: lambda value=value: value for name, value in told.items()},
        )
        monkeypatch.setattr(vllm_config, "current_platform", platform)

    return be


def test_vllm_accepts_what_can_be_served(quantised):
    made = engine_config(quantised, tensor_parallel_size=2)
    assert made.quant_config.get_name() == "flute"


def test_vllm_refuses_ranks_that_cut_groups_while_it_makes_its_config(quantised, monkeypatch):
    with pytest.raises(ValueError, match=r"`model\.layers\.0\.self_attn\.o_proj`: a tensor par"):
        engine_config(quantised, tensor_parallel_size=4)
    monkeypatch.setenv("FLUTE_BITS", "4")
    monkeypatch.setenv("FLUTE_GROUP_SIZE", "128")
    with pytest.raises(ValueError, match=r"`model\.layers\.0\.self_attn\.o_proj`: a tensor par"):
        engine_config(DEMO_MODEL, quantization="flute", tensor_parallel_size=4)


def test_vllm_refuses_gpus_that_run_no_kernels(quantised, one_gpu, monkeypatch):
    one_gpu(9, 0)
    monkeypatch.setattr("flute.integrations.vllm_config.why_not_on", lambda *capability: "")
    engine_config(quantised)
    monkeypatch.undo()
    one_gpu(7, 5)
    with pytest.raises(ValueError, match=r"No kernels run on this GPU\. sm_75 is older than sm_80"):
        engine_config(quantised)
    one_gpu(8, 9)
    with pytest.raises(ValueError, match=r"sm_89.*FLUTE_UNTESTED_GPU=1 runs them"):
        engine_config(quantised)
    one_gpu(9, 0, is_cuda=False)
    with pytest.raises(ValueError, match="vLLM's device is a stand-in; FLUTE's kernels run on NVI"):
        engine_config(quantised)


def test_vllm_s_own_check_knows_the_oldest_gpu(quantised, monkeypatch):
    pytest.importorskip("vllm")
    from vllm.platforms import current_platform
    from vllm.platforms.interface import DeviceCapability

    old = DeviceCapability(7, 5)
    monkeypatch.setattr(type(current_platform), "get_device_capability", lambda *_, **__: old)
    with pytest.raises(ValueError, match=r"flute is not supported for the current GPU.*: 80\."):
        engine_config(quantised)


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ({"format_version": 99}, [], "format version 99; this package reads up to 1"),
        ({}, ["--tensor-parallel-size", "4"], "cuts its K=256 input features into parts of 64"),
        ({"group_size": 64}, [], ".scales` is BF16 of shape (256, 2)"),
        (None, ["--quantization", "flute"], "The model is dense"),
    ],
    ids=["version", "ranks", "other files", "dense"],
)
def test_the_command_says_it_in_one_line(broken, change, arguments, message, capfd, monkeypatch):
    pytest.importorskip("vllm")
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    about = json.loads((broken / "config.json").read_text())["quantization_config"]
    if change is not None:
        edit_json(broken / "config.json", quantization_config=about | change)
    words = ["--model", str(DEMO_MODEL if change is None else broken), *arguments]
    assert plugin.main(["vllm.entrypoints.openai.api_server", *words]) == 1
    lines = [line for line in capfd.readouterr().err.splitlines() if message in line]
    assert len(lines) == 1
    assert re.match(r"(\(\w+ pid=\d+\) )?error: ", lines[0])  # vLLM names its process


def test_the_command_passes_other_failures_on(monkeypatch, tmp_path):
    (tmp_path / "failing.py").write_text("raise KeyError('theirs')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(plugin, "find_spec", lambda name: object())
    monkeypatch.setattr(plugin, "register", lambda: None)
    with pytest.raises(KeyError, match="theirs"):
        plugin.main(["failing"])


def test_nothing_is_allocated_by_the_checks(quantised, monkeypatch):
    """Neither weights on the CPU nor a CUDA context."""
    made = []
    empty = torch.empty

    def watched(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        made.append(tensor.numel() if tensor.device.type != "meta" else 0)
        return tensor

    monkeypatch.setattr(torch, "empty", watched)
    served(quantised, 2)
    assert sum(made) < 10_000
    assert not torch.cuda.is_initialized()
