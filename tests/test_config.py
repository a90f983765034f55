"""Plans: one for every problem that fits, each within its own rules."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from flute.candidates import candidates, heuristic
from flute.config import Gpu, KernelConfig, Plan, Problem, kernel_group_size, supports
from flute.errors import UnsupportedProblemError

GPUS = [
    Gpu(),
    Gpu("sm_80", 108, 166912),
    Gpu("sm_86", 84, 101376),
    Gpu("sm_89", 128, 101376),
    Gpu("sm_100", 148, 232448),
    Gpu("sm_120", 170, 101376),
]
KS = [32, 64, 96, 160, 512, 1024, 1792, 3584, 4096, 4608, 8192, 11008, 14336, 28672, 53248]


def random_problem(rng, *, max_m=16):
    group, k = rng.choice((0, 32, 64, 128, 256)), rng.choice(KS)
    if group and (k % group or k <= group):
        group = 0
    dtype = rng.choice(("float16", "bfloat16"))
    scale_dtype = rng.choice((dtype, "float32"))
    n = rng.choice((1, 33, 1000, 4096, 8192, 57344))
    rows = rng.random() < 0.2
    return Problem(
        rng.choice((2, 3, 4)), group, dtype, scale_dtype, rows, rng.randint(1, max_m), n, k
    )


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.arch)
def test_every_problem_has_plans_and_they_are_supported(gpu):
    rng = random.Random(gpu.arch)
    for _ in range(250):
        problem = random_problem(rng, max_m=32)
        plans = candidates(problem, gpu)
        assert plans, problem
        assert heuristic(problem, gpu) == plans[0]
        for plan in plans:
            assert supports(plan, problem.m, problem.n, problem.k, gpu) == ""
            assert plan.config.bulk == gpu.has_bulk_copies
            assert plan.config.smem_bytes(problem.m, problem.k) <= gpu.smem_bytes


CHANGES = [
    ({}, 9, 4096, r"M=9 must be 1 to block_tokens=8"),
    ({}, 1, 4000, r"K=4000 must be a multiple of 32 and of group_size=128"),
    ({}, 1, 128, r"group_size=128 is the whole row of K=128"),
    ({"panel": 8, "x_source": "registers"}, 1, 768, r"must be a multiple of panel=8 \* 64"),
    ({"x_source": "registers"}, 1, 4096, r"16 panels in 1 phases exceed 8 warps \* 1 rounds"),
    ({"register_steps": 2, "row_tables": True}, 1, 4096, r"register_steps and .* need one table"),
    ({"num_bits": 2, "register_steps": 3}, 1, 4096, r"register_steps=3 must be .* even at 2 bits"),
    ({"num_bits": 3, "wide_table": True, "row_tables": True}, 1, 4096, r"need one table"),
    ({"phased": True, "x_source": "registers"}, 1, 1024, r"phased=True does not fit 1 phases"),
    ({"stages": 99}, 1, 4096, r"bytes of shared memory exceed 232448"),
]


def test_x_is_staged_in_as_many_chunks_as_shared_memory_spares():
    kept = replace(KernelConfig(), x_source="registers", num_warps=16, panel=8, tiles=4)
    assert [kept.x_stage(m) for m in (1, 2, 8)] == [8, 4, 4]
    assert replace(kept, panel=4).x_stage(1) == 4
    assert replace(kept, cluster=2).x_stage(1) == 1  # sums of other ranks lie there
    for m in (1, 3, 8):
        streamed = replace(kept, x_source="streamed")
        assert kept.smem_bytes(m, 8192) <= streamed.smem_bytes(m, 8192) + 12_000


@pytest.mark.parametrize(("changes", "m", "k", "rule"), CHANGES)
def test_the_broken_rule_is_named(changes, m, k, rule):
    import re

    plan = Plan(replace(KernelConfig(), **changes))
    assert re.search(rule, supports(plan, m, 64, k, Gpu()))


def test_bulk_copies_need_hopper():
    assert "bulk copies" in supports(Plan(KernelConfig()), 1, 64, 4096, GPUS[1])


def test_no_plan_is_an_error_that_names_the_problem():
    problem = Problem(4, 128, "float16", "float16", False, 1, 64, 4096)
    with pytest.raises(UnsupportedProblemError, match=r"No decode kernel for Problem\(num_bits=4"):
        heuristic(problem, Gpu(smem_bytes=1000))


@pytest.mark.parametrize(("group", "expected"), [(-1, 0), (512, 0), (128, 128), (1024, 0)])
def test_group_of_the_whole_row(group, expected):
    assert kernel_group_size(group, 512) == expected
