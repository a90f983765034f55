"""Batch plans: one for every problem on sm_90a, each within its own rules; their predicted cost."""

from __future__ import annotations

import itertools
import random
import re
from dataclasses import replace

import pytest
from test_config import GPUS, random_problem

from flute.batch import (
    TOKENS,
    BatchConfig,
    BatchPlan,
    candidates,
    num_clusters,
    predicted_us,
    supports,
)
from flute.config import Gpu, Problem
from flute.plans import DensePlan, MmaPlan, SplitPlan, default_plan, plans_of, slab_tokens

GPU = Gpu()


def test_every_problem_has_plans_and_they_are_supported():
    rng = random.Random(0)
    for _ in range(150):
        problem = random_problem(rng)._replace(m=rng.choice((1, 9, 16, 33, 100, 129, 300, 4096)))
        plans = candidates(problem, GPU)
        assert plans, problem
        m, n, k = problem[-3:]
        for plan in plans:
            assert supports(plan, m, n, k, GPU) == ""
            assert plan.config.smem_bytes <= GPU.smem_bytes
        times = [predicted_us(plan, m, n, k, GPU) for plan in plans]
        assert times == sorted(times)


@pytest.mark.parametrize("gpu", GPUS[1:], ids=lambda gpu: gpu.arch)
def test_other_gpus_have_none(gpu):
    problem = Problem(4, 128, "float16", "float16", False, 64, 4096, 4096)
    assert candidates(problem, gpu) == []
    assert isinstance(default_plan(problem, gpu), MmaPlan)
    assert plans_of(problem, gpu)[-2:] == [SplitPlan(16), DensePlan()]


@pytest.mark.parametrize(
    ("changes", "k", "rule"),
    [
        ({"tokens": 40}, 4096, r"tokens=40 must be one of"),
        ({"warpgroups": 5}, 4096, r"warpgroups=5 must be one of"),
        ({}, 4000, r"K=4000 must be a multiple of 32 and of group_size=128"),
        ({}, 128, r"group_size=128 is the whole row of K=128"),
        ({"cluster": 8}, 1024, r"K=1024 has fewer panels of 256 than cluster=8 blocks"),
        ({"split_k": True, "x_panel": 1, "x_stages": 4}, 4096, r"x_stages=4 hold one panel of x"),
        ({"num_bits": 2, "register_steps": 3}, 4096, r"must be 0 to 8, and even at 2 bits"),
        ({"register_steps": 9}, 4096, r"register_steps=9 must be 0 to 8"),
        ({"register_steps": 2, "row_tables": True}, 4096, r"register_steps need one table"),
        ({"stages": 1}, 4096, r"a stage is filled while another is used"),
        ({"stages": 9}, 4096, r"bytes of shared memory exceed 232448"),
    ],
)
def test_broken_rules_are_named(changes, k, rule):
    plan = BatchPlan(replace(BatchConfig(), **changes))
    assert re.search(rule, supports(plan, 16, 4096, k, GPU))


def test_the_source_holds_every_constant_and_the_instruction():
    config = BatchConfig(tokens=24, dtype="bfloat16")
    text = config.source()
    assert "static constexpr int tokens = 24;" in text
    assert "static constexpr bool scale_sums = true;" in text
    assert "m64n24k16.f32.bf16.bf16" in text
    assert text.count('"+f"(d[') == 12


def test_clusters_are_no_more_than_run_at_once():
    shape = {"m": 16, "n": 57344, "num_sms": 132}
    counts = [num_clusters(BatchConfig(cluster=c), **shape) for c in (1, 2, 4, 8)]
    assert counts == [132, 66, 30, 15]
    assert num_clusters(BatchConfig(), 16, 100, 132) == 2
    assert num_clusters(BatchConfig(), 40, 100, 132) == 6


@pytest.mark.parametrize("shape", [(57344, 8192), (8192, 28672), (4096, 4096), (28672, 4096)])
def test_more_tokens_are_never_predicted_much_cheaper_each(shape):
    n, k = shape

    def per_token(m):
        plan = candidates(Problem(4, 128, "float16", "float16", False, m, n, k), GPU)[0]
        return predicted_us(plan, m, n, k, GPU) / m

    for below, above in itertools.pairwise(TOKENS):
        assert per_token(above) < 1.15 * per_token(below)


def test_narrow_matrices_split_k_between_warpgroups():
    def first(n, k):
        problem = Problem(4, 128, "float16", "float16", False, 32, n, k)
        return candidates(problem, GPU)[0].config

    assert first(4096, 4096).split_k  # 64 blocks of rows for 132 multiprocessors
    assert first(8192, 28672).split_k
    assert not first(57344, 8192).split_k


def test_the_dispatcher_by_tokens():
    def kind(m, n=57344, k=8192):
        return type(default_plan(Problem(4, 128, "float16", "float16", False, m, n, k), GPU))

    kinds = [kind(m).__name__ for m in (1, 8, 9, 2048, 4096)]
    assert kinds == ["Plan", "Plan", "BatchPlan", "BatchPlan", "SplitPlan"]
    assert [kind(m, 2048, 4096).__name__ for m in (16, 17)] == ["Plan", "BatchPlan"]


@pytest.mark.parametrize("k", [4096, 8192, 28672])
def test_many_tokens_are_launched_in_equal_slabs(k):
    for m in (1, 2048, 2500, 3000, 4096, 5000, 8192, 16384, 100_000):
        tokens = slab_tokens(m, k)
        assert tokens == m or (tokens % 256 == 0 and 1280 <= tokens <= 5120)
        assert tokens * k * 2 <= 42 << 20 or tokens <= 2560
        launches = -(-m // tokens)
        assert launches == 1 or m > 2500
        assert slab_tokens(tokens, k) == tokens


def test_very_many_tokens_of_short_rows_are_dequantised():
    """Where a batch kernel's start and end are a large share of each unit."""

    def default(m, k):
        return default_plan(Problem(4, 128, "float16", "float16", False, m, 28672, k), GPU)

    assert [default(m, 4096) for m in (8192, 16384)] == [DensePlan()] * 2
    assert not isinstance(default(4096, 4096), DensePlan)
    assert isinstance(default(16384, 8192), SplitPlan)
