"""What a captured graph holds of a product: one kernel, launched before the one before it ends."""

from __future__ import annotations

import pytest
import torch
from helpers import random_weight

import flute
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
