"""MoE experts in a CUDA graph: copied and multiplied by what each replay's routing says."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import packed_weight, random_weight

from flute.concat import concat_weights
from flute.format import QuantSpec
from flute.integrations.expert_stack import Block, ExpertStack, all_experts, asked_for, routed
from flute.integrations.vllm_order import in_kernel_order
from flute.precompile import compile_kernels, prepared_problem

E, H, INNER, TOP, REPLAYS = 32, 512, 256, 4, 300


def stack_of(experts):
    """Experts in kernel order, their kernels compiled."""
    joined = [concat_weights([packed_weight(p) for p in parts]) for parts in experts]
    moved = [
        w._replace(packed=w.packed.cuda(), scales=w.scales.cuda(), table=w.table.cuda())
        for w in joined
    ]
    ordered = [in_kernel_order(w, torch.float16) for w in moved]
    first, rows = ordered[0]
    assert rows == first.N
    parts = (torch.stack([w[i] for w, _ in ordered]) for i in range(3))
    stack = ExpertStack(*parts, first.spec, first.N, first.table_ends, True)
    wide = [stack.side_by_side(count, first.K) for count in dict.fromkeys(stack.launches(TOP))]
    problems = [prepared_problem(weight, torch.float16) for weight in wide]
    compile_kernels(problems, first.packed.device, lambda *_: None)
    return stack


@pytest.mark.parametrize("num_bits", [2, 3, 4])
@pytest.mark.parametrize("T", [1, 2])
@pytest.mark.parametrize("way", [routed, all_experts])
def test_replays_follow_the_routing(way, T, num_bits):
    spec = QuantSpec(num_bits, 64)
    shapes = ((INNER, H), (INNER, H), (H, INNER))
    experts = [
        [random_weight(*shape, spec, seed=3 * e + i) for i, shape in enumerate(shapes)]
        for e in range(E)
    ]
    block = Block(stack_of([e[:2] for e in experts]), stack_of([e[2:] for e in experts]), F.silu)
    x = torch.zeros(T, H, dtype=torch.float16, device="cuda")
    weights = torch.zeros(T, TOP, device="cuda")
    ids = torch.zeros(T, TOP, dtype=torch.int32, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        way(block, x, weights, ids)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = way(block, x, weights, ids)
    generator = torch.Generator().manual_seed(T)
    for _ in range(REPLAYS):  # a copy that a product did not wait for would show sooner or later
        x.copy_(torch.randn(T, H, generator=generator) / 16)
        weights.copy_(torch.rand(T, TOP, generator=generator))
        ids.copy_(torch.stack([torch.randperm(E, generator=generator)[:TOP] for _ in range(T)]))
        graph.replay()
        expected = asked_for(block, x, weights, ids).float()
        assert (out.float() - expected).norm() <= 5e-3 * expected.norm()
