"""The model that orders decode kernels: its file, its terms, what it may and may not change."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from flute import candidates as module
from flute.candidates import GAIN, TIMED, candidates
from flute.config import Gpu, Problem
from flute.decode_cost import COEFFICIENTS, TERMS, coefficients, family, predicted_us, terms

GPU = Gpu()
SHAPES = [(57344, 8192), (28672, 4096), (8192, 8192), (4096, 14336), (1024, 5120), (100, 256)]
PROBLEMS = [
    Problem(bits, group, "float16", "float16", False, m, n, k)
    for bits in (2, 3, 4)
    for group in (0, 64, 128)
    for m in (1, 8)
    for n, k in SHAPES
]


def test_the_file_names_terms_and_families_that_there_are():
    families = json.loads(COEFFICIENTS.read_text())["families"]
    assert all(set(one) <= set(TERMS) for one in families.values())
    assert all(c > 0 for one in families.values() for c in one.values())
    known = {family(plan) for problem in PROBLEMS for plan in candidates(problem, GPU)}
    assert set(families) <= known


def test_a_prediction_is_the_sum_of_its_terms():
    problem = PROBLEMS[-6]
    plan = candidates(problem, GPU)[0]
    sizes = terms(plan, problem.m, problem.n, problem.k, GPU.num_sms)
    expected = sum(a * b for a, b in zip(coefficients()[family(plan)], sizes, strict=True))
    assert predicted_us(plan, problem.m, problem.n, problem.k, GPU.num_sms) == expected > 1
    other = replace(plan, config=replace(plan.config, num_warps=2))
    assert predicted_us(other, problem.m, problem.n, problem.k, GPU.num_sms) == math.inf


def test_twice_the_rows_take_longer():
    for problem in PROBLEMS:
        plan = candidates(problem, GPU)[0]
        once, twice = (
            predicted_us(plan, problem.m, rows, problem.k, GPU.num_sms)
            for rows in (problem.n, 2 * problem.n)
        )
        assert once < twice


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_the_first_dozen_change_places_and_no_others(problem, monkeypatch):
    """And the rule's own choice stays where no other is predicted to be clearly faster."""
    ordered = candidates(problem, GPU)
    monkeypatch.setattr(module, "_by_model", lambda plans, *_: plans)
    rule = candidates(problem, GPU)
    first = [plan for plan in rule[:TIMED] if not module._spills(plan.config)]
    assert set(ordered[: len(first)]) == set(first)
    assert ordered[len(first) :] == [plan for plan in rule if plan not in first]
    us = [predicted_us(p, problem.m, problem.n, problem.k, GPU.num_sms) for p in ordered]
    if ordered[0] != first[0]:
        assert us[0] <= GAIN * us[ordered.index(first[0])]
