"""The original's interface: its README's snippets as printed, hooks, offload, command line."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook, SequentialHook, add_hook_to_module
from safetensors.torch import load_file
from torch import nn

import flute
import flute.integrations.base
from flute.errors import FormatError, UnsupportedProblemError
from flute.integrations.base import main, prepare_model_flute
from flute.stream import quantize_checkpoint
from tests.helpers import ROOT, edit_tensors, save_tiny, tiny_model

TOKENS = torch.arange(24).view(2, 12)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(TOKENS).logits
        return out


def nf(weight: torch.Tensor, num_bits: int, group_size: int) -> flute.QuantizedWeight:
    return flute.quantize(weight, num_bits, group_size, method="nf", scale_dtype=weight.dtype)


def dequantised_model(model: nn.Module, num_bits: int, group_size: int) -> nn.Module:
    """The dense model whose decoder layers hold the dequantised values."""
    model = copy.deepcopy(model)
    for layer in model.model.layers.modules():
        if isinstance(layer, nn.Linear):
            weight = nf(layer.weight.data, num_bits, group_size)
            layer.weight.data = flute.dequantize(weight, layer.weight.dtype)
    return model


# ------------------------------------------------------------------- the original's README

FIRST_README = """
from transformers import (
    LlamaForCausalLM,
    Gemma2ForCausalLM,
    AutoModelForCausalLM)
import flute.integrations.base

model = AutoModelForCausalLM.from_pretrained(
    pretrained_model_name_or_path,
    device_map="cpu",
    torch_dtype="auto")

if isinstance(model, (LlamaForCausalLM, Gemma2ForCausalLM)):
    flute.integrations.base.prepare_model_flute(
        module=model.model.layers,
        num_bits=num_bits,
        group_size=group_size,
        fake=False)
else:
    # more models to come
    raise NotImplementedError
"""
SECOND_README = FIRST_README.replace(
    "        module=model.model.layers,",
    '        name="model.model.layers",\n        module=model.model.layers,',
)
HUGGINGFACE_README = """
import flute.integrations.base
flute.integrations.base.prepare_model_flute(
    name="model.model.layers",
    module=model.model.layers,  # for LLaMA-3 and Gemma-2
    num_bits=num_bits,
    group_size=group_size,
    fake=False,
    handle_hooks=True)  # for `accelerate` hooks
