"""The package on a GPU: quantising there, the op there, a real model there."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    DEMO_MODEL,
    TOLERANCE,
    folder_bytes,
    random_weight,
    relative_error,
    squared_error,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

import flute
from flute.evaluate import perplexity, read_text, to_windows
from flute.format import QuantSpec
from flute.model import QuantizeOptions
from flute.stream import quantize_checkpoint

CUDA = torch.device("cuda")


@pytest.mark.parametrize("num_bits", [2, 3, 4])
@pytest.mark.parametrize("group_size", [32, 64, 128, 256, -1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("per_row", [False, True])
def test_op_by_the_three_oracles(num_bits, group_size, dtype, per_row):
    weight = random_weight(33, 768, QuantSpec(num_bits, group_size), per_row=per_row)
    layer = flute.LutLinear.from_quantized(weight).to(CUDA)
    dense = flute.dequantize(weight, dtype)
    eye = torch.eye(768, dtype=dtype, device=CUDA)
    assert torch.equal(layer(eye).T.cpu(), dense)
    x = torch.randn(9, 768, generator=torch.Generator().manual_seed(0)).to(dtype)
    exact = x.double() @ flute.dequantize(weight).double().T
    ours = relative_error(layer(x.to(CUDA)).cpu(), exact)
    torchs = relative_error((x.to(CUDA) @ dense.to(CUDA).T).cpu(), exact)
    assert ours <= TOLERANCE[dtype]
    assert ours <= 1.5 * torchs


@pytest.mark.parametrize("method", ["nf", "int", "fp"])
@pytest.mark.parametrize("num_bits", [2, 3, 4])
def test_absmax_is_bitwise_the_same_as_on_the_cpu(method, num_bits):
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0)).bfloat16()
    here = flute.quantize(weight, num_bits, 64, method=method)
    there = flute.quantize(weight.to(CUDA), num_bits, 64, method=method)
    assert torch.equal(here.codes, there.codes.cpu())
    assert torch.equal(here.scales, there.scales.cpu())


@pytest.mark.parametrize("num_bits", [2, 3, 4])
def test_searched_scales_are_as_good_as_on_the_cpu(num_bits):
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    here = squared_error(weight, flute.quantize(weight, num_bits, 64))
    there = flute.quantize(weight.to(CUDA), num_bits, 64)
    on_gpu = flute.QuantizedWeight(
        there.codes.cpu(), there.scales.cpu(), there.table.cpu(), there.spec
    )
    assert squared_error(weight, on_gpu) == pytest.approx(here, rel=1e-4)


def test_checkpoint_quantised_on_the_gpu_is_the_cpus(tmp_path):
    for device in ("cpu", "cuda"):
        quantize_checkpoint(
            DEMO_MODEL, tmp_path / device, QuantizeOptions(method="nf"), device=device
        )
    assert folder_bytes(tmp_path / "cpu") == folder_bytes(tmp_path / "cuda")


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """The demo model at 4 bits, quantised on the GPU."""
    out = tmp_path_factory.mktemp("gpu") / "demo"
    quantize_checkpoint(DEMO_MODEL, out, device="cuda")
    return out


def test_perplexity_is_that_of_the_cpu(quantized):
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    windows = to_windows(read_text("wikitext2"), tokenizer, 512, 4096)
    losses = [
        perplexity(flute.from_pretrained(quantized, device_map=device), windows).loss
        for device in ("cpu", "cuda")
    ]
    assert losses[1] == pytest.approx(losses[0], abs=2e-3)


def test_quantise_on_load_to_the_gpu_equals_loading(quantized):
    config = flute.FluteConfig(num_bits=4, group_size=64)
    model = AutoModelForCausalLM.from_pretrained(
        DEMO_MODEL, quantization_config=config, device_map="cuda", dtype="auto"
    )
    loaded = flute.from_pretrained(quantized, device_map="cuda")
    ids = torch.arange(100, device=CUDA)[None]
    assert torch.equal(model(ids).logits, loaded(ids).logits)


@pytest.mark.filterwarnings("ignore:A product on cuda.0 takes the slow path")  # offloaded layers
def test_generate_offload_and_autocast(quantized):
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    ids = tokenizer("The king of the", return_tensors="pt").input_ids
    model = flute.from_pretrained(quantized, device_map="cuda")
    out = model.generate(ids.to(CUDA), max_new_tokens=16, do_sample=False, pad_token_id=0)
    mixed = {"model.embed_tokens": 0, "model.norm": 0, "model.rotary_emb": 0, "lm_head": 0}
    mixed |= {f"model.layers.{i}": 0 if i < 3 else "cpu" for i in range(6)}
    offloaded = flute.from_pretrained(quantized, device_map=mixed)
    again = offloaded.generate(ids.to(CUDA), max_new_tokens=16, do_sample=False, pad_token_id=0)
    assert torch.equal(out, again)
    with torch.autocast("cuda", dtype=torch.float16):
        layer = model.model.layers[0].self_attn.q_proj
        assert layer(torch.randn(2, 256, device=CUDA)).dtype == torch.float16


def test_compile_and_cuda_graph(quantized):
    model = flute.from_pretrained(quantized, device_map="cuda")
    layer = model.model.layers[0].mlp.gate_proj
    x = torch.randn(3, 256, device=CUDA, dtype=torch.bfloat16)
    expected = layer(x)
    compiled = torch.compile(layer, fullgraph=True, mode="reduce-overhead")
    for _ in range(4):
        assert torch.equal(compiled(x).clone(), expected)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        layer(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer(x)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(captured, layer(x))


def test_op_passes_opcheck_on_the_gpu():
    weight = random_weight(24, 128, QuantSpec(4, 32))
    layer = flute.LutLinear.from_quantized(weight).to(CUDA)
    x = torch.randn(5, 128, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
    arguments = (x, layer.codes.data, layer.scales.data, layer.table.data, None, 4, 32)
    result = torch.library.opcheck(torch.ops.flute.lut_gemm.default, arguments)
    assert set(result.values()) == {"SUCCESS"}
