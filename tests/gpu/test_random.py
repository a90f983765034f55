"""Random problems on a GPU against fp64: every kind of weight, all ways to multiply.

FLUTE_RANDOM_PROBLEMS sets how many (default 600); FLUTE_RANDOM_SEED another draw.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import relative_error

from flute import batch, cuda, launchers
from flute.device import gpu_of
from flute.format import PackedWeight, QuantSpec
from flute.jit.cache import load_or_compile
from flute.kernel_order import order_codes, order_scales
from flute.plans import BatchPlan, DensePlan, KernelPlan, Plan, SplitPlan, plans_of

CUDA = torch.device("cuda", 0)
COUNT = int(os.environ.get("FLUTE_RANDOM_PROBLEMS", "600"))
SEED = int(os.environ.get("FLUTE_RANDOM_SEED", "0"))
KINDS = max(6, min(30, COUNT // 300))
KS = (32, 64, 96, 160, 256, 448, 512, 896, 1024, 1792, 2048, 3584, 4096, 4608, 11008)
NS = (1, 2, 15, 16, 17, 33, 63, 64, 65, 100, 127, 256, 500, 1000, 1029, 2049)
MS = (1, 1, 2, 3, 5, 7, 8, 9, 12, 16, 17, 23, 32, 33, 47, 64, 65, 90, 128, 129, 190, 256, 300, 520)
SPECIAL = ("", "", "", "zero scales", "top codes", "identity", "inf", "nan")


def random_kind(rng):
    """Bits, group, dtype, scales' dtype, tables."""
    dtype = rng.choice((torch.float16, torch.bfloat16))
    scale_dtype = rng.choice((dtype, dtype, torch.float16, torch.bfloat16, torch.float32))
    group, tables = rng.choice((32, 64, 128, 256, -1)), rng.choice(("one", "one", "row", "ranges"))
    return QuantSpec(rng.choice((2, 3, 4)), group), dtype, scale_dtype, tables


def random_sizes(rng, spec):
    K = rng.choice([k for k in KS if spec.group_size < 0 or k % spec.group_size == 0])
    return rng.choice(MS), rng.choice(NS), K


def plan_of(kind, M, N, K):
    spec, dtype, scale_dtype, tables = kind
    table = torch.empty(N if tables == "row" else 1, 0)
    weight = PackedWeight(table, torch.empty(0, dtype=scale_dtype), table, spec, N, K)
    return launchers.choose(launchers.problem_of(weight, M, dtype), (), gpu_of(CUDA))


def compile_all(cases):
    sources = {}
    for kind, sizes in cases:
        plan = plan_of(kind, *sizes)
        if isinstance(plan, KernelPlan):
            sources[launchers.source_of(plan)] = None
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda source: load_or_compile(source, gpu_of(CUDA).arch), sources))


