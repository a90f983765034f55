"""The mma kernels, which sm_90 takes only when told to: random problems, graphs, streams."""

from __future__ import annotations

import os
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from test_decode import chain, make
from test_random import MS, check, random_kind, random_sizes

from flute import batch, launchers, mma
from flute.config import Problem
from flute.device import gpu_of
from flute.format import QuantSpec
from flute.jit.cache import load_or_compile
from flute.plans import MmaPlan, plans_of

CUDA = torch.device("cuda", 0)
COUNT = int(os.environ.get("FLUTE_RANDOM_PROBLEMS", "600"))


@pytest.fixture
def forced(monkeypatch):
    monkeypatch.setenv(batch.ENVIRONMENT, "mma")
    monkeypatch.setattr(launchers, "_products", {})


def candidates(problem: Problem) -> list[MmaPlan]:
    """What this GPU would take, and one with the least shared memory of those that have kernels."""
    gpu = gpu_of(CUDA)
    small = replace(gpu, smem_bytes=101376)
    return list(dict.fromkeys((*mma.candidates(problem, gpu), *mma.candidates(problem, small))))


def test_random_problems(monkeypatch):
    """Each by any of the plans that might be timed for it."""
    rng = random.Random(2)
    kinds = [random_kind(rng) for _ in range(max(4, min(24, COUNT // 50)))]
    most_kernels = 4 * len(kinds)
    cases, sources, plans = [], {}, Counter()
    for _ in range(COUNT):
        kind = rng.choice(kinds)
        spec, dtype, scale_dtype, tables = kind
        M, N, K = random_sizes(rng, spec)
        M = max(M, rng.choice(MS))
        group = 0 if spec.group_size >= K or spec.group_size < 0 else spec.group_size
        names = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}
        problem = Problem(
            spec.num_bits, group, names[dtype], names[scale_dtype], tables == "row", M, N, K
        )
        found = candidates(problem)
        known = [p for p in found if launchers.source_of(p) in sources]
        plan = rng.choice(found if len(sources) < most_kernels or not known else known)
        sources[launchers.source_of(plan)] = None
        cases.append((kind, (M, N, K), plan))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda source: load_or_compile(source, gpu_of(CUDA).arch), sources))
    broken = []
    for i, (kind, sizes, plan) in enumerate(cases):
        monkeypatch.setattr(launchers, "choose", lambda *_, plan=plan: plan)
        monkeypatch.setattr(launchers, "_products", {})
        plans[plan.parts, plan.config.tokens] += 1
        special = rng.choice(("", "", "zero scales", "top codes", "identity", "inf", "nan"))
        found = check(kind, *sizes, special, i)
        if found:
            broken.append((found, *kind, *sizes, special, plan))
    assert not broken, f"{len(broken)} of {COUNT}: {broken[:5]}"
    assert {parts for parts, _ in plans} == {True, False}


@pytest.mark.parametrize("M", [20, 130])
def test_dependent_chain_in_a_graph(M, forced):
    """Each kernel starts while the one before, which writes its x or its sums, still runs."""
    model = chain()
    problem = launchers.problem_of(model[0].packed_weight(), M, torch.float16)
    assert isinstance(plans_of(problem, gpu_of(CUDA))[0], MmaPlan)
    x = torch.randn(M, 1024, device=CUDA).half() / 100
    stepwise = x
    for layer in model:
        stepwise = layer(stepwise)
        torch.cuda.synchronize()
    assert torch.equal(model(x), stepwise)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = model(x)
    for _ in range(20):
        x.copy_(torch.randn_like(x) / 100)
        graph.replay()
        assert torch.equal(out.clone(), model(x))


@pytest.mark.parametrize(("M", "N", "K"), [(16, 8192, 8192), (64, 4096, 4096), (200, 1029, 4096)])
def test_repeated_on_two_streams_at_once(M, N, K, forced):
    layer = make(N, K, QuantSpec(4, 128), scale_dtype=torch.float16)
    x = torch.randn(M, K, device=CUDA).half()
    expected = layer(x)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    outs = []
    for i in range(100):
        with torch.cuda.stream(streams[i % 2]):
            outs.append(layer(x))
    torch.cuda.synchronize()
    assert all(torch.equal(out, expected) for out in outs)
