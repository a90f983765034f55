"""The plans that are taken where nothing was tuned, against what was timed of all candidates.

`benchmarks/results/rule_h200.json` has the microseconds of the best dozen candidates of 498
problems on an H200, which `flute tune --json` measured, and their plans as text. The models that
order candidates were fitted to these, which `benchmarks/fit_decode.py` does for few tokens.
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
MOST_DECODE_MODEL = 8


SHAPES = {  # timed at each width and number of tokens; of others 4 and 2 bits, M = 1, 8, 32
    (57344, 8192),
    (28672, 4096),
    (8192, 28672),
    (8192, 8192),
    (4096, 14336),
    (4096, 4096),
    (10240, 8192),
}


@pytest.fixture(scope="module")
def ratios():
    """(tokens, shape, the rule's time over the best candidate's) of each problem."""
    timed = json.loads(RESULTS.read_text())
    found = []
    for one in timed["problems"]:
        sizes = (one["m"], one["n"], one["k"])
        problem = Problem(one["num_bits"], 128, "float16", "float16", False, *sizes)
        us = {timed["plans"][index]: time for index, time in one["us"]}
        plan = repr(default_plan(problem, Gpu()))
        assert plan in us, f"the rule's plan of {problem} was not timed: {plan}"
        found.append((one["m"], sizes[1:], us[plan] / min(us.values())))
    assert len(found) == 498
    return found


def test_few_tokens_take_a_plan_within_five_percent_of_the_best(ratios):
    few = [ratio for m, shape, ratio in ratios if m <= MOST_DECODED and shape in SHAPES]
    assert len(few) == 147
    assert max(few) <= 1.05


def test_up_to_eight_tokens_take_one_in_all_shapes_of_well_known_models(ratios):
    few = [ratio for m, _, ratio in ratios if m <= MOST_DECODE_MODEL]
    assert len(few) == 188
    assert max(few) <= 1.065
    assert sum(ratio > 1.05 for ratio in few) <= 2


def test_all_take_one_within_fourteen_percent(ratios):
    assert max(ratio for _, _, ratio in ratios) <= 1.14
    assert sum(ratio > 1.05 for _, _, ratio in ratios) <= 9
    assert fmean(ratio for _, _, ratio in ratios) <= 1.01
    timed_before = [ratio for _, shape, ratio in ratios if shape in SHAPES]
    assert max(timed_before) <= 1.13
