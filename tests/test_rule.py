"""The plans that are taken where nothing was tuned, against what was timed of all candidates.

`benchmarks/results/rule_h200.json` has the microseconds of the best dozen candidates of 336
problems on an H200, which `flute tune --json` measured, and their plans as text.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean

import pytest

from flute.config import Gpu, Problem
from flute.plans import default_plan

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "rule_h200.json"
MOST_DECODED = 32


@pytest.fixture(scope="module")
def ratios():
    """(tokens, the rule's time over the best candidate's) of each problem."""
    timed = json.loads(RESULTS.read_text())
    found = []
    for one in timed["problems"]:
        sizes = (one["m"], one["n"], one["k"])
        problem = Problem(one["num_bits"], 128, "float16", "float16", False, *sizes)
        us = {timed["plans"][index]: time for index, time in one["us"]}
        plan = repr(default_plan(problem, Gpu()))
        assert plan in us, f"the rule's plan of {problem} was not timed: {plan}"
        found.append((one["m"], us[plan] / min(us.values())))
    return found


def test_few_tokens_take_a_plan_within_five_percent_of_the_best(ratios):
    few = [ratio for m, ratio in ratios if m <= MOST_DECODED]
    assert len(few) == 147
    assert max(few) <= 1.05


def test_more_tokens_take_one_within_thirteen_percent(ratios):
    assert len(ratios) == 336
    assert max(ratio for _, ratio in ratios) <= 1.13
    assert fmean(ratio for _, ratio in ratios) <= 1.01
