"""Dependent launches of inductor's kernels between products: code, graph and results.

What vLLM compiles of a decoder with the options of `flute.integrations.vllm_launch`, without vLLM.
"""

from __future__ import annotations

import pytest
import torch
import torch._inductor.config as inductor
from helpers import relative_error
from test_graph import DEPENDENT, edge_types
from torch._inductor.utils import run_and_get_code
from torch._inductor.virtualized import V
from torch.nn.functional import silu

import flute
from flute.integrations.inductor_norms import OnePassNorms
from flute.linear import LutLinear

WIDTH, INNER, BLOCKS, REPLAYS = 4096, 2048, 2, 300
OPTIONS = {"triton.enable_pdl": True, "force_disable_caches": True}
"""Why without caches: their keys do not hold the choices in every torch."""


@pytest.fixture(scope="module", autouse=True)
def on_hopper():
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("dependent launches are of sm_90 and later")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLUTE_EARLY_DEPENDENTS", "0")  # as the plugin does
        yield


def product(N, K, seed):
    rng = torch.Generator("cuda").manual_seed(seed)
    weight = torch.randn(N, K, generator=rng, device="cuda") / K**0.5
    layer = LutLinear.from_quantized(flute.quantize(weight, 4, 128, method="nf")).half().cuda()
    flute.prepare(layer)
    args = (layer.codes, layer.scales, layer.table, None, 4, 128, N)
    return lambda x: torch.ops.flute.lut_gemm.default(x, *args)


def norm(x, residual, weight):
    summed = x.float() + residual.float()
    scale = torch.rsqrt(summed.pow(2).mean(-1, keepdim=True) + 1e-5)
    return (summed * scale).half() * weight, summed.half()


@pytest.fixture(scope="module")
def decoder():
    """Blocks of a norm, a product, an activation and a product, as a function of x."""
    blocks = [
        (product(2 * INNER, WIDTH, 2 * i), product(WIDTH, INNER, 2 * i + 1)) for i in range(BLOCKS)
    ]
    weight = torch.rand(WIDTH, dtype=torch.float16, device="cuda") + 0.5

    def run(x):
        residual = x
        for up, down in blocks:
            normed, residual = norm(x, residual, weight)
            both = up(normed)
            x = down(silu(both[:, :INNER]) * both[:, INNER:])
        return norm(x, residual, weight)

    return run


@pytest.mark.parametrize("M", [1, 8, 32])
def test_kernels_of_inductor_start_early_and_read_what_is_there(decoder, M):
    inputs = torch.randn(2, M, WIDTH, dtype=torch.float16, device="cuda")
    x = inputs[0].clone()
    compiled = torch.compile(decoder)
    choices = V.set_choices_handler(OnePassNorms())
    with torch.inference_mode(), inductor.patch(OPTIONS), choices:
        _, codes = run_and_get_code(compiled, x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.graph(graph):
            out, residual = compiled(x)
        edges = edge_types(graph)
        graph.instantiate()
        kept = torch.empty(REPLAYS, 2, M, WIDTH, dtype=torch.float16, device="cuda")
        for i in range(REPLAYS):
            x.copy_(inputs[i % 2])
            graph.replay()
            kept[i, 0].copy_(out)
            kept[i, 1].copy_(residual)
        torch.cuda.synchronize()
        exact = [torch.stack(decoder(given)) for given in inputs]

    kernels = [text for code in codes for text in code.split("@triton.jit")[1:]]
    assert len(kernels) >= 3
    for kernel in kernels:
        source = kernel.split("'''")[0]
        wait, launch = source.index("gdc_wait"), source.index("gdc_launch_dependents")
        assert wait < min(source.index("tl.load"), source.index("tl.store")), source
        assert source.rindex("tl.load") < launch < source.index("tl.store"), source
    assert edges == [DEPENDENT] * (4 * BLOCKS)  # a chain of one kernel more
    for i in range(REPLAYS):
        assert torch.equal(kept[i], kept[i % 2]), f"replay {i} differs"
    for i, expected in enumerate(exact):
        assert relative_error(kept[i].cpu(), expected.double().cpu()) < 1e-2
