"""What a captured graph holds of a product: one kernel, launched before the one before it ends."""

from __future__ import annotations

import pytest
import torch
from helpers import random_weight

import flute
from flute import launchers
from flute.format import QuantSpec
from flute.linear import LutLinear

DEPENDENT = 1  # CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC


def edge_types(graph):
    """The types of a graph's edges."""
    driver = pytest.importorskip("cuda.bindings.driver")
    raw = driver.CUgraph(graph.raw_cuda_graph())
    error, *_, count = driver.cuGraphGetEdges(raw)
    assert int(error) == 0
    error, _, _, data, _ = driver.cuGraphGetEdges(raw, count)
    assert int(error) == 0
    return [int(edge.type) for edge in data[:count]]


@pytest.mark.parametrize("M", [1, 8, 32])
def test_a_captured_product_is_a_dependent_launch(M):
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("dependent launches are of sm_90 and later")
    weight = random_weight(1024, 512, QuantSpec(4, 128))
    layer = LutLinear.from_quantized(weight).half().cuda()
    flute.prepare(layer)
    x = torch.randn(M, 512, dtype=torch.float16, device="cuda")
    args = (layer.codes, layer.scales, layer.table, None, 4, 128, 1024)

    def product():  # as a compiled model calls it
        return torch.ops.flute.lut_gemm.default(x * 2, *args)

    expected = product()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph):
        out = product()
    assert edge_types(graph) == [DEPENDENT]  # one edge: from the doubling to the product
    graph.instantiate()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, expected)


class Block(torch.nn.Module):
    """Two products between operations that inductor generates kernels of, with a residual."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        shapes = ((1024, 512), (512, 512))
        weights = [random_weight(*shape, QuantSpec(4, 128), seed=seed) for shape in shapes]
        self.up, self.down = (LutLinear.from_quantized(w).half().cuda() for w in weights)

    def forward(self, x):
        gate, up = self.up(torch.nn.functional.rms_norm(x, (512,))).chunk(2, -1)
        return x + self.down(torch.nn.functional.silu(gate / 8) * up)


@pytest.mark.parametrize("M", [1, 16])
def test_beside_dependent_kernels_of_inductor(M, monkeypatch):
    """They wait for the kernel before them only, and read what older ones wrote."""
    if not hasattr(torch._inductor.config.triton, "enable_pdl"):
        pytest.skip("this torch has no such option")
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("dependent launches are of sm_90 and later")
    monkeypatch.setenv(launchers.EARLY_DEPENDENTS, "0")
    monkeypatch.setattr(launchers, "_products", {})
    model = torch.nn.Sequential(*(Block(i) for i in range(6)))
    flute.prepare(model)
    x = torch.randn(M, 512, dtype=torch.float16, device="cuda")
    results = []
    for enable in (False, True):
        torch._dynamo.reset()
        options = {"triton.enable_pdl": enable, "triton.autotune_pointwise": False}
        compiled = torch.compile(model, fullgraph=True, options=options)
        with torch.inference_mode():
            for _ in range(3):
                compiled(x)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph(keep_graph=True)
            with torch.cuda.graph(graph):
                out = compiled(x)
            kinds = edge_types(graph)
            assert (kinds.count(DEPENDENT) > 12) is enable  # ours are 12
            graph.instantiate()
            for _ in range(300):
                out.zero_()
                graph.replay()
                results.append(out.clone())
    torch.cuda.synchronize()
    assert all(torch.equal(result, results[0]) for result in results)
