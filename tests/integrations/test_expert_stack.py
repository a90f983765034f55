"""The ways of multiplying by MoE experts agree with the dense sum, in plain and in kernel order."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import packed_weight, random_weight

import flute
from flute.concat import concat_weights
from flute.format import QuantSpec
from flute.integrations import expert_stack
from flute.integrations.expert_stack import (
    Block,
    ExpertStack,
    all_experts,
    asked_for,
    captured,
    routed,
)
from flute.kernel_order import to_kernel_order

E, H, INNER, TOP = 12, 64, 96, 3


def stack_of(weights, is_ordered):
    joined = [concat_weights([packed_weight(part) for part in parts]) for parts in weights]
    first = joined[0]
    if is_ordered:
        ordered = [to_kernel_order(w.packed, w.scales, w.spec.num_bits, w.K) for w in joined]
    else:
        ordered = [(w.packed, w.scales) for w in joined]
    codes, scales = (torch.stack(tensors) for tensors in zip(*ordered, strict=True))
    table = torch.stack([w.table for w in joined])
    return ExpertStack(codes, scales, table, first.spec, first.N, first.table_ends, is_ordered)


def made(spec, *, per_row=False, is_ordered=False):
    """A block, and its dense weights: gate, up and down of each expert."""
    shapes = ((INNER, H), (INNER, H), (H, INNER))
    experts = [
        [random_weight(*s, spec, per_row=per_row, seed=3 * e + i) for i, s in enumerate(shapes)]
        for e in range(E)
    ]
    gate_up = stack_of([expert[:2] for expert in experts], is_ordered)
    down = stack_of([expert[2:] for expert in experts], is_ordered)
    dense = [[flute.dequantize(w).double() for w in expert] for expert in experts]
    return Block(gate_up, down, F.silu), dense


def exact(dense, x, weights, ids):
    """The sum in fp64, token by token."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    for t in range(len(x)):
        for weight, e in zip(weights[t].double(), ids[t].tolist(), strict=True):
            if e >= 0:
                gate, up, down = dense[e]
                v = x[t].double()
                out[t] += weight * (down @ (F.silu(gate @ v) * (up @ v)))
    return out


def routing(T):
    generator = torch.Generator().manual_seed(T)
    ids = torch.stack([torch.randperm(E, generator=generator)[:TOP] for _ in range(T)])
    return torch.rand(T, TOP, generator=generator), ids


@pytest.mark.parametrize("way", [asked_for, all_experts, routed, captured])
@pytest.mark.parametrize("is_ordered", [False, True], ids=["plain", "kernel order"])
@pytest.mark.parametrize("per_row", [False, True], ids=["tables", "row tables"])
@pytest.mark.parametrize("spec", [QuantSpec(4, 32), QuantSpec(3, 32), QuantSpec(2, -1)], ids=str)
def test_every_way_gives_the_weighted_sum(way, spec, per_row, is_ordered):
    block, dense = made(spec, per_row=per_row, is_ordered=is_ordered)
    for T in (1, 2, 5):
        weights, ids = routing(T)
        ids[0, 1] = -1  # of another rank
        x = torch.randn(T, H)
        expected = exact(dense, x, weights, ids)
        error = (way(block, x, weights, ids) - expected).norm() / expected.norm()
        assert error < 1e-5, (T, error)


@pytest.mark.parametrize(("inner", "launches"), [(96, [4, 4, 4]), (36, [1] * 12)])
def test_experts_side_by_side_are_their_products(inner, launches):
    """In launches of at most 8 ranges; rows that are no whole tiles cannot lie side by side."""
    shapes = ((inner, H), (inner, H))
    parts = [
        [random_weight(*s, QuantSpec(4, 32), seed=2 * e + i) for i, s in enumerate(shapes)]
        for e in range(E)
    ]
    stack, x = stack_of(parts, is_ordered=True), torch.randn(2, H)
    assert stack.launches(E) == launches
    assert stack_of([part[:1] for part in parts], is_ordered=False).launches(E) == [8, 4]
    whole = stack.multiply_side_by_side(1, 10, x)
    assert whole.shape == (2, 9, 2 * inner)
    for e in range(1, 10):
        assert torch.equal(whole[:, e - 1], stack.multiply(e, x))


def test_few_tokens_copy_their_experts_and_many_do_not(monkeypatch):
    block, _ = made(QuantSpec(4, 32))
    used = []
    for name in ("routed", "all_experts"):
        monkeypatch.setattr(expert_stack, name, lambda *_, name=name: used.append(name))
    for T in (1, 2, 0):
        captured(block, torch.randn(T, H), *routing(max(T, 1)) if T else (torch.empty(0, 3),) * 2)
    assert used == ["routed", "all_experts", "all_experts"]  # 12 experts, 3 a token


def test_copies_are_made_before_the_kernel_that_products_may_overtake():
    """In the order of calls: the last copy, then another kernel, then the first product."""
    block, _ = made(QuantSpec(4, 32))
    calls = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls.append(func.name())
            return func(*args, **(kwargs or {}))

    weights, ids = routing(1)
    with Watch():
        routed(block, torch.randn(1, H), weights, ids)
    copies = [i for i, name in enumerate(calls) if "index_select" in name]
    products = [i for i, name in enumerate(calls) if "lut_gemm" in name]
    assert len(copies) == 6
    assert "aten::masked_fill.Scalar" in calls[copies[-1] : products[0]]
