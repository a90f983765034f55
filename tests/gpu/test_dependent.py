"""Dependent launches of inductor's kernels between products: code, graph and results.

What vLLM compiles of a decoder with the options of `flute.integrations.vllm_launch`, without vLLM;
and the same bits with and without. Each replay has another input than the one before it, so that a
kernel that reads too early reads what belongs to the other.
"""

from __future__ import annotations

import pytest
import torch
import torch._inductor.config as inductor
from helpers import random_weight, relative_error
from test_graph import DEPENDENT, edge_types
from torch._inductor.utils import run_and_get_code
from torch._inductor.virtualized import V
from torch.nn.functional import silu

import flute
from flute import launchers
from flute.format import QuantSpec
from flute.integrations.inductor_norms import OnePassNorms
from flute.linear import LutLinear

WIDTH, INNER, BLOCKS, REPLAYS = 4096, 2048, 2, 300
OPTIONS = {"triton.enable_pdl": True, "force_disable_caches": True}
"""Why without caches: their keys do not hold the choices in every torch."""


@pytest.fixture(scope="module", autouse=True)
def on_hopper():
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("dependent launches are of sm_90 and later")
    if not hasattr(inductor.triton, "enable_pdl"):
        pytest.skip("this torch has no such option")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(launchers.EARLY_DEPENDENTS, "0")  # as the plugin does
        patch.setattr(launchers, "_products", {})  # those of other tests were made without it
        yield


def captured(compiled, x):
    """Return a graph of a compiled function, what it writes, and the types of its edges."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph):
        out = compiled(x)
    edges = edge_types(graph)
    graph.instantiate()
    return graph, out, edges


def replayed(graph, x, inputs, outs):
    """Replay a graph on inputs (2, ...) in turns; what each replay left, (REPLAYS, outs, ...)."""
    kept = torch.empty(REPLAYS, len(outs), *outs[0].shape, dtype=x.dtype, device=x.device)
    for i in range(REPLAYS):
        x.copy_(inputs[i % 2])
        graph.replay()
        for own, out in zip(kept[i], outs, strict=True):
            own.copy_(out)
    torch.cuda.synchronize()
    for i in range(REPLAYS):
        assert torch.equal(kept[i], kept[i % 2]), f"replay {i} differs"
    return kept


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
        graph, outs, edges = captured(compiled, x)
        kept = replayed(graph, x, inputs, outs)
        exact = [torch.stack(decoder(given)) for given in inputs]

    kernels = [text for code in codes for text in code.split("@triton.jit")[1:]]
    assert len(kernels) >= 3
    for kernel in kernels:
        source = kernel.split("'''")[0]
        wait, launch = source.index("gdc_wait"), source.index("gdc_launch_dependents")
        assert wait < min(source.index("tl.load"), source.index("tl.store")), source
        assert source.rindex("tl.load") < launch < source.index("tl.store"), source
    assert edges == [DEPENDENT] * (4 * BLOCKS)  # a chain of one kernel more
    for i, expected in enumerate(exact):
        assert relative_error(kept[i].cpu(), expected.double().cpu()) < 1e-2


class Block(torch.nn.Module):
    """Two products between operations that inductor generates kernels of, with a residual."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        shapes = ((1024, 512), (512, 512))
        weights = [random_weight(*shape, QuantSpec(4, 128), seed=seed) for shape in shapes]
        self.up, self.down = (LutLinear.from_quantized(w).half().cuda() for w in weights)

    def forward(self, x):
        gate, up = self.up(torch.nn.functional.rms_norm(x, (512,))).chunk(2, -1)
        return x + self.down(silu(gate / 8) * up)


@pytest.mark.parametrize("M", [1, 16])
def test_dependent_kernels_of_inductor_change_no_bit(M):
    """A chain of 12 short products, as modules, compiled with inductor's option off and on."""
    model = torch.nn.Sequential(*(Block(i) for i in range(6)))
    flute.prepare(model)
    inputs = torch.randn(2, M, 512, dtype=torch.float16, device="cuda")
    x = inputs[0].clone()
    results = []
    for enable in (False, True):
        torch._dynamo.reset()
        options = {"triton.enable_pdl": enable, "triton.autotune_pointwise": False}
        compiled = torch.compile(model, fullgraph=True, options=options)
        with torch.inference_mode():
            for _ in range(3):
                compiled(x)
            graph, out, edges = captured(compiled, x)
            assert (edges.count(DEPENDENT) > 12) is enable  # ours are 12
            results.append(replayed(graph, x, inputs, (out,))[:2])
    assert torch.equal(*results)