"""


@pytest.mark.parametrize("snippet", [FIRST_README, SECOND_README])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("num_bits", [4, 3, 2])
def test_the_readmes_quantise_a_model_as_printed(tmp_path, snippet, dtype, num_bits):
    dense = save_tiny(tmp_path, dtype=dtype)
    names = {"num_bits": num_bits, "group_size": 64, "pretrained_model_name_or_path": str(tmp_path)}
    exec(snippet, names)
    model = names["model"]
    assert isinstance(model.lm_head, nn.Linear)
    layers = [m for m in model.model.layers.modules() if isinstance(m, flute.LutLinear)]
    assert len(layers) == 14
    for name, linear in dense.model.layers.named_modules():
        if isinstance(linear, nn.Linear):
            layer, expected = (
                model.model.layers.get_submodule(name),
                nf(linear.weight, num_bits, 64),
            )
            assert layer.scales.dtype == dtype
            assert torch.equal(layer.dequantize(), flute.dequantize(expected)), name
    expected = logits(dequantised_model(dense, num_bits, 64)).float()
    assert (logits(model).float() - expected).norm() < 0.02 * expected.norm()


def test_the_accelerate_snippet_quantises_a_model_as_printed():
    dense = tiny_model(dtype=torch.float32)
    model = dispatch_model(copy.deepcopy(dense), {"": "cpu"}, force_hooks=True)
    exec(HUGGINGFACE_README, {"model": model, "num_bits": 4, "group_size": 32})
    layer = model.model.layers[0].mlp.up_proj
    assert isinstance(layer, flute.LutLinear)
    expected = logits(dequantised_model(dense, 4, 32))
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-6)


def test_positional_arguments_are_in_the_originals_order():
    model = tiny_model()
    prepare_model_flute("model.model.layers", model.model.layers, 4, 64, True, False)
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear


# ------------------------------------------------------------------------------------ replacement


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_fake_layers_are_dense_and_hold_the_dequantised_values(dtype):
    dense = tiny_model(dtype=dtype)
    model = copy.deepcopy(dense)
    prepare_model_flute(module=model.model.layers, num_bits=3, group_size=32, fake=True)
    layer = model.model.layers[1].self_attn.q_proj
    assert type(layer) is nn.Linear
    weight = nf(dense.model.layers[1].self_attn.q_proj.weight.data, 3, 32)
    assert torch.equal(layer.weight, flute.dequantize(weight, dtype))
    assert torch.equal(logits(model), logits(dequantised_model(dense, 3, 32)))


@pytest.mark.parametrize("fake", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_biases_training_mode_and_shared_layers_survive(fake, training):
    shared = nn.Linear(64, 8, dtype=torch.float16)
    module = nn.ModuleDict({"a": shared, "b": nn.ModuleDict({"c": shared})}).train(training)
    prepare_model_flute(module=module, num_bits=4, group_size=64, fake=fake)
    assert module["a"] is module["b"]["c"]
    assert module["a"] is not shared
    assert module["a"].training is training
    assert torch.equal(module["a"].bias, shared.bias)


def test_scales_of_ones_own_are_used_and_the_codes_fit_them():
    linear = nn.Linear(64, 8, bias=False, dtype=torch.float16)
    scales = linear.weight.detach().view(8, 2, 32).abs().amax(2) * 0.8
    module = nn.Sequential(linear)
    prepare_model_flute("m", module, 4, 32, custom_scales_dict={"m.0": scales})
    weight = module[0].quantized_weight()
    assert torch.equal(weight.scales, scales)
    groups = linear.weight.detach().float().view(8, 2, 32) / scales.float()[..., None]
    nearest = (groups[..., None] - flute.get_table("nf", 4)[0]).abs().argmin(-1)
    assert torch.equal(weight.codes.view(8, 2, 32).long(), nearest)


def test_attention_whose_weight_is_read_and_not_called_is_left_alone():
    module = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True).eval()
    prepare_model_flute(module=module, num_bits=4, group_size=64)
    assert isinstance(module.linear1, flute.LutLinear)
    assert isinstance(module.self_attn.out_proj, nn.Linear)
    with torch.no_grad():
        assert bool(torch.isfinite(module.self_attn(*[torch.randn(1, 5, 64)] * 3)[0]).all())


# ------------------------------------------------------------------------------------ accelerate


def on_cpu(model, folder):
    cpu_offload(model, execution_device="cpu")


def on_disk(model, folder):
    disk_offload(model, str(folder), execution_device="cpu")


@pytest.mark.parametrize("offload", [on_cpu, on_disk])
@pytest.mark.parametrize("fake", [False, True])
def test_offloaded_weights_are_quantised_and_stay_offloaded(tmp_path, offload, fake):
    dense = tiny_model("qwen2", dtype=torch.float32)  # has biases
    model = copy.deepcopy(dense)
    offload(model, tmp_path)
    assert model.model.layers[0].mlp.up_proj.weight.device.type == "meta"
    prepare_model_flute(
        module=model.model.layers, num_bits=4, group_size=64, fake=fake, handle_hooks=True
    )
    layer = model.model.layers[0].self_attn.q_proj
    assert isinstance(layer, nn.Linear if fake else flute.LutLinear)
    expected = logits(dequantised_model(dense, 4, 64))
    for _ in range(2):
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-6)
        assert {p.device.type for p in layer.parameters()} == {"meta"}


def test_what_transformers_offloads_to_disk_is_quantised(tmp_path):
    from transformers import AutoModelForCausalLM

    dense = save_tiny(tmp_path / "model", dtype=torch.float32)
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    places |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload", dtype="auto"
    )
    assert model.model.layers[1].mlp.up_proj.weight.device.type == "meta"
    prepare_model_flute("model.model.layers", model.model.layers, 4, 64, handle_hooks=True)
    assert isinstance(model.model.layers[1].mlp.up_proj, flute.LutLinear)
    torch.testing.assert_close(
        logits(model), logits(dequantised_model(dense, 4, 64)), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("fake", [False, True])
def test_hooks_are_moved_if_asked_or_fake_and_dropped_if_not(fake):
    for handle, present in ((True, True), (False, fake)):
        module = nn.Sequential(nn.Linear(64, 8))
        hooks = [AlignDevicesHook("cpu", io_same_device=True), AlignDevicesHook("cpu")]
        add_hook_to_module(module[0], SequentialHook(*hooks))
        prepare_model_flute(
            module=module, num_bits=4, group_size=64, fake=fake, handle_hooks=handle
        )
        assert hasattr(module[0], "_hf_hook") is present
        if present:
            assert isinstance(module[0]._hf_hook, SequentialHook)
            assert [h.io_same_device for h in module[0]._hf_hook.hooks] == [True, False]
        assert module(torch.ones(3, 64)).shape == (3, 8)


# ---------------------------------------------------------------------------------- bitsandbytes


def bnb_model(**config):
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    def load(folder, **kwargs):
        asked = BitsAndBytesConfig(load_in_4bit=True, **config)
        return AutoModelForCausalLM.from_pretrained(folder, quantization_config=asked, **kwargs)

    return load


def bnb_layers(model):
    import bitsandbytes

    return {n: m for n, m in model.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)}


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("fake", [False, True])
def test_a_bitsandbytes_model_converts_exactly(tmp_path, quant_type, nested, fake):
    from bitsandbytes.functional import dequantize_4bit

    save_tiny(tmp_path, "qwen2", dtype=torch.float32)
    load = bnb_model(bnb_4bit_quant_type=quant_type, bnb_4bit_use_double_quant=nested)
    model = load(tmp_path, dtype=torch.float32)
    expected = {
        name: dequantize_4bit(layer.weight.data, layer.weight.quant_state).clone()
        for name, layer in bnb_layers(model).items()
    }
    assert len(expected) == 14
    assert next(iter(expected.values())).dtype == torch.float32
    prepare_model_flute("model.layers", model.model.layers, 4, 64, fake=fake, handle_hooks=True)
    assert not bnb_layers(model)
    for name, weight in expected.items():
        layer = model.get_submodule(name)
        assert torch.equal(layer.weight if fake else layer.dequantize(), weight), name
    dense = tiny_model("qwen2", dtype=torch.float32)
    for name, weight in expected.items():
        dense.get_submodule(name).weight.data = weight
    torch.testing.assert_close(logits(model), logits(dense), rtol=0, atol=1e-6)


def test_bitsandbytes_layers_are_left_as_they_are_if_asked(tmp_path):
    save_tiny(tmp_path)
    model = bnb_model()(tmp_path)
    model.model.layers[0].mlp.up_proj = nn.Linear(64, 128)
    prepare_model_flute(
        module=model.model.layers, num_bits=4, group_size=64, prepare_bnb_layers=False
    )
    assert len(bnb_layers(model)) == 13
    assert isinstance(model.model.layers[0].mlp.up_proj, flute.LutLinear)


def test_default_bnb_dtype_is_that_of_layers_made_from_fp32_only(tmp_path):
    for dtype, expected in ((torch.float32, torch.float16), (torch.bfloat16, torch.bfloat16)):
        save_tiny(tmp_path / str(dtype), dtype=dtype)
        model = bnb_model()(tmp_path / str(dtype), dtype=dtype)
        prepare_model_flute(
            module=model.model.layers, num_bits=4, group_size=64, default_bnb_dtype=torch.float16
        )
        assert model.model.layers[0].mlp.up_proj.scales.dtype == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3, 64), r"`m.0.self_attn.q_proj` is a bitsandbytes layer of 4 bits, but num_bits=3"),
        ((4, 128), r"`m.0.self_attn.q_proj` has bitsandbytes blocks of 64 .*Use group_size=64"),
    ],
)
def test_bitsandbytes_layers_that_the_arguments_do_not_fit_are_refused(
    tmp_path, arguments, message
):
    save_tiny(tmp_path)
    model = bnb_model()(tmp_path)
    with pytest.raises(UnsupportedProblemError, match=message):
        prepare_model_flute("m", model.model.layers, *arguments)
    assert len(bnb_layers(model)) == 14


# ---------------------------------------------------------------------------------------- errors


def two_layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 8), nn.Linear(96, 8))


def test_a_row_not_divisible_by_the_group_is_named_before_anything_changes():
    module = two_layers()
    with pytest.raises(FormatError, match=r"`m.1`: K=96 is not a multiple of group_size=64"):
        prepare_model_flute("m", module, 4, 64)
    assert isinstance(module[0], nn.Linear)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_are_refused_by_tensor(value):
    module = nn.Sequential(nn.Linear(64, 8))
    module[0].weight.data[3, 5] = value
    with pytest.raises(FormatError, match=r"`m.0.weight` holds .*NaN or Inf.* at \(3, 5\)"):
        prepare_model_flute("m", module, 4, 64)


def test_pytorch_hooks_are_refused_since_they_would_be_lost():
    module = two_layers()
    module[1].register_forward_hook(lambda *_: None)
    with pytest.raises(UnsupportedProblemError, match=r"`m.1` has PyTorch hooks.*Remove them"):
        prepare_model_flute("m", module, 4, 32)
    assert isinstance(module[0], nn.Linear)


def test_offloaded_weights_need_handle_hooks():
    module = nn.Sequential(nn.Linear(64, 8))
    cpu_offload(module, execution_device="cpu")
    with pytest.raises(UnsupportedProblemError, match=r"offloaded by accelerate.*`handle_hooks=Tr"):
        prepare_model_flute("m", module, 4, 64)


def test_weights_that_nobody_holds_are_refused():
    with pytest.raises(UnsupportedProblemError, match=r"`0.weight` is on the meta device"):
        prepare_model_flute("", nn.Sequential(nn.Linear(64, 8, device="meta")), 4, 64)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, FormatError, r"`module` is NoneType; expected the nn.Module"),
        ({"name": nn.Linear(64, 8)}, FormatError, "`module` is NoneType"),
        (
            {"module": nn.Linear(64, 8)},
            UnsupportedProblemError,
            "`Linear` has no linear layer below",
        ),
        ({"module": two_layers(), "num_bits": 5}, FormatError, "`num_bits` is 5; expected one of"),
        ({"module": two_layers(), "group_size": 48}, FormatError, "`group_size` is 48"),
    ],
)
def test_arguments_that_cannot_be_right_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        prepare_model_flute(**arguments)


def test_scales_of_ones_own_must_be_there_and_fit():
    module = nn.Sequential(nn.Linear(64, 8))
    with pytest.raises(FormatError, match=r"`custom_scales_dict` has no `m.0`; it has m.1"):
        prepare_model_flute("m", module, 4, 32, custom_scales_dict={"m.1": torch.ones(8, 2)})
    with pytest.raises(FormatError, match=r"`custom_scales_dict`, `m.0`: `scales` has shape"):
        prepare_model_flute("m", module, 4, 32, custom_scales_dict={"m.0": torch.ones(8, 3)})


def test_weights_that_are_no_numbers_are_refused():
    module = nn.Sequential(nn.Linear(64, 8, bias=False))
    module[0].weight = nn.Parameter(torch.zeros(8, 64, dtype=torch.int8), requires_grad=False)
    with pytest.raises(FormatError, match=r"`m.0.weight` is torch.int8; expected a floating-point"):
        prepare_model_flute("m", module, 4, 64)


# ---------------------------------------------------------------------------------- command line


def command(source, destination, *more: str) -> list[str]:
    paths = ["--pretrained_model_name_or_path", str(source), "--save_directory", str(destination)]
    return [*paths, "--num_bits", "4", "--group_size", "32", *more]


def test_the_command_of_the_readme_writes_a_checkpoint_without_a_warning(tmp_path):
    dense = save_tiny(tmp_path / "dense")
    module = [sys.executable, "-W", "error::RuntimeWarning", "-m", "flute.integrations.base"]
    done = subprocess.run(
        [*module, *command(tmp_path / "dense", tmp_path / "out")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr.strip()) == (0, "")
    assert done.stdout == f"{tmp_path / 'out'}: 14 layers at 4 bits, 1 left dense.\n"
    model = flute.from_pretrained(tmp_path / "out")
    for name, layer in model.named_modules():
        if isinstance(layer, flute.LutLinear):
            expected = nf(dense.get_submodule(name).weight.data, 4, 32)
            assert torch.equal(layer.dequantize(), flute.dequantize(expected)), name


def test_fake_writes_a_dense_checkpoint_of_the_dequantised_values(tmp_path, capsys):
    dense = save_tiny(tmp_path / "dense", dtype=torch.float16)
    assert main(command(tmp_path / "dense", tmp_path / "out", "--fake")) == 0
    assert "14 layers at 4 bits" in capsys.readouterr().out
    found, source = (load_file(tmp_path / d / "model.safetensors") for d in ("out", "dense"))
    assert found.keys() == source.keys()
    for name, tensor in source.items():
        if name.endswith("_proj.weight"):
            tensor = flute.dequantize(nf(tensor, 4, 32), torch.float16)
        assert torch.equal(found[name], tensor), name
    fake = flute.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(fake), logits(dequantised_model(dense, 4, 32)))
    assert (tmp_path / "out" / "tokenizer_config.json").exists()


def test_the_command_equals_flute_quantize_with_method_nf(tmp_path):
    from flute.model import QuantizeOptions

    save_tiny(tmp_path / "dense")
    assert main(command(tmp_path / "dense", tmp_path / "a", "--example_batch_size", "1")) == 0
    quantize_checkpoint(tmp_path / "dense", tmp_path / "b", QuantizeOptions(4, 32, method="nf"))
    tensors = [(tmp_path / d / "model.safetensors").read_bytes() for d in ("a", "b")]
    assert tensors[0] == tensors[1]


def test_errors_are_one_line_and_exit_code_1(tmp_path, capsys):
    save_tiny(tmp_path / "dense")
    bad = torch.full((128, 64), float("nan"), dtype=torch.bfloat16)
    save_tiny(tmp_path / "nan")
    edit_tensors(tmp_path / "nan", {"model.layers.0.mlp.up_proj.weight": bad})
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("kept")
    out = str(tmp_path / "out")
    capsys.readouterr()
    for arguments, message in (
        (command(tmp_path / "absent", out), "absent` is not a folder"),
        (command(tmp_path / "nan", out), "`model.layers.0.mlp.up_proj.weight` holds"),
        (command(tmp_path / "dense", tmp_path / "full"), "exists and is not empty"),
        (command(tmp_path / "dense", out, "--num_bits", "5"), "`num_bits` is 5"),
        (command(tmp_path / "dense", out, "--group_size", "7"), "`group_size` is 7"),
    ):
        assert main(arguments) == 1
        captured = capsys.readouterr()
        assert message in captured.err
        assert captured.err.strip().startswith("error: ")
        assert "\n" not in captured.err.strip()
        assert captured.out == ""
    assert not (tmp_path / "out").exists()


def test_help_shows_an_example(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    text = capsys.readouterr().out
    assert "--save_directory Meta-Llama-3-8B-Instruct-NF4 --num_bits 4 --group_size 128" in text