def check(kind, M, N, K, special, seed):
    """Multiply and compare; returns what broke, or ""."""
    spec, dtype, scale_dtype, tables = kind
    generator = torch.Generator(CUDA).manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, device=CUDA, generator=generator)

    entries, groups = spec.num_entries, spec.num_groups(K)
    codes = torch.randint(0, entries, (N, K), device=CUDA, dtype=torch.uint8, generator=generator)
    scales, ends, table = normal(N, groups).to(scale_dtype), (), normal(1, entries)
    if tables == "row":
        table = normal(N, entries)
    elif tables == "ranges" and N > 64:
        ends = tuple(range(64, N, max(64, N // 4 // 64 * 64)))[:7]
        ends = (*ends, N)
        table = normal(len(ends), entries)
    if special == "zero scales":
        scales[::2] = 0
    if special == "top codes":
        codes.fill_(entries - 1)
    x = normal(M, K).to(dtype)
    if special == "identity":
        x.zero_()
        x[torch.arange(M), torch.arange(M) % K] = 1
    if special in ("inf", "nan"):
        x[M // 2, K // 3] = float(special)
    bias = normal(N).to(dtype) if seed % 3 == 0 and special != "identity" else None
    weight = PackedWeight(
        order_codes(codes, spec.num_bits), order_scales(scales, K), table, spec, N, K, ends
    )
    torch.cuda.synchronize()
    outs = [cuda.multiply(x, weight, bias) for _ in range(2)]

    rows = table.to(dtype).double()
    if ends:
        rows = rows.repeat_interleave(
            torch.tensor([b - a for a, b in zip((0, *ends), ends, strict=False)], device=CUDA), 0
        )
    values = rows.expand(N, -1).gather(1, codes.long())
    exact_weight = (values.view(N, groups, -1) * scales.double()[..., None]).flatten(1)
    dense = exact_weight.float().to(dtype)
    exact = x.double() @ exact_weight.T + (0 if bias is None else bias.double())
    theirs = torch.nn.functional.linear(x, dense, bias)
    if not torch.equal(outs[0].view(torch.int16), outs[1].view(torch.int16)):
        return "repetition"
    if special == "identity":
        expected = dense.T[torch.arange(M) % K]
        return "" if torch.equal(outs[0], expected) else "identity"
    if special in ("inf", "nan"):
        wrong = (outs[0].isnan() != theirs.isnan()) | (outs[0].isinf() != theirs.isinf())
        if wrong.any():
            return special
        finite = theirs.isfinite()
        outs[0], theirs, exact = outs[0][finite], theirs[finite], exact[finite]
        if not finite.any():
            return ""
    mine, their = relative_error(outs[0], exact), relative_error(theirs, exact)
    return "" if mine <= 1.5 * their + 1e-6 else f"error {mine:.1e}, dense {their:.1e}"


def test_random_problems():
    rng = random.Random(SEED)
    kinds = [random_kind(rng) for _ in range(KINDS)]
    cases = [
        (kind, random_sizes(rng, kind[0])) for kind in (rng.choice(kinds) for _ in range(COUNT))
    ]
    compile_all(cases)
    broken, plans = [], Counter()
    for i, (kind, sizes) in enumerate(cases):
        special = rng.choice(SPECIAL)
        plans[type(plan_of(kind, *sizes))] += 1
        found = check(kind, *sizes, special, i + SEED * COUNT)
        if found:
            broken.append((found, *kind, *sizes, special, i))
    assert not broken, f"{len(broken)} of {COUNT}: {broken[:5]}"
    if torch.cuda.get_device_capability() == (9, 0):
        assert plans[Plan]
        assert plans[BatchPlan]


@pytest.mark.parametrize("plan", [DensePlan(), SplitPlan()], ids=lambda plan: type(plan).__name__)
def test_other_ways_agree(plan, monkeypatch):
    """Dense and split plans, which the dispatcher takes for few of these problems."""
    rng = random.Random(1)
    real = launchers.choose

    def choose(problem, ends, gpu):
        return plan if problem.m > 16 else real(problem, ends, gpu)

    monkeypatch.setattr(launchers, "choose", choose)
    monkeypatch.setattr(launchers, "_products", {})
    kinds = [random_kind(rng) for _ in range(4)]
    for i in range(40):
        kind = rng.choice(kinds)
        M, N, K = random_sizes(rng, kind[0])
        assert check(kind, max(M, 17), N, min(K, 2048) if K % 256 == 0 else K, "", i) == ""


@pytest.mark.parametrize("tokens", [48, 64, 96, 128, 192, 256])
def test_a_last_tile_of_tokens_overlaps_the_one_before(tokens, monkeypatch):
    """Whatever part of the last tile is left, in every kind of kernel that has such tiles."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the batch kernel needs wgmma")
    rng = random.Random(tokens)
    splits = Counter()

    def choose(problem, ends, gpu):
        plans = [p for p in plans_of(problem, gpu) if isinstance(p, BatchPlan)]
        plans += batch.candidates(problem._replace(m=tokens), gpu)  # whose tiles are as large
        found = [p for p in plans if p.config.tokens == tokens]
        by_kind = {(p.config.cluster, p.config.split_k): p for p in reversed(found)}
        plan = rng.choice(list(by_kind.values()))
        splits[plan.config.cluster > 1, plan.config.split_k] += 1
        return plan

    monkeypatch.setattr(launchers, "choose", choose)
    monkeypatch.setattr(launchers, "_products", {})
    kinds = [random_kind(rng) for _ in range(3)]
    for i, rest in enumerate((1, 7, 8, 9, tokens // 2, tokens - 1)):
        kind = rng.choice(kinds)
        _, N, K = random_sizes(rng, kind[0])
        for special in ("", "identity", "nan"):
            assert check(kind, tokens * rng.choice((1, 2)) + rest, N, K, special, i) == ""
    assert len(splits) > 1
