"""mma plans: one for every problem on every GPU, each within its own rules; how work is cut."""

from __future__ import annotations

import itertools
import random
import re
from dataclasses import replace

import pytest
from test_config import GPUS, random_problem

from flute import batch
from flute.config import Gpu, Problem
from flute.mma import (
    TOKENS,
    MmaConfig,
    MmaPlan,
    candidates,
    predicted_us,
    ranked_tokens,
    scratch_floats,
    sum_blocks,
    supports,
    work_of,
)
from flute.plans import MAX_MMA_M, BatchPlan, DensePlan, Plan, default_plan
from flute.precompile import PREPARED_M

A100 = GPUS[1]
MOST_SCRATCH = 64 << 20


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.arch)
def test_every_problem_has_plans_and_they_are_supported(gpu):
    rng = random.Random(gpu.arch)
    for _ in range(60):
        problem = random_problem(rng)._replace(m=rng.choice((9, 16, 33, 100, 129, 300, 4096)))
        plans = candidates(problem, gpu)
        assert plans, problem
        m, n, k = problem[-3:]
        for plan in plans:
            assert supports(plan, m, n, k, gpu) == ""
            assert plan.config.smem_bytes <= gpu.smem_bytes
            assert 4 * scratch_floats(plan, work_of(plan, m, n, k, gpu)) <= MOST_SCRATCH
        times = [predicted_us(plan, ranked_tokens(m), n, k, gpu) for plan in plans]
        assert times == sorted(times)


@pytest.mark.parametrize(
    ("changes", "k", "rule"),
    [
        ({"tokens": 40}, 4096, r"tokens=40 must be one of"),
        ({}, 4000, r"K=4000 must be a multiple of 32 and of group_size=128"),
        ({}, 128, r"group_size=128 is the whole row of K=128"),
        ({"chunks": 3}, 4096, r"chunks=3 must be 1, 2 or 4"),
        ({"chunks": 2, "warps_k": 4}, 4096, r"a multiple of warps_k=4"),
        ({"chunks": 4, "warps_k": 4}, 4096, r"warps_n=8 \* warps_k=4 exceed 16 warps"),
        ({"stages": 1}, 4096, r"stages=1: one is filled while 1 are used"),
        ({"stages": 2, "ahead": True}, 4096, r"stages=2: one is filled while 2 are used"),
        ({"stages": 19}, 4096, r"1 \* \d+ bytes of shared memory exceed 166912"),
        ({"stages": 4, "min_blocks": 2}, 4096, r"2 \* \d+ bytes of shared memory exceed 166912"),
    ],
)
def test_broken_rules_are_named(changes, k, rule):
    plan = MmaPlan(replace(MmaConfig(), **changes))
    assert re.search(rule, supports(plan, 16, 4096, k, A100))


def borders(work, steps):
    grains = work.row_blocks * work.token_tiles * steps // work.grain
    return [grains * i // work.pieces * work.grain for i in range(work.pieces + 1)]


@pytest.mark.parametrize("parts", [True, False])
@pytest.mark.parametrize(
    ("m", "n", "k", "ends"),
    [
        (16, 4096, 4096, ()),
        (100, 57344, 8192, ()),
        (33, 6144, 4096, (4096, 5120, 6144)),
        (9, 100, 32, ()),
        (2048, 17, 28672, ()),
        (40, 333, 1024, (48, 64, 333)),
    ],
)
def test_pieces_are_equal_and_cover_all(parts, m, n, k, ends):
    plan = MmaPlan(MmaConfig(tokens=32, chunks=2), parts)
    work = work_of(plan, m, n, k, A100, ends)
    steps = -(-k // 256) * 4 // 2
    at = borders(work, steps)
    sizes = [b - a for a, b in itertools.pairwise(at)]
    assert at[-1] == work.row_blocks * work.token_tiles * steps
    assert min(sizes) > 0
    assert max(sizes) - min(sizes) <= work.grain
    assert work.pieces <= A100.num_sms
    assert work.parted == len({b // steps for b in at if b % steps})
    assert parts or not work.parted
    assert not work.parted or 1 <= sum_blocks(plan, work, A100) <= 4
    rows = [-(-(b - a) // 256) for a, b in zip((0, *ends), ends or (n,), strict=False)]
    assert work.row_blocks == sum(rows)
    assert scratch_floats(plan, work) == (2 * work.pieces * 32 * 256 if work.parted else 0)


@pytest.mark.parametrize("shape", [(57344, 8192), (8192, 28672), (4096, 4096), (28672, 4096)])
@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.arch)
def test_more_tokens_are_never_predicted_much_cheaper_each(gpu, shape):
    def per_token(m):
        problem = Problem(4, 128, "float16", "float16", False, m, *shape)
        return predicted_us(candidates(problem, gpu)[0], m, *shape, gpu) / m

    for below, above in itertools.pairwise((*TOKENS, 256, 512, 1024)):
        assert per_token(above) < 1.15 * per_token(below)


@pytest.mark.parametrize("gpu", GPUS[1:], ids=lambda gpu: gpu.arch)
def test_the_dispatcher_by_tokens(gpu):
    def kind(m, n=57344, k=8192):
        problem = Problem(4, 128, "float16", "float16", False, m, n, k)
        return type(default_plan(problem, gpu))

    assert [kind(m) for m in (1, 8, 9, 97, 2048)] == [Plan, Plan, *[MmaPlan] * 3]
    assert kind(2049) is DensePlan
    assert [kind(m, 4096, 4096) for m in (16, 17)] == [Plan, MmaPlan]


@pytest.mark.parametrize(("n", "k"), [(6144, 4096), (28672, 4096), (4096, 14336)])
def test_every_number_of_tokens_takes_a_kernel_compiled_ahead(n, k):
    def plan(m):
        return default_plan(Problem(4, 128, "float16", "float16", False, m, n, k), A100)

    ahead = {plan(m).config for m in PREPARED_M if m <= MAX_MMA_M}
    assert {plan(m).config for m in (*range(9, 160), *range(161, 2048, 17))} <= ahead


def test_hopper_takes_them_when_told_to(monkeypatch):
    problem = Problem(4, 128, "float16", "float16", False, 64, 57344, 8192)
    assert isinstance(default_plan(problem, Gpu()), BatchPlan)
    monkeypatch.setenv(batch.ENVIRONMENT, "mma")
    assert isinstance(default_plan(problem, Gpu()), MmaPlan)
    assert batch.candidates(problem, Gpu()) == []
